"""Stage 2's features: the frozen vision tower's tokens on disk, and whole features of a VLM that has no cache.

A run that changes the language model reads what the vision tower makes of each picture instead of computing it in every
step (most of the VLM's work). One file an episode in the folder `vision` of the VL cache's binding, whose id says what
made it; `vla cache rm` removes both.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from vla_lib.core.errors import UserError
from vla_lib.core.files import atomic_path
from vla_lib.episodes import PreparedEpisode
from vla_lib.features.cache import DAMAGES, VISION, EpisodeFeatures, FeatureCache, digest, episode_key, feature_file
from vla_lib.features.extractor import EncodedPicture, FeatureExtractor
from vla_lib.features.reader import BatchPlan, backing_off, plan_batches, read_batch, tick_steps

PICTURES = 16  # in one pass of the vision tower
TICKS = 8  # in one pass of the language model


@dataclass(frozen=True)
class VisionTokens:
    """An episode's encoded pictures, mapped; ticks: of each of the VL cache, each view's picture's number or -1."""

    pictures: list[EncodedPicture]
    ticks: list[list[int]]
    xxh3: str | None = None  # of all tensors; None in files of earlier versions


class VisionCache:
    """The vision tokens of a VL cache's episodes. `extractor` must be the one that the cache is bound to."""

    def __init__(self, cache: FeatureCache, extractor: FeatureExtractor):
        self.cache, self.extractor = cache, extractor
        self.folder = cache.folder / VISION
        self._open: dict[str, VisionTokens] = {}

    def missing(self, episodes: Sequence[PreparedEpisode]) -> list[PreparedEpisode]:
        """The episodes that have no vision tokens yet, or those of other data or of an earlier form."""
        return [episode for episode in episodes if self._read(episode) is None]

    def check_space(self, episodes: Sequence[PreparedEpisode]) -> None:
        """Raise UserError where the disk cannot take the vision tokens of `episodes`."""
        recipe, views = self.extractor.recipe, self.cache.binding["views"]
        rows, cols = recipe.token_grid(recipe.height, recipe.width)
        levels = 1 + len(getattr(self.extractor.vlm.model.config.vision_config, "deepstack_visual_indexes", None) or [])
        picture = rows * cols * self.extractor.hidden_size * levels * self.extractor.dtype.itemsize
        ticks = sum(len(self.cache.episode(episode).tick_step) for episode in episodes)
        needed, free = ticks * len(views) * picture, shutil.disk_usage(self.cache.folder).free
        if needed > free:
            raise UserError(
                f"The vision tokens of {len(episodes)} episodes need up to {needed / 1e9:.1f} GB and the dataset's "
                f"disk has {free / 1e9:.1f} GB free; make room, or take a cache of smaller pictures, "
                "of fewer views or of a larger --vlm-reuse-count."
            )

    def build(self, episodes: Sequence[PreparedEpisode], done: Callable[[int], None] = lambda pictures: None) -> None:
        """Compute and write the vision tokens of `episodes`; `done` hears of the pictures of each.

        A picture that cannot be read is masked, as in the VL cache. Raises UserError where the disk is full.
        """
        for episode in episodes:
            steps = self.cache.episode(episode).tick_step.tolist()
            (plan,) = plan_batches(0, episode, steps, self.cache.binding["views"], len(steps))
            pictures, places = self._encode(plan.files)
            value = {
                "binding": self.cache.binding["id"],
                "fingerprint": episode.fingerprint,
                "pictures": [tuple(picture) for picture in pictures],
                "ticks": [[places[number] for number in tick] for tick in plan.ticks],
                "xxh3": _digest(pictures),
            }
            try:
                with atomic_path(self._file(episode)) as temporary, open(temporary, "wb") as file:
                    torch.save(value, file)
            except (OSError, RuntimeError) as error:
                raise UserError(
                    f"The vision tokens cannot be written below {self.folder} ({error}); make room and start again."
                ) from error
            done(len(pictures))

    def episode(self, episode: PreparedEpisode) -> VisionTokens:
        """An episode's tokens, read whole when first asked for. UserError, naming the file, where absent or damaged."""
        key = str(episode.path)
        if key not in self._open:
            if (found := self._read(episode)) is None:
                remedy = "start the training again, which computes them"
                raise UserError(f"The vision tokens of {episode.path} are missing or stale; {remedy}.")
            if found.xxh3 not in (None, _digest(found.pictures)):
                remedy = "remove it and start the training again with --resume, which computes it"
                raise UserError(f"{self._file(episode)} is damaged: it is not what was written; {remedy}.")
            self._open[key] = found
        return self._open[key]

    @torch.no_grad()
    def _encode(self, files: Sequence[Path]) -> tuple[list[EncodedPicture], dict[int, int]]:
        """The files that can be read, encoded, on the CPU; and for the number of each file its place there, or -1."""
        found: list[EncodedPicture] = []
        places = {-1: -1}
        for first in range(0, len(files), PICTURES):  # few at a time, or an episode's pixels would fill the memory
            part = tuple(files[first : first + PICTURES])
            plan = BatchPlan(0, part, tuple((number,) for number in range(len(part))))
            batch = read_batch(plan, self.extractor.recipe, self.cache.root)
            for number, (place,) in enumerate(batch.ticks, first):
                places[number] = -1 if place < 0 else len(found) + place
            for grid, tokens, deep in self.extractor.encode(batch.pictures(self.extractor.device)):
                # copies, since a slice is written with the whole tensor that it is a slice of
                found.append(EncodedPicture(grid, tokens.cpu().clone(), [level.cpu().clone() for level in deep]))
        return found, places

    def _file(self, episode: PreparedEpisode) -> Path:
        return feature_file(self.folder, episode_key(self.cache.root, episode.path))

    def _read(self, episode: PreparedEpisode) -> VisionTokens | None:
        try:
            value = torch.load(self._file(episode), weights_only=True, mmap=True, map_location="cpu")
            if (value["binding"], value["fingerprint"]) != (self.cache.binding["id"], episode.fingerprint):
                return None
            pictures = [EncodedPicture(*picture) for picture in value["pictures"]]
            return VisionTokens(pictures, value["ticks"], value.get("xxh3"))
        except DAMAGES:
            return None


