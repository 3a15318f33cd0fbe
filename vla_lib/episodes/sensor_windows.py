"""Overlapping sensor windows (F2) in; which rows are new, and the time of every sample out.

Each window of W rows carries the time of its LAST row. Neighbouring windows share rows: the number of new rows is found
by content (the first row of a window is looked up, bit by bit, in the window before), with the times as the first guess.
Sample times are reconstructed: last rows have the recorded time, rows between are spread evenly; where fewer new rows came
than the time between two windows holds, rows were lost somewhere in between: the new rows are laid at the nominal rate
before their window's time and the whole span counts as a gap, because nobody knows where in it the loss lies.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vla_lib.episodes.findings import EXCLUDED, NOTE, Finding
from vla_lib.episodes.timeline import Span

Array = np.ndarray[Any, Any]

NOMINAL_HZ = 650.0


@dataclass
class Stitched:
    """How a stack of windows becomes one stream."""

    order: Array
    """(V,) windows used, in order of time."""
    new: Array
    """(V,) number of last rows of each window that no earlier window holds."""
    t_s: Array
    """(S,) reconstructed time of each sample."""
    hz: float
    gaps: list[Span]
    findings: list[Finding] = field(default_factory=list)


def stitch(windows: Iterable[Array], width: int, order: Array, ends_s: Array) -> Stitched:
    """Join windows, each (W, C) with W = width, that come in the order (V,); their last rows have the rising times ends_s (V,).

    Reads a few rows of each window, unless the content is not where the times say.
    """
    new = np.full(len(order), width, np.int64)
    matched = np.ones(len(order), bool)
    before: Array | None = None
    for place, window in enumerate(windows):
        if before is not None:
            guess = int(round((ends_s[place] - ends_s[place - 1]) * NOMINAL_HZ))
            shift = _find_shift(before, window, guess)
            matched[place] = shift is not None
            new[place] = shift if shift is not None else min(guess, width)
        before = window
    hz = _rate(new[1:], np.diff(ends_s), matched[1:], width)
    times, gaps, squeezed = _times(new, ends_s, width, hz)
    findings = []
    apart = [k for k in range(1, len(order)) if not matched[k] and round((ends_s[k] - ends_s[k - 1]) * hz) < width]
    if apart:
        findings.append(
            Finding(
                EXCLUDED,
                "sensor",
                f"{len(apart)} of {len(order) - 1} neighbouring windows do not share the samples that their times say; "
                f"they are placed by time (first at {ends_s[apart[0]] - ends_s[0]:.2f} s)",
            )
        )
    if squeezed:
        findings.append(
            Finding(NOTE, "sensor", f"{squeezed} windows bring more new samples than the time between them holds")
        )
    return Stitched(order, new, times, hz, gaps, findings)


def _find_shift(before: Array, after: Array, guess: int) -> int | None:
    """How many new rows `after` holds: its first row is row `shift` of `before`; None where they share nothing."""
    width = len(before)
    near = [guess + step for k in range(4) for step in ((k, -k) if k else (0,))]
    for shift in near:
        if 0 <= shift < width and _same(before, after, shift):
            return shift
    columns = [0, *np.linspace(1, before.shape[1] - 1, 7).astype(int)]
    alike = (_bits(before[:, columns]) == _bits(after[0:1, columns])).all(axis=1)
    for shift in sorted(np.flatnonzero(alike).tolist(), key=lambda place: abs(place - guess)):
        if _same(before, after, shift):
            return int(shift)
    return None


def _same(before: Array, after: Array, shift: int) -> bool:
    shared = len(before) - shift
    rows = {0, shared // 2, shared - 1}
    return all(np.array_equal(_bits(before[shift + row]), _bits(after[row])) for row in rows)


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")  # so that NaN equals NaN


def _rate(new: Array, steps_s: Array, matched: Array, width: int) -> float:
    usable = matched & (steps_s > 0) & (new > 0) & (new < width)
    if not usable.any():
        return NOMINAL_HZ
    hz = float(np.median(new[usable] / steps_s[usable]))
    total = float(new[usable].sum() / steps_s[usable].sum())
    best = total if abs(total - hz) < 0.02 * hz else hz
    return best if 0.5 * NOMINAL_HZ < best < 2 * NOMINAL_HZ else NOMINAL_HZ


def _times(new: Array, ends_s: Array, width: int, hz: float) -> tuple[Array, list[Span], int]:
    pieces: list[Array] = []
    gaps: list[Span] = []
    squeezed = 0
    for place, (count, end) in enumerate(zip(new.tolist(), ends_s.tolist(), strict=True)):
        back = np.arange(count - 1, -1, -1) / hz
        if not place:
            pieces.append(end - back)
            continue
        before = float(ends_s[place - 1])
        expected, passed = count / hz, end - before
        tolerance = max(0.25 * expected, 0.02)
        if count and passed - expected > tolerance:
            pieces.append(end - back)
            gaps.append((before, float(end - back[0]) if count == width else float(end)))
        elif count:
            squeezed += expected - passed > tolerance
            pieces.append(before + (np.arange(count) + 1) / count * passed)
    return np.concatenate(pieces) if pieces else np.empty(0), gaps, squeezed
