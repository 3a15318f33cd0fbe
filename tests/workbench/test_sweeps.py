"""Sweeps and nights: a queue that several workers share, that survives failures and kills, and goes on."""

import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import psutil
import pytest
import sweep_stub

from benchmarks import workbench as benchmarks
from vla_lib.core.errors import UserError
from vla_lib.core.files import append_jsonl, read_json
from vla_lib.core.run_folder import RunFolder, read_record, write_results
from vla_lib.workbench import commands, jobs, sweeps, worker
from vla_lib.workbench.jobs import Job
from vla_lib.workbench.parameters import resolve
from vla_lib.workbench.queue import Claim, Queue


def entries(folder: Path) -> dict[str, dict[str, object]]:
    """The rows of the only sweep or night, by entry."""
    (found,) = [*folder.glob("*-sweep"), *folder.glob("*-night")]
    return {row["entry"]: row for row in read_json(found / "results.json")["entries"]}


write_report = worker.write_report


@pytest.fixture(autouse=True)
def reported(monkeypatch) -> list[Path]:
    """The sweeps of which a report would have been made: that takes seconds."""
    made: list[Path] = []
    monkeypatch.setattr(worker, "write_report", made.append)
    return made


def test_a_sweep_survives_a_failing_run_and_goes_on_where_it_was(
    write_notebook, runs_folder, monkeypatch, capsys, reported
):
    path = write_notebook("n: int = 1")
    broken = {"2"}

    def stand_in(self: worker.Worker, claim: Claim) -> Job:
        run, n = RunFolder.create("small", {"n": int(claim.words["n"])}, path=claim.run), claim.words["n"]
        if n in broken:
            run.finish("failed", "ValueError: two is broken\nin cell 3")
        else:
            write_results(run.path, {"step": 10 * int(n), "val_action_loss": 0.25 / int(n)})
            run.finish("done")
        return Job(["false" if n in broken else "true"], self.queue.path / "jobs" / claim.run.name, "vla.log")

    monkeypatch.setattr(worker.Worker, "_job", stand_in)
    plan = sweeps.plan_sweep(str(path), ["n=1,2"], {})
    assert worker.run(plan, parallel=2) == 1
    said = capsys.readouterr().out
    assert "failed after" in said and "  ValueError: two is broken\n" in said
    (folder,) = runs_folder.glob("*-sweep")
    first = entries(runs_folder)
    assert (read_record(folder)["state"], first["n=1"]["state"], first["n=2"]["state"]) == ("failed", "done", "failed")

    broken.clear()
    monkeypatch.setattr(worker, "write_report", write_report)
    assert worker.run(plan) == 0
    after = entries(runs_folder)
    assert after["n=1"] == first["n=1"]  # not done again
    assert after["n=2"]["run"] != first["n=2"]["run"]
    table = pd.read_csv(folder / "comparison.csv")
    assert table[["entry", "state", "n", "step"]].values.tolist() == [["n=1", "done", 1, 10], ["n=2", "done", 2, 20]]
    assert len(list(runs_folder.glob("*-sweep"))) == 1
    assert reported == [folder]
    said, page = capsys.readouterr().out, folder / "report" / "notebook.html"
    assert f"report: {page}" in said
    text = page.read_text()
    assert all(f">{one}</td>" in text for one in ("n=1", "n=2", "0.25", "0.125")) and "data:image/png;base64" in text


def test_a_stopped_queue_leaves_no_process_and_true_records(write_notebook, runs_folder, tmp_path):
    path = write_notebook("n: int = 1", "import time; print('begun', flush=True); time.sleep(600)")
    jobs = tmp_path / "jobs.yaml"
    jobs.write_text(f"- {{name: long, notebook: {path}, parameters: {{n: 3}}}}\n- {{notebook: {path}}}\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "vla_lib.cli", "night", str(jobs)], stdout=subprocess.PIPE, text=True
    )
    while not any("begun" in log.read_text() for log in runs_folder.glob("*-small/run.log")):
        assert process.poll() is None
        time.sleep(0.1)
    (run,) = runs_folder.glob("*-small")
    (night,) = runs_folder.glob("*-night")
    assert commands.stop(night.name) == 0
    assert process.wait() == 130
    assert (read_record(run)["state"], read_record(night)["state"]) == ("cancelled", "cancelled")
    assert read_record(run)["parameters"] == {"n": 3}
    assert entries(runs_folder)["long"]["state"] == "waiting"  # it goes on with the same command


