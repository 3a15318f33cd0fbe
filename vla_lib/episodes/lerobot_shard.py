"""One shard of a LeRobot dataset: its data file, its videos, and the sensor streams of its episodes.

A shard's files are written whole or not at all, its record (the rows of LeRobot's table of episodes) last.
"""

import contextlib
import os
import shutil
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
from vla_lib.episodes.lerobot_stats import Stats, VideoStats, table_stats
from vla_lib.episodes.prepared import PreparedEpisode, load_prepared

FILES_A_CHUNK = 1000
CODECS = {"h264": ("libx264", 20), "av1": ("libsvtav1", 30)}  # encoder, quality (CRF) where none is given
INDEX_COLUMNS = ("frame_index", "episode_index", "index", "task_index")


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


def _row(shard: Shard, part: Part) -> dict[str, Any]:
    """What LeRobot's table of episodes says of a part, and what ours adds to it (`vla/...`)."""
    episode, place = _episode(part.folder), divmod(shard.number, FILES_A_CHUNK)
    before = part.first - shard.parts[0].first  # frames of the video before it
    row: dict[str, Any] = {"episode_index": part.number, "tasks": [part.task], "length": len(part)}
    row |= {"dataset_from_index": part.first, "dataset_to_index": part.first + len(part)}
    row |= {"data/chunk_index": place[0], "data/file_index": place[1]}
    row |= {"meta/episodes/chunk_index": 0, "meta/episodes/file_index": 0}
    for view in shard.sizes:
        name = f"videos/{feature(view)}"
        row |= {f"{name}/chunk_index": place[0], f"{name}/file_index": place[1]}
        row[f"{name}/from_timestamp"] = before / shard.fps
        row[f"{name}/to_timestamp"] = (before + len(part)) / shard.fps
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
    found = []
    with contextlib.ExitStack() as stack:
        path = stack.enter_context(atomic_path(shard.out / shard.path("data", "parquet")))
        writer = None
        for part in shard.parts:
            columns = _columns(shard, part)
            table = pa.table({name: _arrow(values) for name, values in columns.items()})
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(path, table.schema))
            writer.write_table(table)
            found.append({name: table_stats(values) for name, values in columns.items()})
    return found


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
            video = VideoStats(len(part))
            for step in range(part.begin, part.end):
                pixels = _pixels(_episode(part.folder).picture_path(view, step), size)
                video.add(step - part.begin, pixels)
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts, frame.time_base = number, Fraction(1, shard.fps)
                if step == part.begin:
                    frame.pict_type = PictureType.I
                container.mux(stream.encode(frame))
                number += 1
            found.append(video.stats())
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
