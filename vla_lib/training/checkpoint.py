"""A checkpoint: what it holds, how it is written, read and compared. Only this module knows.

A dict of plain values and tensors, opened with weights_only=True:

    format          FORMAT
    front_door      train_async or train_diffusion
    policy_config   what Policy is built from
    policy          its state dict: the averaged weights and the normalisation
    settings        the run's settings, as recorded
    binding         of the VL cache
    split           {"train": [...], "val": [...]} of episode keys
    step, epoch     optimiser steps and whole epochs that are done
    metrics         figures of the newest validation
    adapter         in stage 2: the averaged LoRA weights of the VLM

and in the newest one `training`, what a resumed run needs besides: model (the raw weights), adapter (stage 2's),
optimizer, position (draws of the epoch that are used), validated (step of the newest validation), tally (counts since
then), best, elapsed_s, wandb_id; fingerprints and weights of the episodes, by key; world (processes). Draws and noise
follow from seed, epoch and step, so no generator's state is needed."""

import errno
import pickle
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vla_lib.core.errors import UserError, first_line, in_words
from vla_lib.core.files import atomic_path
from vla_lib.core.owner import Owner
from vla_lib.core.settings import flag
from vla_lib.features.binding import differences
from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.policy import Policy
from vla_lib.training.settings import TrainingSettings, resume_conflicts

FORMAT = "vla-policy-1"
KEYS = ("front_door", "policy_config", "policy", "settings", "binding", "split", "step", "epoch", "metrics")
# of a policy's config: what no weight depends on
WEIGHTLESS = ("dropout", "view_dropout", "token_noise", "ddim_steps", "vl_ages_s")
# of torch's zip writer, which says so of a disk that takes no more
FULL = ("unexpected pos", "file write failed")
# left by a writer that was killed
LEFT_BEHIND = ("checkpoints/.*.partial", ".metrics.jsonl.*.partial", ".results.json.*.partial")

Content = dict[str, Any]


# ---- writing


def save_checkpoint(path: Path, content: Content) -> None:
    """Write atomically: at any failure (a full disk, a kill) the old file stays. Raises OSError."""
    with atomic_path(path) as temporary:
        try:
            torch.save({"format": FORMAT, **content}, temporary)
        except RuntimeError as error:
            said = first_line(error)
            if any(words in said for words in FULL):
                raise OSError(errno.ENOSPC, said) from error
            raise OSError(said) from error


class CheckpointWriter:
    """Writes the checkpoints of a run into its folder: only the main process does, the folder's `owner`; the others
    call in vain.

    `run`: front_door, policy_config, settings, binding, split; `data`: fingerprints, weights, world (see the module).
    The methods take a TrainState's `state_dict()`.
    """

    def __init__(
        self, run_dir: Path, settings: TrainingSettings, run: Content, data: Content, owner: Owner | None
    ) -> None:
        self._folder, self._settings, self._run, self._data = run_dir, settings, run, data
        self._owner, self._tried_at, self._tried_step = owner, time.monotonic(), -1
        for path in [path for pattern in LEFT_BEHIND for path in run_dir.glob(pattern)] if owner else []:
            path.unlink(missing_ok=True)

    def due(self, step: int, interval_s: float | None = None) -> bool:
        """Whether it is time for the newest checkpoint: after `interval_s`, or what the settings ask for."""
        s = self._settings
        by_steps = s.checkpoint_every_steps and step % s.checkpoint_every_steps == 0 and step != self._tried_step
        wanted = s.checkpoint_every_s if interval_s is None else min(interval_s, s.checkpoint_every_s)
        return bool(by_steps) or time.monotonic() - self._tried_at >= wanted

    def newest(self, state: Content, must: bool = False) -> None:
        """Write what a resumed run goes on from. A failure is said aloud, and is an error if `must`."""
        content = {**state, "training": state["training"] | self._data}
        self._write(self._settings.checkpoints.latest, content, must)
        # a try that failed counts too: a full disk is not filled anew in every step
        self._tried_at, self._tried_step = time.monotonic(), state["step"]

    def best(self, state: Content) -> None:
        """Write the policy of the best validation; the newest checkpoint is no younger for it."""
        self._write(self._settings.checkpoints.best, _policy_alone(state), must=False)

    def final(self, state: Content) -> None:
        """Write what the run ends with: the newest checkpoint, and the policy alone where that has a file."""
        self.newest(state, must=True)
        if name := self._settings.checkpoints.final:
            self._write(name, _policy_alone(state), must=True)

    def _write(self, name: str, content: Content, must: bool) -> None:
        if self._owner is None:
            return
        self._owner.check()  # whoever was stopped for long may have lost the folder to another run
        path = self._folder / "checkpoints" / name
        try:
            save_checkpoint(path, self._run | content)
        except OSError as error:
            said = f"{path} could not be written ({in_words(error)}); the one written before it is untouched"
            if must:
                raise UserError(f"{said}. Make room and go on with --resume.") from error
            print(f"{said}; training goes on and tries again.", flush=True)


