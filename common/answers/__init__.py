"""Grading of model answers against reference answers: deterministic, exact, standard library only.

Model text is never given to an expression evaluator. `common.answers.pool` grades in isolated
worker processes; as nothing here imports JAX or NumPy, those start in milliseconds.
"""

from common.answers.gsm8k import grade_gsm8k

__all__ = ["grade_gsm8k"]
