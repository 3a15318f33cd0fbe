"""Kills, stops, resumptions, several processes: the result is the uninterrupted run's."""

import dataclasses
import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from front_doors import SMALL, flags_of, launch, wandb_rows
from rank_worker import train_watched
from ranks import fork, free_port, two_ranks
from synthetic import write_dataset
from torch.distributed import run as torchrun

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl
from vla_lib.core.run_folder import read_record
from vla_lib.train_async import main as train_async
from vla_lib.train_diffusion import main as train_diffusion
from vla_lib.training import checkpoint, loop, metrics
from vla_lib.training.checkpoint import load_policy, read_checkpoint
from vla_lib.training.settings import AsyncSettings, DiffusionSettings

STEPS = 12
RUN = {
    "max_steps": STEPS,
    "batch_size": 4,
    "grad_accum_steps": 2,
    "lr": 1e-3,
    "dropout": 0.1,
    "checkpoint_every_steps": 2,
}


DIFFUSION = {"diffusion_timesteps": 10, "ddim_steps": 2}


def latest(run: Path) -> Path:
    (path,) = [*run.glob("checkpoints/qwen_vla_async.pt"), *run.glob("checkpoints/diffusion_stage1_latest.pt")]
    return path


def weights(run: Path) -> dict:
    content = read_checkpoint(latest(run))
    return {**{f"raw {k}": v for k, v in content["training"]["model"].items()}, **content["policy"]}


def same(a: dict, b: dict, tolerance: float = 0.0) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if not tolerance else torch.allclose(a[k], b[k], atol=tolerance, rtol=0) for k in a
    )


def figures(run: Path) -> list[tuple]:
    rows = read_jsonl(run / "metrics.jsonl")
    loss = [
        (r["step"], r.get("epoch"), r.get("train/loss_step", r.get("train/noise_loss")), r.get("val/loss_epoch"))
        for r in rows
    ]
    return [
        (*a, r.get("train/vl_reuse_counts"), r.get("train/diffusion_t_counts")) for a, r in zip(loss, rows, strict=True)
    ]


