"""Training settings in; the checked data of a training out: episodes, cache, split, sample sets, weights. Everything fails here, early.

Notebooks call `prepare_data` for their preflight; the training loop calls it for itself.
"""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.policy.config import PolicyConfig
from vla_lib.training.sampler import shares
from vla_lib.training.samples import SampleSet
from vla_lib.training.settings import TrainingSettings
from vla_lib.training.split import split_episodes
from vla_lib.training.starting_point import check_stage1, stage1


@dataclass(frozen=True)
class TrainingData:
    """What a training stands on. `episode_weights`: of each training episode, by key; `val` is None where nothing is held out."""

    train: SampleSet
    val: SampleSet | None
    split: dict[str, list[str]]
    fingerprints: dict[str, str]
    episode_weights: dict[str, float]
    cache: Any  # the FeatureCache

    @property
    def weights(self) -> np.ndarray:
        """Of each training sample (n,), float64."""
        return np.array(list(self.episode_weights.values()), dtype=np.float64)[self.train.episode]

    @property
    def binding(self) -> dict[str, Any]:
        """What the VL features were made with."""
        return dict(self.cache.binding)

    def policy_config(self, settings: TrainingSettings) -> PolicyConfig:
        """The policy that fits these data and settings."""
        tokens, dim = self.train.token_shape
        layout = self.cache.layout
        assert tokens == len(layout.view_id)
        chosen = {f.name: getattr(settings, f.name) for f in fields(PolicyConfig) if hasattr(settings, f.name)}
        return PolicyConfig(
            **chosen,
            views=tuple(layout.views),
            token_dim=dim,
            token_view=tuple(np.asarray(layout.view_id).tolist()),
            token_row=tuple(np.asarray(layout.row).tolist()),
            token_col=tuple(np.asarray(layout.col).tolist()),
            action_hz=self.train.action_hz,
        )

    def weights_table(self) -> list[dict[str, Any]]:
        """One row a dataset, or a task of it where tasks have other weights: episodes, training steps, weight, and the share of all draws."""
        weights = {}  # of each dataset
        for episode, weight in zip(self.train.episodes, self.episode_weights.values(), strict=True):
            weights.setdefault(episode.dataset, set()).add(weight)

        def name(episode: Any) -> str:
            return f"{episode.dataset}/{episode.task}" if len(weights.get(episode.dataset, ())) > 1 else episode.dataset

        trained, held = [[name(e) for e in samples.episodes] if samples else [] for samples in (self.train, self.val)]
        names = np.asarray(trained)[self.train.episode]
        rows = []
        for group, part in shares(self.weights, names).items():
            row = {"dataset": group, "train_episodes": trained.count(group), "val_episodes": held.count(group)}
            weight = float(self.weights[names == group][0])
            rows.append(row | {"train_steps": int((names == group).sum()), "weight": weight, "share": part})
        return rows


def prepare_data(settings: TrainingSettings, split: dict[str, list[str]] | None = None) -> TrainingData:
    """Open, check and split the data. `split`: of a checkpoint to go on from; stage 2 takes that of its stage-1 checkpoint.

    Raises UserError with the command to run where there is no prepared episode or no VL cache, where the cache was made for another
    picture size or reuse count, where the sensor is asked for but no episode has one, and where a stage-1 checkpoint does not fit.
    """
    from vla_lib.episodes import DatasetTable, find_prepared, load_prepared
    from vla_lib.features.cache import FeatureCache, episode_key

    root = settings.dataset_root
    if not root.is_dir():
        raise UserError(f"--dataset-root {root} is not a folder; give the folder that the datasets lie in.")
    folders = find_prepared(root)
    if not folders:
        raise UserError(
            f"No data.pkl below {root}; run `python -m vla_lib.preprocess --dataset-root {shlex.quote(str(root))}` first."
        )
    episodes = {episode_key(root, folder): load_prepared(folder) for folder in folders}
    try:
        cache = FeatureCache.open(root, settings.cache_id or None)
    except UserError as error:
        raise UserError(f"{error} The features of these settings are built by: {cache_command(settings)}") from error
    check_cache(settings, cache.binding)
    start = stage1(settings) if settings.live_vlm and split is None else None
    if start is not None:
        split = start["split"]  # what stage 1 has trained on stays out of the held-out episodes
    if split is None:
        split = split_episodes({k: e.dataset for k, e in episodes.items()}, settings.val_fraction, settings.seed)
    gone = [k for k in (*split["train"], *split["val"]) if k not in episodes]
    if gone:
        raise UserError(
            f"{len(gone)} episodes of the checkpoint's split are gone from {root} (first: {gone[0]}); restore them or start a new run."
        )
    used = [episodes[k] for k in (*split["train"], *split["val"])]
    if settings.sensor_enabled and not any(e.has_sensor for e in used):
        raise UserError(f"No episode below {root} has sensor data; pass --no-sensor-enabled to train without it.")
    options = {
        "horizon": settings.horizon,
        "sensor_enabled": settings.sensor_enabled,
        "sensor_window_size": settings.sensor_window_size,
        "vlm_reuse_count": settings.vlm_reuse_count,
        "vlm_latency_ms": settings.vlm_latency_ms,
    }
    try:
        train = SampleSet([episodes[k] for k in split["train"]], cache, **options)
        val = SampleSet([episodes[k] for k in split["val"]], cache, **options) if split["val"] else None
    except UserError as error:
        if "cache" in str(error):
            raise UserError(
                f"{error} Missing features are added by: {cache_command(settings, cache.binding)}"
            ) from error
        raise
    table = DatasetTable.load(root)
    weights = {key: table.weight(episodes[key].dataset, episodes[key].task) for key in split["train"]}
    fingerprints = {k: str(episodes[k].fingerprint) for k in (*split["train"], *split["val"])}
    data = TrainingData(train, val, split, fingerprints, weights, cache)
    if start is not None:
        check_stage1(start, settings, data)
    return data


def cache_command(settings: TrainingSettings, binding: Mapping[str, Any] | None = None) -> str:
    """The command that builds the VL cache which these settings need, with the VLM of `binding` where it is known."""
    vlm = f"--vl-model {shlex.quote(str(binding['source']))} " if binding and binding.get("source") else ""
    return (
        f"python -m vla_lib.build_vl_cache --dataset-root {shlex.quote(str(settings.dataset_root))} {vlm}--vlm-reuse-count "
        f"{settings.vlm_reuse_count} --image-resize-height {settings.image_resize_height} --image-resize-width {settings.image_resize_width}"
    )


def check_cache(settings: TrainingSettings, binding: dict[str, Any]) -> None:
    """Raise UserError where the cache's picture size is not the settings', both sides named."""
    odd = list(_size_differences(settings, binding))
    if odd:
        raise UserError(
            f"The VL cache and the flags differ: {'; '.join(odd)}. Pass the cache's size, or build another: {cache_command(settings, binding)}"
        )


def _size_differences(settings: TrainingSettings, binding: dict[str, Any]) -> Iterator[str]:
    for name in ("image_resize_height", "image_resize_width"):
        if name in binding and int(binding[name]) != getattr(settings, name):
            yield f"{name.replace('_', '-')} is {binding[name]} in the cache, --{name.replace('_', '-')} {getattr(settings, name)} here"
