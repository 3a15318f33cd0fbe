"""Shared by the training tests: small prepared datasets with a VL cache, and settings that train on them in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from synthetic import write_dataset

from vla_lib.training.settings import AsyncSettings, DiffusionSettings

SMALL = {
    "width": 32,
    "layers": 1,
    "heads": 2,
    "sensor_window_size": 13,
    "num_workers": 0,
    "wandb_mode": "disabled",
    "device": "cpu",
    "warmup_steps": 2,
}


@pytest.fixture(autouse=True)
def quiet_machine(tmp_path, monkeypatch):
    """One thread (so that sums have one order) and a W&B folder of the test's own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def mixed(tmp_path_factory) -> Path:
    """Three datasets of weight 3, 2 and 1; 8 episodes of 24 steps, ticks at every step."""
    root = tmp_path_factory.mktemp("mixed")
    write_dataset(root, {"New_dataset/Task_a": 2, "White_silicone_white_circle": 3, "part1": 3}, steps=24)
    return root


@pytest.fixture(scope="session")
def single(tmp_path_factory) -> Path:
    """One episode."""
    root = tmp_path_factory.mktemp("single")
    write_dataset(root, {"White_silicone_white_circle": 1}, steps=30, seed=3)
    return root


@pytest.fixture
def async_settings(mixed, tmp_path):
    """Builder of small async settings; every call with the same `run` shares a run folder."""
    return _builder(AsyncSettings, mixed, tmp_path)


@pytest.fixture
def diffusion_settings(mixed, tmp_path):
    """Builder of small diffusion settings."""
    return _builder(DiffusionSettings, mixed, tmp_path)


def _builder(settings_class, root, tmp_path):
    def build(run: str = "run", **changes):
        return settings_class(**{"dataset_root": root, "run_dir": tmp_path / run, **SMALL, **changes})

    return build


def wandb_rows(run: Path) -> list[dict]:
    """What `wandb sync` would upload of a run folder: the history of its only W&B folder, read from its record file
    (LevelDB's log format)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("wandb/*run-*/run-*.wandb")
    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            row, record = Record.FromString(record), b""
            if row.HasField("history"):
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.history.item}
                )
    return rows


def launch(
    program: str | list[str], flags: dict, processes: int = 1, background: bool = False, environment: dict | None = None
):
    """Start a front door (or the words behind `python`) as a program, under torchrun where `processes` > 1.

    Returns the finished (or running) process. Flags are written as the settings' names with dashes.
    """
    words = [sys.executable, *(program if isinstance(program, list) else ["-m", f"vla_lib.{program}"])]
    if processes > 1:
        words[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    for name, value in {**SMALL, **flags}.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **(environment or {})}
    if background:
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(words, env=environment, start_new_session=True, **output)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300)
