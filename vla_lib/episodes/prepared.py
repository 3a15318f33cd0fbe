"""A prepared episode: `data.pkl` is checked at once, almost nothing is kept in memory, and arrays come when touched.

A thousand episodes open in about a second, and an untouched one costs a few kilobytes."""

import contextlib
import errno
import os
import shlex
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation, Slerp

from vla_lib.core.errors import UserError
from vla_lib.core.files import file_checksum
from vla_lib.episodes.clocks import Clocks
from vla_lib.episodes.data_pkl import DATA_NAME, read_checked
from vla_lib.episodes.datasets import MARKS_NAME, Mark, Marks
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.findings import NO_NUMBERS
from vla_lib.episodes.layouts import CHANNELS
from vla_lib.episodes.steps import pose_rows, window_full
from vla_lib.episodes.survey import all_prepared
from vla_lib.episodes.timeline import Span

BEYOND = 1e12  # that no sensor measures, in any unit (a guess)
OF_STEPS = ("action", "timestamp", "valid", "state", "image_index", "image_timestamp")
AGAIN = "prepare its dataset again with python -m vla_lib.preprocess --overwrite"
OPEN_MAPS = 64  # sensor files: each mapped one is an open file, of which a process has 1,024 where nobody raised it


@lru_cache(maxsize=OPEN_MAPS)
def _mapped(path: Path, state: tuple[int, ...]) -> np.ndarray:
    """The array of a sensor file, without memmap's slow indexing. `state`: of the file by now."""
    return np.asarray(np.load(path, mmap_mode="r", allow_pickle=False))


def _state(path: Path) -> tuple[int, ...]:
    """What changes with a file's content: of an absent file, nothing."""
    status = path.stat() if path.exists() else None
    return (status.st_mtime_ns, status.st_size, status.st_ino) if status else ()


@lru_cache(maxsize=1)
def _content(path: Path, state: tuple[int, ...]) -> dict[str, Any]:
    """The content read last: opening an episode and touching it reads it once. `state`: of the file by now."""
    return read_checked(path)


