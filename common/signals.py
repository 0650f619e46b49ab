"""Stopping on request: SIGTERM, SIGUSR1 and the first Ctrl-C become a flag that a loop looks at."""

import signal
import threading
from types import FrameType

from common.errors import Interrupted
from common.processes import any_process


class StopRequest:
    """Context manager; inside it, `requested` tells whether the process was asked to stop.

    A second Ctrl-C stops at once. Outside the main thread signals cannot be caught, and the flag
    stays False.
    """

    def __init__(self) -> None:
        """Nothing is installed before the context is entered."""
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            # SIGUSR1 is what batch systems send ahead of the wall-time limit.
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self) -> bool:
        """Whether any process of the command was asked to stop; the same answer on all of them.

        Collective: every process asks at the same step.
        """
        return any_process(self.requested)

    def check(self, what: str) -> None:
        """Leave with exit status 3 when a stop was requested; call right after a save.

        Collective, like `agreed`.

        Raises:
          Interrupted: with a line that says how to go on.
        """
        if self.agreed():
            raise Interrupted(f"{what} saved; run the same command again to continue")
