"""What a training run will be, before it starts: sizes, steps and the estimated time in one table."""

import math
import time
from collections import Counter

import numpy as np
import pandas as pd
import torch

from vla_lib.core.errors import UserError
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import read_record, read_results
from vla_lib.episodes.survey import left_out
from vla_lib.features.binding import model_words
from vla_lib.policy.policy import Policy
from vla_lib.training.data import TrainingData
from vla_lib.training.process import uses_bf16, uses_gpu
from vla_lib.training.settings import TrainingSettings
from vla_lib.workbench.runs import find_runs

PASSES = 4  # forward and backward, where no former run shows the time
BATCH = {  # what SampleSet.batch gives: unit, meaning
    "state": ("deg, mm", "joints 1 to 6, then the tool's pose: x, y, z and angles"),
    "vl_tokens": ("", "VL features of the newest tick: a grid of tokens for each view, then one for the text"),
    "vl_mask": ("", "which tokens come from a picture that was there"),
    "vl_age_s": ("s", "how old these features are"),
    "vl_state": ("deg, mm", "the state when their pictures were taken"),
    "goal": ("mm, deg", "target: where the episode ends, x, y and yaw, as each of its steps knows by hindsight"),
    "sensor": ("sensor's own", "samples up to now, oldest first: force, then 1025 depths of the A-scan"),
    "sensor_mask": ("", "whether the window is whole; one that is not is zeros"),
    "action": ("mm, deg", "target: a chunk of motions in the base frame (dx dy dz, rotation vector), gripper"),
    "action_mask": ("", "which steps of the chunk count"),
    "previous_action": ("mm, deg", "the motion before, for the persistence baseline alone"),
}
BLOCKS = {  # of a Policy
    "goal_reader": "VL tokens to a goal: keypoints, where they show the tip, the state at the pictures",
    "goal_token": "the way to the goal from the present state as a token",
    "state_in": "robot state as a token",
    "sensor_encoder": "sensor window as a few tokens",
    "queries": "one learned token an action of the chunk",
    "blocks": "transformer over all tokens",
    "norm": "normalisation before the head",
    "head": "action tokens to motions",
}


def table(name: str, settings: TrainingSettings, data: TrainingData, nproc_per_node: int) -> pd.DataFrame:
    """Rows (what, value) for the notebook `name`; the time is estimated from the newest finished run of that
    notebook with as many processes, or from a few steps taken here."""
    per_step = settings.batch_size * settings.grad_accum_steps * nproc_per_node
    steps = settings.max_steps or math.ceil(len(data.train) / per_step) * settings.epochs
    samples = steps * per_step
    policy, binding = Policy(data.policy_config(settings)), data.binding
    layers = f" and LoRA of rank {settings.lora_rank} in {binding['layer']} layers of the VLM"
    lora = layers if settings.live_vlm else ""
    rows = {
        "training samples": f"{len(data.train):,} of {len(data.split['train'])} episodes",
        "held out": f"{len(data.val or []):,} of {len(data.split['val'])} episodes",
        "left out": left_out(settings.dataset_root) or "nothing",
        "VL cache": f"{binding['id']}: {policy.config.tokens} tokens of width {policy.config.token_dim}",
        "VL model": model_words(binding),
        "views": ", ".join(policy.config.views),
        "parameters": f"{policy.parameter_count():,}{lora}",
        "optimiser steps": f"{steps:,} of {per_step} samples",
        "estimated time": _estimate(name, settings, samples, nproc_per_node)
        or _measured(settings, data, policy, samples, nproc_per_node),
    }
    told = [("note", note) for note in data.notes]
    return pd.DataFrame([*rows.items(), *told], columns=["what", "value"])


def batch_table(data: TrainingData, size: int) -> pd.DataFrame:
    """One row for each key of a batch of `size` training samples: shape, dtype, range, unit and meaning."""
    rows = []
    for key, values in data.train.batch(range(min(size, len(data.train)))).items():
        unit, meaning = BATCH[key]
        low, high = values.min().item(), values.max().item()
        span = f"{low:.3g} to {high:.3g}"
        rows.append((key, tuple(values.shape), str(values.dtype).removeprefix("torch."), span, unit, meaning))
    return pd.DataFrame(rows, columns=["key", "shape", "dtype", "range", "unit", "meaning"])


def model_table(settings: TrainingSettings, data: TrainingData) -> pd.DataFrame:
    """One row for each block of the policy: parameters, their share, and what the block is for; then their sum."""
    policy = Policy(data.policy_config(settings))
    counts: Counter[str] = Counter()
    for name, parameter in policy.named_parameters():
        counts[name.partition(".")[0]] += parameter.numel()
    total = counts.total()
    rows = [(name, f"{count:,}", f"{100 * count / total:.1f} %", BLOCKS[name]) for name, count in counts.items()]
    return pd.DataFrame(
        [*rows, ("all", f"{total:,}", "", "")], columns=["block", "parameters", "share", "what it does"]
    )


def _estimate(name: str, settings: TrainingSettings, samples: int, processes: int) -> str:
    """From former runs; "" where there is none to go by."""
    for run in reversed(find_runs(name)):
        try:
            record, results = read_record(run), read_results(run)
        except UserError:  # a damaged file of another run
            continue
        given = record.get("parameters", {})
        alike = given.get("training_stage", "stage1") == settings.training_stage
        whole = record["state"] == "done" and results.get("wall_s") and not given.get("resume_run")
        if alike and whole and results.get("processes") == processes:
            rate = results["step"] * given["batch_size"] * given["grad_accum_steps"] * processes / results["wall_s"]
            return f"{clock(samples / rate)} at the {rate:,.0f} samples/s of {run.name}"
    return ""


def _measured(settings: TrainingSettings, data: TrainingData, policy: Policy, samples: int, processes: int) -> str:
    """From a few forward and backward passes here, on the device of the run, reading included."""
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
