"""Shared by the training tests: small prepared data sets with a VL cache, and settings that train on them in seconds."""

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
    """Three data sets of weight 3, 2 and 1; 8 episodes of 24 steps, ticks at every step."""
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


def launch(module: str, flags: dict, processes: int = 1, background: bool = False, **options):
    """Start a front door as a program, under torchrun where `processes` > 1; returns the finished (or running) process."""
    words = [sys.executable, "-m", f"vla_lib.{module}"]
    if processes > 1:
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m", f"vla_lib.{module}"]
    for name, value in {**SMALL, **flags}.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    if background:
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, **options)
