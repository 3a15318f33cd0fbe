"""Damage is noticed where it would be learned from: the run stops with the file's name."""

import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from front_doors import SMALL
from ranks import two_ranks
from synthetic import write_dataset

from vla_lib.core.errors import UserError
from vla_lib.core.files import file_checksum
from vla_lib.core.loader import load
from vla_lib.core.run_folder import read_record
from vla_lib.episodes import find_prepared, load_prepared
from vla_lib.episodes.data_pkl import read_pickle, write_pickle
from vla_lib.episodes.findings import NO_NUMBERS
from vla_lib.features.cache import FeatureCache
from vla_lib.train_async import main as train_async
from vla_lib.training.samples import SampleSet
from vla_lib.training.settings import AsyncSettings


@pytest.fixture
def root(tmp_path):
    """Three episodes as the workbench writes them: with checksums."""
    write_dataset(tmp_path, {"part1": 3}, steps=12)
    for folder in find_prepared(tmp_path):
        content = read_pickle(folder / "data.pkl")
        content["sensor_data"]["checksum"] = file_checksum(folder / "sensor.npy")
        write_pickle(folder / "data.pkl", content)
    return tmp_path


def learn(root, workers=0):
    episodes = [load_prepared(folder) for folder in find_prepared(root)]
    samples = SampleSet(episodes, FeatureCache.open(root), sensor_window_size=13, vlm_reuse_count=1)
    return list(load(samples, workers, sampler=[np.arange(len(samples))]))


def alter_pickle(root, act, keep=True):
    """`keep`: the checksums stay; None: there are none."""
    path = find_prepared(root)[1] / "data.pkl"
    content = read_pickle(path)
    act(content)
    if keep is False:
        del content["metadata"]["checksum"], content["sensor_data"]["checksum"]
    path.write_bytes(pickle.dumps(content))
    return path


def alter_cache(root, name, act):
    path = sorted(root.glob("cache/**/*.pt"))[1]
    value = torch.load(path, weights_only=True)
    value[name] = act(value[name].clone())
    torch.save(value, path)
    return path


def alter_sensor(root, act):
    path = find_prepared(root)[1] / "sensor.npy"
    stream = np.load(path)
    act(stream)
    np.save(path, stream)
    return path


def flip(array):
    array.view(np.uint8).reshape(-1)[4001] ^= 1


def flipped(tokens):
    flip(tokens.numpy())
    return tokens


CACHE = {
    "scaled": ("tokens", lambda t: t * 1e4),
    "zeroed": ("tokens", torch.zeros_like),
    "a bit flipped": ("tokens", flipped),
    "reversed in time": ("tokens", lambda t: t.flip(0)),
    "masks all false": ("mask", torch.zeros_like),
}


@pytest.mark.parametrize("name, act", CACHE.values(), ids=CACHE)
def test_a_damaged_cache_file_stops_the_run(root, name, act):
    learn(root)
    path = alter_cache(root, name, act)
    with pytest.raises(UserError, match=f"{path.name} is damaged"):
        learn(root)


def nan(stream):
    stream[100, 7] = np.nan


def huge(stream):
    stream[100, 7] = 1e30


@pytest.mark.parametrize("act", (nan, huge, flip))
def test_a_damaged_sensor_file_stops_the_run_also_in_a_loader_process(root, act):
    assert len(learn(root, 1)) == 1
    path = alter_sensor(root, act)
    with pytest.raises(UserError, match=f"^{path} is damaged.*--overwrite"):
        learn(root, 1)


def planted(content):
    content["action"][5, 0] = 150.0


def backwards(content):
    content["timestamp"] = content["timestamp"][::-1].copy()


@pytest.mark.parametrize("act", (planted, backwards))
def test_an_altered_data_pkl_is_refused(root, act):
    path = alter_pickle(root, act)
    with pytest.raises(UserError, match=str(path)):
        learn(root)


def test_files_without_checksums_open_and_their_ranges_are_looked_at(root):
    """As earlier versions wrote them."""
    alter_pickle(root, lambda content: None, keep=False)
    path = sorted(root.glob("cache/**/*.pt"))[1]
    value = torch.load(path, weights_only=True)
    del value["xxh3"]
    torch.save(value, path)
    learn(root)
    alter_sensor(root, huge)
    with pytest.raises(UserError, match="sensor.npy is damaged"):
        learn(root)
    alter_sensor(root, lambda stream: stream.__setitem__((100, 7), 1.0))
    learn(root)
    alter_sensor(root, nan)
    with pytest.raises(UserError, match="sensor.npy is damaged"):
        learn(root)
    said = [{"weight": "excluded", "stream": "sensor", "text": f"1 samples {NO_NUMBERS}", "left_out": False}]
    alter_pickle(root, lambda content: content["metadata"].update(findings=said), keep=None)
    learn(root)  # the recording held it already, and its windows are left out
    path = alter_pickle(root, planted, keep=None)
    with pytest.raises(UserError, match=f"{path}: the action of step 5 moves by 150 mm"):
        learn(root)


RANKS = {"batch_size": 2, "grad_accum_steps": 1, "max_steps": 40, "val_fraction": 0.0, "epochs": 99}


def test_two_ranks_stop_with_the_name_of_the_file_that_one_of_them_met(root, tmp_path):
    path = alter_sensor(root, flip)
    settings = AsyncSettings(**SMALL, **RANKS, dataset_root=root, run_dir=tmp_path / "run")
    statuses, output = two_ranks(lambda: train_async(settings))
    assert all(statuses) and f"{path} is damaged" in output
    record = read_record(tmp_path / "run")
    assert record["state"] == "failed" and str(path) in record["error"]


def test_two_ranks_name_the_episode_and_step_of_a_loss_that_is_not_finite_on_one_of_them(mixed, tmp_path, monkeypatch):
    root = tmp_path / "data"
    shutil.copytree(mixed, root)
    victim = find_prepared(root)[2]
    settings, read = AsyncSettings(**SMALL, **RANKS, dataset_root=root, run_dir=tmp_path / "run"), SampleSet.batch

    def spoilt(self, numbers):
        batch = read(self, numbers)
        for place, number in enumerate(numbers):
            if self.episodes[self.episode[number]].path == victim and self.step[number] == 7:
                batch["action"][place, 0] = float("nan")
        return batch

    monkeypatch.setattr(SampleSet, "batch", spoilt)
    statuses, output = two_ranks(lambda: train_async(settings))
    assert all(statuses)
    assert re.search(rf"not finite at step \d+: it comes from step 7 \(0.7 s\) of episode {victim}; look", output), (
        output
    )
    assert read_record(tmp_path / "run")["state"] == "failed"
