"""A prepared episode folder in; a `PreparedEpisode` out that checks `data.pkl` at once and keeps almost nothing in memory.

Opening validates the whole file and keeps its metadata; the arrays come back at the first touch. A thousand episodes open
in about a second, and an untouched one costs a few kilobytes.
"""

import os
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.data_pkl import CHANNELS, DATA_NAME, check_content, read_pickle
from vla_lib.episodes.layouts import MAX_DEPTH, SKIPPED_FOLDERS
from vla_lib.episodes.timeline import Span

Array = np.ndarray[Any, Any]


def find_prepared(root: str | Path) -> list[Path]:
    """All folders below `root` (itself included) that hold a data.pkl, sorted. Raises UserError where root is no folder."""
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"There is no dataset folder {root}; give an existing folder.")
    found: list[Path] = []
    _collect(str(root), 0, found, set())
    return sorted(found)


def _collect(folder: str, depth: int, found: list[Path], seen: set[tuple[int, int]]) -> None:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    inner = []
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        if entry.name == DATA_NAME:
            found.append(Path(folder))
            return
        if entry.name[0] == "." or entry.name in SKIPPED_FOLDERS or entry.name.lower().startswith(("view", "images")):
            continue
        try:
            if entry.is_dir():
                inner.append(entry.path)
        except OSError:  # a link that points at itself
            continue
    if depth < MAX_DEPTH:
        for path in inner:
            _collect(path, depth + 1, found, seen)


class _PathList:
    """Thousands of paths that differ in a few characters, as one array of those characters."""

    def __init__(self, paths: list[str]):
        ends = (min(paths), max(paths)) if paths else ("", "")
        self.prefix = commonprefix(ends)
        rest = [path[len(self.prefix) :] for path in paths]
        back = commonprefix([path[::-1] for path in rest]) if rest and all(rest) else ""
        self.suffix = back[::-1]
        middle = [path[: len(path) - len(self.suffix)].encode() for path in rest]
        self.middle = np.asarray(middle, dtype=bytes) if middle else np.empty(0, "S1")

    def __len__(self) -> int:
        return len(self.middle)

    def __getitem__(self, number: int) -> str:
        return f"{self.prefix}{self.middle[number].decode()}{self.suffix}"


_latest: tuple[object, dict[str, Any]] | None = None
"""The content read last and the episode it belongs to: opening an episode and touching it at once reads it once."""


