"""The sensor stream of an episode: one continuous series of samples with times, whatever files and windows it lies in.

In F2, overlapping windows of W rows carry the time of their LAST row. How many rows of a window are new is found by
content (its first row is looked up, bit by bit, in the window before), with the times as the first guess. Sample times
are rebuilt: last rows have the recorded time, rows between are spread evenly; where fewer new rows came than the time
between two windows holds, rows were lost somewhere in between: the new rows are laid at the nominal rate before their
window's time and the whole span counts as a gap, because nobody knows where in it the loss lies.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.hdf5 import H5Samples
from vla_lib.episodes.layouts import CHANNELS
from vla_lib.episodes.sensor_file import SensorFile, bits
from vla_lib.episodes.timeline import Cleaned, Span, clean_times, find_gaps, in_seconds, spread_packets

NOMINAL_HZ = 650.0
LONGEST_TAIL_S = 600.0  # a sensor that goes on so much longer than the robot log was not stopped
TAIL_S = 10.0  # of such a sensor, so much is kept before and after the robot log
SAME_PART = 0.5  # a file of which this part lies in the time of another one holds the same samples, or other ones
MOST_HZ = 5000.0


@dataclass
class SensorLog:
    """The whole sensor stream of an episode, in the robot's time."""

    files: Sequence[SensorFile | H5Samples]
    t_s: np.ndarray  # (S,) float64 UNIX seconds, clock offset already taken off
    hz: float  # rate from the median interval
    gaps: list[Span]  # spans without samples (in windows: within which samples were lost)
    cleaned: Cleaned = field(repr=False)
    clock_offset_s: float = 0.0  # how far the sensor's clock was ahead of the robot's; taken off already

    def __len__(self) -> int:
        return len(self.t_s)

    @property
    def reconstructed(self) -> bool:
        """True where sample times were rebuilt from window times."""
        return any(file.window for file in self.files)

    @property
    def begins_s(self) -> tuple[float, ...]:
        """Times at which recording may have begun: the first sample, in windows also the end of the first window.

        The lab's recorder fills a window before it records; its derived windowed files begin with the first sample.
        """
        first = self.files[0]
        ends = [float(self.t_s[int(first.new[0]) - 1])] if isinstance(first, SensorFile) and first.window else []
        return (float(self.t_s[0]), *ends)

    def shift(self, offset_s: float) -> None:
        """Take a clock offset off all times (the sensor's clock was ahead by offset_s)."""
        self.t_s = self.t_s - offset_s
        self.gaps = [(begin - offset_s, end - offset_s) for begin, end in self.gaps]
        self.clock_offset_s += offset_s

    def blocks(self) -> Iterator[tuple[np.ndarray, int]]:
        """See `SensorFile.blocks`: the whole stream in order."""
        for file in self.files:
            yield from file.blocks()

    @cached_property
    def force(self) -> np.ndarray:
        """(S,) float32 force of every sample, in the sensor's own unit."""
        return np.concatenate([file.force() for file in self.files])

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """(M, 1026) float32: the samples with the given numbers, e.g. every tenth for a picture."""
        wanted = np.asarray(wanted, np.int64)
        out = np.full((len(wanted), CHANNELS), np.nan, np.float32)
        start = 0
        for file in self.files:
            inside = (wanted >= start) & (wanted < start + len(file))
            if inside.any():
                out[inside] = file.rows(wanted[inside] - start)
            start += len(file)
        return out


def read_sensor_log(paths: Sequence[Path], findings: Findings, robot: Span = (-np.inf, np.inf)) -> SensorLog | None:
    """Open all sensor files of an episode; None where there is none or none can be used (each said in `findings`).

    robot: when the robot log begins and ends, on the sensor's clock. Of a file that lasts far longer only that time is
    used, and none that is far denser than any sensor: a few megabytes can inflate to many gigabytes, so this is asked
    before a sample is read.
    """
    opened = [file for file in _opened(paths, findings) if _is_in_proportion(file, robot, findings)]
    files = sorted(_once(opened, findings), key=lambda file: float(np.nanmin(file.stamps_s)))
    if not files:
        return None
    cut = sum(file.cut for file in files)
    cleaned = clean_times(np.concatenate([file.stamps_s for file in files]))
    begins = np.cumsum([0, *(len(file.stamps_s) for file in files)])
    used, times, rates = [], [], []
    gaps: list[Span] = []
    for file, begin, end in zip(files, begins[:-1], begins[1:], strict=True):
        file.keep = cleaned.keep[(cleaned.keep >= begin) & (cleaned.keep < end)] - begin
        if not len(file.keep):
            findings.exclude("sensor", f"{file.path.name} has no usable sample and is not used", left_out=True)
            continue
        stamps = file.stamps_s[file.keep]
        file.new = np.ones(len(stamps), np.int64)
        if file.window:
            joined = stitch(file.windows(), file.window, stamps, findings)
            file.new, stamps = joined.new, joined.t_s
            gaps += joined.gaps
            rates.append(joined.hz)
        used.append(file)
        times.append(stamps)
    if not used:
        return None
    t_s = np.concatenate(times)
    if np.any(np.diff(t_s) <= 0):  # windows of two files that overlap: later samples are pushed on by a hair
        t_s = np.maximum.accumulate(t_s) + np.arange(len(t_s)) * 1e-9
    interval = float(np.median(np.diff(t_s))) if len(t_s) > 1 else 0.0
    hz = max(rates, default=0.0) or (1.0 / interval if interval > 0 else 0.0)
    for begin, end in find_gaps(t_s, max(3 * interval, 0.02)):
        if not any(b <= begin + 1e-6 and end <= e + 1e-6 for b, e in gaps):
            gaps.append((begin, end))
    cleaned.report("sensor", "samples", findings, known=cut)
    return SensorLog(used, t_s, hz, sorted(gaps), cleaned)


