"""One shard of a LeRobot dataset: its data file, its videos, the sensor streams of its episodes, and their statistics.

A shard's files are written whole or not at all, its record (the rows of LeRobot's table of episodes) last.

Statistics are min, max, mean, std, count, and five quantiles, as LeRobot 0.4.4 defines them
(`lerobot/datasets/compute_stats.py`): quantiles of an episode come from a histogram of 5,000 bins, those of all
episodes are the means of the episodes' own, weighted by their counts. Sums are made in float64, so that a small motion
far from zero keeps its spread.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from av.video.frame import PictureType
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.core.files import atomic_path, write_json
from vla_lib.episodes.prepared import PreparedEpisode, load_prepared

FILES_A_CHUNK = 1000
CODECS = {"h264": ("libx264", 20), "av1": ("libsvtav1", 30)}  # encoder, quality (CRF) where none is given
INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")
STATE_NAMES = [*(f"joint_{n}_deg" for n in range(1, 7)), "x_mm", "y_mm", "z_mm", "a_deg", "b_deg", "r_deg"]
ACTION_NAMES = ["dx_mm", "dy_mm", "dz_mm", "rotvec_x_deg", "rotvec_y_deg", "rotvec_z_deg", "gripper"]
QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BINS = 5000
EDGE = 1e-10
LEVELS = np.arange(256.0)

Stats = dict[str, np.ndarray]  # name of the statistic -> (width,), of a video (3, 1, 1); `count`: (1,)


@dataclass(frozen=True)
class Part:
    """One run of valid steps of a prepared episode: one LeRobot episode."""

    folder: Path
    key: str  # the episode's path below the root
    begin: int  # first step
    end: int  # one past the last
    number: int  # LeRobot's episode_index
    first: int  # LeRobot's index of its first frame
    task: str
    task_index: int
    weight: float
    label: str  # a person's, of marks.yaml; "" where there is none

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Shard:
    """Parts whose frames go into one data file, and one video a view."""

    number: int
    parts: tuple[Part, ...]
    out: Path
    codec: str  # a key of CODECS
    quality: int  # CRF: less is better
    sizes: dict[str, tuple[int, int]]  # view -> width, height of its video
    fps: int
    window: int  # samples of the force window; 0 where no episode has a sensor

    def path(self, kind: str, suffix: str) -> str:
        place = divmod(self.number, FILES_A_CHUNK)
        return f"{kind}/chunk-{place[0]:03d}/file-{place[1]:03d}.{suffix}"

    @property
    def record(self) -> Path:
        return self.out / ".shards" / f"{self.number:06d}.json"


def write_shard(shard: Shard) -> list[dict[str, Any]]:
    """Write the files of one shard, its record last; returns its rows. Raises UserError where a source is damaged."""
    rows = [_row(shard, part) for part in shard.parts]
    found = _write_data(shard)
    for view, size in shard.sizes.items():
        for stats, one in zip(found, _write_video(shard, view, size), strict=True):
            stats[feature(view)] = one
    for part in {part.key: part for part in shard.parts}.values():
        _copy_sensor(_episode(part.folder), shard.out / "sensor" / part.key)
    for row, of_part in zip(rows, found, strict=True):
        row |= {f"stats/{name}/{key}": value for name, one in of_part.items() for key, value in one.items()}
    write_json(shard.record, rows)
    return rows


@lru_cache(maxsize=4)
def _episode(folder: Path) -> PreparedEpisode:
    return load_prepared(folder)


def feature(view: str) -> str:
    """What LeRobot calls a view."""
    return f"observation.images.{view}"


def features(shard: Shard) -> dict[str, dict[str, Any]]:
    """What `meta/info.json` says of each column of the data file, and of each video."""

    def column(dtype: str, width: int = 1, names: list[str] | None = None) -> dict[str, Any]:
        return {"dtype": dtype, "shape": [width], "names": names}

    found = {"observation.state": column("float32", 12, STATE_NAMES), "action": column("float32", 7, ACTION_NAMES)}
    if shard.window:
        found["observation.force"] = column("float32", shard.window)
        found |= {"force_valid": column("bool"), "sensor_index": column("int64")}
    for view, (width, height) in shard.sizes.items():
        video: dict[str, Any] = {"height": height, "width": width, "codec": shard.codec, "pix_fmt": "yuv420p"}
        video |= {"is_depth_map": False, "fps": shard.fps, "channels": 3}
        found[feature(view)] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {f"video.{name}": value for name, value in video.items()} | {"has_audio": False},
        }
    return found | {"timestamp": column("float32")} | {name: column("int64") for name in INDEX_COLUMNS}


def _row(shard: Shard, part: Part) -> dict[str, Any]:
    """What LeRobot's table of episodes says of a part, and what ours adds to it (`vla/...`)."""
    episode, place = _episode(part.folder), divmod(shard.number, FILES_A_CHUNK)
    file = {"chunk_index": place[0], "file_index": place[1]}
    before = part.first - shard.parts[0].first  # frames of the video before it
    span = {"from_timestamp": before / shard.fps, "to_timestamp": (before + len(part)) / shard.fps}
    row: dict[str, Any] = {"episode_index": part.number, "tasks": [part.task], "length": len(part)}
    row |= {"dataset_from_index": part.first, "dataset_to_index": part.first + len(part)}
    row |= {f"data/{name}": value for name, value in file.items()}
    row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    for view in shard.sizes:
        row |= {f"videos/{feature(view)}/{name}": value for name, value in (file | span).items()}
    ours: dict[str, Any] = {
        "dataset": episode.dataset,
        "task": episode.task,
        "episode": part.key,
        "layout": episode.layout,
    }
    ours |= {"verdict": str(episode.metadata["verdict"]), "weight": part.weight, "label": part.label}
    ours |= {"first_step": part.begin, "start_unix_s": float(episode.timestamp[part.begin])}
    ours["sensor_hz"] = episode.sensor_hz
    ours["sensor"] = f"sensor/{part.key}" if episode.has_sensor else ""
    return row | {f"vla/{name}": value for name, value in ours.items()}


