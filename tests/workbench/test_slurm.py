"""On a real Slurm with two fake nodes: a training over both, the time limit, cancelling, a sweep as an array."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import slurm_cluster
import sweep_stub

from tests.workbench import rank_stub
from vla_lib import cli
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl, write_json
from vla_lib.core.run_folder import PROJECT, RunFolder, read_record
from vla_lib.workbench import run_all, slurm

TRAINING = """
from tests.workbench import rank_stub
from vla_lib.workbench import slurm
from vla_lib.workbench.jobs import Job
with slurm.on_other_nodes('json.tool', [given, made], run.path): pass
job = Job.torchrun("tests.workbench.rank_stub", rank_stub.Settings(), run.path, nproc_per_node, resume=bool(resume_run))
await job.watch()
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
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # of the jobs, for rank_stub
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # Slurm says which


def vla(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(words))
    assert ended.value.code == 0


def until(true: Callable[[], object], runs: Path) -> None:
    deadline = time.monotonic() + 300
    while not true():
        assert time.monotonic() < deadline, [log.read_text()[-3000:] for log in runs.glob("*/*.log")]
        time.sleep(0.2)


def reach_limit(job: str, runs: Path) -> None:
    """Tell a job what Slurm tells it before its time limit, and let it begin again soon after it is requeued: Slurm
    would wait for as long as a credential holds, where another second than that of the old one's end will do."""
    subprocess.run(["scancel", "--signal=USR1", "--batch", job], check=True)
    asked = time.monotonic()
    while (
        "PENDING" not in subprocess.run(["squeue", "-h", "-j", job, "-o", "%T"], capture_output=True, text=True).stdout
    ):
        assert time.monotonic() < asked + 300, "the job is not requeued"
        time.sleep(0.2)
    subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now+3"], check=True)


def ranks() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = " ".join(process.info["cmdline"] or [])
        found += [process] if "rank_stub --run-dir" in words and "srun" not in words else []
    return found


@needs_slurm
def test_a_training_over_two_nodes_outlives_its_time_limit_and_is_cancelled(
    on_cluster, write_notebook, runs_folder, tmp_path, capsys
):
    """On the other node a helper writes a file, then torchrun goes to both through srun. Another run waits meanwhile,
    and is cancelled. Told before the limit the training saves and is requeued, goes on, and ends at `stop`."""
    given, made = tmp_path / "given.json", tmp_path / "made.json"
    given.write_text("{}")
    path = write_notebook("given: str = ''\nmade: str = ''\nnproc_per_node: int = 1\nresume_run: str = ''", TRAINING)
    words = ["run", str(path), "--slurm", "--nodes", "2", "--cpus", "8"]
    words += ["-p", "given", str(given), "-p", "made", str(made)]
    vla(*words, "--time", "10")
    (run,) = runs_folder.iterdir()
    waiting = runs_folder / "waiting"
    vla(*words, "--run-dir", str(waiting))
    vla("runs", "stop", waiting.name)
    job, latest = slurm.job_of(run), run / "checkpoints" / rank_stub.CHECKPOINT
    steps = lambda: [row["step"] for row in read_jsonl(run / "metrics.jsonl")]  # noqa: E731
    until(lambda: len(steps()) >= 5, runs_folder)
    assert made.read_text() == "{}\n" and not (run / "found").exists()
    capsys.readouterr()
    vla("runs")
    said = capsys.readouterr().out
    assert f"{job} RUNNING" in said and f"{slurm.job_of(waiting)} CANCELLED" in said
    assert read_record(waiting)["state"] == "cancelled" and not (waiting / "run.log").exists()

    reach_limit(job, runs_folder)
    begun = lambda: re.findall(r"rank (\d) of 2 begins at step (\d+)", (run / "train.log").read_text())  # noqa: E731
    until(lambda: len(begun()) == 4, runs_folder)
    (stopped,) = re.findall(r"job stopped at step (\d+); saved", (run / "slurm.log").read_text())
    assert int(stopped) >= 5
    assert sorted(begun()) == sorted([("0", "0"), ("1", "0"), ("0", stopped), ("1", stopped)])
    until(lambda: len(steps()) > int(stopped), runs_folder)
    assert read_record(run)["state"] == "running"

    vla("runs", "stop", run.name)
    until(lambda: read_record(run)["state"] != "running", runs_folder)
    assert steps() == list(range(1, rank_stub.read_step(latest) + 1))
    assert read_record(run)["state"] == "cancelled"
    until(lambda: not ranks(), runs_folder)
    until(lambda: slurm.states([run])[run.name] in (f"{job} CANCELLED", f"{job} {slurm.GONE}"), runs_folder)

    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--partition", "nosuch"])
    assert ended.value.code == 2 and "Slurm refused" in capsys.readouterr().err
    assert sorted(read_record(path)["state"] for path in runs_folder.iterdir()) == ["cancelled"] * 2 + ["failed"]


