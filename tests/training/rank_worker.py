"""What a rank of a test does: it trains, and writes the weights that it ends with and the samples that it drew."""

import os

import pytest
import torch
from accelerate import Accelerator

from vla_lib.training import loop, reporting
from vla_lib.training.schedule import Schedule


def train_watched(*runs) -> None:
    """Train with these settings, one run after the other; what is left of each is `rankN.pt` in its folder."""
    drawn, steps, results = [], Schedule.steps, reporting.results

    def watched_steps(self, state):
        found = steps(self, state)
        drawn.extend(int(i) for micros in found for m in micros for i, c in zip(m.indices, m.counts, strict=True) if c)
        return found

    def watched_results(state, data, stopped, latest, world):
        lora = dict(enumerate(state.live.weights.values() if state.live else ()))
        content = {"weights": state.policy.state_dict(), "lora": lora, "drawn": drawn, "metrics": state.metrics}
        torch.save(content, latest.parent.parent / f"rank{os.environ['RANK']}.pt")
        drawn.clear()
        return results(state, data, stopped, latest, world)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Schedule, "steps", watched_steps)
        patched.setattr(reporting, "results", watched_results)
        # the second group would find the first one's addresses in the ranks' store, and hang
        patched.setattr(Accelerator, "end_training", lambda self: None)
        for settings in runs:
            loop.train(settings)
