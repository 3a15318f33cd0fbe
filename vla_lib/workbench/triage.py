"""Episodes to decide about: all of a root in one table with verdicts and marks, and the first of them that opens."""

from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.episodes import Episode, EpisodeFiles, find_episodes, load_prepared
from vla_lib.episodes.marks import Marks
from vla_lib.episodes.prepared import known_clocks
from vla_lib.episodes.verdicts import read_verdicts

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
        rows.append(row | {"marks": marks.of(key).words})
    return pd.DataFrame(rows, columns=COLUMNS)


def _verdict(files: EpisodeFiles, known: dict[str, Any] | None) -> dict[str, Any]:
    if known is None and (files.path / "data.pkl").exists():
        try:  # prepared before verdicts were kept
            known = load_prepared(files.path).metadata["report"]["summary"]
        except (UserError, KeyError) as error:
            return {"verdict": f"data.pkl refused: {error}"}
    if known is None:
        return {"verdict": UNJUDGED}
    reasons = known.get("reasons") or ""
    return {name: known.get(name) for name in ("verdict", "steps", "seconds")} | {"reasons": reasons}


def open_first(root: Path, dataset: str = "", episode: str = "") -> tuple[Episode | None, list[str]]:
    """The first episode below `root` of that dataset, with that text in its name, that can be opened, and a sentence
    about each before it that cannot; None where none can. Raises UserError where none fits."""
    found = find_episodes(root)
    fits = [files for files in found if dataset in ("", files.dataset) and episode in files.name]
    if not fits:
        names = ", ".join(sorted({files.dataset for files in found})) or "none at all"
        wanted = f"dataset '{dataset}' and '{episode}' in its name"
        raise UserError(f"No episode below {root} has {wanted}; the datasets there are {names}.")
    broken: list[str] = []
    for files in fits:
        try:
            return Episode.open(files, known_clocks(files.path)), broken
        except Exception as error:  # whatever is wrong with one recording
            broken.append(
                str(error) if isinstance(error, UserError) else f"{files.path}: {type(error).__name__}: {error}"
            )
    return None, broken
