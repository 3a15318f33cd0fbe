"""What a training will be, before it starts: its settings and data in; a table of sizes, steps and the estimated time
out."""

import math
from typing import Any

import numpy as np
import pandas as pd

from vla_lib.core.progress import clock
from vla_lib.core.run_folder import read_record, read_results
from vla_lib.training.data import TrainingData
from vla_lib.training.settings import TrainingSettings
from vla_lib.workbench.runs import find_runs

PASSES = 4  # forward and backward, where no former run shows the time


def table(name: str, settings: TrainingSettings, data: TrainingData, nproc_per_node: int) -> pd.DataFrame:
    """Rows (what, value) for the notebook `name`; the time is estimated from the newest finished run of that
    notebook with as many processes, or from a few steps taken here."""
    from vla_lib.policy.policy import Policy

    per_step = settings.batch_size * settings.grad_accum_steps * nproc_per_node
    steps = settings.max_steps or math.ceil(len(data.train) / per_step) * settings.epochs
    samples = steps * per_step
    policy, binding = Policy(data.policy_config(settings)), data.binding
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in policy.named_children()}
    largest = sorted(counts, key=lambda part: -counts[part])[:4]
    parts = ", ".join(f"{part} {counts[part]:,}" for part in largest if counts[part])
    if settings.live_vlm:
        parts += f"; LoRA of rank {settings.lora_rank} in {binding['layer']} layers of the VLM besides"
    rows = {
        "training samples": f"{len(data.train):,} of {len(data.split['train'])} episodes",
        "held out": f"{len(data.val or []):,} of {len(data.split['val'])} episodes",
        "VL cache": f"{binding['id']}: {policy.config.tokens} tokens of width {policy.config.token_dim}",
        "views": ", ".join(policy.config.views),
        "parameters": f"{policy.parameter_count():,}, of which {parts}",
        "optimiser steps": f"{steps:,} of {per_step} samples",
        "estimated time": _estimate(name, settings, samples, nproc_per_node)
        or _measured(settings, data, policy, samples, nproc_per_node),
    }
    return pd.DataFrame(rows.items(), columns=["what", "value"])


def _estimate(name: str, settings: TrainingSettings, samples: int, processes: int) -> str:
    """From former runs; "" where there is none to go by."""
    for run in reversed(find_runs(name)):
        record, results = read_record(run), read_results(run)
        given = record.get("parameters", {})
        alike = given.get("training_stage", "stage1") == settings.training_stage
        whole = record["state"] == "done" and results.get("wall_s") and not given.get("resume_run")
        if alike and whole and results.get("processes") == processes:
            rate = results["step"] * given["batch_size"] * given["grad_accum_steps"] * processes / results["wall_s"]
            return f"{clock(samples / rate)} at the {rate:,.0f} samples/s of {run.name}"
    return ""


def _measured(settings: TrainingSettings, data: TrainingData, policy: Any, samples: int, processes: int) -> str:
    """From a few forward and backward passes here, on the device of the run, reading included."""
    import time

    import torch

    from vla_lib.training.device import uses_bf16, uses_gpu

    if settings.live_vlm:
        return "no finished run of stage 2 to go by; the first steps will tell"
    device = torch.device("cuda" if uses_gpu(settings) else "cpu")
    policy = policy.to(device).train()
    draws = {k: v.to(device) for k, v in policy.draw(settings.batch_size, torch.Generator().manual_seed(0)).items()}
    taken = []
    for numbers in np.random.default_rng(0).integers(0, len(data.train), (PASSES, settings.batch_size)):
        begin = time.perf_counter()
        batch = {k: v.to(device) for k, v in data.train.batch(numbers).items()}
        with torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(settings)):
            loss = policy(batch, draws).mean()
        loss.backward()
        loss.item()  # waits for the device
        taken.append(time.perf_counter() - begin)
    policy.zero_grad()
    policy.to("cpu")
    del batch, draws, loss
    torch.cuda.empty_cache()  # the processes of torchrun want it
    side_by_side = processes if device.type == "cuda" else 1  # processes on the CPU share its cores
    rate = side_by_side * settings.batch_size / float(np.median(taken[1:]))
    how = f"{rate:,.0f} samples/s ({PASSES} passes on the {device.type} here)"
    return f"{clock(samples / rate)} and the validations, at {how}"
