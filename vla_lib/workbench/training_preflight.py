"""What a training will be, before it starts: its settings and data in; a table of sizes, steps and the estimated time out."""

import math
from typing import Any

import pandas as pd

from vla_lib.core.progress import clock
from vla_lib.core.run_folder import read_record
from vla_lib.training.data import TrainingData
from vla_lib.training.settings import TrainingSettings
from vla_lib.workbench.runs import find_runs, results_of


def table(name: str, settings: TrainingSettings, data: TrainingData, nproc_per_node: int) -> pd.DataFrame:
    """Rows (what, value) for the notebook `name`; the time is estimated from the newest finished run of that notebook with as many processes."""
    from vla_lib.policy import Policy

    per_step = settings.batch_size * settings.grad_accum_steps * nproc_per_node
    steps = settings.max_steps or math.ceil(len(data.train) / per_step) * settings.epochs
    policy = Policy(data.policy_config(settings))
    rows = [
        ("training samples", f"{len(data.train):,} of {len(data.split['train'])} episodes"),
        ("held out", f"{len(data.val or []):,} of {len(data.split['val'])} episodes"),
        ("VL cache", f"{data.binding['id']}: {policy.config.tokens} tokens of width {policy.config.token_dim}"),
        ("views", ", ".join(policy.config.views)),
        ("parameters", f"{policy.parameter_count():,}, of which " + ", ".join(f"{part} {count:,}" for part, count in _parts(policy))),
        ("optimiser steps", f"{steps:,} of {per_step} samples"),
        ("estimated time", _estimate(name, steps * per_step, nproc_per_node)),
    ]
    return pd.DataFrame(rows, columns=["what", "value"])


def _parts(policy: Any) -> list[tuple[str, int]]:
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in policy.named_children()}
    return sorted(((name, count) for name, count in counts.items() if count), key=lambda item: -item[1])[:4]


def _estimate(name: str, samples: int, processes: int) -> str:
    for run in reversed(find_runs(name)):
        record, results = read_record(run), results_of(run)
        given = record.get("parameters", {})
        if record["state"] != "done" or results.get("processes") != processes or not results.get("wall_s") or given.get("resume_run"):
            continue
        rate = results["step"] * given["batch_size"] * given["grad_accum_steps"] * processes / results["wall_s"]
        return f"{clock(samples / rate)} at the {rate:,.0f} samples/s of {run.name}"
    return "no finished run with as many processes to go by; the first steps will tell"