class PreparedEpisode:
    """One episode as `data.pkl` holds it; N steps, S sensor samples. See `data_pkl` for the units."""

    # all read when one of them is first touched
    action: np.ndarray  # (N, 7) float32: mm, rotation vector in degrees (base frame), gripper
    timestamp: np.ndarray  # (N,) float64 UNIX seconds on the action grid
    valid: np.ndarray  # (N,) bool: false where a stream has a gap across the step
    state: np.ndarray  # (N, 12) float32: joints (deg), pose (mm, deg)
    image_index: dict[str, np.ndarray]  # view -> (N,) int32: newest picture at or before each step, -1 for none
    image_timestamp: dict[str, np.ndarray]  # view -> (n,) float64 UNIX seconds of its pictures

    def __init__(self, path: str | Path):
        """Open and check the episode folder. Raises UserError, saying what is wrong, if data.pkl cannot be trusted."""
        self.path = Path(path)  # The episode folder
        content = self._read()
        self.metadata: dict[str, Any] = content["metadata"]
        self.name: str = self.path.name
        self.dataset: str = str(self.metadata["dataset"])  # the dataset folder below the root
        self.task: str = str(self.metadata.get("task", ""))  # folder between dataset and episode, or empty
        self.layout: str = str(self.metadata["layout"])
        self.action_hz: float = float(self.metadata["action_hz"])
        self.sensor_hz: float = float(self.metadata["sensor_hz"] or 0.0)
        self.fingerprint: str = str(self.metadata["fingerprint"])
        """Identifies the inputs and settings that data.pkl was made from."""
        self.instruction: str = content["instruction"]
        self.views: list[str] = sorted(content["image"])  # View keys, sorted
        sensor = content["sensor_data"]
        self.has_sensor: bool = sensor is not None
        self._sensor_path: str = sensor["array"] if sensor else ""
        self._samples = len(sensor["force"]) if sensor else 0
        self._sensor_state: tuple[int, ...] | None = None  # of the file, once it was opened
        self._length = len(content["action"])
        self._full: dict[int, np.ndarray] = {}

    @property
    def clocks(self) -> Clocks:
        """What was taken off the sensor's times and the pictures': `Episode.open` needs it to show the same times."""
        known = self.metadata["clock_offsets"]
        return Clocks(**known) if "cameras" in known else Clocks()

    def _read(self) -> dict[str, Any]:
        path = self.path / DATA_NAME
        return _content(path, _state(path))

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"PreparedEpisode({str(self.path)!r}, {len(self)} steps)"

    if not TYPE_CHECKING:  # else mypy would take any name for an attribute

        def __getattr__(self, name: str) -> Any:
            if name not in OF_STEPS:
                raise AttributeError(f"A prepared episode has no {name}.")
            content = self._read()
            vars(self).update({each: content[each] for each in OF_STEPS})
            return content[name]

    @cached_property
    def _paths(self) -> dict[str, np.ndarray]:
        # as arrays of bytes: thousands of str objects an episode would fill the memory
        paths = self._read()["image"].items()
        return {view: np.array([path.encode() for path in of_view], bytes) for view, of_view in paths}

    def picture_path(self, view: str, step: int) -> Path | None:
        """Newest picture of a view at or before step `step`; None where there is none (or no such view)."""
        number = int(self.image_index[view][step]) if view in self.views else -1
        return self.path / self._paths[view][number].decode() if number >= 0 else None

    @cached_property
    def sensor_index(self) -> np.ndarray:
        """(N,) int64: one past the newest sample at or before each step; all zero without a sensor."""
        sensor = self._read()["sensor_data"]
        return sensor["index"].astype(np.int64) if sensor else np.zeros(len(self), np.int64)

    def _stream(self) -> dict[str, Any]:
        stream = self._read()["sensor_data"]
        if stream is None:
            raise UserError(f"{self.path} has no sensor stream.")
        return dict(stream)

    @cached_property
    def sensor_force(self) -> np.ndarray:
        """(S,) float32 force of every sample. Raises UserError without a sensor."""
        return np.asarray(self._stream()["force"])

    @cached_property
    def sensor_timestamp(self) -> np.ndarray:
        """(S,) float64 UNIX seconds of every sample, clock offset taken off. Raises UserError without a sensor."""
        return np.asarray(self._stream()["timestamp"])

    @property
    def sensor(self) -> np.ndarray:
        """(S, 1026) float32, mapped, force first; the files used last stay mapped. Raises UserError without a sensor,
        or if the file is not whole or another than at first."""
        if not self._sensor_path:
            raise UserError(f"{self.path} has no sensor stream.")
        path = self.path / self._sensor_path
        state = _state(path)
        if self._sensor_state not in (None, state):
            raise UserError(f"{path} was changed while it was read; start again with --resume.")
        try:
            mapped = _mapped(path, state)
        except (OSError, ValueError, EOFError) as error:
            full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
            remedy = "raise `ulimit -n`" if full else AGAIN
            raise UserError(f"{path} cannot be opened ({error}); {remedy}.") from error
        if mapped.shape != (self._samples, CHANNELS) or mapped.dtype != np.float32:
            held = f"{mapped.shape} {mapped.dtype}"
            raise UserError(f"{path} holds {held}, which data.pkl does not expect; {AGAIN}.")
        self._sensor_state = state
        return mapped

    def check_sensor(self) -> None:
        """Read sensor.npy whole and compare it with what was written. Raises UserError, naming it, where it differs.

        Where data.pkl has no checksum for it (earlier versions), its force must be data.pkl's, and its values numbers
        (where the report says that the raw ones were) below `BEYOND`."""
        if not self.has_sensor:
            return
        stream, path = self._stream(), self.path / self._sensor_path
        if "checksum" in stream:
            same = file_checksum(path) == stream["checksum"]
        else:
            same = np.array_equal(self.sensor[:, 0], stream["force"], equal_nan=True)
            said = any(str(finding["text"]).endswith(NO_NUMBERS) for finding in self.metadata.get("findings", ()))
            odd = np.isinf(self.sensor) if said else ~np.isfinite(self.sensor)
            same = same and not (odd | (np.abs(self.sensor) > BEYOND)).any()
        if not same:
            raise UserError(f"{path} is damaged: it is not what was written; {AGAIN}.")

    def sensor_full(self, length: int) -> np.ndarray:
        """(N,) bool: steps that have a whole window of `length` samples, free of gaps, behind them."""
        if length not in self._full:
            full = np.zeros(len(self), bool)
            if self.has_sensor:
                gaps: list[Span] = [(begin, end) for begin, end in self.metadata.get("gaps", {}).get("sensor", [])]
                times = self._stream()["timestamp"]  # needed once: the mask is enough from here on
                full = window_full(self.sensor_index, times, self.timestamp, length, self.sensor_hz, gaps)
            self._full[length] = full
        return self._full[length]

    def sensor_window(self, step: int, length: int) -> np.ndarray | None:
        """(length, 1026) float32: the samples that end at step `step`; None where the window is not full, and without a
        sensor. They alone are read: round a mapped one the system reads ahead, by megabytes where it is told to. Raises
        UserError as `sensor` does."""
        if not self.sensor_full(length)[step]:
            return None
        samples, begin = self.sensor, int(self.sensor_index[step]) - length
        with contextlib.suppress(OSError, ValueError), open(self.path / self._sensor_path, "rb", buffering=0) as file:
            file.seek(begin * samples.strides[0] - samples.nbytes, os.SEEK_END)
            return np.frombuffer(file.read(length * samples.strides[0]), np.float32).reshape(length, CHANNELS)
        return np.asarray(self.sensor[begin : begin + length])  # the same, or a sentence of what is wrong


