"""Prepared episodes go out as one LeRobot dataset (format v3.0): Parquet, videos, and the sensor streams beside them.

    OUT/meta/{info.json, stats.json, tasks.parquet, episodes/, vla_export.json}   OUT/README.md (the dataset card)
    OUT/data/chunk-000/file-000.parquet       OUT/videos/observation.images.VIEW/chunk-000/file-000.mp4
    OUT/sensor/EPISODE/{sensor.npy, timestamp.npy}

LeRobot's frames are whole and evenly spaced, so each run of valid steps becomes one LeRobot episode. Files hold about
`SHARD_FRAMES` frames; each is written whole or not at all, and an interrupted export goes on behind its last one.
`meta/info.json` comes last: without it nothing takes OUT for a dataset.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from annotated_types import Ge, Le
from PIL import Image

from vla_lib.core import pool
from vla_lib.core.errors import UserError, needing_room
from vla_lib.core.files import atomic_path, file_lock, make_folder, read_json, write_json, write_text
from vla_lib.core.progress import Progress
from vla_lib.core.settings import Settings, settings
from vla_lib.episodes.datasets import Marks
from vla_lib.episodes.lerobot_shard import CODECS, FILES_A_CHUNK, Part, Shard, features, total_stats, write_shard
from vla_lib.episodes.prepared import PreparedEpisode, load_used
from vla_lib.episodes.survey import all_prepared

VERSION = "v3.0"
SHARD_FRAMES = 1000  # frames of a data file and its videos: what an interruption costs at most
EXPORT_RECORD = "meta/vla_export.json"
CARD = """Each frame is one step of the action grid: the state at its time, and the motion from it to the next step.

- `observation.state` (12): joints (deg), pose of the tip (mm; intrinsic XYZ Euler angles, deg).
- `action` (7): displacement (mm) and rotation vector (deg) in the base frame; gripper, always 1.
- `observation.force` ({window}): the newest force samples (650 Hz) at the frame's time, newest last; `force_valid`
  tells whether they are whole. Where it is false they are zeros.
- `sensor_index`: one past the newest sample of the episode's `sensor.npy` at the frame's time.

## What this format does not hold

- A second rate. The sensor's 1,025 depth bins stay beside, in `sensor/EPISODE/sensor.npy` ((samples, 1026) float32,
  force first) with UNIX seconds in `timestamp.npy`. LeRobot's tools neither read nor copy them.
- Gaps. Each run of valid steps is an episode of its own; steps across a gap of a stream are left out.
- The pictures' own times. A frame shows the newest picture at or before it, which may be a camera period old.
- Weights. `vla/weight` in `meta/episodes` says how often a step is to be drawn; LeRobot draws all alike. The columns
  `vla/...` also tell the source episode, its first step and its UNIX time; LeRobot's edit tools may drop them.
