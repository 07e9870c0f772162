"""SIGTERM, SIGINT and SIGUSR1 ask a run to save and leave; all ranks agree on when."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
ECHO_SECONDS = 2.0  # for one Ctrl-C a rank gets two SIGINTs: the terminal's, and the launcher's right after it
PEER_SECONDS = 10.0  # from the end of one rank to the launcher's signal to the others


class Stopped(Exception):
    """The run saved its state and left because of a signal; carries the exit status 128 + signal."""

    def __init__(self, number: int, after: str = "") -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}{after}; the same command goes on from here")
        self.status = 128 + number


class StopFlag:
    """Remembers the first stop signal; Ctrl-C pressed again ends the process at once."""

    def __init__(self) -> None:
        self.number, self.since = 0, 0.0

    def catch(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if not self.number:
            self.number, self.since = number, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self.since > ECHO_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)

    def check(self) -> None:
        """Raise Stopped after a signal."""
        if self.number:
            raise Stopped(self.number)


@contextmanager
def stop_flag() -> Iterator[StopFlag]:
    """Install the handlers for the duration of a block; once a signal has come they stay while the process leaves.

    A rank that waits for one that has left raises Stopped too, if it was or soon is asked to stop.
    """
    flag = StopFlag()
    before = {number: signal.signal(number, flag.catch) for number in STOP_SIGNALS}
    try:
        yield flag
    except RuntimeError as error:
        if "by peer" not in str(error):  # as torch says it when the other end of a connection is gone
            raise
        flag.check()
        until = time.monotonic() + PEER_SECONDS
        while not flag.number and time.monotonic() < until:
            time.sleep(0.05)
        if flag.number:  # what became of the other rank is said by that rank, or by the launcher
            raise Stopped(flag.number, " because another rank has left") from error
        raise
    finally:
        if not flag.number:
            for number, handler in before.items():
                signal.signal(number, handler)
