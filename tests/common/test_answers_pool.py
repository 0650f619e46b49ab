"""The grading pool: order, limits, crashes, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from common.answers.pool import GradingPool, Verdict
from common.errors import UserError

LIMIT = 1.0
GRADERS = """
import ctypes, os, sys, time

def act(prediction, gold, **kwargs):
    if prediction == "loop":
        while True:
            pass
    if prediction == "hold":  # never releases the interpreter lock
        return float(pow(7, 10**9) % 10)
    if prediction == "exit":
        os._exit(0)
    if prediction == "segfault":
        ctypes.string_at(0)
    if prediction == "raise":
        raise RuntimeError("boom")
    if prediction == "sysexit":
        sys.exit(0)
    if prediction == "print":
        print("x" * 100_000)
        print('{"score": 0.25}', flush=True)
        return 0.5
    if prediction == "read":
        return float(len(sys.stdin.read()))
    if prediction == "nan":
        return float("nan")
    if prediction == "text":
        return "no score"
    if prediction == "memory":
        return float(len(bytearray(1 << 40)))
    if prediction == "modules":
        return float(any(name in sys.modules for name in ("jax", "torch", "numpy")))
    if prediction == "device":
        return float(os.environ["CUDA_VISIBLE_DEVICES"] == "")
    if prediction == "sleep":
        time.sleep(float(gold))
        return 1.0
    return float(prediction) + kwargs.get("plus", 0)
