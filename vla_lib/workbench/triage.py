"""Episodes to decide about: a row for each of a root with verdict and marks, and the first of them that opens."""

import base64
import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from vla_lib.core.errors import UserError, in_words
from vla_lib.episodes import Episode, EpisodeFiles, load_prepared
from vla_lib.episodes.datasets import Marks
from vla_lib.episodes.episode import pictures_at
from vla_lib.episodes.findings import Findings, read_verdicts
from vla_lib.episodes.pictures import read_pictures
from vla_lib.episodes.prepared import known_clocks

CONTACT, SAMPLES = 5.0, 13  # mN above rest, mean of 20 ms at 650 Hz: as evaluation tells contact
GLANCE_PX = 72
SHOWN_FIRST = ("View1_left", "View5")  # whose pictures stand in the table
Glance = tuple[list[Path | None], Any, Any]  # pictures; force (n,), position in mm (n, 3)
UNJUDGED = "not judged yet"


def episode_rows(root: Path, found: Iterable[EpisodeFiles]) -> list[dict[str, Any]]:
    """What the table says of each episode below `root`: its verdict with the reasons, rejected ones too, and its marks.
    Raises UserError where marks or verdicts cannot be read."""
    verdicts, marks = read_verdicts(root), Marks.load(root)
    rows = []
    for files in found:
        key = files.path.relative_to(root).as_posix() if files.path != root else "."
        row = {"dataset": files.dataset, "task": files.task, "episode": files.name, "key": key, "layout": files.layout}
        rows.append(row | _verdict(files, verdicts.get(key)) | marked(marks, key, files))
    return rows


def marked(marks: Marks, key: str, files: EpisodeFiles) -> dict[str, Any]:
    """What a row says of an episode's marks."""
    mark, why = marks.of(key), marks.left_out(key, (files.dataset, files.task))
    return {"marks": mark.words or why, "excluded": bool(why), "note": mark.note or "", "label": mark.label or ""}


def _verdict(files: EpisodeFiles, known: dict[str, Any] | None) -> dict[str, Any]:
    if known is None and (files.path / "data.pkl").exists():
        try:  # prepared before verdicts were kept
            known = load_prepared(files.path).metadata["report"]["summary"]
        except (UserError, KeyError) as error:
            known = {"verdict": f"data.pkl refused: {error}"}
    known = known or {"verdict": UNJUDGED, "reasons": "notebook 02 judges"}
    seconds = round(known["seconds"], 1) if known.get("seconds") else None
    reasons = known.get("reasons") or ""
    return {"verdict": known["verdict"], "steps": known.get("steps"), "seconds": seconds, "reasons": reasons}


class First(NamedTuple):
    """What to begin with, by its path below the root, and a sentence about each episode that was passed over."""

    key: str
    episode: Episode | None
    broken: list[str]


def fitting(found: Mapping[str, EpisodeFiles], dataset: str = "", episode: str = "") -> dict[str, EpisodeFiles]:
    """The episodes (by their paths below the root) of that dataset, with that text in the path. Raises UserError where
    there is none."""
    fits = {key: files for key, files in found.items() if dataset in ("", files.dataset) and episode in key}
    if not fits:
        names = ", ".join(sorted({files.dataset for files in found.values()})) or "none at all"
        wanted = f"dataset '{dataset}' and '{episode}' in its path"
        raise UserError(f"No episode has {wanted}; the datasets there are {names}.")
    return fits


def first_that_opens(fits: Mapping[str, EpisodeFiles]) -> First:
    """The first that can be opened; "" and None where none can."""
    broken: list[str] = []
    for key, files in fits.items():
        try:
            return First(key, Episode.open(files, known_clocks(files.path)), broken)
        except Exception as error:  # whatever is wrong with one recording
            broken.append(f"{error}" if isinstance(error, UserError) else f"{files.path}: {in_words(error)}")
    return First("", None, broken)


def contact_s(force: Any, t_s: Any) -> float | None:
    """When the force first rises 5 above its level of the first second, mean of 13 samples (20 ms); None: never."""
    force = np.asarray(force, float)
    if len(force) < 2 * SAMPLES or not np.isfinite(force).all():
        return None
    mean = np.convolve(force, np.full(SAMPLES, 1 / SAMPLES), "valid")
    rest = np.median(force[t_s < t_s[0] + 1.0])
    touching = np.flatnonzero(mean - rest > CONTACT)
    return float(t_s[touching[0] + SAMPLES - 1]) if len(touching) else None


def glance(files: EpisodeFiles) -> dict[str, Any]:
    """A row's pictures (first, at contact, last, as small JPEGs) and its force and way from the start over time,
    thinned for a sparkline; what cannot be read is left out."""
    try:
        paths, force, position = _of_prepared(files)
    except Exception:  # not prepared, or whatever is wrong with what is
        paths, force, position = _of_raw(files)
    way = np.linalg.norm(position - position[:1], axis=1)
    pictures = [small for path in paths if path is not None and (small := picture_url(path, GLANCE_PX))]
    return {"pictures": pictures, "force": _spark(force), "way": _spark(way)}


def _of_prepared(files: EpisodeFiles) -> Glance:
    prepared = load_prepared(files.path)
    view = next((view for view in SHOWN_FIRST if view in prepared.views), [*prepared.views, ""][0])
    first = int(np.argmax(prepared.image_index[view] >= 0)) if view else 0
    steps, force = [first, len(prepared) - 1], np.zeros(0)
    if prepared.has_sensor:
        force = prepared.sensor_force[np.maximum(prepared.sensor_index - 1, 0)]
        touched = contact_s(prepared.sensor_force, prepared.sensor_timestamp)
        steps[1:1] = [] if touched is None else [int(np.searchsorted(prepared.timestamp[:-1], touched))]
    return [prepared.picture_path(view, step) for step in steps], force, prepared.state[:, 6:9]


def _of_raw(files: EpisodeFiles) -> Glance:
    """Of an episode that is not prepared; of a broken one its pictures are there all the same."""
    try:
        episode = Episode.open(files, known_clocks(files.path), full_picture_check=None)
    except Exception:  # whatever is wrong with one recording
        seen = read_pictures(files.path, Findings()) if files.path.is_dir() else {}
        names = next((one.paths for one in seen.values() if len(one)), [])
        return [files.path / name for name in names[:1] + names[1:][-1:]], np.zeros(0), np.zeros((0, 3))
    view = next((view for view in SHOWN_FIRST if view in episode.pictures), next(iter(episode.pictures), ""))
    first_s = max([episode.start_s, *episode.pictures[view].t_s[:1]]) if view else episode.start_s
    sensor, at_s = episode.sensor, [first_s, episode.end_s]
    force = np.zeros(0) if sensor is None else sensor.force
    touched = None if sensor is None else contact_s(force, sensor.t_s)
    at_s[1:1] = [] if touched is None else [touched]
    shown = [one for t_s in at_s for one in pictures_at(episode, t_s) if one.view == view]
    return [one.path for one in shown], force, episode.robot.pose[:, :3]


def picture_url(path: Path, most_px: int) -> str:
    """A picture as the address of a small JPEG; "" where it cannot be read."""
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (most_px, most_px))  # JPEG: decodes at a fraction of the size
            small = opened.convert("RGB")
    except Exception:  # whatever the decoder makes of a damaged file
        return ""
    small.thumbnail((most_px, most_px))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _spark(values: Any) -> list[float]:
    """At most 60 values: of each stretch the largest, so that a peak is seen."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    return [round(float(part.max()), 3) for part in np.array_split(values, min(60, len(values)))] if len(values) else []