- The pictures themselves: a video is lossy.
"""
NO_SENSOR = "None of these episodes has a sensor: its columns and files are absent.\n"


@settings
class ExportSettings(Settings):
    """Write the prepared episodes below a root as a LeRobot dataset v3.0. Nothing below the root is changed."""

    unnamed = "codec crf views image_resize_height image_resize_width"

    dataset_root: Path  # Folder that the dataset folders lie in, preprocessed
    out: Path  # Folder of the LeRobot dataset; must be new, or an export that was interrupted
    codec: Literal["h264", "av1"] = "h264"  # Of the videos; av1: smaller, and slower to write
    crf: Annotated[int, Ge(0), Le(63)] | None = None  # Quality, less is better; default: 20 (h264), 30 (av1)
    views: tuple[str, ...] = ()  # View keys to export; default: those that every episode has
    image_resize_height: Annotated[int, Ge(2)] | None = None  # Height of the videos; default: as recorded
    image_resize_width: Annotated[int, Ge(2)] | None = None  # Width of the videos; default: as recorded
    sensor_window_size: Annotated[int, Ge(1)] = 65  # Samples of the force window of each frame
    workers: Annotated[int, Ge(0)] = 0  # Processes; 0: one per core


def export(settings: ExportSettings) -> dict[str, Any]:
    """Export; returns counts (episodes, frames), `left_out` (sentences) and `status`: `written` or `unchanged`.

    Raises UserError where nothing can be exported, where OUT holds something else, or where the disk is full.
    """
    shards, sources, left_out = _plan(settings)
    out, parts = settings.out, [part for shard in shards for part in shard.parts]
    chosen = [settings.codec, settings.crf, settings.sensor_window_size]  # what decides over the files' content
    fingerprint = hashlib.sha256(repr([shards[0].sizes, sources, parts, chosen]).encode()).hexdigest()[:32]
    counts = {"episodes": len(parts), "frames": sum(map(len, parts)), "left_out": left_out}
    with needing_room(out, "Make room and give the same command again, which goes on."):
        make_folder(out)
        with file_lock(out / ".export.lock"):
            if _known(out, fingerprint):
                return counts | {"status": "unchanged"}
            write_json(out / ".shards" / "plan.json", {"fingerprint": fingerprint})
            for left in out.rglob(".*.partial"):  # of an export that was killed
                left.unlink()
            _write_shards(shards, settings.workers)
            record = {"fingerprint": fingerprint, "settings": settings.record(), "left_out": left_out}
            _write_meta(shards, record | {"sources": sources})
    return counts | {"status": "written"}


def _known(out: Path, fingerprint: str) -> bool:
    """Whether OUT holds this very export. Raises UserError where it holds anything but this one, whole or begun."""
    whole, begun = out / EXPORT_RECORD, out / ".shards" / "plan.json"
    if (out / "meta" / "info.json").exists() and whole.exists():
        if read_json(whole).get("fingerprint") == fingerprint:
            return True
        remedy = "choose another --out, or remove it"
        raise UserError(f"{out} holds an export of other episodes, or with other settings; {remedy}.")
    if begun.exists() and read_json(begun).get("fingerprint") != fingerprint:
        remedy = "give the settings of then, choose another --out, or remove it"
        raise UserError(f"{out} holds an interrupted export of other episodes, or with other settings; {remedy}.")
    if not begun.exists() and any(not name.startswith(".export.lock") for name in os.listdir(out)):
        raise UserError(f"{out} holds files that are no export of ours; choose a new folder with --out.")
    return False


def _plan(settings: ExportSettings) -> tuple[list[Shard], list[dict[str, Any]], list[str]]:
    """All shards, what each source episode is, and a sentence for each thing left out. Raises UserError."""
    if (settings.image_resize_height is None) != (settings.image_resize_width is None):
        raise UserError("Give both --image-resize-height and --image-resize-width, or none of them.")
    root = settings.dataset_root
    used = load_used(root)
    episodes = list(used.values())
    left_out = [f"{folder.relative_to(root).as_posix()}: {why}" for folder, why in all_prepared(root).items() if why]
    fps = _same_rate(episodes)
    views = list(settings.views) or sorted(set.intersection(*(set(episode.views) for episode in episodes)))
    lacking = [f"{one.path} has no {view}" for one in episodes for view in views if view not in one.views]
    if lacking or not views:
        remedy = "name with --views what every episode has"
        raise UserError(f"{lacking[0] if lacking else 'The episodes have no view in common'}; {remedy}.")
    if others := sorted({view for episode in episodes for view in episode.views} - set(views)):
        left_out.append(f"views {', '.join(others)}: {'not asked for' if settings.views else 'not in every episode'}")
    sizes = _sizes(episodes, views, settings)
    marks = Marks.load(root)
    tasks: dict[str, int] = {}
    parts: list[Part] = []
    sources = []
    for key, episode in used.items():
        valid = episode.valid & np.all([episode.image_index[view] >= 0 for view in views], axis=0)
        runs = _runs(valid)
        if not valid.all():
            what = f"{(~valid).sum()} of {len(valid)} steps are not valid and left out"
            left_out.append(f"{key}: {what}; it becomes {len(runs)} LeRobot episode(s)")
        for begin, end in runs:
            number, first = len(parts), parts[-1].first + len(parts[-1]) if parts else 0
            task = tasks.setdefault(episode.instruction, len(tasks))
            weight, label = marks.table.weight(episode.dataset, episode.task), marks.of(key).label or ""
            where = (episode.path, key, begin, end, number, first)
            parts.append(Part(*where, episode.instruction, task, weight, label))
        sources.append({"episode": key, "fingerprint": episode.fingerprint, "steps": len(episode)})
    if not parts:
        raise UserError(f"No episode below {root} has a valid step; look at it in notebook 02.")
    window = settings.sensor_window_size if any(episode.has_sensor for episode in episodes) else 0
    quality = CODECS[settings.codec][1] if settings.crf is None else settings.crf
    empty = Shard(0, (), settings.out, settings.codec, quality, sizes, fps, window)
    return [replace(empty, number=k, parts=group) for k, group in enumerate(_groups(parts))], sources, left_out


def _same_rate(episodes: Sequence[PreparedEpisode]) -> int:
    rates = sorted({episode.action_hz for episode in episodes})
    if len(rates) > 1 or rates[0] != round(rates[0]):
        shown = ", ".join(f"{rate:g}" for rate in rates)
        needed = "LeRobot needs one whole number of frames a second"
        raise UserError(f"The episodes have {shown} actions a second; {needed}: prepare them with one --action-hz.")
    if euler := [one.path for one in episodes if one.metadata.get("rotation") == "euler"]:
        raise UserError(f"{euler[0]} holds Euler differences; prepare it again with --rotation rotvec.")
    return round(rates[0])


def _sizes(
    episodes: Sequence[PreparedEpisode], views: Sequence[str], settings: ExportSettings
) -> dict[str, tuple[int, int]]:
    """View -> (width, height) of its video. Raises UserError where its pictures have several, or odd ones."""
    sizes: dict[str, tuple[int, int]] = {}
    for episode in episodes:
        for view in views:
            path = episode.picture_path(view, len(episode) - 1)
            if path is None:
                continue
            try:
                with Image.open(path) as picture:
                    size = picture.size
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error}); prepare its dataset again.") from error
            remedy = "give --image-resize-width and --image-resize-height"
            if settings.image_resize_width is not None and settings.image_resize_height is not None:
                size = settings.image_resize_width, settings.image_resize_height
            if sizes.setdefault(view, size) != size:
                one, other = (f"{width}x{height}" for width, height in (size, sizes[view]))
                raise UserError(f"{path} is {one}, others of {view} are {other}; {remedy}.")
            if size[0] % 2 or size[1] % 2:
                raise UserError(f"{path} is {size[0]}x{size[1]}, and videos need even sides; {remedy}.")
    return sizes


def _runs(valid: np.ndarray) -> list[tuple[int, int]]:
    """(begin, end) of each run of valid steps."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], valid, [False]]).astype(int)))
    return [(int(begin), int(end)) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


def _groups(parts: Sequence[Part]) -> Iterator[tuple[Part, ...]]:
    group: list[Part] = []
    for part in parts:
        if group and sum(map(len, group)) + len(part) > SHARD_FRAMES:
            yield tuple(group)
            group = []
        group.append(part)
    yield tuple(group)


def _write_shards(shards: Sequence[Shard], workers: int) -> None:
    left = [shard for shard in shards if not shard.record.exists()]
    workers = min(workers or len(os.sched_getaffinity(0)), len(left))
    frames = sum(len(part) for shard in left for part in shard.parts)
    results: Generator[tuple[Shard, Any], None, None] = ((shard, write_shard(shard)) for shard in left)
    if workers > 1:
        results = pool.run_jobs(write_shard, left, workers)
    with contextlib.closing(results), Progress(frames, "exporting", "frames") as progress:
        for shard, result in results:
            if isinstance(result, pool.WorkerDied):
                raise UserError(f"The export stopped: {result}. Give the same command again, which goes on.")
            if isinstance(result, BaseException):
                raise result
            progress.update(sum(map(len, shard.parts)))


# ---- the whole


def _write_meta(shards: Sequence[Shard], record: dict[str, Any]) -> None:
    """Write `meta/` from the shards' records, the card, and `meta/info.json` last; then the records go."""
    meta, first = shards[0].out / "meta", shards[0]
    rows = [row for shard in shards for row in read_json(shard.record)]
    with atomic_path(meta / "episodes" / "chunk-000" / "file-000.parquet") as path:
        pq.write_table(pa.Table.from_pylist(rows), path)
    write_json(meta / "stats.json", total_stats(rows))
    parts = [part for shard in shards for part in shard.parts]
    tasks = list(dict.fromkeys(part.task for part in parts))
    with atomic_path(meta / "tasks.parquet") as path:
        pd.DataFrame({"task_index": range(len(tasks))}, index=tasks).to_parquet(path)
    info = {
        "codebase_version": VERSION,
        "robot_type": "meca500",
        "total_episodes": len(parts),
        "total_frames": sum(map(len, parts)),
        "total_tasks": len(tasks),
        "chunks_size": FILES_A_CHUNK,
        "data_files_size_in_mb": 100,
        "video_files_size_in_mb": 200,
        "fps": first.fps,
        "splits": {"train": f"0:{len(parts)}"},
        "data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        "video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        "features": features(first),
    }
    write_json(meta.parent / EXPORT_RECORD, record)
    write_text(meta.parent / "README.md", _card(info, record, first.window))
    write_json(meta / "info.json", info)
    shutil.rmtree(first.record.parent)


def _card(info: dict[str, Any], record: dict[str, Any], window: int) -> str:
    head: dict[str, Any] = {"task_categories": ["robotics"], "tags": ["LeRobot"]}
    head |= {"configs": [{"config_name": "default", "data_files": "data/*/*.parquet"}]}
    counts = f"{info['total_episodes']} episodes, {info['total_frames']} frames at {info['fps']} Hz"
    lines = ["---", yaml.safe_dump(head) + "---\n", f"# Needle insertion: {counts}\n"]
    lines += [CARD.format(window=window or "..."), "" if window else NO_SENSOR, "## Left out\n"]
    return "\n".join([*lines, *(f"- {text}" for text in record["left_out"] or ["nothing"]), ""])
