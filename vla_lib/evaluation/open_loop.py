"""Open-loop evaluation: a checkpoint and its held-out episodes in; the policy's errors beside the three baselines' out.

The policy gets observations alone; the targets are compared afterwards. Low open-loop error is no success on the robot: closed loop decides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_lib.core.errors import UserError
from vla_lib.core.progress import Progress
from vla_lib.episodes import load_prepared
from vla_lib.evaluation.baselines import baseline_chunks
from vla_lib.evaluation.contact import phases
from vla_lib.evaluation.metrics import open_loop_metrics
from vla_lib.features.cache import FeatureCache
from vla_lib.policy.config import PolicyConfig
from vla_lib.runtime.expert import hidden
from vla_lib.training.checkpoint import load_policy
from vla_lib.training.samples import SampleSet
from vla_lib.training.validation import BASELINES

OBSERVATION = ("vl_tokens", "vl_mask", "vl_age_s", "state", "sensor", "sensor_mask")
VL_MASKED, SENSOR_MASKED = "VL masked", "sensor masked"


@dataclass(frozen=True)
class OpenLoop:
    """Predictions of one checkpoint on M samples: chunks (M, H, 7) of `policy`, of the policy with an input masked (where asked for) and of each
    baseline, `target`, `mask` (M, H), and where they come from."""

    chunks: dict[str, np.ndarray]
    target: np.ndarray
    mask: np.ndarray
    episode: np.ndarray  # (M,) key of the episode
    dataset: np.ndarray  # (M,)
    step: np.ndarray  # (M,)
    phase: np.ndarray  # (M,) "contact", "free" or "unknown"
    action_hz: float

    def metrics(self, keep: np.ndarray | None = None) -> dict[str, dict[str, Any]]:
        """Metrics of the policy and of each baseline over the samples in `keep` (M,) bool (default: all)."""
        keep = np.ones(len(self.step), bool) if keep is None else keep
        return {
            name: open_loop_metrics(chunk[keep], self.target[keep], self.mask[keep])
            for name, chunk in self.chunks.items()
        }

    def by_dataset(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`metrics` of each dataset apart."""
        return self._by(self.dataset)

    def by_phase(self) -> dict[str, dict[str, dict[str, Any]]]:
        """`metrics` of the steps in contact, of those in free motion, and of those whose force is not known."""
        return self._by(self.phase)

    def _by(self, labels: np.ndarray) -> dict[str, dict[str, dict[str, Any]]]:
        return {str(name): self.metrics(labels == name) for name in np.unique(labels)}


def evaluate_open_loop(
    checkpoint: Path,
    dataset_root: Path,
    episodes: str = "val",
    batch_size: int = 64,
    device: str = "cpu",
    masked: bool = False,
    ddim_steps: int = 0,
) -> OpenLoop:
    """Run the checkpoint's policy over the `val` or `train` episodes of its own recorded split.

    `masked`: also without VL and without sensor; `ddim_steps`: denoising steps of a diffusion policy, 0: its own.

    Raises UserError where the checkpoint, an episode of its split or its feature cache is missing or another one.
    """
    policy, info = load_policy(checkpoint)
    keys = info["split"][episodes]
    if not keys:
        raise UserError(
            f"{checkpoint} was trained with no {episodes} episodes; train again with --val-fraction above 0."
        )
    prepared = [_episode(dataset_root, key) for key in keys]
    samples = sample_set(prepared, dataset_root, info)
    mean_action = _mean_action([_episode(dataset_root, key) for key in info["split"]["train"]])
    policy.to(device)

    inputs = inputs_of(policy.config) if masked else {}
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in ("policy", *inputs)}
    target, mask, previous = [], [], []
    with Progress(len(samples), "open loop", "samples") as progress:
        for start in range(0, len(samples), batch_size):
            batch = samples.batch(np.arange(start, min(start + batch_size, len(samples))))
            observation = {key: batch[key].to(device) for key in OBSERVATION if key in batch}
            with torch.inference_mode():
                for name, without in {"policy": "nothing", **inputs}.items():
                    chunk = policy.predict(hidden(observation, without), ddim_steps=ddim_steps or None)
                    predicted[name].append(chunk.float().cpu().numpy())
            target.append(batch["action"].numpy())
            mask.append(batch["action_mask"].numpy())
            previous.append(batch["previous_action"].numpy())
            progress.update(len(target[-1]))
    chunks = {name: np.concatenate(parts) for name, parts in predicted.items()}
    chunks |= baseline_chunks(np.concatenate(previous), mean_action, chunks["policy"].shape[1])
    return OpenLoop(
        chunks,
        np.concatenate(target),
        np.concatenate(mask),
        np.array(keys)[samples.episode],
        np.array(samples.datasets),
        np.asarray(samples.step),
        np.concatenate([phases(episode)[samples.step[samples.episode == k]] for k, episode in enumerate(prepared)]),
        samples.action_hz,
    )