def _policy_alone(state: Content) -> Content:
    return {name: value for name, value in state.items() if name != "training"}


# ---- reading


def read_checkpoint(path: str | Path, map_location: str = "cpu") -> Content:
    """The content of a checkpoint. Raises UserError where the file is missing, damaged, or no checkpoint of ours."""
    path = Path(path)
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except FileNotFoundError:
        where = "a run keeps its own below checkpoints/ (see `vla runs`)"
        raise UserError(f"There is no checkpoint {path}; {where}.") from None
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        said = f"{path} cannot be read as a checkpoint ({first_line(error)})"
        raise UserError(f"{said}; take another one of the same run.") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path} is not a checkpoint of this workbench (format {FORMAT}); give one that it trained.")
    if missing := [name for name in KEYS if name not in content]:
        raise UserError(f"{path} lacks {', '.join(missing)}; train anew, or use the version that wrote it.")
    return content


def load_policy(
    path: str | Path, device: str = "cpu", binding: Mapping[str, Any] | None = None
) -> tuple[Policy, Content]:
    """The policy of a checkpoint in eval mode on `device`, and what else it holds: settings, binding, split, step,
    epoch, metrics, front_door, adapter (None but in stage 2: the VLM must be opened with it,
    `FeatureExtractor.from_binding(info["binding"], device, info["adapter"])`).

    Give `binding` (of the features that the policy is about to be fed) to have it compared. Raises UserError where
    the file is damaged, a weight is missing or left over, or the bindings differ (both sides named)."""
    content = read_checkpoint(path, device)
    if binding is not None:
        if "adapter" in content:
            said = f"{path} has LoRA weights in its VLM (stage 2): features from a cache are not its own"
            raise UserError(f"{said}; compute them with its adapter.")
        check_binding(content["binding"], binding, str(path))
    policy = Policy(PolicyConfig.from_dict(content["policy_config"]))
    load_weights(policy, content["policy"], str(path))
    info = {name: content.get(name) for name in (*KEYS, "adapter") if name not in ("policy", "policy_config")}
    return policy.to(device).eval(), info


def load_weights(policy: torch.nn.Module, state: Mapping[str, Any], where: str) -> None:
    """Strict: every weight of the policy, and no other. Raises UserError that names the first differences."""
    try:
        policy.load_state_dict(state, strict=True)
    except RuntimeError as error:
        odd = " ".join(str(error).split())[:400]
        remedy = "Take another one of its run; where an earlier version of the workbench trained it, train anew"
        raise UserError(f"The weights in {where} do not fit its policy: {odd}. {remedy}.") from error


# ---- comparing


