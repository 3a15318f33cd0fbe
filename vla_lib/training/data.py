"""The data of a run: episodes, VL cache, split, sample sets and weights, opened and checked: all fails early, here.

Notebooks call `prepare_data` for their preflight; the training loop calls it for itself.
"""

import hashlib
import shlex
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.settings import flag
from vla_lib.episodes import DatasetTable, PreparedEpisode, load_used
from vla_lib.features.cache import FeatureCache
from vla_lib.policy.config import PolicyConfig
from vla_lib.training.checkpoint import check_stage1, read_stage1
from vla_lib.training.samples import PAIRING, SampleSet
from vla_lib.training.settings import TrainingSettings

Split = dict[str, list[str]]
SENSOR_RATE_PART = 0.15  # the lab's own recorders differ by this much: 650 Hz, and about 700 in F4


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from. `episode_weights`: of training episodes, by key; `val`: None if nothing is held out."""

    train: SampleSet
    val: SampleSet | None
    split: Split
    fingerprints: dict[str, str]
    episode_weights: dict[str, float]
    cache: FeatureCache
    notes: tuple[str, ...] = ()
    """Sentences about datasets that no table names, and recordings that are there twice."""

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
        layout = self.cache.layout
        return PolicyConfig(
            **{f.name: getattr(settings, f.name) for f in fields(PolicyConfig) if hasattr(settings, f.name)},
            views=tuple(layout.views),
            token_dim=self.train.token_shape[1],
            token_view=tuple(np.asarray(layout.view_id).tolist()),
            token_row=tuple(np.asarray(layout.row).tolist()),
            token_col=tuple(np.asarray(layout.col).tolist()),
            action_hz=self.train.action_hz,
            vl_ages_s=self.train.trained_ages_s,
        )

    def weights_table(self) -> list[dict[str, Any]]:
        """One row a dataset, or a task of it where tasks differ in weight: episodes, steps, weight, share of draws."""
        weights, episodes = list(self.episode_weights.values()), self.train.episodes
        of_dataset = {(e.dataset, weight) for e, weight in zip(episodes, weights, strict=True)}
        several = Counter(dataset for dataset, _ in of_dataset)

        def group(e: PreparedEpisode) -> str:
            return f"{e.dataset}/{e.task}" if several[e.dataset] > 1 else e.dataset

        steps = np.bincount(self.train.episode, minlength=len(episodes))
        train = pd.DataFrame({"dataset": map(group, episodes), "train_steps": steps, "weight": weights})
        train["share"] = train["weight"] * train["train_steps"] / np.dot(weights, steps)
        rows = train.groupby("dataset").agg({"train_steps": "sum", "weight": "first", "share": "sum"})
        rows.insert(0, "train_episodes", train["dataset"].value_counts())
        held = Counter(map(group, self.val.episodes if self.val else ()))
        rows.insert(1, "val_episodes", [held[name] for name in rows.index])
        return cast(list[dict[str, Any]], rows.reset_index().to_dict("records"))


def split_episodes(datasets: Mapping[str, str], val_fraction: float, seed: int = 0) -> Split:
    """`{episode key: dataset}` -> `{"train": [...], "val": [...]}`, both sorted; never a window of one episode on
    both sides.

    Stratified: of each dataset with n >= 2 episodes round(n * val_fraction) are held out, at least one. Which ones
    follows from a hash of seed and key, so that neither the order of the files nor a new episode elsewhere moves the
    others. Raises UserError where nothing would be left to train on or to validate with."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, dataset in datasets.items():
        groups[dataset].append(key)
    split: Split = {"train": [], "val": []}
    for keys in groups.values():
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
        held = min(max(1, round(len(keys) * val_fraction)), len(keys) - 1) if val_fraction > 0 else 0
        split["val"] += keys[:held]
        split["train"] += keys[held:]
    if not split["train"]:
        raise UserError("There is no episode to train on; run `python -m vla_lib.preprocess` on the dataset first.")
    if val_fraction > 0 and not split["val"]:
        raise UserError("No dataset has two episodes, so none can be held out; record more, or pass --val-fraction 0.")
    return {side: sorted(keys) for side, keys in split.items()}


def _check_sensor_rates(episodes: Sequence[PreparedEpisode], window: int) -> None:
    """A window is a span of time: one rate a training. Raises UserError naming the spans and an episode of each."""
    slowest, *_, fastest = sorted([*episodes, episodes[0]], key=lambda episode: episode.sensor_hz)
    if fastest.sensor_hz > (1 + SENSOR_RATE_PART) * slowest.sensor_hz:
        spans = " and ".join(
            f"{1e3 * window / episode.sensor_hz:.0f} ms in {episode.name} ({episode.sensor_hz:.0f} Hz)"
            for episode in (slowest, fastest)
        )
        remedy = "train the datasets of one rate alone, or resample the sensor files of the others"
        raise UserError(f"A sensor window of {window} samples would last {spans}: one rate a training; {remedy}.")


