"""Progress of a counted job: a bar on a terminal, otherwise one plain line every few seconds (headless logs, notebooks)."""

import sys
import time
from typing import Any

from tqdm import tqdm


class Progress:
    """Counts `total` units; `update` after each. Lines read `label 12/40 episodes, 3.1/s, ETA 0:09`.

    Papermill autosaves only when a cell prints, so plain lines are also what keeps a headless notebook's file fresh.
    """

    def __init__(self, total: float, label: str, unit: str = "items", every_s: float = 5.0, show: bool = True):
        self.total, self.label, self.unit, self.every_s = total, label, unit, every_s
        self.done = 0.0
        self._show = show
        self._start = self._last = time.monotonic()
        terminal = show and sys.stderr is not None and sys.stderr.isatty()
        self._bar: Any = tqdm(total=total, desc=label, unit=f" {unit}", dynamic_ncols=True) if terminal else None

    def update(self, n: float = 1, note: str = "") -> None:
        """Add `n` finished units; `note` is shown behind the rate."""
        self.done += n
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(note, refresh=False)
            self._bar.update(n)
        elif self._show and (time.monotonic() - self._last >= self.every_s):
            self._print(note)

    def _print(self, note: str = "") -> None:
        self._last = time.monotonic()
        elapsed = max(self._last - self._start, 1e-9)
        rate = self.done / elapsed
        eta = f", ETA {clock((self.total - self.done) / rate)}" if 0 < self.done < self.total else f", took {clock(elapsed)}"
        print(f"{self.label} {self.done:g}/{self.total:g} {self.unit}, {rate:.3g}/s{eta}{', ' + note if note else ''}", flush=True)

    def close(self) -> None:
        """End the bar, or print the last line."""
        if self._bar is not None:
            self._bar.close()
        elif self._show:
            self._print()
        self._show = False
        self._bar = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def clock(seconds: float) -> str:
    """Seconds as `m:ss` or `h:mm:ss`."""
    seconds = int(round(seconds))
    hours, rest = divmod(seconds, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
