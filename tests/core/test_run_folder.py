import subprocess
import sys

import psutil

from vla_lib.core.files import read_json, write_json
from vla_lib.core.run_folder import RunFolder, read_record


def test_a_run_is_recorded_from_start_to_end(runs_folder):
    run = RunFolder.create("04_train_async", {"lr": 1e-4})
    assert run.path.parent == runs_folder
    assert read_record(run.path)["state"] == "running"
    run.finish("failed", "the disk is full")
    record = read_json(run.path / "run.json")
    assert (record["state"], record["error"], record["parameters"]) == ("failed", "the disk is full", {"lr": 1e-4})
    assert record["duration_s"] >= 0
    assert record["versions"]["torch"]
    run.finish("done")  # the first end holds
    assert read_record(run.path)["state"] == "failed"


def test_two_runs_in_the_same_second_get_folders_of_their_own():
    assert len({RunFolder.create("x", {}).path for _ in range(5)}) == 5


def test_a_run_whose_process_is_gone_is_lost():
    code = "from vla_lib.core.run_folder import RunFolder; print(RunFolder.create('x', {}).path)"
    path = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert read_json(f"{path}/run.json")["state"] == "running"
    assert read_record(path)["state"] == "lost"


def test_a_reused_process_number_does_not_keep_a_run_alive():
    run = RunFolder.create("x", {})
    write_json(run.path / "run.json", {**run.record, "pid_created": psutil.Process().create_time() - 100})
    assert read_record(run.path)["state"] == "lost"
