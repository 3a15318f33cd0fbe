"""A training in; its checkpoints on disk, whole and never older than asked for, out."""

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vla_lib.core.errors import UserError
from vla_lib.training.checkpoint import save_checkpoint

if TYPE_CHECKING:
    from vla_lib.training.loop import Trainer

EPOCH_SAVE_S = 2.0  # epochs and validations shorter than this do not each write a checkpoint
LEFT_BEHIND = (
    "checkpoints/.*.partial",
    ".metrics.jsonl.*.partial",
    ".results.json.*.partial",
)  # by a save that was killed


@contextlib.contextmanager
def needing_room(path: Path) -> Iterator[None]:
    """Inside, `path` is written: a full or read-only disk becomes a UserError with its remedy."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error}). Make room and go on with --resume.") from error


class Saver:
    """Writes the checkpoints of a training: only its main process does, the others call in vain."""

    def __init__(self, trainer: "Trainer"):
        self.trainer = trainer
        self._tried_at, self._tried_step = (
            time.monotonic(),
            -1,
        )  # a try that failed counts: a full disk is not filled anew in every step
        if trainer.main:
            for pattern in LEFT_BEHIND:
                for path in trainer.run_dir.glob(pattern):
                    path.unlink(missing_ok=True)

    def due(self, interval_s: float | None = None) -> bool:
        """Whether it is time for the newest checkpoint: after `interval_s`, or what the settings ask for."""
        s, step = self.trainer.settings, self.trainer.step
        by_steps = s.checkpoint_every_steps and step % s.checkpoint_every_steps == 0 and step != self._tried_step
        wanted = s.checkpoint_every_s if interval_s is None else min(interval_s, s.checkpoint_every_s)
        return bool(by_steps) or time.monotonic() - self._tried_at >= wanted

    def newest(self, must: bool = False) -> None:
        """Write what a resumption goes on from. A failure is said aloud, and is an error if `must`."""
        if self.trainer.main:
            self._tried_step = self.trainer.step
            self._write(self.trainer.settings.checkpoints.latest, {"training": self._state()}, must)
            self._tried_at = time.monotonic()

    def best(self) -> None:
        """Write the policy of the best validation; the newest checkpoint is no younger for it."""
        if self.trainer.main:
            self._write(self.trainer.settings.checkpoints.best, {}, must=False)

    def final(self) -> None:
        """Write what the training ends with: the newest checkpoint, and the policy alone where the model has a file for it."""
        self.newest(must=True)
        name = self.trainer.settings.checkpoints.final
        if name and self.trainer.main:
            self._write(name, {}, must=True)

    def _write(self, name: str, more: dict[str, Any], must: bool) -> None:
        """Write one checkpoint; a failure keeps the file that was there."""
        path = self.trainer.latest.with_name(name)
        try:
            save_checkpoint(path, self._content() | more)
        except OSError as error:
            said = f"{path} could not be written ({error}); the one written before it is untouched"
            if must:
                raise UserError(f"{said}. Make room and go on with --resume.") from error
            print(f"{said}; training goes on and tries again.", flush=True)

    def _content(self) -> dict[str, Any]:
        t = self.trainer
        return {
            "front_door": t.settings.name,
            "policy_config": t.policy.config.record(),
            "policy": t.averaged.policy.state_dict(),
            "settings": t.settings.record(),
            "binding": t.data.binding,
            "split": t.data.split,
            "step": t.step,
            "epoch": t.epoch,
            "metrics": t.metrics,
        } | ({"adapter": t.live.record(t.averaged.adapter)} if t.live else {})

    def _state(self) -> dict[str, Any]:
        t = self.trainer
        return {
            "model": t.policy.state_dict(),
            "optimizer": t.optimizer.state_dict(),
            "position": t.position,
            "validated": t.validated,
            "tally": t.tally.state(),
            "best": t.best,
            "elapsed_s": t._elapsed(),
            "wandb_id": t.wandb_id,
            "fingerprints": t.data.fingerprints,
            "weights": t.data.episode_weights,
            "world": t.world,
            # draws and noise follow from (seed, epoch, step); the generator's state is kept for the record
            "random": {"seed": t.settings.seed, "torch": torch.get_rng_state()},
        } | ({"adapter": t.live.record()} if t.live else {})
