"""A run's own run.json: every end is recorded, a notebook's record is left alone, the lab book lists it."""

import dataclasses
import signal

import pytest

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.core.run_folder import RunFolder, read_record
from vla_lib.train_async import main as train_async
from vla_lib.training import loop
from vla_lib.workbench import runs


def test_a_front_doors_run_is_in_the_lab_book(async_settings, runs_folder):
    """In a folder made for it, or in one with a name of its own."""
    RunFolder.create("04_train_async", {}, path=runs_folder / "20200101-000000-04_train_async")
    train_async(async_settings(max_steps=1, run_dir=None, val_fraction=0.5))
    (made,) = runs.find_runs("train_async")
    assert read_record(made)["parameters"]["max_steps"] == 1 and read_record(made)["state"] == "done"
    row = runs.table("train_async").iloc[0]
    assert (row["name"], row["r.step"], row["cache"]) == ("train_async", 1, row["r.cache"])
    assert len(runs.find_runs("04_train_async")) == 1  # no notebook's run
    train_async(async_settings(max_steps=1, run_dir=runs_folder / "a_trial", vl_enabled=False))
    assert set(runs.find_runs("train_async")) == {made, runs_folder / "a_trial"}
    train_async(async_settings(max_steps=1, run_dir=None))
    newest = runs.newest_checkpoint("qwen_vla_async_best.pt")
    assert newest.parent.parent == runs.find_runs()[-1] != runs_folder / "a_trial"
    names = [runs.name_of(path) for path in runs.find_checkpoints()]
    assert len(set(names)) == 9 and "async no VL a_trial" in names


def test_a_stopped_run_is_cancelled_and_runs_again_when_resumed(async_settings, tmp_path, monkeypatch):
    rate, seen = loop.Schedule.learning_rate, []

    def asked(self, state):  # in each step
        if not self.settings.resume:
            signal.raise_signal(signal.SIGTERM)
        seen.append(read_record(tmp_path / "run")["state"])
        return rate(self, state)

    monkeypatch.setattr(loop.Schedule, "learning_rate", asked)
    settings = async_settings(max_steps=2)
    train_async(settings)
    stopped = read_record(tmp_path / "run")
    assert (stopped["state"], stopped["error"]) == ("cancelled", "stopped by SIGTERM")
    train_async(dataclasses.replace(settings, resume=True))
    done = read_record(tmp_path / "run")
    assert (done["state"], done["error"], done["first_started"]) == ("done", None, stopped["started"])
    assert seen == ["running", "running"] and done["parameters"]["resume"]
    with pytest.raises(UserError, match="exists already"):
        train_async(settings)
    assert read_record(tmp_path / "run") == done  # what is refused leaves no trace


def test_a_failure_is_told_in_the_record(async_settings, tmp_path, monkeypatch):
    with pytest.raises(UserError):
        train_async(async_settings(image_resize_height=180))
    record = read_record(tmp_path / "run")
    assert record["state"] == "failed" and record["error"].startswith(
        "The VL cache and the flags differ: image-resize-height is 360"
    )
    monkeypatch.setattr(loop.Schedule, "learning_rate", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train_async(async_settings())
    assert read_record(tmp_path / "run")["error"] == "ZeroDivisionError: division by zero"


def test_a_notebooks_record_is_left_alone(async_settings, tmp_path):
    RunFolder.create("04_train_async", {"lr": 1.0}, path=tmp_path / "run", notebook="04_train_async.ipynb")
    before = read_json(tmp_path / "run" / "run.json")
    train_async(async_settings(max_steps=1))
    assert read_json(tmp_path / "run" / "run.json") == before
