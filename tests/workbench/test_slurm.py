"""On a real Slurm with two fake nodes: a training over both, the time limit, cancelling, a sweep as an array."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import slurm_cluster

from tests.training.synthetic import write_dataset
from vla_lib import cli
from vla_lib.core.files import read_json, read_jsonl
from vla_lib.core.run_folder import RunFolder, read_record
from vla_lib.training.checkpoint import read_checkpoint
from vla_lib.workbench import run_all, slurm, submissions

TRAINING = """
from vla_lib import train_async
from vla_lib.workbench.jobs import Job
small = {"batch_size": 2, "grad_accum_steps": 1, "num_workers": 0, "width": 16, "layers": 1, "heads": 2}
endless = {"val_fraction": 0.0, "max_steps": 100_000, "checkpoint_every_steps": 5}
settings = train_async.Settings(dataset_root=root, **small, **endless)
await Job.torchrun("vla_lib.train_async", settings, run.path, nproc_per_node, resume=bool(resume_run)).watch()
"""
needs_slurm = pytest.mark.skipif(bool(slurm_cluster.WHY), reason=slurm_cluster.WHY)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("slurm")
    try:
        yield slurm_cluster.start(folder)
    finally:
        slurm_cluster.stop(folder)


@pytest.fixture
def on_cluster(cluster: Path, monkeypatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(cluster))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # Slurm says which


def vla(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 0


def until(true: Callable[[], object], runs: Path) -> None:
    deadline = time.monotonic() + 180
    while not true():
        assert time.monotonic() < deadline, [log.read_text()[-3000:] for log in runs.glob("*/*.log")]
        time.sleep(0.2)


def ranks() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        found += [process] if "vla_lib.train_async --dataset-root" in words and "srun" not in words else []
    return found


@needs_slurm
def test_a_training_over_two_nodes_outlives_its_time_limit_and_is_cancelled(
    on_cluster, write_notebook, runs_folder, tmp_path, capsys
):
    """torchrun through srun on both; told before the limit it saves and is requeued, goes on, and ends at `stop`."""
    write_dataset(tmp_path / "data", {"New_dataset/Task": 2}, steps=400, stride=3)
    path = write_notebook("root: str = ''\nnproc_per_node: int = 1\nresume_run: str = ''", TRAINING)
    vla("run", str(path), "--slurm", "--nodes", "2", "--time", "10", "-p", "root", str(tmp_path / "data"))
    (run,) = runs_folder.iterdir()
    job, latest = slurm.job_of(run), run / "checkpoints" / "qwen_vla_async.pt"
    until(lambda: latest.exists() and read_checkpoint(latest)["step"] >= 5, runs_folder)
    assert "2 process(es)" in (run / "train.log").read_text()
    capsys.readouterr()
    vla("runs")
    assert f"{job} RUNNING" in capsys.readouterr().out

    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)  # as Slurm does before the limit
    until(lambda: "resumed" in (run / "train.log").read_text(), runs_folder)
    at = int((run / "train.log").read_text().rpartition(" at step ")[2].partition(",")[0])
    assert at >= 5 and [row["step"] for row in read_jsonl(run / "metrics.jsonl")][:at] == list(range(1, at + 1))
    until(lambda: read_checkpoint(latest)["step"] > at, runs_folder)
    assert read_record(run)["state"] == "running"

    vla("runs", "stop", run.name)
    until(lambda: read_record(run)["state"] != "running", runs_folder)
    assert read_record(run)["state"] == "cancelled" and read_checkpoint(latest)["step"] > at
    until(lambda: not ranks(), runs_folder)
    until(lambda: slurm.states([run])[run.name] in (f"{job} CANCELLED", f"{job} {slurm.GONE}"), runs_folder)


CELL = """
import os
if n == 2: raise ValueError('two is broken')
run.add_results(step=n, gpus=os.environ["CUDA_VISIBLE_DEVICES"], job=os.environ["SLURM_JOB_ID"]); run.finish()
"""


@needs_slurm
def test_a_sweep_is_an_array_of_workers_of_one_study(on_cluster, write_notebook, runs_folder):
    path = write_notebook("n: int = 1\nnproc_per_node: int = 1", CELL)
    vla("sweep", str(path), "--grid", "n=1,2,3,4", "--slurm", "--gpus", "2", "--parallel", "2", "--gpus-per-run", "2")
    (sweep,) = runs_folder.glob("*-sweep")
    assert read_record(sweep)["state"] in ("submitted", "running", "cancelled")
    until(lambda: read_record(sweep)["state"] in ("done", "failed"), runs_folder)
    rows = read_json(sweep / "results.json")["entries"]
    assert [row["state"] for row in rows] == ["done", "failed", "done", "done"]
    assert len(list(runs_folder.glob("*-small"))) == 4  # each was begun once
    found = [read_json(runs_folder / row["run"] / "results.json") for row in rows if row["state"] == "done"]
    assert all(len(one["gpus"].split(",")) == 2 for one in found)
    assert "two is broken" in "".join(log.read_text() for log in sweep.glob("slurm-*.log"))
    assert read_record(sweep)["error"] == "1 of 4 runs did not end as done: n=2"


@needs_slurm
def test_a_waiting_job_is_cancelled_before_it_begins(on_cluster, write_notebook, runs_folder, tmp_path, capsys):
    """The first holds both machines; on the other one a helper writes a file for it."""
    both = "from vla_lib.workbench import slurm\nwith slurm.on_other_nodes('json.tool', [given, made]): pass"
    path = write_notebook("given: str = ''\nmade: str = ''", both, "run.finish()")
    (tmp_path / "given.json").write_text("{}")
    words = ["run", str(path), "--slurm", "--nodes", "2", "--cpus", "8", "--time", "1"]
    vla(*words, "-p", "given", str(tmp_path / "given.json"), "-p", "made", str(tmp_path / "made.json"))
    (first,) = runs_folder.iterdir()
    vla(*words, "--run-dir", str(runs_folder / "second"))
    run = runs_folder / "second"
    vla("runs", "stop", run.name)
    until(lambda: "CANCELLED" in slurm.states([run])[run.name], runs_folder)
    until(lambda: read_record(first)["state"] == "done", runs_folder)
    assert (tmp_path / "made.json").read_text() == "{}\n"
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(path), "--slurm", "--partition", "nosuch"])
    assert ended.value.code == 2 and "Slurm refused" in capsys.readouterr().err
    assert sorted(read_record(path)["state"] for path in runs_folder.iterdir()) == ["cancelled", "done", "failed"]


def test_where_there_is_no_slurm_that_is_told(write_notebook, runs_folder, monkeypatch, capsys):
    path = write_notebook("n: int = 1")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(path), "--slurm"])
    assert ended.value.code == 2 and "sbatch cannot be called" in capsys.readouterr().err
    (run,) = runs_folder.iterdir()
    assert read_record(run)["state"] == "failed"
    vla("runs", "stop", run.name)
    assert "does not run (failed)" in capsys.readouterr().out


def test_a_submitted_flow_is_taken_up_in_its_folder_with_the_step_that_was_stopped(runs_folder, monkeypatch):
    scripts: list[str] = []
    monkeypatch.setattr(slurm, "_slurm", lambda *words, given="": scripts.append(given) or "12\n")
    words = ("run-all", "--dataset-root", "D")
    batch = slurm.Batch(slurm=True, nodes=2, gpus=4, time="8:00:00", partition="long", words=words)
    assert submissions.submit_flow(batch, "run-all", "D") == 0
    lines = scripts[0].splitlines()
    asked = ["nodes=2", "gres=gpu:4", "cpus-per-task=8", "time=8:00:00", "partition=long", "signal=B:USR1@120"]
    assert {f"#SBATCH --{one}" for one in [*asked, "requeue"]} <= set(lines)
    assert any(line.endswith("-m vla_lib.cli run-all --dataset-root D & run=$!") for line in lines)
    (folder,) = runs_folder.iterdir()
    assert (read_record(folder)["state"], slurm.job_of(folder)) == ("submitted", "12")
    monkeypatch.setenv(slurm.SUBMITTED, str(folder))
    run = slurm.taken_up("run-all", {"dataset_root": "D"})
    assert run.path == folder and read_record(folder)["state"] == "running"
    stopped = RunFolder.create("04_train_async", {}, flow=folder.name)
    RunFolder.create("04_train_async", {}, flow="another").finish("cancelled")
    flow = run_all.Flow(run_all.FlowPlan(folder), run)
    assert flow._stopped("04_train_async") is None
    stopped.finish("cancelled")
    assert flow._stopped("04_train_async") == stopped.path


def test_helpers_on_other_machines_begin_elsewhere_in_the_list(monkeypatch):
    assert slurm.share(90) == 0
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for number, first in (("0", 30), ("1", 60)):
        monkeypatch.setenv("SLURM_PROCID", number)
        assert slurm.share(90) == first


def test_the_words_for_the_cluster_are_the_commands_own():
    words = ["sweep", "x", "--slurm", "--grid", "lr=1,2", "--nodes", "2", "--time=8:00:00", "--parallel", "4"]
    assert slurm.plain(words, "--parallel") == ["sweep", "x", "--grid", "lr=1,2"]


def test_a_job_of_one_machine_is_as_any_other(monkeypatch):
    assert slurm.nodes() == 1
    for number, count in (("1", 1), ("2", 2)):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", number)
        assert slurm.nodes() == count
    words = slurm.torchrun_words(2)
    assert words[0] == "srun" and "--nnodes=2" in words and "--rdzv-id=7" in words
    assert sys.executable in words