def _digest(pictures: Sequence[EncodedPicture]) -> str:
    return digest("xxh3", *(tensor for _, tokens, deep in pictures for tensor in (tokens, *deep)))


class ComputedFeatures:
    """Takes the place of a FeatureCache where a stage-2 checkpoint is judged: no cache holds its VLM's features, so the
    VLM runs over the episode's pictures. Kept in memory."""

    def __init__(self, extractor: FeatureExtractor, tick_stride: int):
        self.extractor, self.tick_stride, self.layout = extractor, tick_stride, extractor.layout
        self._forward = backing_off(self._compute, TICKS)

    def episode(self, episode: PreparedEpisode) -> EpisodeFeatures:
        """Features of an episode, a tick every `tick_stride` steps. Raises UserError where a picture cannot be read."""
        tokens, mask = self._forward(episode)
        tick_step = torch.tensor(tick_steps(episode, self.tick_stride))
        return EpisodeFeatures(tokens, mask, tick_step, self.layout, str(episode.path), {})

    def _compute(self, batch_size: int, episode: PreparedEpisode) -> tuple[torch.Tensor, torch.Tensor]:
        parts = []
        steps = tick_steps(episode, self.tick_stride)
        for plan in plan_batches(0, episode, steps, self.extractor.views, batch_size):
            batch = read_batch(plan, self.extractor.recipe, episode.path)
            if batch.findings:
                remedy = "restore it, or leave the episode out"
                raise UserError(f"A picture of {episode.path} cannot be read: {batch.findings[0]}; {remedy}.")
            pictures = batch.pictures(self.extractor.device)
            parts.append(self.extractor.forward(pictures, batch.ticks, episode.instruction))
        tokens, mask = (torch.cat(part) for part in zip(*parts, strict=True))
        return tokens, mask
