"""Prepared episodes and a binding in, the plan of a build out: what is there, what is missing, bytes, free space. No model is loaded."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.features.cache import cache_folder, coverage_state, episode_key
from vla_lib.features.pooling import TokenLayout

STANDARD_VIEWS = ("View1_left", "View2_left", "View3_left", "View4_left", "View5")
HEADER_BYTES = 4096
SPARE_BYTES = 64 << 20  # left free beyond what the build writes


@dataclass(frozen=True)
class PlannedEpisode:
    """One episode: `ticks` to compute, `state` of what is in the cache ("covered", "stale", "missing"), views that it lacks."""

    path: Path
    key: str
    dataset: str
    ticks: int
    bytes: int
    state: str
    pictures: int
    missing_views: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preflight:
    """The plan: every episode, and what a person wants to know before the model is loaded."""

    binding: dict[str, Any]
    episodes: list[PlannedEpisode]
    free_bytes: int
    others: list[str] = field(default_factory=list)

    def todo(self, overwrite: bool = False) -> list[PlannedEpisode]:
        """The episodes to compute."""
        return [episode for episode in self.episodes if overwrite or episode.state != "covered"]

    def table(self) -> list[dict[str, Any]]:
        """One row a dataset: episodes, ticks, what is there and what is not, bytes of the whole."""
        rows: dict[str, dict[str, Any]] = {}
        for episode in self.episodes:
            row = rows.setdefault(
                episode.dataset,
                {
                    "dataset": episode.dataset,
                    "episodes": 0,
                    "ticks": 0,
                    "covered": 0,
                    "stale": 0,
                    "missing": 0,
                    "MB": 0.0,
                    "lack a view": 0,
                },
            )
            row["episodes"] += 1
            row["ticks"] += episode.ticks
            row[episode.state] += 1
            row["MB"] += episode.bytes / 1e6
            row["lack a view"] += bool(episode.missing_views)
        return list(rows.values())

    def text(self, overwrite: bool = False) -> str:
        """The table and the totals as plain lines."""
        todo = self.todo(overwrite)
        lines = [f"cache {self.binding['id']}"]
        for row in self.table():
            lines.append(
                "  "
                + ", ".join(f"{name} {value:.1f}" if name == "MB" else f"{name} {value}" for name, value in row.items())
            )
        ticks, size = sum(episode.ticks for episode in todo), sum(episode.bytes for episode in todo)
        lines.append(
            f"  to do: {len(todo)} episodes, {ticks} ticks, {size / 1e6:.1f} MB; free: {self.free_bytes / 1e9:.1f} GB"
        )
        if self.others:
            lines.append(f"  other caches here: {', '.join(self.others)}")
        return "\n".join(lines)

    def check_space(self, overwrite: bool = False) -> None:
        """Raise UserError where the disk cannot take what is to do."""
        needed = sum(episode.bytes for episode in self.todo(overwrite)) + SPARE_BYTES
        if self.todo(overwrite) and needed > self.free_bytes:
            raise UserError(
                f"The features need {needed / 1e9:.2f} GB and the dataset's disk has {self.free_bytes / 1e9:.2f} GB free, too little; "
                "free some space (`vla cache ls`, `vla cache rm`), or take a coarser --vl-pooling or a larger --vlm-reuse-count."
            )

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        todo = self.todo()
        return {
            "binding_id": self.binding["id"],
            "table": self.table(),
            "todo_episodes": len(todo),
            "todo_ticks": sum(episode.ticks for episode in todo),
            "todo_bytes": sum(episode.bytes for episode in todo),
            "free_bytes": self.free_bytes,
            "other_bindings": self.others,
            "episodes": [asdict(episode) for episode in self.episodes],
        }


def load_episodes(root: Path) -> list[Any]:
    """Every prepared episode under `root`. Raises UserError where there is none."""
    from vla_lib.episodes import find_prepared, load_prepared

    if not root.is_dir():
        raise UserError(f"There is no dataset root {root}; check --dataset-root.")
    episodes = [load_prepared(folder) for folder in find_prepared(root)]
    if not episodes:
        raise UserError(
            f"There are no prepared episodes (data.pkl) under {root}; run `python -m vla_lib.preprocess` first."
        )
    return episodes


def choose_views(episodes: Sequence[Any], asked: Sequence[str]) -> tuple[str, ...]:
    """The views of the binding: `asked` in its order, else the standard ones that some episode has, else all that there are.

    Raises UserError for a view that no episode has.
    """
    there = sorted({view for episode in episodes for view in episode.views})
    if unknown := [view for view in asked if view not in there]:
        raise UserError(f"No episode has a view {', '.join(unknown)}; --views can name {', '.join(there)}.")
    return tuple(asked) or tuple(view for view in STANDARD_VIEWS if view in there) or tuple(there)


def tick_steps(episode: Any, stride: int) -> range:
    """The action steps of an episode's ticks: 0, stride, 2 stride, ..."""
    return range(0, len(episode), stride)


def plan_build(root: Path, episodes: Sequence[Any], binding: Mapping[str, Any]) -> Preflight:
    """Compare the episodes with what the binding's folder holds."""
    base = cache_folder(root)
    folder = base / binding["id"]
    layout = TokenLayout.from_dict(binding["layout"])
    width = {"float32": 4}.get(binding["dtype"], 2)
    planned = []
    for episode in episodes:
        ticks = len(tick_steps(episode, binding["tick_stride"]))
        lacking = tuple(view for view in binding["views"] if view not in episode.views)
        planned.append(
            PlannedEpisode(
                path=Path(episode.path),
                key=episode_key(root, episode.path),
                dataset=episode.dataset,
                ticks=ticks,
                bytes=ticks * layout.tokens * (binding["hidden_size"] * width + 1) + ticks * 8 + HEADER_BYTES,
                state=coverage_state(folder, binding, root, episode),
                pictures=ticks * (len(binding["views"]) - len(lacking)),
                missing_views=lacking,
            )
        )
    others = sorted(path.parent.name for path in base.glob("*/binding.json") if path.parent.name != binding["id"])
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return Preflight(dict(binding), planned, shutil.disk_usage(existing).free, others)


def share_out(episodes: Sequence[PlannedEpisode], ranks: int) -> list[list[PlannedEpisode]]:
    """Share episodes over ranks by their pictures: the largest first, each to the rank with least so far (within 4/3 of the best share)."""
    shares: list[list[PlannedEpisode]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for episode in sorted(episodes, key=lambda one: (-one.pictures, one.key)):
        rank = loads.index(min(loads))
        shares[rank].append(episode)
        loads[rank] += max(1, episode.pictures)
    return shares
