"""Benchmark rows of the real-time runner: lateness of every tick, missed deadlines, VLM and expert at the same time.

The simulated rig, the tiny VLM on five views in a process of its own, an untrained policy of the usual size (it hardly
moves), both at lab rates; once with the async model and once with the diffusion model, which denoises anew at every
tick.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import BenchRow
from needle_rig.world import VIEWS
from vla_lib.evaluation.rehearsal import rehearse
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.features.form import FeatureForm
from vla_lib.features.vlm import load_processor, open_checkpoint
from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.policy import Policy
from vla_lib.runtime.run_log import RunLog
from vla_lib.training.checkpoint import save_checkpoint
from vla_lib.training.settings import AsyncSettings, DiffusionSettings, TrainingSettings

LATENESS_MS = 5.0
GIVEN = {"vlm_reuse_count": 3, "vlm_latency_ms": 0.0}


def rows(fast: bool = False) -> list[BenchRow]:
    """Run each model for a minute of real time (3 s if `fast`). Raises UserError where EGL is missing."""
    found = []
    for settings in (AsyncSettings(), DiffusionSettings()):
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = untrained(Path(folder) / "policy.pt", settings)
            log = rehearse(RolloutSettings(checkpoint, max_time_s=3.0 if fast else 60.0), seed=0, go_on=True)["log"]
        found += [lateness_row(log, settings.head), concurrency_row(log, settings.head)]
    return found


def lateness_row(log: RunLog, head: str) -> BenchRow:
    """99th percentile of the lateness of every tick, against the 5 ms that are allowed."""
    summary = log.summary()
    late = summary["lateness_ms"]
    note = (
        f"{summary['ticks']} ticks, ended by {summary['ended']}: "
        f"median {late['median']:.2f}, max {late['max']:.2f} ms; "
        f"{summary['missed_deadlines']} missed deadlines, {summary['skipped_ticks']} skipped, "
        f"{summary['modes'].get('hold', 0)} held; baseline: allowed"
    )
    name = f"runtime.lateness p99 ({head})"
    return BenchRow(name, late["p99"], LATENESS_MS, "ms", "< 5 ms, none missed", note, less=True)


def concurrency_row(log: RunLog, head: str) -> BenchRow:
    """Median duration of the expert while the VLM works, against while it rests: they share nothing but cores."""
    busy, rest = expert_ms(log, True), expert_ms(log, False)
    note = (
        f"{len(busy)} of {len(busy) + len(rest)} expert calls fell into VLM work; {len(log.vlm_ms)} VLM ticks, "
        f"median {np.median(log.vlm_ms):.1f} ms; baseline: VLM at rest"
    )
    ours, baseline = (float(np.median(values)) if values else float("nan") for values in (busy, rest))
    return BenchRow(f"runtime.expert beside the VLM ({head})", ours, baseline, "ms", "", note, less=True)


def expert_ms(log: RunLog, vlm_busy: bool) -> list[float]:
    """Durations of the expert's calls while the VLM worked, or while it did not."""
    return [tick.expert_ms for tick in log.ticks if tick.expert_ms is not None and tick.vl_busy == vlm_busy]


def untrained(path: Path, settings: TrainingSettings) -> Path:
    """Write a checkpoint of an untrained policy, which hardly moves, on the tiny VLM's features of five views."""
    source = open_checkpoint("tiny")
    form = FeatureForm(load_processor(source), VIEWS, "grid:4x6", 360, 640)
    binding: dict[str, Any] = form.binding(source, 2, 3, "float32")
    layout = (tuple(part.tolist()) for part in (form.layout.view_id, form.layout.row, form.layout.col))
    config = PolicyConfig(
        settings.head, VIEWS, binding["hidden_size"], *layout, sensor_window_size=settings.sensor_window_size
    )
    content = {"policy_config": config.record(), "policy": Policy(config).state_dict()}
    content |= {"binding": binding, "settings": GIVEN}
    rest = {"front_door": settings.name, "split": {"train": [], "val": []}, "step": 0, "epoch": 0, "metrics": {}}
    save_checkpoint(path, content | rest)
    return path
