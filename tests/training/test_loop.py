"""The loop: it learns, it does not cheat, every figure that it reports is the one that it means."""

import dataclasses
import json
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from synthetic import write_dataset

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl
from vla_lib.policy.heads import DRAWS
from vla_lib.policy.policy import Policy
from vla_lib.train_async import main as train_async
from vla_lib.train_diffusion import main as train_diffusion
from vla_lib.training import loop, process
from vla_lib.training.checkpoint import load_policy, read_checkpoint
from vla_lib.training.data import prepare_data
from vla_lib.training.samples import SampleSet
from vla_lib.training.schedule import MicroBatch, Schedule
from vla_lib.training.settings import AsyncSettings
from vla_lib.training.validation import validate
from vla_lib.workbench.plots import training as plots


def built(settings):
    """Data, state and module of a run that has not begun."""
    data = prepare_data(settings)
    return data, *loop.build(settings, data, Accelerator(cpu=True))


def one_step(settings, groups, monkeypatch) -> tuple[dict, dict]:
    """Train one optimiser step on micro-batches of these samples: its row in metrics.jsonl, the weights behind it."""
    parts = [np.asarray(group) for group in groups]
    micros = [MicroBatch(part, np.ones(len(part), np.float32), part, 0, len(part)) for part in parts]
    with monkeypatch.context() as patched:
        patched.setattr(loop.Schedule, "steps", lambda self, state: [] if state.step else [micros])
        train_async(settings)
    checkpoint = read_checkpoint(settings.run_dir / "checkpoints" / settings.checkpoints.latest)
    return read_jsonl(settings.run_dir / "metrics.jsonl")[0], checkpoint["training"]["model"]


def test_async_writes_everything_and_its_policy_loads(async_settings, tmp_path):
    settings = async_settings(epochs=2, wandb_mode="offline")
    results = train_async(settings)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    steps = [r for r in rows if "train/loss_step" in r]
    assert [r["step"] for r in steps] == list(range(1, results["step"] + 1))
    assert {"time", "train/lr", "train/vl_reuse_counter", "train/sensor_samples"} <= set(steps[0])
    validations = [r for r in rows if "val/loss_epoch" in r]
    assert [r["epoch"] for r in validations] == [1, 2] and {"train/loader_wait_share", "train/vl_reuse_counts"} <= set(
        validations[0]
    )
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == results
    assert {
        "step",
        "epochs",
        "train_episodes",
        "val_episodes",
        "val_loss",
        "best_step",
        "val_mae_mm",
        "val_mae_deg",
        "parameters",
        "wall_s",
    } <= set(results)
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "qwen_vla_async.pt",
        "qwen_vla_async_best.pt",
        "qwen_vla_async_final.pt",
    ]
    for path in folder.iterdir():
        policy, info = load_policy(path, binding=prepare_data(settings).binding)
        assert not policy.training and sorted(info["split"]) == ["train", "val"] and info["settings"]["horizon"] == 8
    samples = prepare_data(settings).train
    chunk = policy.predict(samples.batch([0, 1]))
    assert chunk.shape == (2, 8, 7) and (chunk[..., 6] == 1).all()
    final, latest = torch.load(folder / "qwen_vla_async_final.pt"), torch.load(folder / "qwen_vla_async.pt")
    assert all(torch.equal(final["policy"][k], latest["policy"][k]) for k in final["policy"])


def test_diffusion_writes_everything_and_its_policy_loads(diffusion_settings, tmp_path):
    settings = diffusion_settings(epochs=1, diffusion_timesteps=20, ddim_steps=4, training_stage="stage1")
    train_diffusion(settings)
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert {"train/noise_loss", "train/diffusion_t"} <= set(rows[0])
    counts = next(r for r in rows if "val/loss_epoch" in r)["train/diffusion_t_counts"]
    assert sum(counts) == DRAWS * len(prepare_data(settings).train) and min(counts) > 0
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["diffusion_stage1_best.pt", "diffusion_stage1_latest.pt"]
    policy, info = load_policy(folder / "diffusion_stage1_best.pt")
    batch = prepare_data(settings).val.batch(range(3))
    assert torch.equal(policy.predict(batch), policy.predict(batch))
    other = policy.predict(batch, torch.Generator().manual_seed(1))
    assert not torch.equal(policy.predict(batch), other) and info["front_door"] == "train_diffusion"


