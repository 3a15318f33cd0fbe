"""Episodes of several datasets in, two lists of episode keys out: training and held out, never a window of one episode on both sides."""

import hashlib
from collections import defaultdict
from collections.abc import Mapping

from vla_lib.core.errors import UserError


def split_episodes(datasets: Mapping[str, str], val_fraction: float, seed: int = 0) -> dict[str, list[str]]:
    """`{episode key: dataset}` -> `{"train": [...], "val": [...]}`, both sorted.

    Stratified: of each dataset with n >= 2 episodes round(n * val_fraction) are held out, at least one. Which ones follows from a
    hash of seed and key, so that neither the order of the files nor a new episode elsewhere moves the others.
    Raises UserError where nothing would be left to train on or to validate with.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for key, dataset in datasets.items():
        groups[dataset].append(key)
    train: list[str] = []
    val: list[str] = []
    for keys in groups.values():
        keys.sort(key=lambda key: hashlib.sha256(f"{seed}:{key}".encode()).hexdigest())
        held = 0
        if val_fraction > 0 and len(keys) > 1:
            held = min(max(1, round(len(keys) * val_fraction)), len(keys) - 1)
        val += keys[:held]
        train += keys[held:]
    if not train:
        raise UserError("There is no episode to train on; run `python -m vla_lib.preprocess` on the dataset first.")
    if val_fraction > 0 and not val:
        raise UserError(
            "No dataset has two episodes, so none can be held out; record more, or pass --val-fraction 0 to train without validation."
        )
    return {"train": sorted(train), "val": sorted(val)}
