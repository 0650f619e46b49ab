"""Computer algebra in workers: what it decides, and that a bad pair costs one verdict."""

import pytest

from common.answers import grade_math, mathematics, symbolic
from common.answers.math_equal import Match
from common.answers.pool import GradingPool
from common.answers.sympy_reader import read_sympy

pytest.importorskip("sympy")
BOMB = "9**9**9**9"


@pytest.fixture(scope="module")
def pool():
    """One worker of the algebra module, shared: its start takes seconds."""
    with GradingPool(1, 10.0, "common.answers.algebra:grade_math") as workers:
        yield workers


def test_pool_worker_decides_what_numbers_cannot(pool):
    pairs = [
        (r"0.33333333333333333333", r"\sqrt{\frac{1}{9}} + 0", 0.0),
        (r"1.41421356237309504880168872", r"\sqrt2", 0.0),
        (r"\boxed{4}", r"So $\boxed{4}$", 1.0),
        (r"\boxed{\frac12}", r"\boxed{0.6}", 0.0),
    ]
    verdicts = pool.submit([(p, g, {"verifier": "robust"}) for p, g, _ in pairs]).result()
    assert [v.score for v in verdicts] == [score for _, _, score in pairs]
    assert not any(v.crashed or v.timed_out for v in verdicts)


def test_sums_need_the_latex_parser(pool):
    pytest.importorskip("latex2sympy2_extended")
    items = [(r"\sum_{k=1}^{3} k", "6", {}), (r"\int_0^1 x\,dx", "\\frac13", {})]
    assert [v.score for v in pool.submit(items).result()] == [1.0, 0.0]


def test_an_undecided_pair_is_counted_as_a_failure(pool):
    [verdict] = pool.submit([("9^{9^9}", "8^{9^9}", {})]).result()
    assert verdict.crashed and verdict.score == 0.0


@pytest.mark.slow
def test_bomb_costs_one_worker_and_one_verdict():
    items = [("1", "1", {"mode": "strict", "parser": "sympy"})] * 2
    items.insert(1, (BOMB, "1", {"mode": "strict", "parser": "sympy"}))
    with GradingPool(1, 3.0, "common.answers.paper_math:paper_score") as workers:
        before = workers.worker_pids()
        verdicts = workers.submit(items).result()
        after = workers.worker_pids()
    assert [v.score for v in verdicts] == [1.0, 0.0, 1.0]
    assert [v.timed_out or v.crashed for v in verdicts] == [False, True, False]
    assert before != after


def test_time_outs_are_reported_and_counted(monkeypatch, caplog):
    monkeypatch.setattr(symbolic, "isolated_score", lambda *_: (0.0, "timeout"))
    before = symbolic.failures["timeout"]
    assert mathematics.equal_answers("9^{9^9}", "8^{9^9}") == (Match.UNKNOWN, "timeout")
    assert grade_math("9^{9^9}", "8^{9^9}") == 0.0
    assert symbolic.failures["timeout"] == before + 2
    assert "timeout" in caplog.text


def test_task_verdict_names_the_time_out(monkeypatch):
    from common.answers import grade_task

    monkeypatch.setattr(symbolic, "isolated_score", lambda *_: (0.0, "timeout"))
    verdict = grade_task("math500", r"\boxed{9^{9^9}}", r"\boxed{8^{9^9}}")
    assert not verdict.correct and verdict.error == "timeout"


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "().__class__",
        "open('/etc/hostname')",
        "sympify('1')",
        "lambdify(x, x)",
        "exec('1')",
        "x[0]",
        "simplify('__import__(1)')",
        "f(x=1)",
        "[i for i in (1,)]",
        "'text'",
    ],
)
def test_text_is_never_evaluated(text, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("model text reached eval")

    monkeypatch.setattr("sympy.parsing.sympy_parser.eval_expr", refuse)
    with pytest.raises(Exception) as caught:  # noqa: B017, PT011
        read_sympy(text)
    assert not isinstance(caught.value, AssertionError)


def test_reader_agrees_with_sympy():
    import sympy

    for text in ("x^2+1", "3!", "1/3", "sqrt(8)", "2*(x+y)**2", "(1, 2)", "sin(pi/6)", "1e2", "pi"):
        assert read_sympy(text) == sympy.sympify(text)
    assert read_sympy("len('abc')") == 3
