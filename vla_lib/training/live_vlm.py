"""The live VLM of stage 2: LoRA in its language model, features computed as the policy trains.

The vision tower is frozen and runs once over each picture (features.vision_cache); the language model runs in every
step, so that gradients reach its LoRA weights. Features from the VL cache and LoRA are never combined: no gradient
would reach it."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vla_lib.core.progress import Progress
from vla_lib.features.extractor import EncodedPicture, FeatureExtractor
from vla_lib.features.vision_cache import VisionCache
from vla_lib.features.vlm import add_adapter, fill_adapter
from vla_lib.policy.policy import Policy
from vla_lib.training.data import TrainingData
from vla_lib.training.samples import Batch, SampleSet
from vla_lib.training.settings import TrainingSettings


class LiveVlm:
    """The VLM that the cache was made with, and its LoRA weights (`weights`, by name)."""

    def __init__(self, settings: TrainingSettings, data: TrainingData, device: torch.device) -> None:
        self.rank, self.alpha = settings.lora_rank, settings.lora_alpha
        self.extractor = FeatureExtractor.from_binding(data.binding, str(device))
        self.weights: dict[str, nn.Parameter] = add_adapter(self.extractor.vlm, self.rank, self.alpha)
        self.vision = VisionCache(data.cache, self.extractor)

    def prepare(self, data: TrainingData, accelerator: Accelerator, log_every_s: float) -> None:
        """Compute missing vision tokens, each process its share. Raises UserError where the disk cannot take them."""
        todo = self.vision.missing([*data.train.episodes, *(data.val.episodes if data.val else ())])
        accelerator.wait_for_everyone()  # all have looked before anyone writes
        if todo:
            self.vision.check_space(todo)
            own = todo[accelerator.process_index :: accelerator.num_processes]
            with Progress(len(own), "vision tokens", "episodes", log_every_s, accelerator.is_main_process) as progress:
                self.vision.build(own, lambda pictures: progress.update(1))
        accelerator.wait_for_everyone()

    def features(self, samples: SampleSet, numbers: Sequence[int] | np.ndarray) -> tuple[Tensor, Tensor]:
        """VL tokens (B, T, D) and mask (B, T) of samples, on the VLM's device; a shared tick is computed once."""
        pictures: list[EncodedPicture] = []
        ticks: list[list[int]] = []
        known: dict[tuple[int, int], int] = {}
        pairs = list(zip(samples.episode[numbers].tolist(), samples.tick[numbers].tolist(), strict=True))
        for episode, tick in pairs:
            vision = self.vision.episode(samples.episodes[episode])
            for number in vision.ticks[tick]:
                if number >= 0 and (episode, number) not in known:
                    known[episode, number] = len(pictures)
                    pictures.append(vision.pictures[number].to(self.extractor.device))
            ticks.append([known.get((episode, number), -1) for number in vision.ticks[tick]])
        instructions = [samples.episodes[episode].instruction for episode, _ in pairs]
        with torch.autocast(self.extractor.device.type, enabled=False):  # as the cache was computed: in the VLM's type
            tokens, mask = self.extractor.features(pictures, ticks, instructions)
        return tokens, mask.to(tokens.device)

    def record(self, values: Sequence[Tensor] | None = None) -> dict[str, Any]:
        """What a checkpoint holds; `values` in the place of the weights where given (their average)."""
        given = zip(self.weights, self.weights.values() if values is None else values, strict=True)
        return {"rank": self.rank, "alpha": self.alpha, "weights": {name: weight.detach() for name, weight in given}}

    def load(self, record: Mapping[str, Any]) -> None:
        """Take the weights of a checkpoint. Raises UserError where they do not fit."""
        fill_adapter(self.weights, record)

    @contextlib.contextmanager
    def using(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Compute with `values` instead of the weights, for a while."""
        own = [weight.detach().clone() for weight in self.weights.values()]
        try:
            self.load(self.record(values))
            yield
        finally:
            self.load(self.record(own))


class LivePolicy(nn.Module):
    """The policy and the LoRA weights as one module to train: what `Policy.forward` takes, and the samples' numbers
    in `sample`.

    The frozen VLM is no part of it: nobody is to average, move or save it.
    """

    def __init__(self, policy: Policy, live: LiveVlm, samples: SampleSet) -> None:
        super().__init__()
        self.policy = policy
        self.adapter = nn.ParameterList(live.weights.values())
        self._live, self._samples = live, samples

    def forward(self, batch: Batch, draws: dict[str, Tensor] | None = None) -> Tensor:
        """Losses (B, H) as `Policy.forward` gives them; gradients reach the policy and the LoRA weights."""
        tokens, mask = self._live.features(self._samples, batch["sample"].cpu().numpy())
        # a batch without a picture: every process still has every gradient
        unused = torch.stack([weight.sum() for weight in self.adapter]).sum() * 0.0
        return self.policy(batch | {"vl_tokens": tokens, "vl_mask": mask}, draws) + unused


class LiveSamples:
    """A SampleSet whose batches hold features of the VLM with the LoRA weights `values`, for validation."""

    def __init__(self, samples: SampleSet, live: LiveVlm, values: Sequence[Tensor]) -> None:
        self._samples, self._live, self._values = samples, live, values

    def __len__(self) -> int:
        return len(self._samples)

    def batch(self, numbers: Sequence[int] | np.ndarray) -> Batch:
        with torch.no_grad(), self._live.using(self._values):
            tokens, mask = self._live.features(self._samples, np.asarray(numbers))
        return self._samples.batch(numbers) | {"vl_tokens": tokens, "vl_mask": mask}