@needs_slurm
def test_a_sweep_is_an_array_of_workers_each_setting_done_once(
    on_cluster, write_notebook, runs_folder, tmp_path, monkeypatch
):
    """Two workers at once. One reaches its time limit, is requeued and joins the other again; then one is killed, one
    cancelled, one entry fails; the same command goes on. See sweep_stub."""
    monkeypatch.setattr(slurm, "PROGRAM", (sys.executable, sweep_stub.__file__, "vla"))
    path = write_notebook("n: int = 1\nnproc_per_node: int = 1")
    words = ["sweep", str(path), "--grid", sweep_stub.GRID]
    words += ["--slurm", "--gpus", "2", "--parallel", "2", "--gpus-per-run", "2", "--time", "1:00:00"]
    vla(*words)
    until(lambda: len(sweep_stub.counted(tmp_path / "begun")) == 2, runs_folder)
    (sweep,) = runs_folder.glob("*-sweep")
    assert read_record(sweep)["state"] == "running"
    job = slurm.job_of(sweep)
    assert slurm.states([sweep]) == {sweep.name: f"{job} RUNNING 2"}
    pids = [json.loads(file.read_text())["pid"] for file in sweep.glob("workers/.*.owner")]
    first, part = pids[0], f"{job}_{psutil.Process(pids[1]).environ()['SLURM_ARRAY_TASK_ID']}"

    reach_limit(part, runs_folder)
    until(lambda: len(sweep_stub.counted(tmp_path / "begun")) == 3, runs_folder)
    assert slurm.states([sweep]) == {sweep.name: f"{job} RUNNING 2"} and read_record(sweep)["state"] == "running"
    told = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    assert sorted(re.findall(r"Restarts=(\d)", told)) == ["0", "1"]
    assert psutil.Process(first).is_running()

    os.kill(first, signal.SIGKILL)
    until(lambda: "FAILED" in slurm.states([sweep])[sweep.name], runs_folder)
    subprocess.run(["scancel", part], check=True)
    until(lambda: read_record(sweep)["state"] == "cancelled", runs_folder)
    until(lambda: "RUNNING" not in slurm.states([sweep])[sweep.name], runs_folder)
    begun = [read_record(run)["state"] for run in runs_folder.glob("*-small")]
    assert begun == ["cancelled"] * 3

    (tmp_path / "go").touch()
    vla(*words)
    until(lambda: read_record(sweep)["state"] in ("done", "failed"), runs_folder)
    until(lambda: (sweep / "reported").exists(), runs_folder)
    found = sweep_stub.check_each_was_done_once(tmp_path, runs_folder)
    assert {one["gpus"].count(",") for one in found} == {1}  # two of four to each
    assert "three is broken" in "".join(log.read_text() for log in sweep.glob("slurm-*.log"))


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
    assert run_all.submit(batch, "run-all", "D") == 0
    lines = scripts[0].splitlines()
    asked = ["nodes=2", "gres=gpu:4", "cpus-per-task=8", "time=8:00:00", "partition=long", "signal=B:USR1@120"]
    assert "\nexport SRUN_CPUS_PER_TASK=8 " in scripts[0]
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