@pytest.mark.parametrize(
    ("kind", "steps", "lr", "batch_size"), [("async", 120, 3e-3, 16), ("diffusion", 420, 6e-3, 32)]
)
def test_overfits_one_episode(kind, steps, lr, batch_size, single, async_settings, diffusion_settings, tmp_path):
    """Under 2 % of the mean-baseline's error on one episode."""
    build, train = (async_settings, train_async) if kind == "async" else (diffusion_settings, train_diffusion)
    extra = {"diffusion_timesteps": 50} if kind == "diffusion" else {}
    settings = build(
        dataset_root=single,
        val_fraction=0.0,
        max_steps=steps,
        lr=lr,
        batch_size=batch_size,
        grad_accum_steps=1,
        width=64,
        layers=2,
        ema_decay=0.98,
        **extra,
    )
    train(settings)
    name = settings.checkpoints.final or settings.checkpoints.latest
    policy, _ = load_policy(tmp_path / "run" / "checkpoints" / name)
    found = validate(policy, prepare_data(settings).train, 64)
    assert found["val/action_loss"] < 0.02 * found["val/baseline_mean_action_loss"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Enough short episodes that what is learnt holds for new ones."""
    root = tmp_path_factory.mktemp("scenes")
    write_dataset(root, {"part1": 60}, steps=12, seed=1)
    return root


LEAK = {
    "async": (250, 3e-3, 0.5, 100, 0.9, 1.1),
    "diffusion": (200, 4e-3, 0.9, 110, 1.1, 1.9),
}  # a sample is farther from the truth than the mean


@pytest.mark.parametrize("kind", LEAK)
def test_trap_18_the_target_is_not_inside_the_input(kind, scenes, async_settings, diffusion_settings, monkeypatch):
    """With targets shuffled against inputs nothing can be learnt: the held-out error is the mean baseline's (of draws
    about it, for diffusion). Unshuffled it is below."""
    build, train = {"async": (async_settings, train_async), "diffusion": (diffusion_settings, train_diffusion)}[kind]
    steps, lr, honest_most, few, least, most = LEAK[kind]
    extra = {"diffusion_timesteps": 20, "ddim_steps": 4} if kind == "diffusion" else {}
    settings = build(
        dataset_root=scenes, max_steps=steps, lr=lr, batch_size=32, grad_accum_steps=1, val_fraction=0.25, **extra
    )
    honest = train(settings)
    assert honest["val_action_loss"] < honest_most * honest["baselines"]["mean"]["action_loss"]

    def shuffled(*args):
        data = prepare_data(*args)
        for samples in (data.train, data.val):
            generator = torch.Generator().manual_seed(9)
            samples._action = samples._action[torch.randperm(len(samples._action), generator=generator)]
        return data

    monkeypatch.setattr(loop, "prepare_data", shuffled)
    cheated = train(dataclasses.replace(settings, run_dir=settings.run_dir.with_name("shuffled"), max_steps=few))
    assert least < cheated["val_action_loss"] / cheated["baselines"]["mean"]["action_loss"] < most


def test_trap_15_sensor_loss_weight_counts_at_batch_size_one(async_settings, monkeypatch):
    """The gradient of a sample with sensor is `sensor_loss_weight` times what it is at weight 1, at batch size 1
    too."""
    alike = {"max_steps": 1, "batch_size": 1, "grad_accum_steps": 1, "clip_norm": 1e9, "val_fraction": 0.0}
    norms = {}
    for weight in (1.0, 3.0):
        settings = async_settings(f"{weight}", sensor_loss_weight=weight, **alike)
        norms[weight] = one_step(settings, [[5]], monkeypatch)[0]["train/grad_norm"]
    assert norms[3.0] == pytest.approx(3 * norms[1.0], rel=1e-4)


def test_accumulation_equals_one_large_batch(async_settings, monkeypatch):
    """Micro-batches of 2+2+1 samples give the gradient of one batch of 5, although their chunks have other numbers of
    valid steps."""
    found = []
    for groups in ([[0, 1], [20, 21], [23]], [[0, 1, 20, 21, 23]]):
        settings = async_settings(f"{len(groups)}", max_steps=1, batch_size=len(groups[0]), val_fraction=0.0)
        found.append(one_step(settings, groups, monkeypatch))
    (parts, own), (whole, other) = found
    assert parts["train/loss_step"] == pytest.approx(whole["train/loss_step"], rel=1e-5)
    assert parts["train/grad_norm"] == pytest.approx(whole["train/grad_norm"], rel=1e-4)
    assert all(torch.allclose(own[name], other[name], atol=1e-6) for name in own)


def test_trap_22_validation_is_in_eval_mode_and_leaves_the_mode_alone(async_settings):
    data, state, _ = built(async_settings(dropout=0.5))
    policy, val = state.policy.train(), data.val
    first = validate(policy, val, 16)
    assert policy.training and first == validate(policy, val, 16)  # with dropout active two passes would differ
    parts = []

    def add(x):
        parts.append(x)
        return x

    for rank in range(2):
        validate(policy, val, 7, rank, 2, add)
    whole = sum(parts)
    stopped = torch.zeros_like(whole)
    stopped[-1] = 1.0
    assert validate(policy, val, 7, stop=iter([False, True]).__next__) is None  # asked before the second batch
    assert validate(policy, val, 7, 0, 2, lambda x: x + stopped) is None  # another process was asked
    assert float(whole[1] / whole[0]) == pytest.approx(
        first["val/loss_epoch"], rel=1e-6
    )  # any number of processes, any batch size


def test_baselines_are_what_they_say(async_settings):
    data, state, _ = built(async_settings())
    val, mean = data.val, state.policy.normaliser.action_mean.numpy()
    found = validate(state.policy, val, 16)
    batch = val.batch(range(len(val)))
    action, mask, before = batch["action"].numpy(), batch["action_mask"].numpy(), batch["previous_action"].numpy()
    for name, guess in (("zero", np.zeros(7)), ("mean", mean), ("persistence", before[:, None])):
        error = np.abs(guess - action)[mask]
        assert found[f"val/baseline_{name}_mae_mm"] == pytest.approx(error[:, :3].mean(), rel=1e-4)
        assert found[f"val/baseline_{name}_mae_deg"] == pytest.approx(error[:, 3:6].mean(), rel=1e-4)
    assert found["val/mae_mm"] == pytest.approx(
        found["val/baseline_mean_mae_mm"], rel=1e-4
    )  # a new regression head says the mean


@pytest.mark.parametrize(("latency_ms", "ages"), [(0.0, 3), (250.0, 6)])
def test_every_age_of_the_features_is_counted(latency_ms, ages, async_settings, tmp_path):
    train_async(async_settings(epochs=2, vlm_latency_ms=latency_ms, vlm_latency_max_ms=0.0))
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    counts = np.array([r["train/vl_reuse_counts"] for r in rows if "epoch" in r])
    assert counts.shape == (2, ages) and counts.min() > 0
    used = sum(age * n for age, n in enumerate(counts[0])) / counts[0].sum()
    first = [r["train/vl_reuse_counter"] for r in rows if "train/loss_step" in r][: len(rows) // 2 - 1]
    assert used == pytest.approx(np.mean(first), rel=0.1)  # the last step is smaller
    bars = plots.reuse_counts([*rows, {"train/vl_reuse_counts": [1]}], action_hz=5.0).axes[0].patches
    assert [bar.get_height() for bar in bars] == [counts[:, 0].sum() + 1, *counts.sum(0)[1:]]
    assert bars[1].get_x() + bars[1].get_width() / 2 == pytest.approx(200)


def counters(step=0, epoch=0, position=0, validated=0):
    return SimpleNamespace(step=step, epoch=epoch, position=position, validated=validated)


def test_the_steps_left_are_those_of_the_processes_that_go_on(async_settings):
    """120 draws an epoch, 32 a step; the 7 steps so far were taken by another number of processes."""
    schedule = Schedule(async_settings(epochs=3), np.ones(120))
    assert schedule.steps_left(counters()) == 12
    assert schedule.steps_left(counters(step=7, epoch=1, position=40)) == 3 + 4
    assert schedule.steps_left(counters(epoch=3)) == 0


def test_learning_rate_warms_up_and_falls(async_settings):
    schedule = Schedule(async_settings(warmup_steps=4, max_steps=100, lr=1.0), np.ones(120))
    rates = [schedule.learning_rate(counters(step=step)) for step in range(100)]
    assert rates[0] == pytest.approx(0.25, rel=0.01) and np.argmax(rates) == 3
    assert all(a >= b for a, b in zip(rates[3:], rates[4:], strict=False)) and 0.01 < rates[-1] < 0.012


def test_trap_20_cached_features_and_lora_are_never_combined(diffusion_settings):
    """Stage 1 reads the cache and holds no weight of a language model; every weight that it holds gets a gradient."""
    data, state, model = built(diffusion_settings(diffusion_timesteps=10))
    assert state.live is None and not state.averaged_adapter
    assert not [n for n, _ in state.trained.named_parameters() if "lora" in n]
    draws = state.policy.draw(4, torch.Generator().manual_seed(0))
    model.train()(data.train.batch([1, 2, 3, 4]), draws).sum().backward()
    assert [n for n, p in state.trained.named_parameters() if p.grad is None and "missing" not in n] == []


@pytest.mark.parametrize(
    ("error", "numbers", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory"),
            (4, 8),
            "--batch-size 2 instead of 4, .*--grad-accum-steps 16 instead of 8 .*--resume",
        ),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
            (5, 3),
            "--batch-size 2 instead of 5, .*steps 8 instead of 3",
        ),
        (
            MemoryError("Unable to allocate 8 GiB for an array"),
            (4, 8),
            "in a new run, smaller pictures: --image-resize-height 180",
        ),
        (
            MemoryError(),
            (1, 8),
            r"^Out of memory at batch size 1. Start a new run with \(1\) a smaller --width than 32, or \(2\) smaller",
        ),
    ],
)
def test_out_of_memory_names_the_remedies_with_this_runs_numbers(error, numbers, said, async_settings, monkeypatch):
    """The effective batch is kept; --resume is named for what it admits."""

    def full(*args):
        raise error

    monkeypatch.setattr(loop, "build", full)
    with pytest.raises(UserError, match=said) as told:
        train_async(async_settings(batch_size=numbers[0], grad_accum_steps=numbers[1]))
    assert numbers[0] > 1 or "--resume" not in str(told.value) and "accum" not in str(told.value)


def test_another_runtime_error_is_not_taken_for_a_lack_of_memory(async_settings, monkeypatch):
    def broken(*args):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(loop, "build", broken)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        train_async(async_settings())


def test_bf16_is_used_where_the_gpu_has_it_by_itself(monkeypatch):
    """Asked of torch without emulation; on a CPU only where it is wanted."""
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: asked.append(including_emulation) or False
    )
    assert not process.uses_bf16(AsyncSettings()) and asked == [False]
    assert process.uses_bf16(AsyncSettings(precision="bf16", device="cpu")) and not process.uses_bf16(
        AsyncSettings(device="cpu")
    )


def test_a_starving_loader_is_reported(async_settings, monkeypatch, capsys):
    read = SampleSet.batch

    def slow(self, request):
        time.sleep(0.1)
        return read(self, request)

    monkeypatch.setattr(SampleSet, "batch", slow)
    train_async(async_settings(max_steps=2, grad_accum_steps=2))
    assert "The loader starves the training" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_training(async_settings, monkeypatch):
    forward = Policy.forward
    monkeypatch.setattr(Policy, "forward", lambda self, *a: forward(self, *a) * float("nan"))
    with pytest.raises(UserError, match="not finite at step 1.*--lr"):
        train_async(async_settings(max_steps=2))


@pytest.mark.parametrize("spoilt", (float("nan"), float("inf")))
def test_a_loss_that_is_not_finite_names_the_sample_that_did_it(spoilt, async_settings, monkeypatch):
    asked, read = {}, SampleSet.batch

    def spoil(self, numbers):
        batch, number = read(self, numbers), asked.setdefault("number", int(numbers[1]))
        batch["action"][np.asarray(numbers) == number, 0] *= spoilt
        asked["where"] = f"step {self.step[number]} .* of episode {self.episodes[self.episode[number]].path}; look"
        return batch

    monkeypatch.setattr(SampleSet, "batch", spoil)
    with pytest.raises(UserError) as stopped:
        train_async(async_settings(max_steps=2, batch_size=4, val_fraction=0.0))
    assert re.search(f"not finite at step 1: .*{asked['where']}", str(stopped.value))


def test_bf16_trains_and_its_checkpoint_predicts_in_float32(diffusion_settings, tmp_path):
    settings = diffusion_settings(precision="bf16", max_steps=2, diffusion_timesteps=10, ddim_steps=2)
    train_diffusion(settings)
    policy, _ = load_policy(tmp_path / "run" / "checkpoints" / "diffusion_stage1_latest.pt")
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert torch.isfinite(policy.predict(prepare_data(settings).train.batch([0]))).all()
