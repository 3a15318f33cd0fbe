"""Sensor files (.npz, any layout) in; one continuous stream of (force, A-scan) samples with times out. 650 Hz, 1026 channels.

Keys decide by name or shape: times, then either windows (N, W, 1026), samples (N, 1026), or forces (N) with A-lines (N, 1025).
The stream is read in blocks of bounded memory; times strictly increase; a sample is float32, force first.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.findings import EXCLUDED, NOTE, Finding
from vla_lib.episodes.npz_stream import Member, NpzFile
from vla_lib.episodes.sensor_windows import Stitched, stitch
from vla_lib.episodes.timeline import Cleaned, Span, clean_times

Array = np.ndarray[Any, Any]

CHANNELS = 1026
"""Force, then 1025 depth bins of the A-scan."""
BLOCK_ROWS = 512
"""Rows read at a time: 2 MB, so that the work stays in the processor's cache."""
TIME_KEYS = ("timestamps", "timestamp", "times", "time", "recv_timestamps", "recv_timestamp", "t")
FORCE_KEYS = ("forces", "force", "force_data", "forces_data")
ALINE_KEYS = ("alines", "aline", "a_lines", "a_line", "ascans", "ascan", "oct", "oct_data", "fpi")


@dataclass(frozen=True)
class SensorKeys:
    """Which keys of a file hold what; exactly one of `windows`, `samples`, (`force`, `alines`) is there."""

    time: str
    windows: str | None = None
    samples: str | None = None
    force: str | None = None
    alines: str | None = None


def sensor_keys(members: dict[str, Member]) -> SensorKeys:
    """Find times, force and A-scans among the arrays of a file. Raises UserError (naming the keys) where one is missing."""
    lower = {key.lower(): key for key in members}

    def named(names: Sequence[str], *ndims: int) -> str | None:
        return next((lower[name] for name in names if name in lower and len(members[lower[name]].shape) in ndims), None)

    def shaped(*tail: int, ndim: int) -> str | None:
        fits = (
            key for key, m in members.items() if len(m.shape) == ndim and m.shape[-1:] == tail and m.dtype.kind in "fiu"
        )
        return next(fits, None)

    shown = ", ".join(f"{key} {member.shape}" for key, member in members.items()) or "no arrays"
    time = named(TIME_KEYS, 1) or next(
        (key for key in members if "time" in key.lower() and len(members[key].shape) == 1), None
    )
    if time is None:
        raise UserError(f"it holds no times (found {shown})")
    windows, samples = shaped(CHANNELS, ndim=3), shaped(CHANNELS, ndim=2)
    if windows:
        return SensorKeys(time, windows=windows)
    if samples:
        return SensorKeys(time, samples=samples)
    alines = named(ALINE_KEYS, 2) or shaped(CHANNELS - 1, ndim=2)
    force = named(FORCE_KEYS, 1, 2) or next(
        (k for k, m in members.items() if "force" in k.lower() and len(m.shape) in (1, 2)), None
    )
    if alines is None or force is None:
        missing = " and ".join(name for name, key in (("forces", force), ("A-lines", alines)) if key is None)
        raise UserError(f"it holds no {missing} (found {shown})")
    if members[alines].shape[1] != CHANNELS - 1:
        raise UserError(f"its A-lines have {members[alines].shape[1]} depth bins, {CHANNELS - 1} are needed")
    return SensorKeys(time, force=force, alines=alines)


@dataclass
class SensorPart:
    """One file of the stream."""

    file: NpzFile
    keys: SensorKeys
    keep: Array
    """(K,) rows (or windows) that are used, in order."""
    stitched: Stitched | None = None

    @property
    def samples(self) -> int:
        return int(self.stitched.new.sum()) if self.stitched else len(self.keep)

    def blocks(self) -> Iterator[tuple[Array, int]]:
        """((n, 1026) float32 block, overlapping rows that disagree with the window before), in order.

        A block is only valid until the next one is asked for.
        """
        if self.stitched:
            yield from self._window_blocks(self.stitched)
            return
        last = int(self.keep[-1]) + 1 if len(self.keep) else 0
        complete = len(self.keep) == last
        used = np.zeros(last, bool)
        used[self.keep] = True
        start = 0
        for block in self._row_blocks():
            stop = min(start + len(block), last)
            if stop <= start:
                return
            yield (block[: stop - start] if complete else block[: stop - start][used[start:stop]]), 0
            start = stop

    def _row_blocks(self) -> Iterator[Array]:
        if self.keys.samples:
            for chunk in self.file.chunks(self.keys.samples, BLOCK_ROWS):
                yield chunk.astype(np.float32, copy=False)
            return
        assert self.keys.force and self.keys.alines
        force = self.file.load(self.keys.force)
        force = force.reshape(len(force), -1)[:, 0]
        block = np.empty((BLOCK_ROWS, CHANNELS), np.float32)
        start = 0
        for chunk in self.file.chunks(self.keys.alines, BLOCK_ROWS):
            count = min(len(chunk), len(force) - start)
            block[:count, 0] = force[start : start + count]
            block[:count, 1:] = chunk[:count]
            start += count
            yield block[:count]

    def _window_blocks(self, stitched: Stitched) -> Iterator[tuple[Array, int]]:
        assert self.keys.windows
        before: Array | None = None
        for window, count in zip(
            windows_of(self.file, self.keys.windows, stitched.order), stitched.new.tolist(), strict=True
        ):
            shared = len(window) - count
            differ = 0
            if before is not None and shared > 0:
                old, now = before[count:], window[:shared]
                if not np.array_equal(old, now):
                    differ = int(
                        (old.view(f"u{old.dtype.itemsize}") != now.view(f"u{now.dtype.itemsize}")).any(axis=1).sum()
                    )
            before = window
            yield window[shared:].astype(np.float32, copy=False), differ


