"""A checkpoint in; the data set that it was trained on, and how the simulated rig must be set up for it (or why it cannot be), out."""

from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.evaluation.attempt import AttemptSettings
from vla_lib.features.vlm import open_checkpoint
from vla_lib.sim.world import VIEWS
from vla_lib.training.checkpoint import read_checkpoint

MANIFEST = "simulation.json"  # what a recording of the rig leaves at its root


def rig_settings(checkpoint: Path, dataset_root: Path | None = None) -> AttemptSettings:
    """AttemptSettings of a checkpoint with pictures as its data set's recording on the rig has them, and VL features as late as it was trained with.

    Raises UserError with the reason of `rig_refusal` where the rig cannot judge it.
    """
    if refusal := rig_refusal(checkpoint, dataset_root):
        raise UserError(refusal)
    plan = read_json(dataset_of(checkpoint, dataset_root) / MANIFEST)["plan"]
    pictures = {name: plan[name] for name in ("picture_width", "picture_height", "camera_hz")}
    return AttemptSettings(checkpoint, vlm_latency_ms=float(read_checkpoint(checkpoint)["settings"]["vlm_latency_ms"]), **pictures)


def rig_refusal(checkpoint: Path, dataset_root: Path | None = None) -> str:
    """Why the simulated rig cannot judge this checkpoint, one sentence; "" where it can."""
    binding = read_checkpoint(checkpoint)["binding"]
    root = dataset_of(checkpoint, dataset_root)
    if unknown := [view for view in binding["views"] if view not in VIEWS]:
        return f"{checkpoint} sees the view {unknown[0]}, which the simulated rig does not have ({', '.join(VIEWS)}): no closed loop."
    if not (root / MANIFEST).is_file():
        return (
            f"{root} was not recorded on the simulated rig (it has no {MANIFEST}): the rig's phantoms say nothing about {checkpoint}; "
            "evaluate it without closed-loop seeds, or train on a recording of `python -m vla_lib.simulate`."
        )
    try:
        open_checkpoint(binding["source"])
    except UserError as error:
        return f"The VLM of {checkpoint} is not at hand, so it cannot look at the rig: {error}"
    return ""


def dataset_of(checkpoint: Path, dataset_root: Path | None = None) -> Path:
    """`dataset_root`, or the folder that the checkpoint says it was trained on. Raises UserError where that is gone."""
    root = Path(dataset_root) if dataset_root is not None else Path(read_checkpoint(checkpoint)["settings"]["dataset_root"])
    if not root.is_dir():
        raise UserError(f"{checkpoint} was trained on {root}, which is not there; give the folder of its data set with --dataset-root.")
    return root
