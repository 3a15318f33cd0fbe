"""Progress of a counted job: a bar on a terminal, otherwise plain lines (headless logs) that can be read back."""

import re
import sys
import time
from typing import NamedTuple, Self

from tqdm import tqdm


class Progress:
    """Counts `total` units; `update` after each. Lines read `label 12/40 episodes, 3.1/s, ETA 0:09`.

    Papermill autosaves only when a cell prints, so plain lines are also what keeps a headless notebook's file fresh.
    """

    def __init__(self, total: float, label: str, unit: str = "items", every_s: float = 5.0, show: bool = True):
        self.total, self.label, self.unit, self.every_s, self.done = total, label, unit, every_s, 0.0
        self._show = show
        self._start = self._last = time.monotonic()
        self._bar = None
        if show and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total, desc=label, unit=f" {unit}", dynamic_ncols=True)

    def update(self, n: float = 1, note: str = "") -> None:
        """Add `n` finished units; `note` is shown behind the rate."""
        self.done += n
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self.done != self.total and time.monotonic() - self._last >= self.every_s:  # the end is for `close`
            self._print(f", {note}" if note else "")

    def _print(self, note: str = "") -> None:
        self._last = time.monotonic()
        elapsed_s = max(self._last - self._start, 1e-9)
        rate = self.done / elapsed_s
        left = f"ETA {clock((self.total - self.done) / rate)}" if 0 < self.done < self.total else ""
        counted = f"{self.label} {self.done:.10g}/{self.total:.10g} {self.unit}, {rate:.3g}/s"
        if self._show:
            print(f"{counted}, {left or f'took {clock(elapsed_s)}'}{note}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the bar, or print the last line."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._print()


class Counted(NamedTuple):
    """What a progress line says: units done and in all, their name, and `ETA m:ss` or `took m:ss`."""

    done: float
    total: float
    unit: str
    left: str


def read_line(line: str) -> Counted | None:
    """A line that `Progress` printed; None for any other line."""
    found = re.search(r" ([\d.e+]+)/([\d.e+]+) (\w+), \S+/s, ((?:ETA|took) [\d:]+)", line)
    return Counted(float(found[1]), float(found[2]), found[3], found[4]) if found else None


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    hours, rest = divmod(int(round(seconds)), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