def wait_for_step(run: Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 90
    while not any(r["step"] >= step for r in read_jsonl(run / "metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.02)


def on_step(monkeypatch, call, after: bool = False) -> None:
    """`call` with the state in each optimiser step: at its beginning, or `after` it, before a checkpoint is due."""
    rate, states = loop.Schedule.learning_rate, []
    update = loop.Progress.update

    def begin(self, state):
        states[:] = [state]
        if not after:
            call(state)
        return rate(self, state)

    def end(self, *args):
        update(self, *args)
        if after:
            call(states[0])

    monkeypatch.setattr(loop.Schedule, "learning_rate", begin)
    monkeypatch.setattr(loop.Progress, "update", end)


def slow_steps(monkeypatch) -> list[float]:
    """A clock (its one entry is the time) on which a step takes 7 s and everything else no time."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])

    def pass_time(_):
        now[0] += 7.0

    on_step(monkeypatch, pass_time)
    return now


MODELS = {"async": (AsyncSettings, train_async, {}), "diffusion": (DiffusionSettings, train_diffusion, DIFFUSION)}


@pytest.fixture(scope="module")
def whole(mixed, tmp_path_factory):
    """The uninterrupted run of each model."""
    runs = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    for model, (settings_class, train, extra) in MODELS.items():
        train(settings_class(**{**SMALL, **RUN, **extra, "dataset_root": mixed, "run_dir": runs / model}))
    return runs


@pytest.mark.parametrize(
    ("model", "kill", "wandb_mode"),
    [
        ("async", signal.SIGKILL, "offline"),
        ("async", signal.SIGTERM, "disabled"),
        ("diffusion", signal.SIGKILL, "disabled"),
    ],
)
def test_trap_24_killed_and_resumed_is_the_uninterrupted_run(model, kill, wandb_mode, whole, mixed, tmp_path):
    """The same weights bit for bit; metrics.jsonl and W&B hold every step once."""
    run = tmp_path / "run"
    settings_class, train, extra = MODELS[model]
    flags = {**RUN, **extra, "dataset_root": mixed, "run_dir": run, "wandb_mode": wandb_mode, "num_workers": 2}
    # as torchrun and a terminal do: the whole process group
    process = launch(f"train_{model}", flags, signal_after=(5, kill))
    output = process.communicate(timeout=240)[0]
    saved = read_checkpoint(latest(run))["step"]
    last = max(r["step"] for r in read_jsonl(run / "metrics.jsonl"))
    if kill == signal.SIGTERM:
        assert process.returncode == 0 and saved == last == 6 and "go on with --resume" in output  # within the step
    else:
        assert process.returncode == -signal.SIGKILL and (saved, last) == (4, 5), output
    assert train(settings_class(**{**SMALL, **flags, "resume": True}))["step"] == STEPS
    assert same(weights(run), weights(whole / model))
    assert figures(run) == figures(whole / model)
    if wandb_mode == "offline":
        sent = wandb_rows(run)
        assert [r["_step"] for r in sent] == list(range(1, STEPS + 1)) and "val/loss_epoch" in sent[-1]
        assert [r["train/loss_step"] for r in sent] == [f[2] for f in figures(run) if f[2] is not None]


THREE = {
    "batch_size": 20,
    "grad_accum_steps": 2,
    "lr": 1e-3,
    "dropout": 0.1,
    "checkpoint_every_steps": 2,
    "num_workers": 0,
}  # an epoch


@pytest.mark.parametrize(
    ("model", "length"), [("async", {"epochs": 2}), ("diffusion", {"max_steps": 4})]
)  # ends with an epoch, or within the second one
def test_trap_24_killed_after_any_step_and_resumed_is_the_uninterrupted_run(
    model, length, mixed, tmp_path, monkeypatch
):
    settings_class, train, extra = MODELS[model]

    def settings(run, **more):
        return settings_class(
            **{
                **SMALL,
                **THREE,
                **extra,
                **length,
                "sensor_enabled": False,
                "dataset_root": mixed,
                "run_dir": tmp_path / run,
                **more,
            }
        )

    steps = train(settings("whole"))["step"]
    for k in range(1, steps + 1):
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            on_step(patched, lambda state, k=k: 1 / (k - state.step), after=True)
            train(settings(f"{k}"))
        train(settings(f"{k}", resume=True))
        assert same(weights(tmp_path / f"{k}"), weights(tmp_path / "whole"))
        assert figures(tmp_path / f"{k}") == figures(tmp_path / "whole")


@pytest.mark.parametrize("length", [{"epochs": 2}, {"max_steps": 5}])
@pytest.mark.parametrize("when", ["step", "validation"])
def test_a_validation_that_a_stop_prevented_is_made_up_for(when, length, async_settings, tmp_path, monkeypatch, capsys):
    """Stopped in the last step, or in the validation after it: resumed, it has every figure and the best checkpoint."""
    flags = {**THREE, **length, "checkpoint_every_steps": 0, "sensor_enabled": False}
    last = train_async(async_settings("whole", **flags))["step"]
    validate, validations = loop.validate, []

    def asked(*args):
        validations.append(args)
        if len(validations) == (2 if when == "validation" else 0):
            signal.raise_signal(signal.SIGTERM)
        return validate(*args)

    with monkeypatch.context() as patched:
        patched.setattr(loop, "validate", asked)
        if when == "step":
            on_step(patched, lambda state: signal.raise_signal(signal.SIGTERM) if state.step == last - 1 else None)
        stopped = train_async(async_settings(**flags))
    assert (stopped["step"], stopped["state"]) == (
        last,
        "stopped",
    ) and "stopped by SIGTERM at step" in capsys.readouterr().out
    assert figures(tmp_path / "run") == figures(tmp_path / "whole")[:-1]
    assert read_checkpoint(latest(tmp_path / "run"))["training"]["position"] > 0
    ended = train_async(async_settings(**flags, resume=True))
    assert figures(tmp_path / "run") == figures(tmp_path / "whole") and ended["state"] == "done"
    best = [read_checkpoint(tmp_path / run / "checkpoints" / "qwen_vla_async_best.pt") for run in ("run", "whole")]
    assert best[0]["step"] == best[1]["step"] and same(best[0]["policy"], best[1]["policy"])
    before = figures(tmp_path / "run")
    train_async(async_settings(**flags, resume=True))  # once is enough
    assert figures(tmp_path / "run") == before


def test_a_long_validation_begins_with_a_checkpoint(async_settings, tmp_path, monkeypatch):
    now, seen = slow_steps(monkeypatch), []
    monkeypatch.setattr(loop.reporting, "epoch_lines", lambda *args: [])

    def long(*args):
        now[0] += 1000.0
        seen.append(read_checkpoint(latest(tmp_path / "run"))["step"])
        return {"val/action_loss": 1.0}

    monkeypatch.setattr(loop, "validate", long)
    train_async(async_settings(**THREE | {"checkpoint_every_steps": 0}, epochs=2))
    assert seen == [3, 6] and read_checkpoint(latest(tmp_path / "run"))["epoch"] == 2


def test_resuming_a_finished_run_with_more_epochs_goes_on(async_settings, tmp_path):
    first = train_async(async_settings(epochs=1))
    more = train_async(async_settings(epochs=2, resume=True))
    assert more["step"] == 2 * first["step"] and more["epochs"] == 2
    assert [f[1] for f in figures(tmp_path / "run") if f[1]] == [1, 2]


def test_trap_24_resume_without_a_checkpoint_is_an_error(async_settings):
    with pytest.raises(UserError, match="There is no checkpoint .* to go on from; give the --run-dir"):
        train_async(async_settings(resume=True))
    with pytest.raises(UserError, match="--resume needs --run-dir"):
        train_async(async_settings(resume=True, run_dir=None))


def test_a_run_folder_is_never_trained_over(async_settings, diffusion_settings, tmp_path):
    train_async(async_settings(max_steps=1))
    with pytest.raises(UserError, match="exists already; pass --resume"):
        train_async(async_settings(max_steps=1))
    stage1 = latest(tmp_path / "run")
    for other in (
        diffusion_settings(),
        async_settings(training_stage="stage2", stage1_checkpoint=stage1),
    ):  # of another model or stage
        with pytest.raises(UserError, match=r"another training \(qwen_vla_async.pt, .*; pass another --run-dir"):
            (train_diffusion if other.head == "diffusion" else train_async)(other)
        with pytest.raises(UserError, match="There is no checkpoint .* to go on from"):
            (train_diffusion if other.head == "diffusion" else train_async)(dataclasses.replace(other, resume=True))


def test_resume_refuses_other_weights_and_names_both_sides(tmp_path):
    """Changed weights would change the draws."""
    write_dataset(tmp_path / "data", {"part1": 2, "OCT_insertion": 2}, steps=10)
    settings = AsyncSettings(**SMALL, dataset_root=tmp_path / "data", run_dir=tmp_path / "run", max_steps=1)
    train_async(settings)
    again = dataclasses.replace(settings, max_steps=2, resume=True)
    (tmp_path / "data" / "datasets.yaml").write_text("part1: {weight: 5}")
    with pytest.raises(
        UserError,
        match=r"1 episodes have another weight .*part1/recv_all_\w+: checkpoint 1, now 5\).*restore datasets.yaml",
    ):
        train_async(again)
    (tmp_path / "data" / "datasets.yaml").write_text("part1: {weight: 1}")
    assert train_async(again)["step"] == 2


def test_resume_refuses_other_settings_and_names_both_sides(async_settings):
    train_async(async_settings(max_steps=1))
    with pytest.raises(UserError, match=r"--lr: checkpoint 0.0001, now 0.5.*--width: checkpoint 32, now 64"):
        train_async(async_settings(max_steps=2, resume=True, lr=0.5, width=64))


def test_resume_and_load_refuse_another_cache(async_settings, tmp_path):
    train_async(async_settings(max_steps=1))
    path = tmp_path / "run" / "checkpoints" / "qwen_vla_async.pt"
    info = load_policy(path)[1]
    with pytest.raises(UserError, match=r"views: .*View5.*against.*View9"):
        load_policy(path, binding={**info["binding"], "views": ["View9"]})
    content = read_checkpoint(path)
    content["binding"]["layer"] = 7
    checkpoint.save_checkpoint(path, content)
    with pytest.raises(UserError, match="layer: 7 against 2"):
        train_async(async_settings(max_steps=2, resume=True))


def test_trap_25_loading_is_strict_and_damage_is_named(async_settings, tmp_path):
    train_async(async_settings(max_steps=1))
    path = tmp_path / "run" / "checkpoints" / "qwen_vla_async.pt"
    content = read_checkpoint(path)
    whole = path.read_bytes()
    for change in ("missing", "extra"):
        state = dict(content["policy"])
        if change == "missing":
            del state["head.out.weight"]
        else:
            state["head.colour"] = torch.zeros(1)
        checkpoint.save_checkpoint(path, content | {"policy": state})
        with pytest.raises(UserError, match=r"do not fit its policy.*head\.(out\.weight|colour)"):
            load_policy(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_policy(path)
    torch.save({"a": 1}, path)
    with pytest.raises(UserError, match="not a checkpoint of this workbench"):
        load_policy(path)
    torch.save({"format": os.system}, path)  # anything beyond tensors and plain values is refused
    with pytest.raises(UserError, match="cannot be read as a checkpoint"):
        load_policy(path)


def test_a_full_disk_keeps_the_last_good_checkpoint(async_settings, tmp_path, monkeypatch, capsys):
    save, calls = torch.save, []

    def full(value, path):
        calls.append(value["step"])
        if value["step"] == 2:
            save({"half": torch.zeros(10)}, path)
            raise OSError(28, "No space left on device")
        save(value, path)

    monkeypatch.setattr(checkpoint.torch, "save", full)
    seen = []
    folder = tmp_path / "run" / "checkpoints"
    on_step(monkeypatch, lambda _: seen.append(read_checkpoint(latest(tmp_path / "run"))["step"]), after=True)
    folder.mkdir(parents=True)
    (folder / ".qwen_vla_async.pt.x1y2.partial").write_text("left by a save that was killed")
    train_async(async_settings(max_steps=4, checkpoint_every_steps=1, val_fraction=0.0))
    assert seen == [0, 1, 1, 3] and "is untouched; training goes on" in capsys.readouterr().out
    assert sorted(p.name for p in folder.iterdir()) == ["qwen_vla_async.pt", "qwen_vla_async_final.pt"]


@pytest.mark.parametrize(
    ("room", "writer", "file"),
    [
        (metrics, "append_jsonl", "metrics.jsonl"),
        (metrics, "write_text", "metrics.jsonl"),
        (loop, "write_results", "results.json"),
    ],
)
def test_a_full_disk_ends_a_training_with_its_remedy(room, writer, file, async_settings, monkeypatch):
    settings = async_settings(max_steps=1, val_fraction=0.0)
    train_async(settings)

    def none_left(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(room, writer, none_left)
    with pytest.raises(UserError, match=f"{file} cannot be written .*No space left.*Make room and go on with --resume"):
        train_async(dataclasses.replace(settings, max_steps=2, resume=True))


@pytest.mark.parametrize(
    "said", ("unexpected pos 704 vs 598", "PytorchStreamWriter failed writing file data/0: file write failed")
)
def test_what_torch_says_of_a_full_disk_is_told_and_recorded_as_one(said, async_settings, tmp_path, monkeypatch):
    def full(value, path):
        raise RuntimeError(f"[enforce fail at inline_container.cc:664] . {said}")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    with pytest.raises(UserError, match="disk full: .*Make room and go on with --resume"):
        train_async(async_settings(max_steps=1, val_fraction=0.0))
    record = read_record(tmp_path / "run")
    assert record["state"] == "failed" and "disk full" in record["error"]


def test_two_trainings_never_share_a_folder(async_settings, tmp_path, monkeypatch):
    """Another one that starts, or resumes, while the first one trains is refused and changes nothing."""
    rate, refused = loop.Schedule.learning_rate, []

    def meanwhile(self, state):
        monkeypatch.setattr(loop.Schedule, "learning_rate", rate)
        for resume in (False, True):
            with pytest.raises(UserError, match="is in use by process") as told:
                train_async(async_settings(max_steps=9, resume=resume))
            refused.append(told)
        return rate(self, state)

    monkeypatch.setattr(loop.Schedule, "learning_rate", meanwhile)
    train_async(async_settings(max_steps=2))
    assert len(refused) == 2 and read_checkpoint(latest(tmp_path / "run"))["step"] == 2
    assert (read_record(tmp_path / "run")["state"], read_record(tmp_path / "run")["error"]) == ("done", None)
    assert not [file for file in (tmp_path / "run").iterdir() if file.name.startswith(".")]


def test_a_full_disk_is_not_tried_in_every_step(async_settings, monkeypatch):
    slow_steps(monkeypatch)
    tries = []

    def full(path, content):
        tries.append(content["step"])
        if 0 < content["step"] < 9:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_checkpoint", full)
    train_async(
        async_settings(
            max_steps=9, checkpoint_every_s=20.0, epochs=99, batch_size=1, grad_accum_steps=1, val_fraction=0.0
        )
    )
    assert tries[:3] == [0, 3, 6]


@pytest.mark.parametrize(
    "batch_size", [1, 60]
)  # all steps within one epoch, or an epoch of two steps, each better than the one before
def test_latest_is_never_older_than_the_interval(batch_size, async_settings, monkeypatch):
    now, ages, written = slow_steps(monkeypatch), [], [0.0]
    monkeypatch.setattr(loop, "validate", lambda *args: {"val/action_loss": -now[0]})
    monkeypatch.setattr(loop.reporting, "epoch_lines", lambda *args: [])
    monkeypatch.setattr(loop, "EPOCH_SAVE_S", 1e9)
    save = checkpoint.save_checkpoint

    def watched(path, content):
        save(path, content)
        if path.name == "qwen_vla_async.pt":
            written[0] = now[0]

    monkeypatch.setattr(checkpoint, "save_checkpoint", watched)
    on_step(monkeypatch, lambda _: ages.append(now[0] - written[0]), after=True)
    train_async(
        async_settings(max_steps=9, checkpoint_every_s=20.0, epochs=99, batch_size=batch_size, grad_accum_steps=1)
    )
    assert max(ages) <= 20.0 + 7.0 and len(ages) == 9


TWO = {"max_steps": 5, "lr": 1e-3, "grad_accum_steps": 2, "sensor_enabled": False, "checkpoint_every_steps": 2}


@pytest.fixture(scope="module")
def on_two_ranks(mixed, tmp_path_factory):
    """Runs of two processes with batches of 3: one of each model; one of async whose processes are killed after step 3,
    as they left it, and in `resumed` gone on with."""
    runs = tmp_path_factory.mktemp("two")
    flags = {**SMALL, **TWO, "batch_size": 3, "dataset_root": mixed}

    def killed():
        with pytest.MonkeyPatch.context() as patched:
            on_step(patched, lambda state: state.step == 3 and os.kill(os.getpid(), signal.SIGKILL), after=True)
            train_async(AsyncSettings(**flags, run_dir=runs / "killed"))

    def others():
        diffusion = {**flags, **DIFFUSION, "sensor_enabled": True, "run_dir": runs / "diffusion"}
        resumed = {**flags, "run_dir": runs / "resumed", "resume": True}
        train_watched(
            AsyncSettings(**flags, run_dir=runs / "async"), DiffusionSettings(**diffusion), AsyncSettings(**resumed)
        )

    statuses, output = two_ranks(killed)
    assert statuses == [-signal.SIGKILL] * 2, output
    shutil.copytree(runs / "killed", runs / "resumed")
    statuses, output = two_ranks(others)
    assert statuses == [0, 0], output
    return runs


@pytest.mark.parametrize("model", MODELS)
def test_trap_19_two_ranks_equal_one_of_twice_the_batch(model, on_two_ranks, mixed, tmp_path):
    """Weights after 5 steps agree within 1e-5, all ranks hold the same bits, they drew different samples, validation
    covers all of them."""
    two = on_two_ranks / model
    ranks = [torch.load(two / f"rank{r}.pt") for r in range(2)]
    assert same(ranks[0]["weights"], ranks[1]["weights"])
    assert ranks[0]["metrics"] == ranks[1]["metrics"]
    settings_class, train, extra = MODELS[model]
    flags = {**SMALL, **TWO, **extra, "sensor_enabled": model == "diffusion", "batch_size": 6}
    one = train(settings_class(**flags, dataset_root=mixed, run_dir=tmp_path / "one"))
    content = read_checkpoint(latest(tmp_path / "one"))
    assert same(content["training"]["model"], ranks[0]["weights"], 1e-5)
    assert content["metrics"] == pytest.approx(ranks[0]["metrics"], rel=1e-4)
    assert figures(tmp_path / "one")[4][2] == pytest.approx(figures(two)[4][2], rel=1e-4)
    a, b = ranks[0]["drawn"], ranks[1]["drawn"]
    assert len(a) == len(b) == 30 and a != b and one["processes"] == 1


def test_trap_24_two_ranks_killed_and_resumed_are_the_uninterrupted_run(on_two_ranks):
    """All ranks are killed after step 3, the checkpoint is of step 2."""
    killed, run, whole = (on_two_ranks / name for name in ("killed", "resumed", "async"))
    assert read_checkpoint(latest(killed))["step"] == 2 and read_jsonl(killed / "metrics.jsonl")[-1]["step"] == 3
    assert same(weights(run), weights(whole)) and figures(run) == figures(whole)
    assert same(torch.load(run / "rank1.pt")["weights"], torch.load(whole / "rank1.pt")["weights"])


def test_two_ranks_below_torchrun_save_the_step_in_which_they_are_stopped(mixed, tmp_path):
    """With loader processes; no checkpoint is due before, so it is the stop's own."""
    run = tmp_path / "run"
    flags = {
        "max_steps": 2000,
        "batch_size": 2,
        "grad_accum_steps": 1,
        "num_workers": 2,
        "epochs": 99,
        "checkpoint_every_s": 600,
    }
    process = launch("train_async", {**flags, "dataset_root": mixed, "run_dir": run}, processes=2)
    wait_for_step(run, 5, process)
    below = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=240)[0]
    rows = [r["step"] for r in read_jsonl(run / "metrics.jsonl") if "epoch" not in r]
    assert rows == list(range(1, len(rows) + 1)) and 5 <= len(rows) < 2000
    assert read_checkpoint(latest(run))["step"] == len(rows) and f"stopped by SIGTERM at step {len(rows)};" in output
    assert read_record(run)["state"] == "cancelled"
    assert not psutil.wait_procs(below, timeout=5)[1]


def test_losing_a_rank_ends_the_job_and_one_process_goes_on(mixed, async_settings, tmp_path):
    """No process is left behind, and --resume with another number of processes ends at the same step without a
    doubled or missing one."""
    run = tmp_path / "run"
    flags = {"max_steps": 14, "batch_size": 2, "grad_accum_steps": 2, "checkpoint_every_steps": 1}
    words = {**flags, "dataset_root": mixed, "run_dir": run}
    process = launch("train_async", words, processes=2, signal_after=(4, signal.SIGSTOP))
    wait_for_step(run, 4, process)
    ranks = psutil.Process(process.pid).children(recursive=True)
    next(rank for rank in ranks if rank.environ().get("RANK") == "1").kill()
    output = process.communicate(timeout=240)[0]
    assert process.returncode != 0 and "Signal 9 (SIGKILL)" in output
    assert not psutil.wait_procs(ranks, timeout=5)[1]
    results = train_async(async_settings(**flags, resume=True))
    assert results["step"] == 14 and results["processes"] == 1
    assert [f[0] for f in figures(run) if f[2] is not None] == list(range(1, 15))


def test_two_nodes_meet_on_this_machine(mixed, tmp_path):
    """Two launchers with a c10d rendezvous, as on two machines, train one policy."""
    words = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=test", "--local_addr=127.0.0.1"]
    words += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "-m", "vla_lib.train_async"]
    words += flags_of({"max_steps": 2, "dataset_root": mixed, "run_dir": tmp_path / "run"})
    launcher = partial(torchrun.main, words)
    statuses, output = fork(launcher, launcher)
    assert statuses == [0, 0], output
    assert read_checkpoint(tmp_path / "run" / "checkpoints" / "qwen_vla_async.pt")["training"]["world"] == 2


def test_resume_keeps_the_split_of_the_run(async_settings, tmp_path):
    train_async(async_settings(max_steps=1))
    path = tmp_path / "run" / "checkpoints" / "qwen_vla_async.pt"
    before = read_checkpoint(path)["split"]
    train_async(dataclasses.replace(async_settings(max_steps=2), resume=True))
    assert read_checkpoint(path)["split"] == before
