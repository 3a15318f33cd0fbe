"""Settings and a run folder in; the checkpoint that a training goes on from (its own, or a stage-1 one), compared with settings and data, out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_lib.core.errors import UserError
from vla_lib.core.settings import flag
from vla_lib.policy.config import PolicyConfig
from vla_lib.training.checkpoint import check_binding, read_checkpoint
from vla_lib.training.settings import TrainingSettings, resume_conflicts

if TYPE_CHECKING:
    from vla_lib.training.data import TrainingData

FREE = ("dropout", "view_dropout", "ddim_steps")  # of a policy's settings: those that no weight depends on


def taken(latest: Path) -> str:
    """Why no new training may begin in the run folder of `latest`: the sentence with its remedy; "" where none of it has checkpoints."""
    found = sorted(path.name for path in latest.parent.glob("*.pt"))
    if latest.name in found:
        return f"{latest} exists already; pass --resume to go on with that run, or another --run-dir."
    return (
        f"{latest.parent} holds the checkpoints of another training ({', '.join(found)}); pass another --run-dir."
        if found
        else ""
    )


def previous(settings: TrainingSettings, latest: Path) -> dict[str, Any]:
    """The newest checkpoint of the run that --resume goes on with. Raises UserError where there is none or it is another training's."""
    if not latest.exists():
        raise UserError(
            f"There is no checkpoint {latest} to go on from; give the --run-dir of a run that has one, or leave --resume out."
        )
    before = read_checkpoint(latest)
    if "training" not in before:
        raise UserError(
            f"{latest} holds a policy but no training state; give the run's newest checkpoint its name back, or start a new run."
        )
    if before["front_door"] != settings.name:
        raise UserError(
            f"{latest} was written by {before['front_door']}, this is {settings.name}; go on with vla_lib.{before['front_door']}, "
            "or give another --run-dir."
        )
    conflicts = resume_conflicts(before["settings"], settings)
    if conflicts:
        raise UserError(
            f"--resume with other settings than the run began with: {'; '.join(conflicts)}. Give the same ones, or start a new run."
        )
    return before


def check_previous(before: dict[str, Any], data: "TrainingData", latest: Path) -> None:
    """Raise UserError where the cache, an episode or its weight is not what the run began with."""
    check_binding(before["binding"], data.binding, str(latest))
    known, now = before["training"]["fingerprints"], data.fingerprints
    changed = [k for k in known if known[k] != now.get(k)]
    if changed:
        raise UserError(
            f"{len(changed)} episodes have changed since the run began (first: {changed[0]}); restore them or start a new run."
        )
    weights = before["training"].get("weights", data.episode_weights)  # it may be older than this
    odd = [
        f"{k}: checkpoint {weights[k]:g}, now {now:g}" for k, now in data.episode_weights.items() if weights[k] != now
    ]
    if odd:
        raise UserError(
            f"{len(odd)} episodes have another weight than the run began with ({'; '.join(odd[:3])}); restore datasets.yaml, or start a new run."
        )


def stage1(settings: TrainingSettings) -> dict[str, Any]:
    """The checkpoint that stage 2 starts from. Raises UserError where it is missing, of the other model, or of stage 2 itself."""
    path = settings.stage1_checkpoint
    found = read_checkpoint(path)
    if found["front_door"] != settings.name:
        raise UserError(
            f"--stage1-checkpoint {path} was written by {found['front_door']}, this is {settings.name}; give one of the same model."
        )
    if "adapter" in found:
        raise UserError(
            f"--stage1-checkpoint {path} is of stage 2 already; go on with it by --resume, or give its stage-1 checkpoint."
        )
    return found


def check_stage1(found: dict[str, Any], settings: TrainingSettings, data: "TrainingData") -> None:
    """Raise UserError where the cache or the policy of the settings is not the stage-1 checkpoint's, both sides named."""
    where = f"--stage1-checkpoint {settings.stage1_checkpoint}"
    check_binding(found["binding"], data.binding, where)
    before, now = PolicyConfig.from_dict(found["policy_config"]).record(), data.policy_config(settings).record()
    odd = [
        f"{flag(k)}: there {before.get(k)!r}, here {now[k]!r}" for k in now if k not in FREE and before.get(k) != now[k]
    ]
    if odd:
        raise UserError(
            f"{where} holds another policy than these settings ask for: {'; '.join(odd)[:600]}. Give the settings of stage 1."
        )
