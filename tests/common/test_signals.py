"""Stop requests: a flag at the first signal, an exit at the second Ctrl-C, handlers put back."""

import os
import signal
import threading

import pytest

from common.errors import Interrupted
from common.signals import StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_a_request(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopRequest() as stop:
        stop.check("nothing")
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(Interrupted, match="iteration 3 saved; run the same command again"):
            stop.check("iteration 3")
    assert signal.getsignal(number) is before


def test_second_interrupt_leaves_at_once() -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            signal.pause()


def test_repeated_terminate_stays_a_request() -> None:
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested


def test_handlers_come_back_after_an_error() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(ValueError), StopRequest():
        raise ValueError
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_gets_a_flag_that_stays_down() -> None:
    seen = []

    def work() -> None:
        with StopRequest() as stop:
            stop.check("nothing")
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
