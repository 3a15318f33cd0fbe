"""Damage is noticed where it would be learned from: the run stops with the file's name."""

import pickle

import numpy as np
import pytest
import torch
from synthetic import write_dataset

from vla_lib.core.errors import UserError
from vla_lib.core.files import file_checksum
from vla_lib.episodes import find_prepared, load_prepared
from vla_lib.episodes.data_pkl import read_pickle, write_pickle
from vla_lib.features.cache import FeatureCache
from vla_lib.training.samples import SampleSet, batches


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
    return list(batches(samples, [np.arange(len(samples))], workers, False))


def alter_pickle(root, act, keep=True):
    path = find_prepared(root)[1] / "data.pkl"
    content = read_pickle(path)
    act(content)
    if not keep:
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
    path = alter_pickle(root, planted)
    with pytest.raises(UserError, match=f"{path}: the action of step 5 moves by 150 mm"):
        learn(root)