def test_a_run_that_waits_to_go_on_is_cancelled_too(runs_folder, monkeypatch, capsys):
    """Its record says cancelled since it was stopped at the time limit."""
    run = RunFolder.create("small", {})
    write_json(run.path / "slurm.json", {"job": "12"})
    run.finish("cancelled")
    asked: list[tuple[str, ...]] = []
    answers = {"squeue": "12 PENDING\n", "scancel": ""}
    monkeypatch.setattr(slurm, "_slurm", lambda *words: asked.append(words) or answers[words[0]])
    vla("runs", "stop", run.path.name)
    assert ("scancel", "--state=PENDING", "12") in asked and "job 12 is cancelled" in capsys.readouterr().out
    answers["squeue"] = "12 CANCELLED\n"
    vla("runs", "stop", run.path.name)
    assert "does not run (cancelled)" in capsys.readouterr().out


def test_a_sweep_that_waits_in_slurms_queue_is_not_submitted_twice(write_notebook, runs_folder, monkeypatch, capsys):
    answers = {"sbatch": "12\n", "squeue": "12_0 PENDING\n12_1 PENDING\n"}
    monkeypatch.setattr(slurm, "_slurm", lambda *words, given="": answers[words[0]])
    words = ["sweep", str(write_notebook("n: int = 1")), "--grid", "n=1,2", "--slurm", "--parallel", "2"]
    vla(*words)
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and "waits in Slurm's queue already" in capsys.readouterr().err
    (sweep,) = runs_folder.glob("*-sweep")
    assert read_record(sweep)["state"] == "submitted"
    assert slurm.states([sweep]) == {sweep.name: "12 PENDING 2"}


def test_helpers_on_other_machines_begin_elsewhere_in_the_list(monkeypatch):
    assert slurm.share(90) == 0
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    for number, first in (("0", 30), ("1", 60)):
        monkeypatch.setenv("SLURM_PROCID", number)
        assert slurm.share(90) == first


def test_the_jobs_own_command_is_the_same_and_runs(monkeypatch):
    """Of a flag that is given twice the last counts: a worker of an array runs one entry at a time."""
    words = ["night", "jobs.yaml", "--slurm", "--parallel", "4", "--nodes", "2"]
    assert cli.parse(words).keywords["batch"].submits
    monkeypatch.setenv(slurm.SUBMITTED, "folder")
    known = cli.parse([*words, "--parallel", "1"]).keywords
    assert known["parallel"] == 1 and not known["batch"].submits


@pytest.mark.parametrize(
    "limit, seconds",
    (("10", 600), ("4:30", 270), ("8:00:00", 28800), ("1-0", 86400), ("1-2:30", 95400), ("0-0:01:10", 70)),
)
def test_a_time_limit_that_leaves_no_time_to_work_is_refused(limit, seconds):
    assert slurm._seconds(limit) == seconds and slurm._seconds("UNLIMITED") > 1e9
    if seconds < slurm.LEAST_S:
        with pytest.raises(UserError, match=f"--time {limit} is too short: .* up to 3 minutes .* give 5 minutes"):
            slurm.Batch(time=limit)
    else:
        slurm.Batch(time=limit)


def test_a_job_of_one_machine_is_as_any_other(monkeypatch):
    assert slurm.nodes() == 1
    for number, count in (("1", 1), ("2", 2)):
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        monkeypatch.setenv("SLURM_JOB_NUM_NODES", number)
        assert slurm.nodes() == count
    words = slurm.torchrun_words(2)
    assert words[0] == "bash" and "srun" in words and "--nnodes=2" in words and "--rdzv-id=7" in words
    assert sys.executable in words