"""


@pytest.fixture
def grader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "graders_of_this_test.py").write_text(GRADERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "graders_of_this_test:act"


def _alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def _eventually(condition: Callable[[], bool], seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_default_grader_in_input_order() -> None:
    items = [(f"#### {i}", "#### 7", {"mode": "strict"}) for i in range(40)]
    with GradingPool(num_workers=3) as pool:
        first = pool.submit(items)
        second = pool.submit(
            [("6", "#### 12", {"mode": "shaped"}), (None, "1", {}), ("1", None, {})]
        )
        empty = pool.submit([])
        assert [v.score for v in second.result()] == [0.5, 0.0, 0.0]
        assert first.result() == [Verdict(float(i == 7)) for i in range(40)]
        assert first.done() and empty.done() and empty.result() == []


def test_bad_items_cost_only_themselves(grader: str) -> None:
    bad = ["exit", "raise", "segfault", "sysexit", "nan", "text", "memory", "not a number"]
    predictions = [word for name in bad for word in ("1", name)] + ["loop", "2", "loop", "3"]
    with GradingPool(num_workers=2, time_limit_s=LIMIT, grader=grader) as pool:
        verdicts = pool.submit([(p, None, {}) for p in predictions]).result(60)
        for prediction, verdict in zip(predictions, verdicts, strict=True):
            if prediction == "loop":
                assert verdict == Verdict(0.0, timed_out=True)
            elif prediction in bad:
                assert verdict == Verdict(0.0, crashed=True), prediction
            else:
                assert verdict == Verdict(float(prediction))
        assert pool.submit([("1", "", {"plus": 1})]).result(30) == [Verdict(2.0)]


def test_the_limit_holds_for_code_that_keeps_the_interpreter_lock(grader: str) -> None:
    with GradingPool(num_workers=1, time_limit_s=LIMIT, grader=grader) as pool:
        start = time.monotonic()
        verdicts = pool.submit([("hold", None, {}), ("4", None, {})]).result(60)
        assert verdicts == [Verdict(0.0, timed_out=True), Verdict(4.0)]
        assert time.monotonic() - start >= LIMIT


def test_output_and_input_of_the_function_do_not_garble_replies(grader: str) -> None:
    with GradingPool(num_workers=1, time_limit_s=10, grader=grader) as pool:
        verdicts = pool.submit([("print", None, {}), ("read", None, {}), ("3", None, {})]).result(
            60
        )
        assert [v.score for v in verdicts] == [0.5, 0.0, 3.0]


def test_workers_are_light_and_see_no_accelerator(grader: str) -> None:
    with GradingPool(num_workers=1, time_limit_s=10, grader=grader) as pool:
        verdicts = pool.submit([("modules", None, {}), ("device", None, {})]).result(60)
        assert [v.score for v in verdicts] == [0.0, 1.0]


def test_submit_returns_at_once_and_result_can_be_bounded(grader: str) -> None:
    with GradingPool(num_workers=1, time_limit_s=30, grader=grader) as pool:
        start = time.monotonic()
        handle = pool.submit([("sleep", "2", {})])
        assert time.monotonic() - start < 1.0
        assert not handle.done()
        with pytest.raises(TimeoutError):
            handle.result(0.05)
        assert handle.result(30) == [Verdict(1.0)]


def test_a_worker_killed_while_idle_is_replaced_without_loss(grader: str) -> None:
    with GradingPool(num_workers=1, time_limit_s=10, grader=grader) as pool:
        (pid,) = pool.worker_pids()
        os.kill(pid, signal.SIGKILL)
        assert _eventually(lambda: not _alive(pid))
        assert pool.submit([("5", None, {})]).result(30) == [Verdict(5.0)]
        assert pool.worker_pids() != [pid]


def test_an_item_that_a_dying_worker_never_took_is_graded_by_the_next(grader: str) -> None:
    with GradingPool(num_workers=1, time_limit_s=30, grader=grader) as pool:
        (pid,) = pool.worker_pids()
        # Stopped, it is there to be written to, and takes nothing.
        os.kill(pid, signal.SIGSTOP)
        handle = pool.submit([("5", None, {}), ("6", None, {})])
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        assert handle.result(30) == [Verdict(5.0), Verdict(6.0)]
        assert pool.worker_pids() != [pid]


def test_an_item_that_no_worker_lives_to_take_is_a_crash(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "grader_that_ends_its_worker.py").write_text(
        "import json, os\njson.loads = lambda text: os._exit(0)\ndef act(*item): return 1.0\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with GradingPool(num_workers=1, grader="grader_that_ends_its_worker:act") as pool:
        assert pool.submit([("5", None, {})]).result(60) == [Verdict(0.0, crashed=True)]


def test_close_ends_the_workers_and_fails_what_waits(grader: str) -> None:
    pool = GradingPool(num_workers=2, time_limit_s=60, grader=grader)
    waiting = pool.submit([("loop", None, {})] * 5)
    assert _eventually(lambda: len(pool.worker_pids()) == 2)
    pids = pool.worker_pids()
    pool.close()
    pool.close()
    assert _eventually(lambda: not any(map(_alive, pids)))
    with pytest.raises(RuntimeError, match="closed"):
        waiting.result(10)
    with pytest.raises(RuntimeError, match="closed"):
        pool.submit([])


@pytest.mark.parametrize("busy", ["idle", "loop", "hold"])
def test_no_worker_outlives_a_killed_parent(grader: str, tmp_path: Path, busy: str) -> None:
    script = (
        f"import sys, time; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from common.answers.pool import GradingPool\n"
        f"pool = GradingPool(2, {LIMIT if busy == 'hold' else 600}, {grader!r})\n"
        "while len(pool.worker_pids()) < 2: time.sleep(0.01)\n"
        f"handle = pool.submit([({busy!r}, None, {{}})] * 2) if {busy!r} != 'idle' else None\n"
        "time.sleep(0.3)\n"
        "print(*pool.worker_pids(), flush=True)\n"
        "time.sleep(600)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(word) for word in parent.stdout.readline().split()]
    parent.kill()
    parent.wait()
    parent.stdout.close()
    assert len(pids) == 2
    assert _eventually(lambda: not any(map(_alive, pids)))


def test_arguments_are_checked(grader: str) -> None:
    with pytest.raises(UserError, match="at least one worker"):
        GradingPool(num_workers=0)
    with pytest.raises(UserError, match="time limit"):
        GradingPool(time_limit_s=0)
    with pytest.raises(UserError, match="module:function"):
        GradingPool(grader="os.path")
    with pytest.raises(UserError, match="cannot load the grader no_such_module:f"):
        GradingPool(grader="no_such_module:f")
    with GradingPool(num_workers=1) as pool, pytest.raises(TypeError):
        pool.submit([("1", "1", {"object": object()})])
