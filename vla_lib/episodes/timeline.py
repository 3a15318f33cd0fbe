"""Raw stamps in; a strictly increasing time axis, gaps, and newest-at-or-before indices out. Seconds, float64, throughout."""

from bisect import bisect_right
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Span = tuple[float, float]

FAR_S = 6 * 3600.0
"""A stamp further than this from the median stamp of its file is not a time of this recording."""


@dataclass(frozen=True)
class Cleaned:
    """What `clean_times` found: which rows to keep, in order, and why the others go."""

    keep: Array = field(repr=False)
    """(K,) int64: rows to keep; their stamps strictly increase."""
    unusable: int
    """Rows whose stamp is no number or lies hours away from all others."""
    backwards: int
    """Rows whose stamp lies behind that of an earlier row that is kept (a clock that stepped)."""
    repeats: int
    """Rows that carry the same stamp as the row before."""
    backward_steps: int
    """How often the clock stepped back between two neighbouring rows."""
    largest_step_back_s: float


def longest_rising(t_s: Array) -> Array:
    """Indices (K,) of the longest never-falling subsequence of t_s: what is left when the fewest rows are dropped."""
    t_s = np.asarray(t_s, float)
    if len(t_s) < 2 or not np.any(np.diff(t_s) < 0):
        return np.arange(len(t_s))
    tails: list[float] = []
    places: list[int] = []
    parent = np.full(len(t_s), -1, np.int64)
    for row, value in enumerate(t_s.tolist()):
        at = bisect_right(tails, value)
        parent[row] = places[at - 1] if at else -1
        if at == len(tails):
            tails.append(value)
            places.append(row)
        else:
            tails[at], places[at] = value, row
    chain = []
    row = places[-1]
    while row >= 0:
        chain.append(row)
        row = int(parent[row])
    return np.asarray(chain[::-1], np.int64)


def clean_times(t_s: Array) -> Cleaned:
    """Choose the rows whose stamps strictly increase, dropping as few as possible.

    A clock that jumps back for some rows loses those rows; a single stamp far in the future loses only itself.
    """
    t_s = np.asarray(t_s, float)
    finite = np.isfinite(t_s)
    if finite.any():
        middle = float(np.median(t_s[finite]))
        finite &= np.abs(np.where(finite, t_s, middle) - middle) <= FAR_S
    rows = np.flatnonzero(finite)
    steps = np.diff(t_s[rows])
    rising = longest_rising(t_s[rows])
    kept = rows[rising]
    fresh = np.ones(len(kept), bool)
    fresh[1:] = np.diff(t_s[kept]) > 0
    back = steps[steps < 0]
    return Cleaned(
        keep=kept[fresh],
        unusable=int(len(t_s) - len(rows)),
        backwards=int(len(rows) - len(kept)),
        repeats=int((~fresh).sum()),
        backward_steps=int(len(back)),
        largest_step_back_s=float(-back.min()) if len(back) else 0.0,
    )


def newest_at_or_before(t_s: Array, at_s: Array) -> Array:
    """Index (M,) of the newest of the rising times t_s (S,) at or before each at_s; -1 where there is none."""
    return np.searchsorted(np.asarray(t_s, float), np.asarray(at_s, float), side="right") - 1


def find_gaps(t_s: Array, longest_s: float) -> list[Span]:
    """Spans between neighbouring times that are longer than `longest_s`."""
    t_s = np.asarray(t_s, float)
    holes = np.flatnonzero(np.diff(t_s) > longest_s)
    return [(float(t_s[k]), float(t_s[k + 1])) for k in holes]


def overlaps(start_s: Array, end_s: Array, spans: list[Span]) -> Array:
    """(M,) bool: whether the open interval (start, end) shares any time with one of the spans."""
    hit = np.zeros(len(start_s), bool)
    for begin, end in spans:
        hit |= (np.asarray(start_s) < end) & (np.asarray(end_s) > begin)
    return hit


def grid(start_s: float, end_s: float, hz: float) -> Array:
    """Times start + k/hz (N,) of all steps that end at or before `end_s`; each from the start, so that nothing drifts."""
    steps = int(np.floor((end_s - start_s) * hz + 1e-6)) if end_s > start_s else 0
    return start_s + np.arange(max(steps, 0)) / hz
