"""Times of a stream, in float64 seconds: a strictly rising axis out of raw stamps, gaps, and what was newest when."""

from bisect import bisect_right
from dataclasses import dataclass, field

import numpy as np

from vla_lib.episodes.findings import Findings

Span = tuple[float, float]

FAR_S = 6 * 3600.0
"""A stamp further than this from the median stamp of its file is not a time of this recording."""

UNITS = ((1e17, 1e9, "nanoseconds"), (1e14, 1e6, "microseconds"), (1e11, 1e3, "milliseconds"))
"""(least stamp, stamps a second, name): a UNIX time of this century in seconds has ten digits, in milliseconds 13."""
PACKET_PART = 0.5  # from this part of repeated stamps on they are those of packets; on a real log 1-3 % repeat


@dataclass(frozen=True)
class Cleaned:
    """What `clean_times` found: which rows to keep, in order, and why the others go."""

    keep: np.ndarray = field(repr=False)  # (K,) int64: rows to keep; their stamps strictly increase
    unusable: int  # rows whose stamp is no number or lies hours away from all others
    backwards: int  # rows whose stamp lies behind that of an earlier row that is kept (a clock that stepped)
    repeats: int  # rows that carry the same stamp as the row before
    backward_steps: int  # how often the clock stepped back between two neighbouring rows
    largest_step_back_s: float

    def report(self, stream: str, entries: str, findings: Findings, known: int = 0) -> None:
        """Say what is left out of a stream of `entries`; `known`: how many unusable ones another finding names."""
        if self.unusable > known:
            findings.note(stream, f"{self.unusable - known} {entries} with an impossible time are left out")
        if self.backward_steps:
            steps, longest_ms = self.backward_steps, self.largest_step_back_s * 1e3
            text = f"the clock steps back {steps} time(s), by up to {longest_ms:.0f} ms"
            findings.exclude(stream, f"{text}; {self.backwards} {entries} are left out")
        if self.repeats:
            findings.note(stream, f"{self.repeats} {entries} repeat the time of the one before and are left out")


def in_seconds(stamps: np.ndarray, stream: str, findings: Findings) -> np.ndarray:
    """UNIX stamps (n,) in seconds, whatever unit their size tells; another one than seconds is noted."""
    stamps = np.asarray(stamps, np.float64)
    finite = stamps[np.isfinite(stamps)]
    middle = float(np.median(finite)) if len(finite) else 0.0
    for least, per_second, name in UNITS:
        if middle >= least:
            findings.note(stream, f"its times are {name}, and read as such")
            return stamps / per_second
    return stamps


def spread_packets(t_s: np.ndarray, findings: Findings) -> np.ndarray:
    """Sample times (S,) of a stream whose samples came in packets, each with one stamp: spread over the packet's span.

    A packet is sent when its last sample was taken: that one keeps the stamp, the others are spread evenly back to the
    packet before, but not across a pause. A stream without packets comes back as it is.
    """
    first = np.flatnonzero(np.diff(t_s, prepend=np.nan) != 0)
    if len(first) < 3 or len(first) > (1 - PACKET_PART) * len(t_s):
        return t_s
    sizes = np.diff(first, append=len(t_s))
    span_s = np.diff(t_s[first], prepend=np.nan)
    usual_s = float(np.nanmedian(span_s / sizes))  # of one sample
    held_s = np.where((span_s > 0) & (span_s < 1.5 * sizes * usual_s), span_s, sizes * usual_s)
    back = np.repeat(first + sizes, sizes) - 1 - np.arange(len(t_s))  # samples of the packet that come after
    size = float(np.median(sizes))
    text = f"samples came in packets of {size:.0f} with one stamp each; they are spread over the packet's span"
    findings.note("sensor", text)
    return np.asarray(t_s - back * np.repeat(held_s / sizes, sizes))


def longest_rising(t_s: np.ndarray) -> np.ndarray:
    """Indices (K,) of the longest never-falling subsequence of t_s: what is left when the fewest rows are dropped."""
    t_s = np.asarray(t_s, float)
    if not np.any(np.diff(t_s) < 0):
        return np.arange(len(t_s))
    tails: list[float] = []  # patience sorting: the smallest end of a rising chain of each length, and its row
    places: list[int] = []
    parent = np.full(len(t_s), -1, np.int64)
    for row, value in enumerate(t_s.tolist()):
        at = bisect_right(tails, value)
        parent[row] = places[at - 1] if at else -1
        tails[at : at + 1], places[at : at + 1] = [value], [row]
    chain = [places[-1]]
    while parent[chain[-1]] >= 0:
        chain.append(int(parent[chain[-1]]))
    return np.asarray(chain[::-1], np.int64)


def clean_times(t_s: np.ndarray) -> Cleaned:
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
    kept = rows[longest_rising(t_s[rows])]
    fresh = np.diff(t_s[kept], prepend=-np.inf) > 0
    return Cleaned(
        keep=kept[fresh],
        unusable=len(t_s) - len(rows),
        backwards=len(rows) - len(kept),
        repeats=int((~fresh).sum()),
        backward_steps=int((steps < 0).sum()),
        largest_step_back_s=abs(float(steps.min(initial=0.0))),
    )


def newest_at_or_before(t_s: np.ndarray, at_s: np.ndarray) -> np.ndarray:
    """Index (M,) of the newest of the rising times t_s (S,) at or before each at_s; -1 where there is none."""
    return np.searchsorted(np.asarray(t_s, float), np.asarray(at_s, float), side="right") - 1


def find_gaps(t_s: np.ndarray, longest_s: float) -> list[Span]:
    """Spans between neighbouring times that are longer than `longest_s`."""
    t_s = np.asarray(t_s, float)
    return [(float(t_s[k]), float(t_s[k + 1])) for k in np.flatnonzero(np.diff(t_s) > longest_s)]


def overlaps(start_s: np.ndarray, end_s: np.ndarray, spans: list[Span]) -> np.ndarray:
    """(M,) bool: whether the open interval (start, end) shares any time with one of the spans."""
    hit = np.zeros(len(start_s), bool)
    for begin, end in spans:
        hit |= (np.asarray(start_s) < end) & (np.asarray(end_s) > begin)
    return hit


def grid(start_s: float, end_s: float, hz: float) -> np.ndarray:
    """Times start + k/hz (N,) of all steps that end by `end_s`; each from the start, so that nothing drifts."""
    steps = int(np.floor((end_s - start_s) * hz + 1e-6)) if end_s > start_s else 0
    return start_s + np.arange(steps) / hz
