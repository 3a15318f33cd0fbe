"""A checkpoint in; the dataset that it was trained on, and how the simulated rig must be set up for it (or why it cannot be), out."""

from collections import Counter
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.evaluation.rollout import RolloutSettings
from vla_lib.evaluation.sim_robot import DEFAULT_TASK, MANIFEST, VIEWS, instruction_of
from vla_lib.features.vlm import open_checkpoint
from vla_lib.training.checkpoint import read_checkpoint


def rig_settings(checkpoint: Path, dataset_root: Path | None = None, judge: bool = True) -> RolloutSettings:
    """RolloutSettings of a checkpoint: pictures, task and instruction as its dataset's recording on the rig has them (of several tasks the
    one with the most episodes), VL features as late as in training.

    Without `judge`, a policy of other recordings is taken too: its pictures are then as large as its VLM asks for, so that a rehearsal's timing is
    true, though what it does means nothing. Raises UserError with the reason of `rig_refusal` where the rig cannot serve it.
    """
    if refusal := rig_refusal(checkpoint, dataset_root, judge):
        raise UserError(refusal)
    content = read_checkpoint(checkpoint)
    latency_ms = float(content["settings"]["vlm_latency_ms"])
    manifest = _root(content, dataset_root) / MANIFEST
    if manifest.is_file():
        recorded = read_json(manifest)
        how = {name: recorded["plan"][name] for name in ("picture_width", "picture_height", "camera_hz")}
        tasks = Counter(entry["task"] for entry in recorded["episodes"]) or {DEFAULT_TASK: 0}
        how["task"] = max(tasks, key=tasks.__getitem__)
        how["instruction"] = instruction_of(how["task"], manifest.parent)
    else:
        how = {f"picture_{side}": int(content["binding"][f"image_resize_{side}"]) for side in ("width", "height")}
    return RolloutSettings(checkpoint, vlm_latency_ms=latency_ms, **how)


def rig_refusal(checkpoint: Path, dataset_root: Path | None = None, judge: bool = True) -> str:
    """Why the simulated rig cannot judge this checkpoint (without `judge`: cannot run it at all), one sentence; "" where it can."""
    binding = read_checkpoint(checkpoint)["binding"]
    if unknown := [view for view in binding["views"] if view not in VIEWS]:
        return f"{checkpoint} sees the view {unknown[0]}, which the simulated rig does not have ({', '.join(VIEWS)}): it cannot run there."
    if judge and not (dataset_of(checkpoint, dataset_root) / MANIFEST).is_file():
        return (
            f"{dataset_of(checkpoint, dataset_root)} was not recorded on the simulated rig (it has no {MANIFEST}): the rig's phantoms say nothing "
            f"about {checkpoint}; evaluate it without closed-loop seeds, or train on a recording of `python -m needle_rig`."
        )
    try:
        open_checkpoint(binding["source"])
    except UserError as error:
        return f"The VLM of {checkpoint} is not at hand, so it cannot look at the rig: {error}"
    return ""


def dataset_of(checkpoint: Path, dataset_root: Path | None = None) -> Path:
    """`dataset_root`, or the folder that the checkpoint says it was trained on. Raises UserError where that is gone."""
    root = _root(read_checkpoint(checkpoint), dataset_root)
    if not root.is_dir():
        raise UserError(
            f"{checkpoint} was trained on {root}, which is not there; give the folder of its dataset with --dataset-root."
        )
    return root


def _root(content: dict[str, Any], dataset_root: Path | None) -> Path:
    return Path(content["settings"]["dataset_root"] if dataset_root is None else dataset_root)