def load_prepared(path: str | Path) -> PreparedEpisode:
    """Open one prepared episode folder (or its data.pkl). Raises UserError where it cannot be trusted."""
    path = Path(path)
    return PreparedEpisode(path.parent if path.name == DATA_NAME else path)


def load_used(root: str | Path) -> dict[str, PreparedEpisode]:
    """Every prepared episode below `root` that the marks do not leave out, by its path below it.

    Raises UserError where there is none, where one cannot be trusted, or was prepared before its marks (trim, task)
    were changed."""
    marks, states = Marks.load(root), all_prepared(root)
    if not states:
        command = f"python -m vla_lib.preprocess --dataset-root {shlex.quote(str(root))}"
        raise UserError(f"There are no prepared episodes (data.pkl) below {root}; run `{command}` first.")
    if all(states.values()):
        first, why = next(iter(states.items()))
        raise UserError(f"All {len(states)} prepared episodes below {root} are left out ({first.name}: {why}).")
    found = {}
    for folder in (folder for folder, why in states.items() if not why):
        key = folder.relative_to(root).as_posix()
        episode, mark = load_prepared(folder), marks.of(key)
        trim, task = tuple(episode.metadata.get("trim", Mark().trim)), mark.task or episode.task
        if (trim, episode.task) != (mark.trim, task):
            remedy = "run python -m vla_lib.preprocess on its dataset again, which prepares only such episodes"
            raise UserError(f"{folder} was prepared before its line in {MARKS_NAME} was changed; {remedy}.")
        found[key] = episode
    return found


def known_clocks(folder: Path) -> Clocks:
    """The clocks that a folder's data.pkl was made with; times as recorded where there is none that can be read."""
    try:
        return load_prepared(folder).clocks
    except UserError:
        return Clocks()


def recheck(prepared: PreparedEpisode, episode: Episode, count: int = 20, seed: int = 0) -> pd.DataFrame:
    """One row per random valid step: differences between data.pkl and the raw files, computed by another route.

    The other route shares no code with the preparation: scipy's Slerp over whole logs, and plain searches.
    Columns: step, seconds (since the start), position_mm and rotation_deg (largest difference of the action), picture
    and sensor (whether the indices agree for all views and for the stream), sample (whether the newest sensor sample is
    the same, number by number), and the action of both routes (`stored`, `recomputed`, (6,) each)."""
    rows = pose_rows(episode.robot)
    t_s, pose = episode.robot.t_s[rows], episode.robot.pose[rows]
    slerp = Slerp(t_s, Rotation.from_euler("XYZ", pose[:, 3:], degrees=True))
    usable = np.flatnonzero(prepared.valid)
    chosen = np.sort(np.random.default_rng(seed).choice(usable, min(count, len(usable)), replace=False))
    found = []
    for step in chosen.tolist():
        begin = float(prepared.timestamp[step])
        ends = np.array([begin, min(begin + 1.0 / prepared.action_hz, float(t_s[-1]))])
        place = np.stack([np.interp(ends, t_s, pose[:, axis]) for axis in range(3)], axis=1)
        turned = slerp(ends)
        turn = (turned[1] * turned[0].inv()).as_rotvec(degrees=True)
        if prepared.metadata.get("rotation") == "euler":
            turn = (np.diff(turned.as_euler("XYZ", degrees=True), axis=0)[0] + 180.0) % 360.0 - 180.0
        stored, recomputed = prepared.action[step, :6].astype(float), np.append(place[1] - place[0], turn)
        away = np.abs(stored - recomputed)
        pictures = episode.pictures.items()
        sensor, sample = _same_sample(prepared, episode, step, begin)
        row = {"step": step, "seconds": begin - episode.start_s, "position_mm": away[:3].max()}
        row |= {"rotation_deg": away[3:].max(), "sensor": sensor, "sample": sample}
        row["picture"] = all(_newest(p.t_s, begin) == int(prepared.image_index[view][step]) for view, p in pictures)
        found.append(row | {"stored": stored, "recomputed": recomputed})
    return pd.DataFrame(found)


def _newest(t_s: np.ndarray, at_s: float) -> int:
    return int((t_s <= at_s).sum()) - 1


def _same_sample(prepared: PreparedEpisode, episode: Episode, step: int, at_s: float) -> tuple[bool, bool]:
    """Whether the index of the newest sensor sample is the same, and whether that sample is."""
    if episode.sensor is None or not prepared.has_sensor:
        same = (episode.sensor is None) == (not prepared.has_sensor)
        return same, same
    number = _newest(episode.sensor.t_s, at_s)
    same = number + 1 == int(prepared.sensor_index[step])
    if number < 0:
        return same, True
    raw = episode.sensor.rows(np.array([number]))[0]
    return same, bool(np.array_equal(raw, prepared.sensor[number], equal_nan=True))
