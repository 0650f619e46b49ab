"""Continuous refill: which request is in which slot, on any backend."""

from collections import deque
from collections.abc import Callable, Iterator
from typing import NamedTuple

from qstar.backend import Backend, Output, Progress, Request
from qstar.texts import Detokenizer


class Finished(NamedTuple):
    """A request with its output.

    Attributes:
        request: as it was asked.
        output: its tokens.
        finish_reason: "stop" = an end token or a stop string; "length" = the limit.
    """

    request: Request
    output: Output
    finish_reason: str


def schedule(
    backend: Backend,
    requests: Iterator[Request],
    texts: Detokenizer | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_step: Callable[[Progress, int], None] | None = None,
) -> Iterator[Finished]:
    """Generates every request, as many at a time as there are slots.

    Finished requests are yielded while the device works on the next burst, so what the caller does
    with them (decoding, writing) costs no device time; upcoming requests are drawn from the
    iterator at the same time.

    Args:
        backend: runs the models.
        requests: drawn when needed, at most twice S ahead.
        texts: finds stop strings; None = there are none.
        should_stop: asked between bursts; once True the sequences being generated are abandoned.
        on_step: called after each burst with its progress and the number of occupied slots.

    Yields:
        Requests with their outputs, in order of completion.
    """
    stop_strings = texts is not None and bool(texts.stop_strings)
    running: dict[int, Request] = {}
    waiting: deque[Request] = deque()
    done: list[Finished] = []
    more = True

    def fetch(wanted: int) -> None:
        nonlocal more
        while more and len(waiting) < wanted:
            request = next(requests, None)
            if request is None:
                more = False
            else:
                waiting.append(request)

    while not should_stop():
        free = [slot for slot in range(backend.slots) if slot not in running]
        fetch(len(free))
        chosen = free[: len(waiting)]
        if chosen:
            admitted = [waiting.popleft() for _ in chosen]
            backend.prefill(chosen, admitted)
            running.update(zip(chosen, admitted, strict=True))
        if not running:
            break
        backend.step(max(1, backend.slots // 8) if waiting or more else 0)
        yield from done
        done = []
        fetch(backend.slots)
        progress = backend.wait()
        if on_step is not None:
            on_step(progress, len(running))
        at = [slot for slot in running if progress.done[slot] or stop_strings]
        leaving = []
        for slot, output in zip(at, backend.read(at), strict=True):
            cut = texts.cut(output) if texts is not None and stop_strings else None
            if cut is None and not progress.done[slot]:
                continue
            reason = "stop" if cut is not None or output.stopped else "length"
            done.append(Finished(running.pop(slot), cut or output, reason))
            leaving.append(slot)
        if leaving:
            backend.release(leaving)
    yield from done
