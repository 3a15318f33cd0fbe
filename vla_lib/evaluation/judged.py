"""How a checkpoint was judged on the rig, kept beside it (`NAME.judged.json`): what is deployed is what was judged.

Deployment takes execution, chunk steps, denoising steps and the greatest age of VL features from here, unless a person
says otherwise.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from vla_lib.core.files import file_checksum, read_json, write_json
from vla_lib.evaluation.closed_loop import ClosedLoop
from vla_lib.evaluation.rollout import rig_limits
from vla_lib.evaluation.settings import ClosedLoopSettings, RolloutSettings
from vla_lib.policy.config import PolicyConfig
from vla_lib.training.checkpoint import read_checkpoint

FIGURES = ("rollouts", "successes", "success_rate", "interval_95")


def judged_file(checkpoint: Path) -> Path:
    """Where a checkpoint's judgement lies."""
    return checkpoint.with_suffix(".judged.json")


def write_judged(checkpoint: Path, loop: ClosedLoop, vlm_latency_ms: float) -> None:
    """Keep the settings, limits and figures of its closed loop; `vlm_latency_ms`: the delay that it ran with."""
    settings: RolloutSettings = loop.settings
    config = PolicyConfig.from_dict(read_checkpoint(checkpoint)["policy_config"])
    record: dict[str, Any] = {one.name: getattr(settings, one.name) for one in fields(ClosedLoopSettings)}
    limits = rig_limits(config, vlm_latency_ms, settings.vlm_jitter_ms)
    record |= {"vlm_latency_ms": vlm_latency_ms, "limits": vars(limits)}
    record |= {name: value for name, value in loop.summary().items() if name in FIGURES}
    write_json(judged_file(checkpoint), record | {"checkpoint_checksum": file_checksum(checkpoint)})


def read_judged(checkpoint: Path) -> dict[str, Any]:
    """The judgement of this very file; empty where there is none, or it is another file's. Raises UserError where it
    cannot be read."""
    path = judged_file(checkpoint)
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    return record if record.get("checkpoint_checksum") == file_checksum(checkpoint) else {}
