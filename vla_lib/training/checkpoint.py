"""A policy and the state of its training in, one file out that is whole or not there; and back, strictly.

A checkpoint is a dict of plain values and tensors, opened with weights_only=True:
    format, front_door, policy_config, policy (state dict: the averaged weights and the normalisation), settings, binding (of the VL
    cache), split, step, epoch, metrics; of stage 2 `adapter` (the averaged LoRA weights of the VLM); and in the newest one `training`:
    raw weights, optimiser, position in the epoch, its counts so far, step of the newest validation, best, weights of the episodes, random state.
"""

import pickle
from pathlib import Path
from typing import Any

import torch

from vla_lib.core.errors import UserError
from vla_lib.core.files import atomic_path
from vla_lib.features.binding import differences
from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.policy import Policy

FORMAT = "vla-policy-1"
KEYS = ("front_door", "policy_config", "policy", "settings", "binding", "split", "step", "epoch", "metrics")


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: at any failure (a full disk, a kill) the file that was there stays. Raises OSError as the file system does."""
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError as error:  # torch's zip writer reports a full disk this way
            raise OSError(f"{error}".splitlines()[0]) from error


def read_checkpoint(path: str | Path, map_location: str = "cpu") -> dict[str, Any]:
    """The content of a checkpoint. Raises UserError where the file is missing, damaged, or no checkpoint of this workbench."""
    path = Path(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"There is no checkpoint {path}; a run keeps its own below checkpoints/ (`vla runs` lists the runs)."
        ) from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read as a checkpoint ({first}); take another one of the same run."
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(
            f"{path} is not a checkpoint of this workbench (format {FORMAT}); give one that its trainings wrote."
        )
    missing = [k for k in KEYS if k not in content]
    if missing:
        raise UserError(
            f"{path} lacks {', '.join(missing)}; it was not written by this version: train anew, or use the version that wrote it."
        )
    return content


def load_policy(
    path: str | Path, device: str = "cpu", binding: dict[str, Any] | None = None
) -> tuple[Policy, dict[str, Any]]:
    """The policy of a checkpoint in eval mode on `device`, and what is known of it.

    info: settings, binding, split {"train": [...], "val": [...]} of episode keys, step, epoch, metrics, front_door, adapter (None but in stage 2:
    the VLM must be opened with it, `FeatureExtractor.from_binding(info["binding"], device, info["adapter"])`).
    Give `binding` (of the features that the policy is about to be fed) to have it compared. Raises UserError where the file is damaged,
    a weight is missing or left over, or the bindings differ (both sides named).
    """
    content = read_checkpoint(path, device)
    if binding is not None:
        if "adapter" in content:
            raise UserError(
                f"{path} has LoRA weights in its VLM (stage 2): features from a cache are not its own; compute them with its adapter."
            )
        check_binding(content["binding"], binding, str(path))
    policy = Policy(PolicyConfig.from_dict(content["policy_config"]))
    load_weights(policy, content["policy"], str(path))
    return policy.to(device).eval(), {
        k: content.get(k) for k in (*KEYS, "adapter") if k not in ("policy", "policy_config")
    }


def load_weights(policy: torch.nn.Module, state: dict[str, torch.Tensor], where: str) -> None:
    """Strict: every weight of the policy, and no other. Raises UserError that names the first differences."""
    try:
        policy.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(
            f"The weights in {where} do not fit its policy: {' '.join(str(error).split())[:400]}. Take another checkpoint of the same run."
        ) from error


def check_binding(trained: dict[str, Any], found: dict[str, Any], where: str) -> None:
    """Raise UserError where two cache bindings differ, with both sides of every difference."""
    if found_differences := differences(trained, found):
        raise UserError(
            f"{where} was trained on VL features made otherwise than these (checkpoint against here): {'; '.join(found_differences)[:900]}. "
            "Use the cache and the VLM that it was trained with, or train anew."
        )
