"""Grading of model answers against reference answers: deterministic, exact, standard library only.

Model text is never given to an expression evaluator. `common.answers.pool` grades in isolated
worker processes; as nothing here imports JAX or NumPy, those start in milliseconds. Computer
algebra (SymPy) is imported by workers only, when the first pair needs it.
"""

from common.answers.gsm8k import grade_gsm8k
from common.answers.mathematics import grade_math
from common.answers.tasks import grade_task
from common.answers.verdicts import Verdict

__all__ = ["Verdict", "grade_gsm8k", "grade_math", "grade_task"]
