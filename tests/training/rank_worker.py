"""Run under torchrun by a test: trains, and each rank writes the weights that it ends with and the samples that it drew.

With KILLED_AFTER in the environment every rank is killed, as by the kernel, after that step. With DIFFUSION there, settings as JSON, the
diffusion model is trained after the async one, in the same processes."""

import dataclasses
import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator

from vla_lib.core import frontdoor
from vla_lib.training import loop
from vla_lib.training.settings import AsyncSettings, DiffusionSettings

drawn = []


class Watched(loop.Trainer):
    def _step(self, micros, loader):
        drawn.extend(int(i) for m in micros for i, c in zip(m.indices, m.counts, strict=True) if c)
        result = super()._step(micros, loader)
        if self.step == int(os.environ.get("KILLED_AFTER", 0)):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    def _end(self):
        results = super()._end()
        state = {
            "weights": self.policy.state_dict(),
            "lora": dict(enumerate(self.lora)),
            "drawn": drawn,
            "metrics": self.metrics,
        }
        torch.save(state, self.run_dir / f"rank{self.rank}.pt")
        return results


def main(settings):
    if "DIFFUSION" not in os.environ:
        loop.train(settings)
    else:
        with (
            pytest.MonkeyPatch.context() as patched
        ):  # a second group would find the first one's addresses in torchrun's store, and hang
            patched.setattr(Accelerator, "end_training", lambda self: None)
            loop.train(settings)
        drawn.clear()
        loop.train(DiffusionSettings(**dataclasses.asdict(settings) | json.loads(os.environ["DIFFUSION"])))


if __name__ == "__main__":
    loop.Trainer = Watched
    frontdoor.start(AsyncSettings, main)