def prepare_data(settings: TrainingSettings, split: Split | None = None) -> TrainingData:
    """Open, check and split the data. `split`: of a checkpoint to go on from; stage 2 takes that of its stage-1
    checkpoint.

    Raises UserError with the command to run where there is no prepared episode or no VL cache, where the cache was
    made for another picture size or reuse count, where the sensor is asked for but no episode has one, and where a
    stage-1 checkpoint does not fit."""
    root = settings.dataset_root
    if not root.is_dir():
        raise UserError(f"--dataset-root {root} is not a folder; give the folder that the datasets lie in.")
    episodes, notes = _each_once(load_used(root), split)
    try:
        cache = FeatureCache.open(root, settings.cache_id or None)
    except UserError as error:
        raise UserError(f"{error} The features of these settings are built by: {cache_command(settings)}") from error
    _check_picture_size(settings, cache.binding)

    start = read_stage1(settings) if settings.live_vlm and split is None else None
    if start is not None:
        split = start["split"]  # what stage 1 has trained on stays out of the held-out episodes
    if split is None:
        split = split_episodes({k: e.dataset for k, e in episodes.items()}, settings.val_fraction, settings.seed)
    keys = [*split["train"], *split["val"]]
    if gone := [key for key in keys if key not in episodes]:
        said = f"{len(gone)} episodes of the checkpoint's split are gone from {root}, or left out there"
        raise UserError(f"{said} (first: {gone[0]}); restore them or start a new run.")
    if settings.sensor_enabled and not any(episodes[key].has_sensor for key in keys):
        raise UserError(f"No episode below {root} has sensor data; pass --no-sensor-enabled to train without it.")
    if settings.sensor_enabled:
        _check_sensor_rates([episodes[key] for key in keys if episodes[key].has_sensor], settings.sensor_window_size)

    def samples(side: str) -> SampleSet:
        given = {name: getattr(settings, name) for name in PAIRING}
        return SampleSet([episodes[key] for key in split[side]], cache, **given)

    try:
        train, val = samples("train"), samples("val") if split["val"] else None
    except UserError as error:
        if "cache" not in str(error):
            raise
        raise UserError(f"{error} Missing features are added by: {cache_command(settings, cache.binding)}") from error
    table = DatasetTable.load(root)
    weights = {key: table.weight(episodes[key].dataset, episodes[key].task) for key in split["train"]}
    notes += table.unknown((episodes[key].dataset, episodes[key].task) for key in keys)
    fingerprints = {key: str(episodes[key].fingerprint) for key in keys}
    data = TrainingData(train, val, split, fingerprints, weights, cache, tuple(notes))
    if start is not None:
        where = f"--stage1-checkpoint {settings.stage1_checkpoint}"
        check_stage1(start, data.binding, data.policy_config(settings), where)
    return data


def _each_once(
    episodes: Mapping[str, PreparedEpisode], split: Split | None
) -> tuple[dict[str, PreparedEpisode], list[str]]:
    """The episodes without copies of a recording, and a sentence for each recording that has any. A copy that a
    checkpoint's split names stays, for its run to go on as it was.

    Preprocessing leaves copies out; those that were prepared apart, or before they lay together, are met here."""
    named = {key for keys in split.values() for key in keys} if split else set()

    def rank(key: str) -> tuple[bool, bool, int, str]:
        return key not in named, not episodes[key].has_sensor, len(key), key

    kept: dict[str, str] = {}
    once, copies = dict(episodes), defaultdict[str, list[str]](list)
    for key in sorted(episodes, key=rank):
        recording = episodes[key].metadata.get("recording")
        if recording is None or kept.setdefault(str(recording), key) == key or key in named:
            continue
        copies[kept[str(recording)]].append(key)
        del once[key]
    notes = []
    for key, twins in copies.items():
        more = f" and {len(twins) - 5} more" if len(twins) > 5 else ""
        notes.append(f"Only {key} is used of one recording; its copies are left out: {', '.join(twins[:5])}{more}.")
    return once, notes


def cache_command(settings: TrainingSettings, binding: Mapping[str, Any] | None = None) -> str:
    """The command that builds the VL cache which these settings need, with the VLM of `binding` where it is known."""
    words = ["python", "-m", "vla_lib.build_vl_cache", "--dataset-root", str(settings.dataset_root)]
    if binding and binding.get("source"):
        words += ["--vl-model", str(binding["source"])]
    for name in ("vlm_reuse_count", "image_resize_height", "image_resize_width"):
        words += [flag(name), str(getattr(settings, name))]
    return shlex.join(words)


def _check_picture_size(settings: TrainingSettings, binding: Mapping[str, Any]) -> None:
    odd = [
        f"{flag(name)[2:]} is {binding[name]} in the cache, {flag(name)} {getattr(settings, name)} here"
        for name in ("image_resize_height", "image_resize_width")
        if name in binding and int(binding[name]) != getattr(settings, name)
    ]
    if odd:
        remedy = f"Pass the cache's size, or build another: {cache_command(settings, binding)}"
        raise UserError(f"The VL cache and the flags differ: {'; '.join(odd)}. {remedy}")
