"""Shared by the training tests: small prepared datasets with a VL cache, and settings that train on them in seconds."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from front_doors import SMALL
from synthetic import write_dataset

from vla_lib.training.settings import AsyncSettings, DiffusionSettings


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