def _is_in_proportion(file: SensorFile, robot: Span, findings: Findings) -> bool:
    """Whether the file can be this recording's, of which it keeps only what lies around the robot log where it is far
    longer."""
    finite = np.isfinite(file.stamps_s)
    stamps, robot_s = file.stamps_s[finite], robot[1] - robot[0]
    lasts_s = float(np.ptp(np.percentile(stamps, (1, 99)))) / 0.98  # single stamps may be far off
    size = file.members[file.keys.body].size / 1e9
    dense = len(stamps) > MOST_HZ * max(lasts_s, 1.0)
    if lasts_s <= robot_s + LONGEST_TAIL_S and not dense:
        return True
    beside = f"{len(stamps)} times over {lasts_s:.0f} s ({size:.1f} GB) beside a robot log of {robot_s:.0f} s"
    away = finite & ((file.stamps_s < robot[0] - TAIL_S) | (file.stamps_s > robot[1] + TAIL_S))
    if dense or away.sum() == finite.sum():
        text = f"{file.path.name} holds {beside} and is not used; cut it to the time of the recording"
        findings.exclude("sensor", text, left_out=True)
        return False
    findings.exclude("sensor", f"{file.path.name} holds {beside}: only the samples within {TAIL_S:g} s of it are used")
    file.stamps_s = np.where(away, np.nan, file.stamps_s)
    file.cut = int(away.sum())
    return True


def _once(files: Sequence[SensorFile], findings: Findings) -> list[SensorFile]:
    """The files without those that hold the time of another one again, as the lab's derived windowed files do.

    Samples one by one go before windows that were cut from them, and long files before short ones.
    """
    kept: list[SensorFile] = []
    for file in sorted(files, key=lambda file: (file.window > 0, -len(file.stamps_s))):
        other = next((other for other in kept if _shared_part(file, other) > SAME_PART), None)
        if other is None:
            kept.append(file)
        elif _same_samples(file, other):
            findings.note("sensor", f"{file.path.name} holds the samples of {other.path.name} again; they count once")
        else:
            text = f"{file.path.name} holds other samples of the same time as {other.path.name} and is not used"
            findings.exclude("sensor", f"{text}; move one of them away", left_out=True)
    return kept


def _shared_part(file: SensorFile, other: SensorFile) -> float:
    """The part of a file's times that lies within another's."""
    stamps = file.stamps_s[np.isfinite(file.stamps_s)]
    inside = (stamps >= np.nanmin(other.stamps_s)) & (stamps <= np.nanmax(other.stamps_s))
    return float(inside.mean())


def _same_samples(file: SensorFile, other: SensorFile) -> bool:
    """Whether the first sample (of windows: the first of the first window) is one of the other file's, bit by bit."""
    first = next(file.windows())[0] if file.window else next(file.blocks())[0][0]
    first = np.array(first, np.float32)
    for block, _ in other.blocks():
        alike = np.flatnonzero(bits(block[:, 0]) == bits(first[:1]))
        if any(np.array_equal(bits(block[row]), bits(first)) for row in alike.tolist()):
            return True
    return False


def _opened(paths: Sequence[Path], findings: Findings) -> Iterator[SensorFile]:
    for path in paths:
        try:
            file = SensorFile(path)
        except UserError as error:
            text = str(error).replace(str(path), path.name)
            said = text if path.name in text else f"{path.name}: {text}"
            findings.exclude("sensor", f"a sensor file is not used: {said}", left_out=True)
            continue
        keys = [key for key in (file.keys.time, file.keys.body, file.keys.force) if key]
        lengths = [file.members[key].shape[0] for key in keys]
        if min(lengths) < max(lengths):
            text = f"its arrays differ in length; the first {min(lengths)} rows are used"
            findings.exclude("sensor", f"{path.name}: {text}")
            file.stamps_s = file.stamps_s[: min(lengths)]
        file.stamps_s = in_seconds(file.stamps_s, "sensor", findings)
        if not file.window:
            file.stamps_s = spread_packets(file.stamps_s, findings)
        if np.isfinite(file.stamps_s).any():
            yield file
        else:
            findings.exclude("sensor", f"{path.name} holds no samples with a time and is not used", left_out=True)


