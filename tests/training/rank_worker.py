"""Run under torchrun by a test: trains, and each rank writes the weights that it ends with and the samples that it
drew.

With SPOILT in the environment (an episode's folder and a step), that action is no number where it is learned from.
With KILLED_AFTER in the environment every rank is killed, as by the kernel, after that step. With DIFFUSION there,
settings as JSON, the diffusion model is trained after the async one, in the same processes."""

import json
import os
import signal

import pytest
import torch
from accelerate import Accelerator

from vla_lib.core import frontdoor
from vla_lib.core.progress import Progress
from vla_lib.training import loop, reporting
from vla_lib.training.samples import SampleSet
from vla_lib.training.schedule import Schedule
from vla_lib.training.settings import AsyncSettings, DiffusionSettings

drawn = []
steps, update, results, read = Schedule.steps, Progress.update, reporting.results, SampleSet.batch


def watched_steps(self, state):
    found = steps(self, state)
    drawn.extend(int(i) for micros in found for m in micros for i, c in zip(m.indices, m.counts, strict=True) if c)
    return found


def watched_update(self, n, note=""):
    update(self, n, note)
    if self.done == int(os.environ.get("KILLED_AFTER", 0)):
        os.kill(os.getpid(), signal.SIGKILL)


def spoilt_batch(self, numbers):
    folder, step = os.environ["SPOILT"].split(os.pathsep)
    batch = read(self, numbers)
    for place, number in enumerate(numbers):
        if str(self.episodes[self.episode[number]].path) == folder and self.step[number] == int(step):
            batch["action"][place, 0] = float("nan")
    return batch


def watched_results(state, data, stopped, latest, world):
    lora = dict(enumerate(state.live.weights.values() if state.live else ()))
    content = {"weights": state.policy.state_dict(), "lora": lora, "drawn": drawn, "metrics": state.metrics}
    torch.save(content, latest.parent.parent / f"rank{os.environ['RANK']}.pt")
    return results(state, data, stopped, latest, world)


def main(settings):
    if "DIFFUSION" not in os.environ:
        loop.train(settings)
        return
    with pytest.MonkeyPatch.context() as patched:
        # a second group would find the first one's addresses in torchrun's store, and hang
        patched.setattr(Accelerator, "end_training", lambda self: None)
        loop.train(settings)
    drawn.clear()
    loop.train(DiffusionSettings(**settings.record() | json.loads(os.environ["DIFFUSION"])))


if __name__ == "__main__":
    Schedule.steps, Progress.update, reporting.results = watched_steps, watched_update, watched_results
    if "SPOILT" in os.environ:
        SampleSet.batch = spoilt_batch
    frontdoor.start(AsyncSettings, main)