class PreparedEpisode:
    """One episode as `data.pkl` holds it; N steps, S sensor samples. See FORMATS in the documentation for the units."""

    def __init__(self, path: str | Path):
        """Open and check the episode folder. Raises UserError, naming what is wrong, where data.pkl cannot be trusted."""
        self.path = Path(path)
        """The episode folder."""
        self._token = object()
        content = self._read()
        self.metadata: dict[str, Any] = content["metadata"]
        self.instruction: str = content["instruction"]
        self.views: list[str] = sorted(content["image"])
        """View keys, sorted."""
        self.has_sensor: bool = content["sensor_data"] is not None
        self._steps = len(content["action"])
        self._small: dict[str, Any] | None = None
        self._paths: dict[str, _PathList] = {}
        self._stream: dict[str, Any] | None = None
        self._sensor: Array | None = None

    def _read(self) -> dict[str, Any]:
        global _latest
        if _latest is not None and _latest[0] is self._token:
            return _latest[1]
        content = read_pickle(self.path / DATA_NAME)
        check_content(content, self.path / DATA_NAME)
        _latest = (self._token, content)
        return content

    def __len__(self) -> int:
        return self._steps

    def __repr__(self) -> str:
        return f"PreparedEpisode({str(self.path)!r}, {self._steps} steps)"

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def dataset(self) -> str:
        """Name of the dataset folder below the root."""
        return str(self.metadata["dataset"])

    @property
    def task(self) -> str:
        """Folder between dataset and episode, or empty."""
        return str(self.metadata.get("task", ""))

    @property
    def layout(self) -> str:
        return str(self.metadata["layout"])

    @property
    def fingerprint(self) -> str:
        """Identifies the inputs and settings that data.pkl was made from."""
        return str(self.metadata["fingerprint"])

    @property
    def action_hz(self) -> float:
        return float(self.metadata["action_hz"])

    @property
    def sensor_hz(self) -> float:
        return float(self.metadata["sensor_hz"] or 0.0)

    def _arrays(self) -> dict[str, Any]:
        if self._small is None:
            content = self._read()
            names = ("action", "timestamp", "valid", "state", "image_index", "image_timestamp")
            small = {name: content[name] for name in names}
            if content["sensor_data"] is not None:
                small["sensor_index"] = content["sensor_data"]["index"].astype(np.int64, copy=False)
            self._small = small
        return self._small

    @property
    def action(self) -> Array:
        """(N, 7) float32: mm, rotation vector in degrees (base frame), gripper."""
        return self._arrays()["action"]  # type: ignore[no-any-return]

    @property
    def timestamp(self) -> Array:
        """(N,) float64 UNIX seconds on the action grid."""
        return self._arrays()["timestamp"]  # type: ignore[no-any-return]

    @property
    def valid(self) -> Array:
        """(N,) bool: false where a stream has a gap across the step."""
        return self._arrays()["valid"]  # type: ignore[no-any-return]

    @property
    def state(self) -> Array:
        """(N, 12) float32: joints (deg), pose (mm, deg)."""
        return self._arrays()["state"]  # type: ignore[no-any-return]

    @property
    def image_index(self) -> dict[str, Array]:
        """View -> (N,) int32: newest picture at or before each step, -1 where there is none."""
        return self._arrays()["image_index"]  # type: ignore[no-any-return]

    @property
    def image_timestamp(self) -> dict[str, Array]:
        """View -> (n,) float64 UNIX seconds of its pictures."""
        return self._arrays()["image_timestamp"]  # type: ignore[no-any-return]

    def image_path(self, view: str, number: int) -> Path:
        """Path of the picture with the given number in a view."""
        return self.path / self._view_paths(view)[number]

    def image_count(self, view: str) -> int:
        """Number of pictures of a view."""
        return len(self._view_paths(view))

    def _view_paths(self, view: str) -> "_PathList | list[str]":
        if view not in self._paths:
            if _latest is not None and _latest[0] is self._token:
                return _latest[1]["image"][view]  # type: ignore[no-any-return]
            self._paths |= {key: _PathList(paths) for key, paths in self._read()["image"].items()}
        return self._paths[view]

    def picture_path(self, view: str, step: int) -> Path | None:
        """Newest picture of a view at or before step `step`; None where there is none (or no such view)."""
        if view not in self.views:
            return None
        number = int(self.image_index[view][step])
        return self.image_path(view, number) if number >= 0 else None

    @property
    def sensor_index(self) -> Array:
        """(N,) int64: one past the newest sample at or before each step; all zero without a sensor."""
        return self._arrays()["sensor_index"] if self.has_sensor else np.zeros(self._steps, np.int64)

    def _sensor_stream(self) -> dict[str, Any]:
        if not self.has_sensor:
            raise UserError(f"{self.path} has no sensor stream.")
        if self._stream is None:
            self._stream = self._read()["sensor_data"]
        assert self._stream is not None
        return self._stream

    @property
    def sensor_force(self) -> Array:
        """(S,) float32 force of every sample. Raises UserError without a sensor."""
        return self._sensor_stream()["force"]  # type: ignore[no-any-return]

    @property
    def sensor_timestamp(self) -> Array:
        """(S,) float64 UNIX seconds of every sample, clock offset taken off. Raises UserError without a sensor."""
        return self._sensor_stream()["timestamp"]  # type: ignore[no-any-return]

    @property
    def sensor(self) -> Array:
        """(S, 1026) float32 memory map, force first. Raises UserError without a sensor or where the file is not whole."""
        if self._sensor is None:
            if not self.has_sensor:
                raise UserError(f"{self.path} has no sensor stream.")
            content = self._read()
            path = self.path / content["sensor_data"]["array"]
            try:
                mapped = np.load(path, mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError) as error:
                raise UserError(f"{path} cannot be opened ({error}); preprocess its dataset again.") from error
            if mapped.shape != (len(content["sensor_data"]["force"]), CHANNELS) or mapped.dtype != np.float32:
                raise UserError(
                    f"{path} holds {mapped.shape} {mapped.dtype}, which data.pkl does not expect; preprocess its dataset again."
                )
            self._sensor = mapped
        return self._sensor

    @property
    def sensor_gaps(self) -> list[Span]:
        """Spans without sensor samples, UNIX seconds."""
        return [(begin, end) for begin, end in self.metadata.get("gaps", {}).get("sensor", [])]

    def sensor_full(self, length: int) -> Array:
        """(N,) bool: steps that have a whole window of `length` samples, free of gaps, behind them."""
        if not self.has_sensor:
            return np.zeros(self._steps, bool)
        from vla_lib.episodes.steps import window_full

        return window_full(
            self.sensor_index, self.sensor_timestamp, self.timestamp, length, self.sensor_hz, self.sensor_gaps
        )

    def sensor_window(self, step: int, length: int) -> Array | None:
        """(length, 1026) float32: the samples that end at step `step`; None where the window is not full.

        Raises nothing for an episode without a sensor: the answer is None.
        """
        if not self.has_sensor or not self._full_mask(length)[step]:
            return None
        end = int(self.sensor_index[step])
        return np.asarray(self.sensor[end - length : end])

    def _full_mask(self, length: int) -> Array:
        masks = self._arrays().setdefault("sensor_full", {})
        if length not in masks:
            masks[length] = self.sensor_full(length)
            self._stream = None  # the times were needed once; the mask is enough from here on
        return masks[length]  # type: ignore[no-any-return]


def load_prepared(path: str | Path) -> PreparedEpisode:
    """Open one prepared episode folder (or its data.pkl). Raises UserError where it cannot be trusted."""
    path = Path(path)
    return PreparedEpisode(path.parent if path.name == DATA_NAME else path)
