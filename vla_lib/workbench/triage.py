"""Episodes to decide about: all of a root in one table with verdicts and marks, and the first of them that opens."""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image

from vla_lib.core.errors import UserError, in_words
from vla_lib.episodes import Episode, EpisodeFiles, find_episodes, load_prepared
from vla_lib.episodes.findings import Findings
from vla_lib.episodes.marks import Marks
from vla_lib.episodes.pictures import read_pictures
from vla_lib.episodes.prepared import known_clocks
from vla_lib.episodes.verdicts import read_verdicts

CONTACT, SAMPLES = 5.0, 13  # mN above rest, mean of 20 ms at 650 Hz: as evaluation tells contact
GLANCE_PX = 72
UNJUDGED = "not judged yet (notebook 02)"
COLUMNS = ["dataset", "task", "episode", "layout", "verdict", "marks", "seconds", "steps", "reasons", "key"]


def episode_table(root: Path, found: list[EpisodeFiles] | None = None) -> pd.DataFrame:
    """One row an episode below `root`, COLUMNS: its verdict with the reasons, rejected ones too, and its marks. Raises
    UserError where the root, its marks or its verdicts cannot be read."""
    verdicts, marks = read_verdicts(root), Marks.load(root)
    rows = []
    for files in find_episodes(root) if found is None else found:
        key = files.path.relative_to(root).as_posix() if files.path != root else "."
        row: dict[str, Any] = {"dataset": files.dataset, "task": files.task, "episode": files.name, "key": key}
        row |= {"layout": files.layout, **_verdict(files, verdicts.get(key))}
        mark = marks.of(key)
        left_out = {"excluded": bool(marks.left_out(key)), "note": mark.note or "", "label": mark.label or ""}
        rows.append(row | left_out | {"marks": mark.words or marks.left_out(key)})
    return pd.DataFrame(rows, columns=[*COLUMNS, "excluded", "note", "label"])


def _verdict(files: EpisodeFiles, known: dict[str, Any] | None) -> dict[str, Any]:
    if known is None and (files.path / "data.pkl").exists():
        try:  # prepared before verdicts were kept
            known = load_prepared(files.path).metadata["report"]["summary"]
        except (UserError, KeyError) as error:
            return {"verdict": f"data.pkl refused: {error}"}
    if known is None:
        return {"verdict": UNJUDGED}
    reasons = known.get("reasons") or ""
    seconds = round(known.get("seconds") or 0.0, 1)
    return {"verdict": known["verdict"], "steps": known.get("steps"), "seconds": seconds, "reasons": reasons}


def first_that_opens(
    found: Mapping[str, EpisodeFiles], dataset: str = "", episode: str = ""
) -> tuple[Episode | None, list[str]]:
    """The first episode (by its path below the root) of that dataset, with that text in its path, that can be opened,
    and a sentence about each before it that cannot; None where none can. Raises UserError where none fits."""
    fits = [files for key, files in found.items() if dataset in ("", files.dataset) and episode in key]
    if not fits:
        names = ", ".join(sorted({files.dataset for files in found.values()})) or "none at all"
        wanted = f"dataset '{dataset}' and '{episode}' in its path"
        raise UserError(f"No episode has {wanted}; the datasets there are {names}.")
    broken: list[str] = []
    for files in fits:
        try:
            return Episode.open(files, known_clocks(files.path)), broken
        except Exception as error:  # whatever is wrong with one recording
            broken.append(f"{error}" if isinstance(error, UserError) else f"{files.path}: {in_words(error)}")
    return None, broken


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
        prepared = load_prepared(files.path)
        view = next((view for view in ("View1_left", "View5") if view in prepared.views), [*prepared.views, ""][0])
        steps = [0, len(prepared) - 1]
        force, way = np.zeros(0), np.linalg.norm(prepared.state[:, 6:9] - prepared.state[0, 6:9], axis=1)
        if prepared.has_sensor:
            force = prepared.sensor_force[np.maximum(prepared.sensor_index - 1, 0)]
            touched = contact_s(prepared.sensor_force, prepared.sensor_timestamp)
            steps[1:1] = [] if touched is None else [int(np.searchsorted(prepared.timestamp[:-1], touched))]
        paths = [prepared.picture_path(view, step) for step in steps]
    except (UserError, IndexError):  # not prepared: its pictures are there all the same
        force = way = np.zeros(0)
        seen = read_pictures(files.path, Findings()) if files.path.is_dir() else {}
        names = next((one.paths for one in seen.values() if len(one)), [])
        paths = [files.path / name for name in (names[:1] + names[-1:] if len(names) > 1 else names)]
    pictures = [small for path in paths if path is not None and (small := picture_url(path, GLANCE_PX))]
    return {"pictures": pictures, "force": _spark(force), "way": _spark(way)}


def picture_url(path: Path, most_px: int) -> str:
    """A picture as the address of a small JPEG; "" where it cannot be read."""
    try:
        with Image.open(path) as opened:
            opened.draft("RGB", (most_px, most_px))  # JPEG: decodes at a fraction of the size
            small = opened.convert("RGB")
    except OSError:
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
