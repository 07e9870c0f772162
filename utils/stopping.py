"""SIGTERM, SIGINT and SIGUSR1 ask a run to save and leave; all ranks agree on when."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


class Stopped(Exception):
    """The run saved its state and left because of a signal; carries the exit status 128 + signal."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; the same command goes on from here")
        self.status = 128 + number


class StopFlag:
    """Remembers the first stop signal; a second SIGINT ends the process at once."""

    def __init__(self) -> None:
        self.number = 0

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Install the handlers for the duration of a block."""
    flag = StopFlag()
    before = {number: signal.signal(number, flag.catch) for number in STOP_SIGNALS}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
