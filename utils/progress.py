"""Progress of a long loop: a bar on a terminal, otherwise a line every ten seconds."""

import logging
import sys
import time

from tqdm import tqdm

LINE_SECONDS = 10.0
log = logging.getLogger("distill_lab")


def clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Progress:
    """Counts `total` steps from `start`; silent unless `shown`."""

    def __init__(self, label: str, total: int, start: int = 0, shown: bool = True) -> None:
        self.label, self.total, self.done, self.first = label, total, start, start
        self.shown = shown
        self.began = self.spoke = time.monotonic()
        self.bar = tqdm(total=total, initial=start, desc=label, disable=not (shown and sys.stderr.isatty()))

    def step(self, count: int = 1, note: str = "") -> None:
        """Count steps; `note` is shown behind."""
        self.done += count
        self.bar.set_postfix_str(note, refresh=False)
        self.bar.update(count)
        now = time.monotonic()
        if self.shown and self.bar.disable and now - self.spoke >= LINE_SECONDS and self.done > self.first:
            self.spoke = now
            left = (now - self.began) / (self.done - self.first) * (self.total - self.done)
            log.info(f"{self.label}: {self.done}/{self.total}, about {clock(left)} left{'; ' + note if note else ''}")

    def close(self) -> None:
        """Finish the bar."""
        self.bar.close()
