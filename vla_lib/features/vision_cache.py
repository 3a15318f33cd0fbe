"""Prepared episodes and a feature extractor in; what the vision tower makes of their pictures, once and for all, on disk and mapped, out.

A training that changes the language model reads it instead of running the frozen vision tower (most of the VLM's work). One file an episode in
the folder `vision` of the VL cache's binding, whose id says what made it; `vla cache rm` removes both.
"""

import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vla_lib.core.errors import UserError
from vla_lib.core.files import atomic_path
from vla_lib.features.cache import VISION, FeatureCache, episode_key, feature_file
from vla_lib.features.extractor import FeatureExtractor, Seen
from vla_lib.features.reader import BatchPlan, BatchReader, plan_batches

PICTURES = 16  # in one pass of the vision tower


@dataclass(frozen=True)
class VisionTokens:
    """The pictures of one episode, one after the other: tokens (R, D), deep (levels, R, D), mapped; `start` (n + 1,) and `grid` (n, 2) tell
    which rows belong to which picture; ticks (t, V): number of the picture that each view shows at each tick of the VL cache, -1 for none."""

    tokens: torch.Tensor
    deep: torch.Tensor
    start: list[int]
    grid: list[list[int]]
    ticks: list[list[int]]

    def picture(self, number: int, device: torch.device) -> Seen:
        """One picture as the extractor's `read` takes it."""
        rows = slice(self.start[number], self.start[number + 1])
        deep = [level[rows].to(device) for level in self.deep]
        return Seen(tuple(self.grid[number]), self.tokens[rows].to(device), deep)


class VisionCache:
    """The vision tokens of a VL cache's episodes. `extractor` must be the one that the cache is bound to."""

    def __init__(self, cache: FeatureCache, extractor: FeatureExtractor):
        self.cache, self.extractor = cache, extractor
        self.folder = cache.folder / VISION
        self._open: dict[str, VisionTokens] = {}

    def missing(self, episodes: Sequence[Any]) -> list[Any]:
        """The episodes that have no vision tokens yet, or those of other data."""
        return [episode for episode in episodes if self._read(episode) is None]

    def check_space(self, episodes: Sequence[Any]) -> None:
        """Raise UserError where the disk cannot take the vision tokens of `episodes`."""
        recipe, views = self.extractor.recipe, self.cache.binding["views"]
        rows, cols = recipe.token_grid(recipe.height, recipe.width)
        levels = 1 + len(getattr(self.extractor.vlm.model.config.vision_config, "deepstack_visual_indexes", None) or [])
        picture = rows * cols * self.extractor.hidden_size * levels * self.extractor.dtype.itemsize
        ticks = sum(len(self.cache.episode(episode).tick_step) for episode in episodes)
        needed, free = ticks * len(views) * picture, shutil.disk_usage(self.cache.folder).free
        if needed > free:
            raise UserError(
                f"The vision tokens of {len(episodes)} episodes need up to {needed / 1e9:.1f} GB and the dataset's disk has {free / 1e9:.1f} GB "
                "free; make room, or take a cache of smaller pictures, of fewer views or of a larger --vlm-reuse-count."
            )

    def build(self, episodes: Sequence[Any], done: Callable[[int], None] = lambda pictures: None) -> None:
        """Compute and write the vision tokens of `episodes`;

        `done` is told the pictures of each. A picture that cannot be read is masked, as in the VL cache. Raises UserError where the disk is full.
        """
        self.folder.mkdir(exist_ok=True)
        for episode in episodes:
            steps = self.cache.episode(episode).tick_step.tolist()
            (plan,) = plan_batches(0, episode, steps, self.cache.binding["views"], len(steps))
            seen, places = self._look_at(plan.files)
            levels = len(seen[0].deep) if seen else 0
            rows = [len(one.tokens) for one in seen]
            empty = torch.zeros(0, self.extractor.hidden_size, dtype=self.extractor.dtype)
            value = {
                "binding": self.cache.binding["id"],
                "fingerprint": episode.fingerprint,
                "tokens": torch.cat([one.tokens for one in seen]) if seen else empty,
                "deep": torch.stack([torch.cat([one.deep[level] for one in seen]) for level in range(levels)])
                if levels
                else empty[None][:0],
                "start": torch.tensor([0, *rows]).cumsum(0),
                "grid": torch.tensor([one.grid for one in seen], dtype=torch.int64).reshape(-1, 2),
                "ticks": torch.tensor(
                    [[places.get(number, -1) for number in tick] for tick in plan.ticks], dtype=torch.int64
                ),
            }
            try:
                with atomic_path(self._file(episode)) as temporary, open(temporary, "wb") as file:
                    torch.save(value, file)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"The vision tokens cannot be written below {self.folder} ({error}); make room and start again."
                ) from error
            done(len(seen))

    def episode(self, episode: Any) -> VisionTokens:
        """Vision tokens of an episode. Raises UserError where there are none."""
        key = str(episode.path)
        if key not in self._open:
            found = self._read(episode)
            if found is None:
                raise UserError(
                    f"The vision tokens of {episode.path} are missing or stale; start the training again, which computes them."
                )
            self._open[key] = found
        return self._open[key]

    def _look_at(self, files: Sequence[Path]) -> tuple[list[Seen], dict[int, int]]:
        """What the vision tower makes of the files that can be read, on the CPU, and each such file's place there; pixels of a few at a time."""
        chunks = range(0, len(files), PICTURES)
        plans = [
            BatchPlan(0, start, part := files[start : start + PICTURES], tuple((k,) for k in range(len(part))))
            for start in chunks
        ]
        reader, seen, places = BatchReader(plans, self.extractor.recipe, self.cache.root), [], {}
        for number, plan in enumerate(plans):
            batch = reader[number]
            places |= {plan.first + k: len(seen) + place for k, (place,) in enumerate(batch.ticks) if place >= 0}
            with torch.no_grad():
                found = self.extractor.look(batch.pictures(torch.device("cpu")))
            seen += [
                Seen(one.grid, one.tokens.to(self.extractor.dtype).cpu(), [level.cpu() for level in one.deep])
                for one in found
            ]
        return seen, places

    def _file(self, episode: Any) -> Path:
        return feature_file(self.folder, episode_key(self.cache.root, episode.path))

    def _read(self, episode: Any) -> VisionTokens | None:
        try:
            value = torch.load(self._file(episode), weights_only=True, mmap=True, map_location="cpu")
            if (value["binding"], value["fingerprint"]) != (self.cache.binding["id"], episode.fingerprint):
                return None
            return VisionTokens(
                value["tokens"], value["deep"], *(value[name].tolist() for name in ("start", "grid", "ticks"))
            )
        except (
            OSError,
            RuntimeError,
            EOFError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            pickle.UnpicklingError,
        ):
            return None