@dataclass
class Stitched:
    """How a stack of V windows becomes one stream of S samples."""

    new: np.ndarray  # (V,) number of last rows of each window that no earlier window holds
    t_s: np.ndarray  # (S,) rebuilt time of each sample
    hz: float
    gaps: list[Span]


def stitch(windows: Iterable[np.ndarray], width: int, ends_s: np.ndarray, findings: Findings) -> Stitched:
    """Join windows, each (W, C) with W = width, whose last rows have the rising times ends_s (V,).

    Reads a few rows of each window, unless the content is not where the times say.
    """
    new = np.full(len(ends_s), width, np.int64)
    matched = np.ones(len(ends_s), bool)
    before: np.ndarray | None = None
    for place, window in enumerate(windows):
        if before is not None:
            guess = int(round((ends_s[place] - ends_s[place - 1]) * NOMINAL_HZ))
            shift = _find_shift(before, window, guess)
            matched[place] = shift is not None
            new[place] = shift if shift is not None else min(guess, width)
        before = window
    steps_s = np.diff(ends_s)
    hz = _rate(new[1:], steps_s, matched[1:] & (steps_s > 0) & (new[1:] > 0) & (new[1:] < width))
    times, gaps, squeezed = _times(new, ends_s, width, hz)
    apart = np.flatnonzero(~matched[1:] & (np.round(steps_s * hz) < width)) + 1
    if len(apart):
        text = f"{len(apart)} of {len(steps_s)} neighbouring windows do not share the samples that their times say"
        first_s = ends_s[apart[0]] - ends_s[0]
        findings.exclude("sensor", f"{text}; they are placed by time (first at {first_s:.2f} s)")
    if squeezed:
        findings.note("sensor", f"{squeezed} windows bring more new samples than the time between them holds")
    return Stitched(new, times, hz, gaps)


def _find_shift(before: np.ndarray, after: np.ndarray, guess: int) -> int | None:
    """How many new rows `after` holds: its first row is row `shift` of `before`; None where they share nothing."""
    width = len(before)
    for shift in (guess + step for step in (0, 1, -1, 2, -2, 3, -3)):
        if 0 <= shift < width and _same(before, after, shift):
            return shift
    columns = [0, *np.linspace(1, before.shape[1] - 1, 7).astype(int)]
    alike = (bits(before[:, columns]) == bits(after[0:1, columns])).all(axis=1)
    nearest_first = sorted(np.flatnonzero(alike).tolist(), key=lambda place: abs(place - guess))
    return next((shift for shift in nearest_first if _same(before, after, shift)), None)


def _same(before: np.ndarray, after: np.ndarray, shift: int) -> bool:
    shared = len(before) - shift
    rows = sorted({0, shared // 2, shared - 1})
    return all(np.array_equal(bits(before[shift + row]), bits(after[row])) for row in rows)


def _rate(new: np.ndarray, steps_s: np.ndarray, usable: np.ndarray) -> float:
    if not usable.any():
        return NOMINAL_HZ
    hz = float(np.median(new[usable] / steps_s[usable]))
    total = float(new[usable].sum() / steps_s[usable].sum())
    best = total if abs(total - hz) < 0.02 * hz else hz
    return best if 0.5 * NOMINAL_HZ < best < 2 * NOMINAL_HZ else NOMINAL_HZ


def _times(new: np.ndarray, ends_s: np.ndarray, width: int, hz: float) -> tuple[np.ndarray, list[Span], int]:
    pieces: list[np.ndarray] = [ends_s[0] - np.arange(new[0] - 1, -1, -1) / hz]
    gaps: list[Span] = []
    squeezed = 0
    for count, before, end in zip(new[1:].tolist(), ends_s[:-1].tolist(), ends_s[1:].tolist(), strict=True):
        expected, passed = count / hz, end - before
        tolerance = max(0.25 * expected, 0.02)
        if count and passed - expected > tolerance:
            back = end - np.arange(count - 1, -1, -1) / hz
            pieces.append(back)
            gaps.append((before, float(back[0]) if count == width else end))
        elif count:
            squeezed += expected - passed > tolerance
            pieces.append(before + (np.arange(count) + 1) / count * passed)
    return np.concatenate(pieces), gaps, squeezed
