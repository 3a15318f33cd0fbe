"""An extractor and a prepared episode in, its features computed here and now out: what a cache would hold, of a VLM that no cache was made with."""

from typing import Any

import torch

from vla_lib.core.errors import UserError
from vla_lib.features.builder import BackingOff
from vla_lib.features.cache import EpisodeFeatures
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.features.preflight import tick_steps
from vla_lib.features.reader import BatchReader, plan_batches

TICKS = 8  # in one pass of the language model


class ComputedFeatures:
    """Takes the place of a FeatureCache where samples are made: `episode` runs the VLM over the episode's pictures. Kept in memory."""

    def __init__(self, extractor: FeatureExtractor, tick_stride: int):
        self.extractor, self.tick_stride, self.layout = extractor, tick_stride, extractor.layout
        self._forward = BackingOff(extractor, TICKS)

    def episode(self, episode: Any) -> EpisodeFeatures:
        """Features of a PreparedEpisode, a tick every `tick_stride` steps. Raises UserError where a picture cannot be read."""
        steps = tick_steps(episode, self.tick_stride)
        plans = plan_batches(0, episode, steps, self.extractor.views, TICKS)
        reader = BatchReader(plans, self.extractor.recipe, episode.path)
        parts = []
        for number in range(len(reader)):
            batch = reader[number]
            if batch.failures:
                raise UserError(
                    f"A picture of {episode.path} cannot be read: {batch.failures[0]}; restore it, or leave the episode out."
                )
            parts.append(self._forward(batch, episode.instruction))
        tokens, mask = (torch.cat([part[k] for part in parts]) for k in range(2))
        return EpisodeFeatures(tokens, mask, torch.tensor(list(steps)), self.layout, str(episode.path), {})
