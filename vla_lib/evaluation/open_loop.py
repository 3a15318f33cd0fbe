"""Open loop: a checkpoint's errors on the held-out episodes of its own split, beside those of the three baselines.

The policy gets observations alone; the targets are compared afterwards. Low open-loop error is no success on the robot:
closed loop decides.

Shapes: M samples, H steps of a chunk (0.1 s each at 10 Hz), 7 action dimensions (dx dy dz in mm, rotation vector in
degrees, gripper).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from vla_lib.core.errors import UserError
from vla_lib.core.progress import Progress
from vla_lib.episodes import PreparedEpisode, load_prepared
from vla_lib.episodes.datasets import Marks
from vla_lib.features.cache import FeatureCache
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.features.vision_cache import ComputedFeatures
from vla_lib.policy.config import PolicyConfig
from vla_lib.runtime.expert import Input, hidden
from vla_lib.training.checkpoint import load_policy
from vla_lib.training.samples import PAIRING, SampleSet
from vla_lib.training.validation import BASELINES

DIMENSIONS = ("dx", "dy", "dz", "rx", "ry", "rz", "gripper")
UNITS = ("mm", "mm", "mm", "deg", "deg", "deg", "")
Metrics = dict[str, Any]
OBSERVATION = ("vl_tokens", "vl_mask", "vl_age_s", "vl_state", "state", "sensor", "sensor_mask")

CONTACT_MN = 5.0  # above the episode's own rest level; several times the sensor's noise
REST_S = 1.0
SAMPLES = 13  # 20 ms at 650 Hz, as the runner's force limit


@dataclass(frozen=True)
class OpenLoop:
    """Predictions of one checkpoint on M samples, the true chunks, and where they come from."""

    chunks: dict[str, np.ndarray]  # (M, H, 7) of `policy`, of it with an input masked (if asked for), of each baseline
    target: np.ndarray  # (M, H, 7)
    mask: np.ndarray  # (M, H) bool
    episode: np.ndarray  # (M,) key of the episode
    dataset: np.ndarray  # (M,)
    step: np.ndarray  # (M,)
    phase: np.ndarray  # (M,) "contact", "free" or "unknown"
    action_hz: float

    def metrics(self, keep: np.ndarray | slice = slice(None)) -> dict[str, Metrics]:
        """Metrics of the policy and of each baseline over the samples in `keep` (M,) bool (default: all)."""
        return {
            name: open_loop_metrics(chunk[keep], self.target[keep], self.mask[keep])
            for name, chunk in self.chunks.items()
        }

    def by_dataset(self) -> dict[str, dict[str, Metrics]]:
        """`metrics` of each dataset apart."""
        return {str(name): self.metrics(self.dataset == name) for name in np.unique(self.dataset)}

    def by_phase(self) -> dict[str, dict[str, Metrics]]:
        """`metrics` of the steps in contact, of those in free motion, and of those whose force is not known."""
        return {str(name): self.metrics(self.phase == name) for name in np.unique(self.phase)}

    def results(self) -> dict[str, Any]:
        """What results.json records: plain figures, then all metrics of all methods, whole, by dataset and by phase."""
        metrics = self.metrics()
        plain = ("samples", "translation_mae_mm", "rotation_mae_deg", "translation_rmse_mm", "rotation_rmse_deg")
        keys = sorted({str(key) for key in self.episode})
        return {name: metrics["policy"][name] for name in plain} | {
            "held_out_episodes": len(keys),
            "episode_keys": keys,
            "beats": beaten(metrics),
            "metrics": metrics,
            "by_dataset": self.by_dataset(),
            "by_phase": self.by_phase(),
        }


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
    marks = Marks.load(dataset_root)
    left_out = {key: why for key in keys if (why := marks.left_out(key))}
    keys = [key for key in keys if key not in left_out]
    if left_out:
        first = next(iter(left_out))
        said = f"{len(left_out)} of {len(keys) + len(left_out)} {episodes} episodes are left out"
        said += f" ({first}: {left_out[first]})"
        if not keys:
            raise UserError(f"{said}; none is left to evaluate on.")
        print(f"{said}.", flush=True)
    prepared = [_episode(dataset_root, key) for key in keys]
    samples = sample_set(prepared, dataset_root, info)
    trained = [_episode(dataset_root, key) for key in info["split"]["train"]]
    actions = np.concatenate([np.asarray(episode.action)[episode.valid] for episode in trained])
    policy.to(device)

    methods: dict[str, Input] = {"policy": "nothing"}
    methods |= inputs_of(policy.config) if masked else {}
    predicted: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    truth: dict[str, list[np.ndarray]] = {name: [] for name in ("action", "action_mask", "previous_action")}
    with Progress(len(samples), "open loop", "samples") as progress:
        for start in range(0, len(samples), batch_size):
            batch = samples.batch(np.arange(start, min(start + batch_size, len(samples))))
            observation = {key: batch[key].to(device) for key in OBSERVATION if key in batch}
            with torch.inference_mode():
                for name, without in methods.items():
                    chunk = policy.predict(hidden(observation, without), ddim_steps=ddim_steps or None)
                    predicted[name].append(chunk.float().cpu().numpy())
            for name, parts in truth.items():
                parts.append(batch[name].numpy())
            progress.update(len(batch["action"]))
    chunks = {name: np.concatenate(parts) for name, parts in predicted.items()}
    target, mask, previous = (np.concatenate(parts) for parts in truth.values())
    chunks |= baseline_chunks(previous, actions.mean(axis=0, dtype=np.float64), target.shape[1])
    phase = [phases(episode)[samples.step[samples.episode == k]] for k, episode in enumerate(prepared)]
    return OpenLoop(
        chunks,
        target,
        mask,
        np.array(keys)[samples.episode],
        np.array([samples.episodes[e].dataset for e in samples.episode]),
        np.asarray(samples.step),
        np.concatenate(phase),
        samples.action_hz,
    )


def sampled_chunks(checkpoint: Path, dataset_root: Path, episode: str, count: int = 5) -> np.ndarray:
    """(count, N, H, 7): chunks from different noise that a diffusion policy draws for the N samples of one episode."""
    policy, info = load_policy(checkpoint)
    samples = sample_set([_episode(dataset_root, episode)], dataset_root, info)
    batch = samples.batch(np.arange(len(samples)))
    observation = {key: batch[key] for key in OBSERVATION if key in batch}
    drawn = []
    with torch.inference_mode():
        for number in range(count):
            noise = policy.head.noise(len(samples), torch.Generator().manual_seed(number))
            # of one chunk: the policy's own answer is the median of several
            drawn.append(policy.predict(observation, noise=None if noise is None else noise[:, :1]))
    return torch.stack(drawn).float().numpy()


def inputs_of(config: PolicyConfig) -> dict[str, Input]:
    """Name -> "vl" or "sensor" of each input that the policy uses and that can be masked."""
    used: dict[str, tuple[Input, bool]] = {
        "VL masked": ("vl", config.vl_enabled),
        "sensor masked": ("sensor", config.sensor_enabled),
    }
    return {name: without for name, (without, uses) in used.items() if uses}


def sample_set(episodes: Sequence[PreparedEpisode], dataset_root: Path, info: Mapping[str, Any]) -> SampleSet:
    """The samples of `episodes` as the checkpoint with this `info` was trained on: same cache, window, reuse, latency.

    Stage 2 changed the VLM, so no cache holds its features: they are computed here.
    """
    binding = info["binding"]
    features: FeatureCache | ComputedFeatures
    if info["adapter"] is None:
        features = FeatureCache.open(dataset_root, binding["id"])
    else:
        extractor = FeatureExtractor.from_binding(binding, adapter=info["adapter"])
        features = ComputedFeatures(extractor, binding["tick_stride"])
    trained = {"vlm_latency_max_ms": 0.0} | info["settings"]  # checkpoints of earlier versions have one delay
    return SampleSet(episodes, features, **{name: trained[name] for name in PAIRING})


def phases(episode: PreparedEpisode) -> np.ndarray:
    """(N,) of "contact" (measured force, mean of 20 ms up to the step, more than 5 mN above the median of the episode's
    first second), "free", and "unknown" where the episode has no sensor sample by then."""
    found = np.full(len(episode), "unknown", dtype="<U7")
    force, end = np.asarray(episode.sensor_force if episode.has_sensor else (), np.float64), episode.sensor_index
    if not len(force) or not np.isfinite(force).all():
        return found
    begin = np.maximum(end - SAMPLES, 0)
    total = np.concatenate([[0.0], np.cumsum(force)])
    seen = end > 0
    mean = (total[end] - total[begin])[seen] / (end - begin)[seen]
    first = int(end[0])  # sample at which the robot's log begins; the sensor ran before, at rest
    rest = np.median(force[max(0, first - round(REST_S * episode.sensor_hz)) : first] if first else mean[:5])
    found[seen] = np.where(mean - rest > CONTACT_MN, "contact", "free")
    return found


def beaten(metrics: Mapping[str, Metrics]) -> dict[str, bool]:
    """For each baseline whether the policy's RMS errors of translation and of rotation are both below it.

    RMS, because the mean baseline is the best constant in that sense; mean absolute errors stand beside it in every
    table.
    """
    ours = metrics["policy"]
    return {
        name: all(ours[key] < metrics[name][key] for key in ("translation_rmse_mm", "rotation_rmse_deg"))
        for name in BASELINES
    }


def _episode(dataset_root: Path, key: str) -> PreparedEpisode:
    path = Path(dataset_root) / key
    if not path.is_dir():
        raise UserError(
            f"The checkpoint's split names the episode {key}, which is not below {dataset_root}; "
            "give the dataset it was trained on."
        )
    return load_prepared(path)


# ---------------------------------------------------------------- metrics


def baseline_chunks(previous_action: np.ndarray, mean_action: np.ndarray, horizon: int) -> dict[str, np.ndarray]:
    """Chunks (M, horizon, 7) of each baseline for M samples.

    previous_action (M, 7): the motion that ended at the step (all that a robot could have known); mean_action (7,):
    mean over the valid steps of the training episodes. `zero` does not move, `mean` moves as the training data do on
    average, `persistence` repeats the previous motion.
    """
    shape = (len(previous_action), horizon, previous_action.shape[1])
    return {
        "zero": np.zeros(shape, np.float32),
        "mean": np.broadcast_to(mean_action.astype(np.float32), shape),
        "persistence": np.broadcast_to(previous_action.astype(np.float32)[:, None], shape),
    }


def open_loop_metrics(predicted: np.ndarray, target: np.ndarray, mask: np.ndarray) -> Metrics:
    """Errors of `predicted` (M, H, 7) against `target` (M, H, 7) where `mask` (M, H) is True.

    Returns `translation_mae_mm` (mean Euclidean error of a step's motion), `rotation_mae_deg`, the same as RMSE,
    `dimensions` (MSE, MAE, R2, correlation of each; R2 and correlation are None for a dimension that does not vary),
    `by_step` (errors by chunk index) and `path_error_mm` (distance between the integrated motions at the end of full
    chunks). Raises ValueError for unequal shapes or an empty mask.
    """
    if predicted.shape != target.shape or mask.shape != target.shape[:2]:
        raise ValueError(f"shapes differ: predicted {predicted.shape}, target {target.shape}, mask {mask.shape}")
    if not mask.any():
        raise ValueError("no valid step to evaluate")
    predicted, target = predicted.astype(np.float64), target.astype(np.float64)
    error = predicted - target
    sizes = {  # (M, H) Euclidean error of each step's motion
        "translation_{}_mm": np.linalg.norm(error[..., 0:3], axis=-1),
        "rotation_{}_deg": np.linalg.norm(error[..., 3:6], axis=-1),
    }
    full = mask.all(axis=1)  # only these: sums over different spans cannot be compared
    path = np.linalg.norm(error[full][..., 0:3].sum(axis=1), axis=-1)
    return {
        "samples": int(mask.any(axis=1).sum()),
        **{name.format("mae"): float(size[mask].mean()) for name, size in sizes.items()},
        **{name.format("rmse"): float(np.sqrt((size[mask] ** 2).mean())) for name, size in sizes.items()},
        "path_error_mm": _mean(path),
        "dimensions": {
            name: _dimension(predicted[mask][:, k], target[mask][:, k]) for k, name in enumerate(DIMENSIONS)
        },
        "by_step": {
            name.format("mae"): [_mean(size[:, h][mask[:, h]]) for h in range(mask.shape[1])]
            for name, size in sizes.items()
        },
    }


def _dimension(predicted: np.ndarray, target: np.ndarray) -> dict[str, float | None]:
    error = predicted - target
    varies = bool(target.std() > 1e-6)  # R2 and correlation divide by the spread
    related = varies and bool(predicted.std() > 1e-9)
    return {
        "mse": float((error**2).mean()),
        "mae": float(np.abs(error).mean()),
        "r2": float(1 - (error**2).mean() / target.var()) if varies else None,
        "correlation": float(np.corrcoef(predicted, target)[0, 1]) if related else None,
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


# ---------------------------------------------------------------- tables


def error_table(metrics: Mapping[str, Metrics]) -> pd.DataFrame:
    """One row a method (the policy, the policy with an input masked, each baseline): mean and RMS error of a step's
    motion, error of the whole chunk's path, mean R2 over the moving dimensions."""
    columns = {
        "translation_mae_mm": "translation MAE (mm)",
        "translation_rmse_mm": "translation RMSE (mm)",
        "rotation_mae_deg": "rotation MAE (deg)",
        "rotation_rmse_deg": "rotation RMSE (deg)",
        "path_error_mm": "path error of a chunk (mm)",
    }
    table = pd.DataFrame(metrics).loc[list(columns)].astype(float).T.rename(columns=columns)
    dimensions = {name: pd.DataFrame(found["dimensions"]).loc["r2"].astype(float) for name, found in metrics.items()}
    table["R2 (mean)"] = pd.DataFrame(dimensions).mean()
    return table.rename_axis("method").reset_index()


def phase_table(found: OpenLoop) -> pd.DataFrame:
    """`error_table` of each phase (contact, free motion, and where the force is not known), one below the other."""
    tables = {phase: error_table(metrics) for phase, metrics in found.by_phase().items()}
    table = pd.concat(tables, names=["phase"]).reset_index("phase")
    table.insert(1, "steps", table["phase"].map(pd.Series(found.phase).value_counts()))
    return table


def dimension_table(metrics: Mapping[str, Metrics]) -> pd.DataFrame:
    """One row a dimension of the action: the policy's MSE, MAE, R2 and correlation, and each baseline's MAE."""
    table = pd.DataFrame(metrics["policy"]["dimensions"]).T[["mse", "mae", "r2", "correlation"]].astype(float)
    table = table.rename(columns={"mse": "MSE", "mae": "MAE", "r2": "R2"})
    for name in BASELINES:
        table[f"MAE of {name}"] = [metrics[name]["dimensions"][dimension]["mae"] for dimension in DIMENSIONS]
    labels = [f"{name} ({unit})" if unit else name for name, unit in zip(DIMENSIONS, UNITS, strict=True)]
    return table.set_axis(labels).rename_axis("dimension").reset_index()


def side_by_side(found: Mapping[str, OpenLoop]) -> pd.DataFrame:
    """One row a checkpoint: its policy's row of `error_table`, episodes, and the baselines that it does not beat."""
    rows = []
    for name, loop in found.items():
        metrics = loop.metrics()
        lost_to = ", ".join(other for other, won in beaten(metrics).items() if not won)
        row = error_table(metrics).iloc[0].to_dict() | {"method": name, "episodes": len(np.unique(loop.episode))}
        rows.append(row | {"not better than": lost_to or "-"})
    return pd.DataFrame(rows).rename(columns={"method": "checkpoint"})