class Workers:
    """Workers of one sweep over n = 1 ... 6, each a process of its own; see sweep_stub."""

    def __init__(self, notebook: Path):
        self.notebook, self.folder = notebook, notebook.parent
        self.processes: list[subprocess.Popen[str]] = []

    def start(self, parallel: int = 1) -> subprocess.Popen[str]:
        words = [sys.executable, sweep_stub.__file__, "worker", str(self.notebook), str(parallel)]
        log = open(self.folder / f"worker{len(self.processes)}.log", "w")  # noqa: SIM115
        self.processes.append(subprocess.Popen(words, stdout=log, stderr=log, text=True))
        return self.processes[-1]

    def begun(self) -> list[int]:
        return sweep_stub.counted(self.folder / "begun")

    def until(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not true():
            assert time.monotonic() < deadline, [log.read_text() for log in self.folder.glob("worker*.log")]
            time.sleep(0.05)


@pytest.fixture
def workers(write_notebook):
    found = Workers(write_notebook("n: int = 1"))
    yield found
    for process in found.processes:
        process.kill()
        process.wait()


def test_each_setting_is_done_once_whatever_happens_to_its_workers(workers, runs_folder):
    """Two workers at once; one is killed, one stopped by Ctrl-C, one entry fails; the same command goes on."""
    first, second = workers.start(), workers.start()
    workers.until(lambda: len(workers.begun()) == 2)
    assert len(set(workers.begun())) == 2  # each has an entry of its own
    (sweep,) = runs_folder.glob("*-sweep")
    keeper = read_record(sweep)["pid"]
    first, second = (first, second) if first.pid == keeper else (second, first)
    family = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    # the other one takes the queue's record up, and waits
    workers.until(lambda: read_record(sweep).get("pid") == second.pid)
    second.send_signal(signal.SIGINT)
    assert second.wait() == 130
    assert psutil.wait_procs(family, timeout=30)[1] == []
    assert read_record(sweep)["state"] == "cancelled" and not (sweep / "reported").exists()
    states = [read_record(run)["state"] for run in runs_folder.glob("*-small")]
    assert states == ["cancelled", "cancelled"]

    third = workers.start(3)
    workers.until(lambda: len(workers.begun()) == 5)
    (workers.folder / "go").touch()
    assert third.wait() == 1
    sweep_stub.check_each_was_done_once(workers.folder, runs_folder)
    said = "".join(log.read_text() for log in workers.folder.glob("worker*.log"))
    assert "ValueError: three is broken" in said


def test_a_worker_of_another_machine_is_gone_by_the_shared_disks_clock(write_notebook, runs_folder, monkeypatch):
    """Its file is old: its entry waits again. Its file is fresh: it works."""
    path = write_notebook("n: int = 1")
    plan = sweeps.plan_sweep(str(path), ["n=1,2"], {})
    there = Queue.open(plan)
    monkeypatch.setattr("vla_lib.core.owner.machine", lambda: "another one")
    here = Queue.open(plan)
    assert here.record is None  # joined
    claims = [there.claim(), there.claim()]
    assert all(claims) and here.claim() is None
    there.worker._over.set()
    monkeypatch.setattr("vla_lib.core.owner.STALE_S", -1.0)
    again = here.claim()
    assert again and again.resume and again.run == claims[0].run
    assert there.tell(claims[0], "done") == "done" and here.rows()[0]["state"] == "running"  # too late: not taken
    there.worker.release()
    here.worker.release()


def test_the_last_entry_may_end_while_another_worker_closes_the_record(
    write_notebook, runs_folder, monkeypatch, reported
):
    plan = sweeps.plan_sweep(str(write_notebook("n: int = 1")), ["n=1,2"], {})
    here, there = Queue.open(plan), Queue.open(plan)
    mine, others = here.claim(), there.claim()
    here.tell(mine, "done")
    monkeypatch.setattr(worker, "write_text", lambda *_: others and there.tell(others, "done"))
    assert worker.conclude(here, stopped=False) == 0
    assert read_record(here.path)["state"] == "done" and reported == [here.path]
    for queue in (here, there):
        queue.worker.release()


def test_a_search_draws_each_setting_once_and_repeats_it_with_other_seeds(write_notebook, runs_folder):
    path = write_notebook("lr: float = 1.0\ndepth: int = 1\nseed: int = 5\nkind: str = 'a'")
    plan = sweeps.plan_sweep(
        str(path), ["kind=a,b"], {"seed": "7"}, ["lr=1e-4..1e-1:log", "depth=1..3"], trials=3, seeds=2
    )
    plan.check()
    queue, drawn = Queue.open(plan), []
    while claim := queue.claim():
        if len(drawn) == 1:  # drawn, and given back before its end: the same setting comes again
            queue.give_back(claim)
            claim = queue.claim()
        drawn.append(claim)
        write_results(claim.run, {"val_action_loss": float(claim.words["lr"])})
        assert queue.tell(claim, "done") == "done"
    assert sorted(one.entry.name for one in drawn) == sorted(
        f"{n:03d} kind={kind} seed={seed}" for n, kind in ((1, "a"), (2, "b"), (3, "a")) for seed in (7, 8)
    )
    for setting in ("001 kind=a", "002 kind=b", "003 kind=a"):
        words = [{**one.words, "seed": ""} for one in drawn if one.entry.setting == setting]
        assert words[0] == words[1] and 1e-4 <= float(words[0]["lr"]) <= 1e-1 and words[0]["depth"] in "123"
    assert len({one.words["lr"] for one in drawn}) == 3
    claims = Queue.open(plan)  # the record was never closed: joined, and nothing is left to do
    assert claims.claim() is None and all(row["state"] == "done" for row in claims.rows())


def test_a_search_without_its_objective_fails(write_notebook, runs_folder):
    path = write_notebook("lr: float = 1.0")
    queue = Queue.open(sweeps.plan_sweep(str(path), [], {}, ["lr=1e-4..1e-1"], trials=1, objective="val_mae_mm"))
    claim = queue.claim()
    assert queue.tell(claim, "done") == "failed" and "val_mae_mm" in queue.rows()[0]["error"]


def test_a_poor_run_is_pruned_and_says_so(write_notebook, runs_folder, monkeypatch, capsys):
    """Three runs have ended with small errors; the fourth reports a large one, and would go on for ever."""
    path = write_notebook("lr: float = 1.0")
    plan = sweeps.plan_sweep(str(path), ["lr=1,2,3,4"], {}, prune=True)
    queue = Queue.open(plan)
    for _ in range(3):
        claim = queue.claim()
        claim.trial.report(0.1, 10)
        write_results(claim.run, {"val_action_loss": 0.1})
        queue.tell(claim, "done")
    queue.worker.release()
    queue.record.finish("cancelled")

    def stand_in(self: worker.Worker, claim: Claim) -> Job:
        run = RunFolder.create("small", {}, path=claim.run)
        append_jsonl(claim.run / "metrics.jsonl", {"epoch": 1, "step": 10, "val/action_loss": 5.0})
        job = Job(["sleep", "600"], self.queue.path / "jobs", "vla.log")
        monkeypatch.setattr(job, "stop", lambda: (run.finish("cancelled"), Job.stop(job)))
        return job

    monkeypatch.setattr(worker.Worker, "_job", stand_in)
    assert worker.run(plan) == 0
    last = list(entries(runs_folder).values())[-1]
    assert last["state"] == "pruned" and last["value"] == 5.0
    record = read_record(runs_folder / last["run"])
    assert record["state"] == "pruned" and "step 10" in record["error"]
    assert "pruned after" in capsys.readouterr().out


def test_a_run_that_never_begins_is_lost_and_stands_beside_the_others(write_notebook, runs_folder, monkeypatch, capsys):
    path = write_notebook("n: int = 1")

    def stand_in(self: worker.Worker, claim: Claim) -> Job:
        if claim.entry.name == "n=1":
            write_results(claim.run, {"step": 1})
            RunFolder.create("small", {}, path=claim.run).finish("done")
        return Job(["false"], self.queue.path / "jobs" / claim.run.name, "vla.log")

    monkeypatch.setattr(worker.Worker, "_job", stand_in)
    assert worker.run(sweeps.plan_sweep(str(path), ["n=1,2"], {}), parallel=2) == 1
    assert "it never began, see " in capsys.readouterr().out
    (sweep,) = runs_folder.glob("*-sweep")
    table = pd.read_csv(sweep / "comparison.csv")
    assert table[["entry", "state"]].values.tolist() == [["n=1", "done"], ["n=2", "lost"]]
    assert read_record(sweep)["error"] == "1 of 2 runs did not end as done: n=2"


@pytest.mark.parametrize(
    "text, said",
    (
        ("- {notebook: 04_train_async, parameters: {lrr: 1e-4}}", "has no parameter lrr"),
        (
            "- {name: a, notebook: 04_train_async, parameters: {lr: 2026-01-01}}",
            "night, a: 04_train_async: parameter lr wants float",
        ),
        (
            "- {notebook: 04_train_async, parameters: {lr: [1e-4, {a: b}]}}",
            "entry 1: parameters lr .*valid string",
        ),
        ("- {name: [a], notebook: 04_train_async}", "entry 1: name: .*valid string"),
        ("- {name: a}", "entry 1: notebook: Field required"),
        ("- {notebook: 04_train_async\n", "cannot be read as YAML"),
        ("[]", "at least 1 item.*holds a list of runs"),
        ("- 4", "entry 1.*holds a list of runs"),
        ("a: b", "valid list; the file holds a list of runs"),
        ("- {name: a, notebook: 04_train_async}\n- {name: a, notebook: 06_evaluate}", "two entries are named 'a'"),
    ),
)
def test_a_bad_list_starts_nothing(text, said, tmp_path, runs_folder):
    (tmp_path / "jobs.yaml").write_text(text)
    with pytest.raises(UserError, match=said):
        worker.run(sweeps.Plan("night", sweeps.read_list(tmp_path / "jobs.yaml")))
    assert not runs_folder.exists()


def test_values_of_a_list_mean_what_command_line_words_mean(tmp_path, write_notebook):
    path = write_notebook("name: str = ''\nlr: float = 1.0\non: bool = False\nviews: list[str] = []")
    (tmp_path / "jobs.yaml").write_text(
        f"- notebook: {path}\n  parameters: {{name: no, lr: 1e-4, on: true, views: [View1, 2026-01-01]}}\n"
    )
    (entry,) = sweeps.read_list(tmp_path / "jobs.yaml")
    values = {"name": "no", "lr": 1e-4, "on": True, "views": ["View1", "2026-01-01"]}
    assert resolve(path, entry.parameters, text=True) == values


def test_a_grid_is_every_combination_and_bad_axes_are_named():
    grid = sweeps.plan_sweep("04_train_async", ["lr=1e-4,5e-5", "vlm_reuse_count=3,4"], {"dropout": "0.1"}).entries
    assert [entry.name for entry in grid][:2] == ["lr=1e-4 vlm_reuse_count=3", "lr=1e-4 vlm_reuse_count=4"]
    assert len(grid) == 4 and grid[3].parameters == {"dropout": "0.1", "lr": "5e-5", "vlm_reuse_count": "4"}
    for axis in ("lr", "lr=", "=3", "lr=1,"):
        with pytest.raises(UserError, match="NAME=VALUE"):
            sweeps.plan_sweep("04_train_async", [axis], {})
    with pytest.raises(UserError, match="given twice"):
        sweeps.plan_sweep("04_train_async", ["lr=1,2"], {"lr": "3"})
    with pytest.raises(UserError, match="a value of seed is given twice"):
        sweeps.plan_sweep("04_train_async", ["seed=1,2,1"], {})


@pytest.mark.parametrize(
    "asked, said",
    (
        ({"search": ["lr=1e-4..1e-5"], "trials": 2}, "no range"),
        ({"search": ["lr=a..b"], "trials": 2}, "no range"),
        ({"search": ["vl_enabled=1..2"], "trials": 2}, "vl_enabled is bool"),
        ({"search": ["lrr=1..2"], "trials": 2}, "no parameter lrr"),
        ({"search": ["lr=1..2"]}, "go together"),
        ({"trials": 2}, "go together"),
        ({"grid": ["lr=1,2,3"], "search": ["dropout=0..1"], "trials": 2}, "the grid has 3 points"),
        ({"search": ["lr=1e-4,x"], "trials": 2}, "parameter lr wants float"),
        ({}, "Nothing varies"),
        ({"seeds": 0, "grid": ["lr=1"]}, "give 1 or more"),
    ),
)
def test_a_bad_search_is_refused(asked, said):
    with pytest.raises(UserError, match=said):
        sweeps.plan_sweep("04_train_async", asked.pop("grid", []), {}, **asked).check()


@pytest.fixture
def four_gpus(tmp_path, monkeypatch):
    monkeypatch.setattr(worker, "LOCKS", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")


def test_no_gpu_is_given_to_two_runs(four_gpus, tmp_path, monkeypatch):
    """Also where the worker that took it is gone and its run still ends: the run's supervisor holds it."""
    gpus = worker.Gpus.find(per_run=2)
    first, second = gpus.take(), gpus.take()
    assert {*first.names, *second.names} == {"0", "1", "2", "3"} and gpus.take() is None
    assert first.variables == {"CUDA_VISIBLE_DEVICES": "0,1"}
    job = Job(["sleep", "600"], tmp_path / "job")
    job.held = first.handles
    job.start()
    first.release()
    assert worker.Gpus.find(per_run=1).take() is None
    job.stop()
    job._process.wait()
    assert gpus.take().names == ("0", "1")
    with pytest.raises(UserError, match="wants 5 GPUs, but there are 4"):
        worker.Gpus.find(per_run=5)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert worker.Gpus.find(per_run=5).take().variables == {}


def test_runs_at_once_have_gpus_of_their_own_and_a_share_of_the_cores(
    four_gpus, write_notebook, runs_folder, monkeypatch, capsys
):
    """Two workers' worth of runs, two GPUs each: what each saw is what it was given, and none was shared."""
    path = write_notebook("n: int = 1\nnproc_per_node: int = 2")
    monkeypatch.setattr(jobs.os, "sched_getaffinity", lambda _: range(16))
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    code = """
import json, os, sys, time
seen = {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "WANDB_RUN_GROUP")}
begun = time.time(); time.sleep(0.3)
json.dump({**seen, "begun": begun, "ended": time.time()}, open(sys.argv[1], "w"))
"""
    given: list[Path] = []

    def stand_in(self: worker.Worker, claim: Claim) -> Job:
        RunFolder.create("small", {}, path=claim.run).finish("done")
        (claim.run / "wandb" / "offline-run-1").mkdir(parents=True)
        given.append(claim.run / "seen.json")
        return Job([sys.executable, "-c", code, str(given[-1])], self.queue.path / "jobs" / claim.run.name, "vla.log")

    monkeypatch.setattr(worker.Worker, "_job", stand_in)
    assert worker.run(sweeps.plan_sweep(str(path), ["n=1,2,3,4"], {})) == 0
    said = capsys.readouterr().out
    assert "2 at a time, 2 to a run, of 4 GPUs (0, 1, 2, 3), 4 CPU threads to a process" in said
    seen = [read_json(file) for file in given]
    (sweep,) = runs_folder.glob("*-sweep")
    assert f"offline, in the group {sweep.name}; `xargs wandb sync < {sweep}/wandb.txt` uploads them" in said
    assert len((sweep / "wandb.txt").read_text().splitlines()) == 4
    assert {(one["OMP_NUM_THREADS"], one["WANDB_RUN_GROUP"]) for one in seen} == {("4", sweep.name)}
    assert {one["CUDA_VISIBLE_DEVICES"] for one in seen} == {"0,1", "2,3"}
    for one, other in itertools.combinations(seen, 2):
        if one["begun"] < other["ended"] and other["begun"] < one["ended"]:
            assert one["CUDA_VISIBLE_DEVICES"] != other["CUDA_VISIBLE_DEVICES"]


def test_the_benchmark_of_the_queue_gives_a_row(runs_folder):
    row = benchmarks.queue_row(3)
    assert 0 < row.ours < row.baseline and row.unit == "s/entry"
