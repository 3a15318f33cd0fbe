import errno
import os
import re
import subprocess
import sys

import psutil
import pytest

from vla_lib.core import files
from vla_lib.core.errors import UserError, in_words
from vla_lib.core.files import read_json, write_json
from vla_lib.core.owner import owner_file
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


def test_two_runs_never_begin_in_one_folder(tmp_path):
    run = RunFolder.create("x", {}, path=tmp_path / "run")
    with pytest.raises(UserError, match="in use by process"):
        RunFolder.resume(run.path, {})
    with pytest.raises(UserError, match="in use by process"):
        RunFolder.create("x", {}, path=run.path)
    run.finish("done")
    with pytest.raises(UserError, match="holds a run already"):
        RunFolder.create("x", {}, path=run.path)
    RunFolder.resume(run.path, {}).finish("done")
    assert sorted(file.name for file in run.path.iterdir()) == ["run.json"]


def test_a_run_of_another_machine_that_is_heard_of_no_more_is_lost():
    run = RunFolder.create("x", {})
    write_json(run.path / "run.json", {**run.record, "host": "there", "pid": 2**22 + 1})
    note = owner_file(run.path, "run")
    write_json(note, {**read_json(note), "machine": "there 1", "host": "there"})
    assert read_record(run.path)["state"] == "running"
    os.utime(note, (1.0, 1.0))
    assert read_record(run.path)["state"] == "lost"


def test_how_a_run_ended_is_recorded_on_a_full_disk(monkeypatch, tmp_path):
    """A disk of this test's own: writing fails while less than 10 kB of 40 are free."""
    run = RunFolder.create("x", {})
    write = files.write_text

    def full(path, text):
        if sum(file.stat().st_size for file in run.path.iterdir()) > 30_000:
            raise OSError(28, "No space left on device")
        write(path, text)

    monkeypatch.setattr(files, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        files.write_json(run.path / "results.json", {})
    run.finish("failed", in_words(OSError(28, "No space left on device")))
    record = read_record(run.path)
    assert (record["state"], record["error"]) == ("failed", "disk full: [Errno 28] No space left on device")


@pytest.mark.parametrize(
    "bad",
    ("{", "[]", "null", "7", "", "[" * 100_000, b"\xff\xfe")
    + tuple({key: value} for key, value in (("pid", -1), ("pid", 2**70), ("parameters", [1]), ("started", "soon")))
    + ({"state": "well"}, {"git": "main"}, {"git": {}}, {"name": None}, {"duration_s": "long"}, {"error": 1}),
    ids=lambda bad: str(bad)[:20],
)
def test_a_bad_record_is_one_that_says_so(bad):
    run = RunFolder.create("x", {})
    if isinstance(bad, dict):
        write_json(run.path / "run.json", run.record | bad)
    else:
        (run.path / "run.json").write_bytes(bad if isinstance(bad, bytes) else bad.encode())
    record = read_record(run.path)
    assert record["state"] == "unreadable" and f"{run.path}/run.json" in record["error"]
    with pytest.raises(UserError, match=re.escape("run.json")):
        RunFolder.resume(run.path, {})


def test_a_full_runs_folder_is_one_sentence(monkeypatch, tmp_path):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vla_lib.core.run_folder.Owner.take", full)
    with pytest.raises(UserError, match=r"cannot be written .disk full: .* Make room there, or set VLA_RUNS"):
        RunFolder.create("01_inspect_episodes", {})
