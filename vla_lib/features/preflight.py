"""What a cache build would do: what is there, what is missing, bytes, free space. No model is loaded."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vla_lib.core.errors import UserError
from vla_lib.core.settings import ROOT_VARIABLE
from vla_lib.episodes import PreparedEpisode, load_used
from vla_lib.episodes.hdf5 import CAMERAS
from vla_lib.episodes.layouts import EXPECTED_VIEWS
from vla_lib.episodes.survey import left_out
from vla_lib.features.binding import model_words
from vla_lib.features.cache import FeatureCache, cache_folder, episode_key
from vla_lib.features.extractor import default_device
from vla_lib.features.form import FeatureForm
from vla_lib.features.reader import tick_steps
from vla_lib.features.settings import CacheSettings
from vla_lib.features.vlm import load_processor, open_checkpoint, resolve_layer

STANDARD_VIEWS = (*EXPECTED_VIEWS, *CAMERAS)
HEADER_BYTES = 4096  # of one episode's file, about
SPARE_BYTES = 64 << 20  # left free beyond what the build writes


@dataclass(frozen=True)
class PlannedEpisode:
    """One episode: `ticks` to compute, `state` in the cache ("covered", "stale" or "missing"), views it lacks."""

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
    others: list[str]
    left_out: str  # how many prepared episodes the marks leave out, and why

    @property
    def title(self) -> str:
        """The cache and its model in words."""
        return f"cache {self.binding['id']} of {model_words(self.binding)}"

    def todo(self, overwrite: bool = False) -> list[PlannedEpisode]:
        """The episodes to compute."""
        return [episode for episode in self.episodes if overwrite or episode.state != "covered"]

    def table(self) -> list[dict[str, Any]]:
        """One row a dataset: episodes, ticks, what is there and what is not, megabytes of the whole."""
        rows = []
        for dataset in dict.fromkeys(episode.dataset for episode in self.episodes):
            own = [episode for episode in self.episodes if episode.dataset == dataset]
            states = [episode.state for episode in own]
            row = {"dataset": dataset, "episodes": len(own), "ticks": sum(episode.ticks for episode in own)}
            row |= {state: states.count(state) for state in ("covered", "stale", "missing")}
            row |= {"MB": sum(episode.bytes for episode in own) / 1e6}
            rows.append(row | {"lack a view": sum(bool(episode.missing_views) for episode in own)})
        return rows

    def text(self, overwrite: bool = False) -> str:
        """The table and the totals as plain lines."""
        lines = [self.title]
        for row in self.table():
            lines.append("  " + ", ".join(f"{k} {v:.1f}" if k == "MB" else f"{k} {v}" for k, v in row.items()))
        todo = self.todo(overwrite)
        ticks, size = sum(episode.ticks for episode in todo), sum(episode.bytes for episode in todo)
        free = f"free: {self.free_bytes / 1e9:.1f} GB"
        lines.append(f"  to do: {len(todo)} episodes, {ticks} ticks, {size / 1e6:.1f} MB; {free}")
        lines += [f"  left out: {self.left_out}"] if self.left_out else []
        if self.others:
            lines.append(f"  other caches here: {', '.join(self.others)}")
        return "\n".join(lines)

    def check_space(self, overwrite: bool = False) -> None:
        """Raise UserError where the disk cannot take what is to do."""
        todo = self.todo(overwrite)
        needed = sum(episode.bytes for episode in todo) + SPARE_BYTES
        if todo and needed > self.free_bytes:
            raise UserError(
                f"The features need {needed / 1e9:.2f} GB and the dataset's disk has {self.free_bytes / 1e9:.2f} GB "
                "free, too little; free some space (`vla cache ls`, `vla cache rm`), or take a coarser --vl-pooling or "
                "a larger --vlm-reuse-count."
            )

    def to_dict(self) -> dict[str, Any]:
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


def plan(settings: CacheSettings) -> tuple[Preflight, FeatureForm]:
    """Look at data, checkpoint and cache without loading the model.

    Raises UserError where there are no prepared episodes, no such view, checkpoint, layer or GPU.
    """
    root = settings.dataset_root
    episodes = load_episodes(root)
    checkpoint = open_checkpoint(settings.model)
    processor = load_processor(checkpoint)
    size = settings.image_resize_height, settings.image_resize_width
    form = FeatureForm(processor, choose_views(episodes, settings.views), settings.vl_pooling, *size)
    automatic = "bfloat16" if device_of(settings).startswith("cuda") else "float32"
    dtype = automatic if settings.dtype == "auto" else settings.dtype
    layer = resolve_layer(settings.vl_layer, checkpoint.depth)
    return plan_build(root, episodes, form.binding(checkpoint, layer, settings.tick_stride, dtype)), form


def device_of(settings: CacheSettings) -> str:
    """The device that `settings` ask for. Raises UserError where it is not there."""
    if settings.device == "auto":
        return default_device()
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {settings.device}: this machine has no usable GPU; take auto or cpu.")
    return settings.device


def load_episodes(root: Path) -> list[PreparedEpisode]:
    """Every prepared episode under `root` that is used. Raises UserError where there is none."""
    if not root.is_dir():
        raise UserError(f"There is no dataset root {root}; give it with --dataset-root or in {ROOT_VARIABLE}.")
    return list(load_used(root).values())


def choose_views(episodes: Sequence[PreparedEpisode], asked: Sequence[str]) -> tuple[str, ...]:
    """The views of the binding: `asked` in its order, else the standard ones that some episode has, else all there are.

    Raises UserError for a view that no episode has.
    """
    there = sorted({view for episode in episodes for view in episode.views})
    if unknown := [view for view in asked if view not in there]:
        raise UserError(f"No episode has a view {', '.join(unknown)}; --views can name {', '.join(there)}.")
    return tuple(asked) or tuple(view for view in STANDARD_VIEWS if view in there) or tuple(there)


def plan_build(root: Path, episodes: Sequence[PreparedEpisode], binding: Mapping[str, Any]) -> Preflight:
    """Compare the episodes with what the binding's folder holds."""
    cache, base = FeatureCache(root, binding), cache_folder(root)
    tick_bytes = cache.layout.tokens * (binding["hidden_size"] * getattr(torch, binding["dtype"]).itemsize + 1) + 8
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
                bytes=ticks * tick_bytes + HEADER_BYTES,
                state=cache.state(episode),
                pictures=ticks * (len(binding["views"]) - len(lacking)),
                missing_views=lacking,
            )
        )
    others = sorted(path.parent.name for path in base.glob("*/binding.json") if path.parent.name != binding["id"])
    existing = next(path for path in (base, *base.parents) if path.exists())
    return Preflight(dict(binding), planned, shutil.disk_usage(existing).free, others, left_out(root))


def share_out(episodes: Sequence[PlannedEpisode], ranks: int) -> list[list[PlannedEpisode]]:
    """Share episodes over ranks by their pictures: the largest first, each to the rank with least so far.

    The largest share is within 4/3 of the best possible (Graham 1969).
    """
    shares: list[list[PlannedEpisode]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for episode in sorted(episodes, key=lambda one: (-one.pictures, one.key)):
        rank = loads.index(min(loads))
        shares[rank].append(episode)
        loads[rank] += max(1, episode.pictures)
    return shares