def sampled_chunks(checkpoint: Path, dataset_root: Path, episode: str, count: int = 5) -> np.ndarray:
    """(count, N, H, 7): chunks that a diffusion policy draws from different noise for each of the N samples of one episode (its key)."""
    policy, info = load_policy(checkpoint)
    samples = sample_set([_episode(dataset_root, episode)], dataset_root, info)
    batch = samples.batch(np.arange(len(samples)))
    observation = {key: batch[key] for key in OBSERVATION if key in batch}
    with torch.inference_mode():
        noise = [
            policy.head.noise(len(samples), torch.Generator().manual_seed(number))[:, :1] for number in range(count)
        ]
        drawn = [policy.predict(observation, noise=one) for one in noise]
    return torch.stack(drawn).float().numpy()


def inputs_of(config: PolicyConfig) -> dict[str, str]:
    """Name -> "vl" or "sensor" of each input that the policy uses and that can be masked."""
    used = {VL_MASKED: ("vl", config.vl_enabled), SENSOR_MASKED: ("sensor", config.sensor_enabled)}
    return {name: without for name, (without, uses) in used.items() if uses}


def sample_set(episodes: Sequence[Any], dataset_root: Path, info: dict[str, Any]) -> SampleSet:
    """The samples of `episodes` as the checkpoint with this `info` was trained on them (same cache, window, reuse, latency).

    Stage 2 changed the VLM, so no cache holds its features: they are computed here.
    """
    binding = info["binding"]
    if info["adapter"] is None:
        features: Any = FeatureCache.open(dataset_root, binding["id"])
    else:
        from vla_lib.features.computed import ComputedFeatures
        from vla_lib.features.extractor import FeatureExtractor

        features = ComputedFeatures(
            FeatureExtractor.from_binding(binding, adapter=info["adapter"]), binding["tick_stride"]
        )
    settings = info["settings"]
    names = ("horizon", "sensor_enabled", "sensor_window_size", "vlm_reuse_count", "vlm_latency_ms")
    return SampleSet(episodes, features, **{name: settings[name] for name in names})


def beaten(metrics: dict[str, dict[str, Any]]) -> dict[str, bool]:
    """For each baseline whether the policy's RMS errors of translation and of rotation are both below it.

    RMS, because the mean baseline is the best constant in that sense; mean absolute errors stand beside it in every table.
    """
    ours = metrics["policy"]
    return {
        name: all(ours[key] < metrics[name][key] for key in ("translation_rmse_mm", "rotation_rmse_deg"))
        for name in BASELINES
    }


def _episode(dataset_root: Path, key: str) -> Any:
    path = Path(dataset_root) / key
    if not path.is_dir():
        raise UserError(
            f"The checkpoint's split names the episode {key}, which is not below {dataset_root}; give the dataset it was trained on."
        )
    return load_prepared(path)


def _mean_action(episodes: Sequence[Any]) -> np.ndarray:
    return np.concatenate([np.asarray(episode.action)[episode.valid] for episode in episodes]).mean(
        axis=0, dtype=np.float64
    )