def _columns(shard: Shard, part: Part) -> dict[str, np.ndarray]:
    """A part's columns of the data file, each (n,) or (n, width), n the part's frames."""
    episode, steps, frames = _episode(part.folder), slice(part.begin, part.end), np.arange(len(part))
    found: dict[str, np.ndarray] = {"observation.state": episode.state[steps].astype(np.float32)}
    found["action"] = episode.action[steps].astype(np.float32)
    if shard.window:
        index, full = episode.sensor_index[steps], episode.sensor_full(shard.window)[steps]
        force = np.zeros((len(part), shard.window), np.float32)
        if full.any():
            force[full] = episode.sensor_force[index[full][:, None] + np.arange(-shard.window, 0)]
        found |= {"observation.force": force, "force_valid": full, "sensor_index": index}
    found["timestamp"] = (frames / shard.fps).astype(np.float32)
    numbers = (frames, np.full(len(part), part.number), part.first + frames, np.full(len(part), part.task_index))
    return found | {name: one.astype(np.int64) for name, one in zip(INDEX_COLUMNS, numbers, strict=True)}


def _write_data(shard: Shard) -> list[dict[str, Stats]]:
    """Write the data file, a row group a part; the statistics of each part's columns."""
    parts = [_columns(shard, part) for part in shard.parts]
    tables = [pa.table({name: _arrow(values) for name, values in columns.items()}) for columns in parts]
    path = shard.out / shard.path("data", "parquet")
    with atomic_path(path) as partial, pq.ParquetWriter(partial, tables[0].schema) as writer:
        for table in tables:
            writer.write_table(table)
    return [{name: table_stats(values) for name, values in columns.items()} for columns in parts]


def _arrow(values: np.ndarray) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _write_video(shard: Shard, view: str, size: tuple[int, int]) -> list[Stats]:
    """Write one view's video, frame k at k / fps; the statistics of each part."""
    found, number = [], 0
    encoder = CODECS[shard.codec][0]
    # every second frame is a key frame, as LeRobot has it: quick to seek
    options = {"crf": str(shard.quality), "g": "2"}
    options |= {"bf": "0"} if encoder == "libx264" else {"preset": "10", "svtav1-params": "lp=1"}
    os.environ.setdefault("SVT_LOG", "1")  # of the AV1 encoder errors alone
    path = shard.out / shard.path(f"videos/{feature(view)}", "mp4")
    with atomic_path(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream(encoder, rate=shard.fps, options=options)
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        stream.codec_context.thread_count = 1  # the shards run side by side
        stream.codec_context.time_base = Fraction(1, shard.fps)
        for part in shard.parts:
            wanted, levels = sampled(len(part)), np.zeros((3, 256))
            for step in range(part.begin, part.end):
                pixels = _pixels(_episode(part.folder).picture_path(view, step), size)
                if step - part.begin in wanted:
                    levels += level_counts(pixels)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, shard.fps)
                if step == part.begin:
                    frame.pict_type = PictureType.I
                container.mux(stream.encode(frame))
                number += 1
            found.append(video_stats(levels, len(wanted)))
        container.mux(stream.encode())
    return found