def windows_of(file: NpzFile, key: str, numbers: Array) -> Iterator[Array]:
    """The windows (W, C) with the given rising numbers, one after the other; each stays valid while the next is looked at."""
    wanted = set(numbers.tolist())
    all_of_them = len(wanted) == file.members[key].shape[0]
    for number, chunk in enumerate(file.chunks(key, 1, buffers=2)):
        if number in wanted:
            yield chunk[0] if all_of_them else chunk[0].copy()


@dataclass
class SensorLog:
    """The whole sensor stream of an episode, in the robot's time."""

    parts: list[SensorPart]
    t_s: Array
    """(S,) float64 UNIX seconds, clock offset already taken off."""
    hz: float
    """Rate from the median interval."""
    gaps: list[Span]
    """Spans without samples (in windows: within which samples were lost)."""
    reconstructed: bool
    """True where sample times were rebuilt from window times."""
    stamps_s: Array = field(repr=False)
    """The stamps as they stand in the files."""
    cleaned: Cleaned = field(repr=False)
    findings: list[Finding] = field(default_factory=list)
    clock_offset_s: float = 0.0
    """How far the sensor's clock was ahead of the robot's; taken off already."""
    _force: Array | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.t_s)

    @property
    def start_s(self) -> float:
        return float(self.t_s[0])

    def shift(self, offset_s: float) -> None:
        """Take a clock offset off all times (the sensor's clock was ahead by offset_s)."""
        self.t_s = self.t_s - offset_s
        self.gaps = [(begin - offset_s, end - offset_s) for begin, end in self.gaps]
        self.clock_offset_s += offset_s

    def blocks(self) -> Iterator[tuple[Array, int]]:
        """See `SensorPart.blocks`: the whole stream in order."""
        for part in self.parts:
            yield from part.blocks()

    @property
    def force(self) -> Array:
        """(S,) float32 force of every sample, in the sensor's own unit."""
        if self._force is None:
            pieces = [self._part_force(part) for part in self.parts]
            self._force = np.concatenate(pieces)
        return self._force

    def _part_force(self, part: SensorPart) -> Array:
        if part.keys.force:
            force = part.file.load(part.keys.force)
            return force.reshape(len(force), -1)[part.keep, 0].astype(np.float32)
        return np.concatenate([block[:, 0].copy() for block, _ in part.blocks()])

    def rows(self, wanted: Array) -> Array:
        """(M, 1026) float32: the samples with the given numbers, e.g. every tenth for a picture."""
        wanted = np.asarray(wanted, np.int64)
        out = np.full((len(wanted), CHANNELS), np.nan, np.float32)
        start = 0
        for part in self.parts:
            inside = (wanted >= start) & (wanted < start + part.samples)
            if inside.any():
                out[inside] = _part_rows(part, wanted[inside] - start)
            start += part.samples
        return out


def _part_rows(part: SensorPart, wanted: Array) -> Array:
    keys = part.keys
    if part.stitched:
        ends = np.cumsum(part.stitched.new)
        place = np.searchsorted(ends, wanted, side="right")
        windows = part.file.mapped(keys.windows or "")
        if windows is not None:
            return np.stack(
                [
                    windows[part.stitched.order[p], windows.shape[1] - (ends[p] - w)]
                    for p, w in zip(place, wanted, strict=True)
                ]
            )
    elif keys.samples and (samples := part.file.mapped(keys.samples)) is not None:
        return np.asarray(samples[part.keep[wanted]], np.float32)
    elif keys.alines and keys.force and (alines := part.file.mapped(keys.alines)) is not None:
        force = part.file.load(keys.force)
        rows = part.keep[wanted]
        return np.concatenate([force.reshape(len(force), -1)[rows, :1], alines[rows]], axis=1).astype(np.float32)
    out = np.empty((len(wanted), CHANNELS), np.float32)
    start = 0
    for block, _ in part.blocks():  # compressed: stream through
        inside = (wanted >= start) & (wanted < start + len(block))
        out[inside] = block[wanted[inside] - start]
        start += len(block)
    return out


