"""A study: some checkpoints on held-out episodes and, on the simulated rig, on the same unseen seeds.

found = evaluate(EvaluateSettings(("async=runs/A/checkpoints/qwen_vla_async_best.pt", "no VL=runs/B/..."),
closed_loop_seeds=100))
    found.results()

The first checkpoint is the one in question: masked inputs, later VL features and disturbances are tried on it, and on
the other trainings of its recipe (`async@1`, `async@2`, ...). The others are compared with it as they are.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from vla_lib.evaluation.closed_loop import (
    FIGURES,
    FIRST_SEED,
    TUNING_SEED,
    ClosedLoop,
    closed_loop,
    compare,
    over_trainings,
    recipe_of,
    unseen_seeds,
    write_judged,
)
from vla_lib.evaluation.open_loop import OpenLoop, evaluate_open_loop, inputs_of
from vla_lib.evaluation.rollout import dataset_of, rig_settings
from vla_lib.evaluation.settings import ClosedLoopSettings, EvaluateSettings, RolloutSettings
from vla_lib.evaluation.sim_robot import CHANGES
from vla_lib.policy.config import PolicyConfig
from vla_lib.training.checkpoint import read_checkpoint

DELAYS_MS = (0.0, 381.0, 600.0)  # at once, as the lab measured its VLM, and slow
# what is tried one at a time: the rig's own disturbances, and those of the computer and the camera host
DISTURBED: dict[str, dict[str, Any]] = {name: {"disturbance": name} for name in CHANGES}
DISTURBED |= {"pictures at 2 Hz": {"camera_hz": 2.0}, "hiccups of 100 ms": {"hiccup_ms": 100.0}}


@dataclass
class Study:
    """What was found: the OpenLoop of each checkpoint, the ClosedLoop of each variant (none if none was asked for)."""

    checkpoints: dict[str, Path]
    open_loop: dict[str, OpenLoop] = field(default_factory=dict)
    closed_loop: dict[str, ClosedLoop] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """Name of the checkpoint in question."""
        return next(iter(self.checkpoints))

    def results(self) -> dict[str, Any]:
        """What results.json records: the first one's figures; others below `compared_with`, variants `closed_loop`."""
        each = {
            name: {"checkpoint": str(self.checkpoints[name])} | found.results()
            for name, found in self.open_loop.items()
        }
        record = {"name": self.first, **each.pop(self.first), "compared_with": each}
        if self.closed_loop:
            main = self.closed_loop[self.first]
            record |= {name: figure for name, figure in main.summary().items() if name in FIGURES}
            record["closed_loop"] = {name: found.results() for name, found in self.closed_loop.items()}
            record["recipes"] = over_trainings(self.closed_loop)
            record["pairs"] = {
                name: compare(main, found) for name, found in self.closed_loop.items() if name != self.first
            }
        return record


def evaluate(settings: EvaluateSettings, done: Callable[[Study], Any] = lambda study: None) -> Study:
    """Evaluate all checkpoints; `done(study)` is called after the open loop and again after the closed one, to save
    what there is.

    Raises UserError where an episode, a cache or a VLM is missing, or where a closed loop is asked for and impossible
    (`rig_refusal`).
    """
    study = Study(settings.named())
    roots = {name: dataset_of(path, settings.dataset_root) for name, path in study.checkpoints.items()}
    tried = variants(settings) if settings.closed_loop_seeds else {}  # what cannot be tried is refused before the work
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    for name, path in study.checkpoints.items():
        print(f"open loop of {name}: {path}", flush=True)
        masked = settings.masked and name == study.first
        how = (settings.episodes, settings.batch_size, device, masked, settings.ddim_steps)
        study.open_loop[name] = evaluate_open_loop(path, roots[name], *how)
    done(study)
    if tried:
        first = TUNING_SEED if settings.tuning else FIRST_SEED
        seeds = unseen_seeds(settings.closed_loop_seeds, list(roots.values()), first + settings.skip_seeds)
        study.closed_loop = closed_loop(tried, seeds, settings.workers)
        for name, path in study.checkpoints.items():
            trained_ms = read_checkpoint(path)["settings"]["vlm_latency_ms"]
            given_ms = tried[name].vlm_latency_ms
            with contextlib.suppress(OSError):  # checkpoints of somebody else, read-only
                write_judged(path, study.closed_loop[name], trained_ms if given_ms is None else given_ms)
        done(study)
    return study


def variants(settings: EvaluateSettings) -> dict[str, RolloutSettings]:
    """Everything that is tried on the rig, by name. Raises UserError where a checkpoint cannot be (`rig_refusal`)."""
    how = {one.name: getattr(settings, one.name) for one in fields(ClosedLoopSettings)}
    found = {name: replace(rig_settings(path, settings.dataset_root), **how) for name, path in settings.named().items()}
    asked = recipe_of(next(iter(found)))
    for one, whole in [(name, of) for name, of in found.items() if recipe_of(name) == asked]:
        changes: dict[str, dict[str, Any]] = {}
        if settings.masked:
            config = PolicyConfig.from_dict(read_checkpoint(whole.checkpoint)["policy_config"])
            changes |= {name: {"without": without} for name, without in inputs_of(config).items()}
        if settings.latency_sweep:
            changes |= {f"VLM delay {ms:g} ms": {"vlm_latency_ms": ms} for ms in DELAYS_MS}
        if settings.disturbed:
            changes |= DISTURBED
        found |= {f"{one}, {name}": replace(whole, **change) for name, change in changes.items()}
    return found