@lru_cache(maxsize=1)
def _pixels(path: Path | None, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8. A camera is slower than the steps: the last picture is kept."""
    try:
        with Image.open(path or "") as picture:
            colours = picture.convert("RGB")
            return np.asarray(colours if colours.size == size else colours.resize(size))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); prepare its dataset again.") from error


def _copy_sensor(episode: PreparedEpisode, folder: Path) -> None:
    """Copy sensor.npy, compared with its checksum, and write its times beside it, where they are not there yet."""
    if episode.has_sensor and not (folder / "timestamp.npy").exists():
        episode.check_sensor()
        with atomic_path(folder / "sensor.npy") as partial:
            shutil.copyfile(episode.path / "sensor.npy", partial)
        with atomic_path(folder / "timestamp.npy") as partial, open(partial, "wb") as file:
            np.save(file, episode.sensor_timestamp)


# ---- statistics


def table_stats(values: np.ndarray) -> Stats:
    """The statistics of one episode's column (n,) or (n, width)."""
    columns = np.asarray(values, float).reshape(len(values), -1)
    each = [_weighted(column, np.ones(len(column))) for column in columns.T]
    found = {name: np.array([one[name] for one in each]) for name in each[0]}
    if len(values) < 2:  # no histogram of one value
        found |= {name: found["mean"].copy() for name in QUANTILES}
    return found | {"count": np.array([len(values)])}


def sampled(frames: int) -> set[int]:
    """The frames of an episode's video that its statistics are made of, as LeRobot chooses them."""
    count = max(min(frames, 100), min(int(frames**0.75), 10_000))
    return set(np.round(np.linspace(0, frames - 1, count)).astype(int).tolist())


def level_counts(pixels: np.ndarray) -> np.ndarray:
    """(3, 256): how often each level of each colour stands in a frame (height, width, 3) uint8; large ones thinned."""
    every = max(max(pixels.shape[:2]) // 150, 1)
    few = pixels[::every, ::every]
    return np.stack([np.bincount(few[..., colour].reshape(-1), minlength=256) for colour in range(3)])


def video_stats(counts: np.ndarray, frames: int) -> Stats:
    """The statistics of an episode's video, levels scaled to 0..1, from the `level_counts` of so many frames."""
    each = [_weighted(LEVELS[levels > 0], levels[levels > 0]) for levels in counts]
    found = {name: np.array([one[name] for one in each]).reshape(3, 1, 1) / 255 for name in each[0]}
    return found | {"count": np.array([frames])}


def _weighted(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    total = weights.sum()
    mean = float((values * weights).sum() / total)
    std = float(np.sqrt((np.square(values - mean) * weights).sum() / total))
    least, most = float(values.min()), float(values.max())
    edges = np.linspace(least - EDGE, most + EDGE, BINS + 1)
    reached = np.cumsum(np.histogram(values, edges, weights=weights)[0])
    found = {"min": least, "max": most, "mean": mean, "std": std}
    for name, part in QUANTILES.items():
        place = int(np.searchsorted(reached, part * total))
        before = reached[place - 1] if place else 0.0
        within = (part * total - before) / (reached[place] - before) if place else 0.0
        found[name] = float(edges[place] + within * (edges[place + 1] - edges[place]))
    return found


def total_stats(rows: Sequence[dict[str, Any]]) -> dict[str, Stats]:
    """Column -> the statistics of all episodes' frames, from those in the episodes' rows (at least one)."""
    each: dict[str, Stats] = {}  # of each statistic (episodes, ...)
    for key in (key for key in rows[0] if key.startswith("stats/")):
        _, name, statistic = key.split("/")
        each.setdefault(name, {})[statistic] = np.array([row[key] for row in rows])
    return {name: _combined(stats) for name, stats in each.items()}


def _combined(each: Stats) -> Stats:
    counts = each["count"][:, 0]

    def mean(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.average(values, axis=0, weights=counts))

    middle = mean(each["mean"])
    spread = mean(np.square(each["std"]) + np.square(each["mean"] - middle))
    found = {"min": each["min"].min(axis=0), "max": each["max"].max(axis=0), "count": counts.sum(keepdims=True)}
    return found | {"mean": middle, "std": np.sqrt(spread)} | {name: mean(each[name]) for name in QUANTILES}