def read_sensor_log(files: Sequence[Path], findings: list[Finding]) -> SensorLog | None:
    """Open all sensor files of an episode; None where there is none or none can be used (each said in `findings`)."""
    opened: list[tuple[NpzFile, SensorKeys, Array]] = []
    for path in files:
        try:
            file = NpzFile(path)
            keys = sensor_keys(file.members)
            stamps = np.asarray(file.load(keys.time), np.float64)
        except UserError as error:
            text = str(error).replace(str(path), path.name)
            said = text if path.name in text else f"{path.name}: {text}"
            findings.append(Finding(EXCLUDED, "sensor", f"a sensor file is not used: {said}", left_out=True))
            continue
        lengths = [file.members[key].shape[0] for key in (keys.windows, keys.samples, keys.force, keys.alines) if key]
        if min(lengths) != len(stamps) or max(lengths) != len(stamps):
            shortest = min([*lengths, len(stamps)])
            findings.append(
                Finding(
                    EXCLUDED, "sensor", f"{path.name}: its arrays differ in length; the first {shortest} rows are used"
                )
            )
            stamps = stamps[:shortest]
        if not np.isfinite(stamps).any():
            findings.append(
                Finding(EXCLUDED, "sensor", f"{path.name} holds no samples with a time and is not used", left_out=True)
            )
            continue
        opened.append((file, keys, stamps))
    if not opened:
        return None
    opened.sort(key=lambda part: float(np.nanmin(part[2])))
    return _join(opened, findings)


def _join(opened: list[tuple[NpzFile, SensorKeys, Array]], findings: list[Finding]) -> SensorLog | None:
    stamps = np.concatenate([part[2] for part in opened])
    cleaned = clean_times(stamps)
    bounds = np.cumsum([0, *(len(part[2]) for part in opened)])
    parts, times, gaps, rates = [], [], [], []
    for (file, keys, own), start in zip(opened, bounds[:-1], strict=True):
        keep = cleaned.keep[(cleaned.keep >= start) & (cleaned.keep < start + len(own))] - start
        if not len(keep):
            findings.append(
                Finding(EXCLUDED, "sensor", f"{file.path.name} has no usable sample and is not used", left_out=True)
            )
            continue
        stitched = None
        if keys.windows:
            windows = file.mapped(keys.windows)
            inside = (
                (windows[number] for number in keep) if windows is not None else windows_of(file, keys.windows, keep)
            )
            stitched = stitch(inside, file.members[keys.windows].shape[1], keep, own[keep])
            findings += stitched.findings
            gaps += stitched.gaps
        times.append(stitched.t_s if stitched else own[keep])
        rates.append(stitched.hz if stitched else 0.0)
        parts.append(SensorPart(file, keys, keep, stitched))
    if not parts:
        return None
    t_s = np.concatenate(times)
    if np.any(np.diff(t_s) <= 0):  # windows of two files that overlap: later samples are pushed on by a hair
        t_s = np.maximum.accumulate(t_s) + np.arange(len(t_s)) * 1e-9
    interval = float(np.median(np.diff(t_s))) if len(t_s) > 1 else 0.0
    hz = max(rates) or (1.0 / interval if interval > 0 else 0.0)
    longest = max(3 * interval, 0.02)
    holes = np.flatnonzero(np.diff(t_s) > longest)
    known = {(round(begin, 6), round(end, 6)) for begin, end in gaps}
    for hole in holes:
        span = (float(t_s[hole]), float(t_s[hole + 1]))
        if (round(span[0], 6), round(span[1], 6)) not in known and not any(
            b <= span[0] and span[1] <= e for b, e in gaps
        ):
            gaps.append(span)
    _report(cleaned, findings)
    return SensorLog(
        parts=parts,
        t_s=t_s,
        hz=hz,
        gaps=sorted(gaps),
        reconstructed=any(part.stitched for part in parts),
        stamps_s=stamps,
        cleaned=cleaned,
    )


def _report(cleaned: Cleaned, findings: list[Finding]) -> None:
    if cleaned.unusable:
        findings.append(Finding(NOTE, "sensor", f"{cleaned.unusable} samples without a possible time are left out"))
    if cleaned.backwards:
        findings.append(
            Finding(
                EXCLUDED,
                "sensor",
                f"the clock steps back {cleaned.backward_steps} time(s), by up to {cleaned.largest_step_back_s * 1e3:.0f} ms; "
                f"{cleaned.backwards} samples are left out",
            )
        )
    if cleaned.repeats:
        findings.append(
            Finding(NOTE, "sensor", f"{cleaned.repeats} samples repeat the time of the one before and are left out")
        )