def check_binding(trained: Mapping[str, Any], found: Mapping[str, Any], where: str) -> None:
    """Raise UserError where two cache bindings differ, with both sides of every difference."""
    if odd := differences(trained, found):
        raise UserError(
            f"{where} was trained on VL features made otherwise than these (checkpoint against here): "
            f"{'; '.join(odd)[:900]}. Use the cache and the VLM that it was trained with, or train anew."
        )


def refuse_taken(latest: Path) -> str:
    """Why no new run may begin in the folder of the newest checkpoint `latest`; "" where it holds none."""
    found = sorted(path.name for path in latest.parent.glob("*.pt"))
    if latest.name in found:
        return f"{latest} exists already; pass --resume to go on with that run, or another --run-dir."
    holds = f"{latest.parent} holds the checkpoints of another training ({', '.join(found)}); pass another --run-dir."
    return holds if found else ""


def read_previous(settings: TrainingSettings, latest: Path) -> Content:
    """The newest checkpoint of the run that --resume goes on with. Raises UserError where none fits."""
    if not latest.exists():
        raise UserError(f"There is no checkpoint {latest} to go on from; give the --run-dir of one, or drop --resume.")
    before = read_checkpoint(latest)
    if "training" not in before:
        raise UserError(f"{latest} holds no training state; give the newest one its name back, or start anew.")
    if (door := before["front_door"]) != settings.name:
        remedy = f"go on with vla_lib.{door}, or give another --run-dir"
        raise UserError(f"{latest} was written by {door}, this is {settings.name}; {remedy}.")
    if conflicts := resume_conflicts(before["settings"], settings):
        other = f"--resume with other settings than the run began with: {'; '.join(conflicts)}"
        raise UserError(f"{other}. Give the same ones, or start a new run.")
    return before


def check_previous(
    before: Content,
    binding: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    weights: Mapping[str, float],
    where: str,
) -> None:
    """Raise UserError where the cache, an episode or its weight (both by key) is not what the run began with."""
    check_binding(before["binding"], binding, where)
    PolicyConfig.from_dict(before["policy_config"])  # one that this version cannot build is refused here
    known = before["training"]["fingerprints"]
    if changed := [key for key in known if known[key] != fingerprints.get(key)]:
        said = f"{len(changed)} episodes have changed since the run began (first: {changed[0]})"
        raise UserError(f"{said}; restore them or start a new run.")
    then = before["training"]["weights"]
    odd = [f"{k}: checkpoint {then[k]:g}, now {now:g}" for k, now in weights.items() if then[k] != now]
    if odd:
        said = f"{len(odd)} episodes have another weight than the run began with ({'; '.join(odd[:3])})"
        raise UserError(f"{said}; restore datasets.yaml, or start a new run.")


def read_stage1(settings: TrainingSettings) -> Content:
    """The checkpoint that stage 2 starts from. Raises UserError where it is missing, or none of stage 1's."""
    path = settings.stage1_checkpoint
    assert path is not None
    found = read_checkpoint(path)
    where = f"--stage1-checkpoint {path}"
    if (door := found["front_door"]) != settings.name:
        raise UserError(f"{where} was written by {door}, this is {settings.name}; give one of the same model.")
    if "adapter" in found:
        raise UserError(f"{where} is of stage 2 already; go on with it by --resume, or give its stage-1 checkpoint.")
    return found


def check_stage1(found: Content, binding: Mapping[str, Any], config: PolicyConfig, where: str) -> None:
    """Raise UserError where the cache or the policy is not the stage-1 checkpoint's, both sides named."""
    check_binding(found["binding"], binding, where)
    before, now = PolicyConfig.from_dict(found["policy_config"]).record(), config.record()
    odd = [
        f"{flag(k)}: there {before[k]!r}, here {now[k]!r}" for k in now if k not in WEIGHTLESS and before[k] != now[k]
    ]
    if odd:
        said = f"{where} holds another policy than these settings ask for: {'; '.join(odd)[:600]}"
        raise UserError(f"{said}. Give the settings of stage 1.")
