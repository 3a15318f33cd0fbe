"""Split, sampler, samples, statistics and the checks before a training."""

import dataclasses
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from synthetic import write_dataset

from vla_lib.core.errors import UserError
from vla_lib.core.loader import load
from vla_lib.episodes import find_prepared, load_prepared
from vla_lib.episodes.data_pkl import DATA_NAME, read_checked, write_pickle
from vla_lib.episodes.findings import NO_NUMBERS
from vla_lib.features.cache import FeatureCache, cache_folder
from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.normaliser import Normaliser
from vla_lib.training import reporting
from vla_lib.training.data import prepare_data, split_episodes
from vla_lib.training.samples import SampleSet, training_statistics
from vla_lib.training.schedule import Schedule, draw_epoch, plan
from vla_lib.training.settings import AsyncSettings
from vla_lib.workbench import training_preflight


def sample_set(root, **options) -> SampleSet:
    return SampleSet(
        [load_prepared(p) for p in find_prepared(root)],
        FeatureCache.open(root),
        **({"sensor_window_size": 13} | options),
    )


# ---- split


@given(st.dictionaries(st.sampled_from("abcd"), st.integers(1, 12), min_size=1), st.floats(0, 0.9), st.integers(0, 5))
def test_trap_11_split_is_by_episode_and_stratified(counts, fraction, seed):
    keys = {f"{d}/{k}": d for d, n in counts.items() for k in range(n)}
    try:
        split = split_episodes(keys, fraction, seed)
    except UserError:
        assert max(counts.values()) == 1 and fraction > 0
        return
    assert sorted(split["train"] + split["val"]) == sorted(keys) and not set(split["train"]) & set(split["val"])
    for d, n in counts.items():
        held = sum(keys[k] == d for k in split["val"])
        assert held < n and (held >= 1) == (fraction > 0 and n > 1) and abs(held - n * fraction) <= 1
    assert split == split_episodes(dict(reversed(keys.items())), fraction, seed)


def test_no_window_of_a_held_out_episode_is_trained_on(mixed):
    data = prepare_data(AsyncSettings(dataset_root=mixed, sensor_window_size=13))
    assert not {e.path for e in data.train.episodes} & {e.path for e in data.val.episodes}
    assert {e.dataset for e in data.val.episodes} == {"New_dataset", "White_silicone_white_circle", "part1"}


# ---- sampler


@pytest.mark.parametrize("world", [1, 2])
def test_weight_three_is_drawn_three_times_as_often(mixed, world):
    data = prepare_data(AsyncSettings(dataset_root=mixed, sensor_window_size=13))
    draws = draw_epoch(data.weights, 60_000, seed=0, epoch=0)
    names = np.array([data.train.episodes[e].dataset for e in data.train.episode])
    table = {row["dataset"]: row["share"] for row in data.weights_table()}
    for rank in range(world):  # in each for itself
        drawn = np.concatenate([m.indices[m.counts > 0] for step in plan(draws, 4, 2, rank, world) for m in step])
        assert len(drawn) == 60_000 / world
        count = np.bincount(drawn, minlength=len(data.train))
        rate = {name: count[names == name].mean() for name in np.unique(names)}
        assert rate["New_dataset"] / rate["part1"] == pytest.approx(3, rel=0.05)
        assert rate["White_silicone_white_circle"] / rate["part1"] == pytest.approx(2, rel=0.05)
        for name, share in table.items():
            assert count[names == name].sum() / len(drawn) == pytest.approx(share, abs=0.01)


def test_a_task_has_a_weight_of_its_own(tmp_path):
    """Where tasks of a dataset differ, each has a row of its own."""
    write_dataset(tmp_path, {"New_dataset/Task_a": 3, "New_dataset/Task_b": 3, "part1": 2}, steps=10)
    settings = AsyncSettings(dataset_root=tmp_path, sensor_window_size=13)
    assert [(r["dataset"], r["weight"]) for r in prepare_data(settings).weights_table()] == [
        ("New_dataset", 3),
        ("part1", 1),
    ]
    (tmp_path / "datasets.yaml").write_text("New_dataset/Task_b: {weight: 6}")
    data = prepare_data(settings)
    tasks = np.array([data.train.episodes[e].task for e in data.train.episode])
    assert sum(row["share"] for row in data.weights_table()) == pytest.approx(1)
    assert set(data.weights[tasks == "Task_b"]) == {6.0} and set(data.weights[tasks == "Task_a"]) == {3.0}
    rows = {r["dataset"]: r for r in data.weights_table()}
    assert [(name, r["weight"]) for name, r in rows.items()] == [
        ("New_dataset/Task_a", 3),
        ("New_dataset/Task_b", 6),
        ("part1", 1),
    ]
    assert sum(r["train_episodes"] + r["val_episodes"] for r in rows.values()) == 8
    b, a = rows["New_dataset/Task_b"], rows["New_dataset/Task_a"]
    assert b["share"] / b["train_steps"] == pytest.approx(2 * a["share"] / a["train_steps"])


def test_trap_12_ranks_draw_different_samples():
    draws = draw_epoch(np.ones(10_000), 4_000, seed=0, epoch=0)
    own = [np.concatenate([m.indices for s in plan(draws, 4, 2, r, 4) for m in s]) for r in range(4)]
    for a in range(4):
        for b in range(a):
            assert np.mean(own[a] == own[b]) < 0.01
    assert not np.array_equal(draws, draw_epoch(np.ones(10_000), 4_000, seed=0, epoch=1))


@given(st.integers(1, 200), st.integers(1, 5), st.integers(1, 4), st.integers(1, 3), st.data())
def test_trap_23_every_draw_is_used_once_in_order_by_any_number_of_ranks(count, batch, accum, world, data):
    draws = np.arange(count)
    position = data.draw(st.integers(0, count))
    plans = [plan(draws[position:], batch, accum, r, world) for r in range(world)]
    assert len({tuple(len(step) for step in steps) for steps in plans}) == 1  # all ranks run as many forward passes
    assert all(len(m.indices) == batch for steps in plans for step in steps for m in step)
    used = [
        i
        for steps in zip(*plans, strict=True)
        for ms in zip(*steps, strict=True)
        for m in ms
        for i, c in zip(m.indices, m.counts, strict=True)
        if c
    ]
    assert used == list(range(position, count))
    schedule = Schedule(AsyncSettings(batch_size=batch, grad_accum_steps=accum, epochs=1), np.ones(count), 0, world)
    assert len(plans[0]) == schedule.steps_left(SimpleNamespace(step=0, epoch=0, position=position))
    shared = [i for step in plans[0] for m in step for i in m.shared]
    assert shared == used


def test_two_ranks_of_a_batch_see_what_one_rank_of_twice_the_batch_sees():
    draws = np.arange(37)
    one = [np.concatenate([m.indices[m.counts > 0] for m in s]) for s in plan(draws, 6, 2)]
    halves = [plan(draws, 3, 2, r, 2) for r in range(2)]
    for k, whole in enumerate(one):
        parts = np.concatenate([m.indices[m.counts > 0] for half in halves for m in half[k]])
        assert sorted(parts) == sorted(whole)


# ---- samples


def test_a_batch_holds_what_the_robot_knew(mixed):
    samples = sample_set(mixed)
    numbers = np.random.default_rng(0).permutation(len(samples))[:40]
    batch = samples.batch(numbers)
    assert {k: tuple(v.shape[1:]) for k, v in batch.items()} == {
        **{
            "vl_tokens": (49, 24),
            "vl_mask": (49,),
            "vl_age_s": (),
            "vl_state": (12,),
            "state": (12,),
            "goal": (3,),
            "sensor": (13, 1026),
            "sensor_mask": (),
        },
        **{"action": (8, 7), "action_mask": (8,), "previous_action": (7,)},
    }
    for b, n in enumerate(numbers):
        episode, k = samples.episodes[samples.episode[n]], int(samples.step[n])
        features = samples.features[samples.episode[n]]
        tick = k - k % 3
        assert float(batch["vl_age_s"][b]) == pytest.approx((k - tick) / 10)
        assert torch.equal(batch["vl_tokens"][b], features.tokens[tick])  # ticks at every step: row number = step
        assert np.array_equal(batch["state"][b], episode.state[k])
        assert np.array_equal(batch["vl_state"][b], episode.state[tick])
        assert np.array_equal(batch["goal"][b], episode.state[-1][[6, 7, 11]])  # where the episode ends
        assert np.array_equal(batch["sensor"][b], episode.sensor_window(k, 13))
        left = min(8, len(episode) - k)
        assert np.array_equal(batch["action"][b, :left], episode.action[k : k + left])
        assert batch["action_mask"][b].tolist() == [True] * left + [False] * (8 - left)
        assert np.array_equal(batch["previous_action"][b], episode.action[k - 1] if k else np.zeros(7))


def test_trap_13_and_14_each_step_has_its_own_features_and_age_in_any_order(mixed):
    samples = sample_set(mixed)
    numbers = np.random.default_rng(1).permutation(len(samples))
    batch = samples.batch(numbers)
    ages, counts = np.unique(samples.age_steps, return_counts=True)
    assert ages.tolist() == [0, 1, 2] and counts.min() > 0.8 * counts.max()
    assert len(np.unique(np.stack([samples.episode, samples.step]), axis=1).T) == len(samples)  # no sample is repeated
    for place in range(0, len(numbers), 7):
        alone = samples.batch(numbers[place : place + 1])
        assert all(torch.equal(alone[k][0], batch[k][place]) for k in batch)


def test_latency_shifts_the_pairing(mixed):
    plain, late = sample_set(mixed), sample_set(mixed, vlm_latency_ms=250)
    assert np.array_equal(plain.age_steps, plain.step % 3)
    # features of tick 0 can be used from 250 ms on, those of tick 3 from step 5.5 on: step 6 is the first to have them
    first = late.age_steps[:12].tolist()
    assert first == [0, 1, 2, 3, 4, 5, 3, 4, 5, 3, 4, 5]


def test_each_sample_draws_its_delay_anew_in_every_epoch(mixed):
    """Beside the runner: a VLM of 0 to 700 ms that does one moment at a time gives ages up to 1.3 s (7 + 7 - 1
    steps)."""
    samples = sample_set(mixed, vlm_latency_max_ms=700)
    drawn = []
    for epoch in (0, 1, 0):
        samples.draw_delays(3, epoch)
        drawn.append(samples.age_steps.copy())
        batch = samples.batch(np.arange(len(samples)))
        assert np.allclose(batch["vl_age_s"], samples.age_steps / 10)
        for n in range(0, len(samples), 9):
            tokens = samples.features[samples.episode[n]].tokens
            assert torch.equal(batch["vl_tokens"][n], tokens[samples.step[n] - samples.age_steps[n]])
        assert ((samples.step - samples.age_steps) % 3 == 0).all()
    assert np.array_equal(drawn[0], drawn[2]) and np.mean(drawn[0] == drawn[1]) < 0.7
    late = drawn[0][samples.step >= 15]
    assert set(late) == set(range(1, late.max() + 1)) and late.max() in (11, 12, 13) and samples.oldest_steps == 13
    assert samples.trained_ages_s == (0.0, 1.3)
    assert sample_set(mixed, vlm_latency_ms=250).trained_ages_s == (0.3, 0.5)
    assert prepare_data(AsyncSettings(dataset_root=mixed)).policy_config(AsyncSettings()).vl_ages_s == (0.0, 1.3)


def test_a_cache_with_other_ticks_is_refused(tmp_path):
    write_dataset(tmp_path, {"part1": 1}, steps=12, stride=3)
    assert sample_set(tmp_path, vlm_reuse_count=6).age_steps.max() == 5
    with pytest.raises(UserError, match="every 3 steps, --vlm-reuse-count 4 needs them"):
        sample_set(tmp_path, vlm_reuse_count=4)


def test_invalid_steps_and_short_windows_are_masked(tmp_path):
    (folder,) = write_dataset(tmp_path, {"part1": 1}, steps=20, lead_s=0.005)
    content = pickle.loads((folder / "data.pkl").read_bytes())
    content["valid"][[6, 7]] = False
    (folder / "data.pkl").write_bytes(pickle.dumps(content))
    samples = sample_set(tmp_path, sensor_window_size=65 * 3)
    assert not set(samples.step) & {6, 7} and len(samples) == 18
    batch = samples.batch(np.arange(len(samples)))
    where = samples.step.tolist().index(5)
    assert batch["action_mask"][where].tolist() == [True, False, False] + [True] * 5
    assert np.array_equal(samples.valid_actions, batch["action_mask"].sum(1))
    assert not batch["sensor_mask"][0] and (batch["sensor"][0] == 0).all() and batch["sensor_mask"][-1]


def test_spoilt_sensor_values_are_masked_not_spread(tmp_path):
    (folder,) = write_dataset(tmp_path, {"part1": 1}, steps=12)
    stream = np.load(folder / "sensor.npy")
    stream[-70:, 5] = np.nan
    np.save(folder / "sensor.npy", stream)
    content = pickle.loads((folder / "data.pkl").read_bytes())  # the recording held them
    content["metadata"]["findings"] = [{"text": f"1 samples {NO_NUMBERS}"}]
    (folder / "data.pkl").write_bytes(pickle.dumps(content))
    samples = sample_set(tmp_path)
    batch = samples.batch(np.arange(len(samples)))
    assert torch.isfinite(batch["sensor"]).all() and not batch["sensor_mask"][-1] and batch["sensor_mask"][0]
    assert all(torch.isfinite(v).all() for v in training_statistics(samples).values())


def test_statistics_are_those_of_the_episodes_given(mixed):
    samples = sample_set(mixed)
    found = training_statistics(samples)
    action = np.concatenate([e.action for e in samples.episodes])
    assert np.allclose(found["action_mean"], action.mean(0), atol=1e-5) and np.allclose(
        found["action_std"], action.std(0), atol=1e-5
    )
    tokens = torch.cat([f.tokens for f in samples.features]).float()
    assert torch.allclose(found["token_mean"], tokens.mean(0), atol=1e-4)
    sensor = np.concatenate([e.sensor for e in samples.episodes])
    assert np.allclose(found["sensor_mean"], sensor.mean(0), rtol=1e-3)
    assert found["sensor_std"][0] == pytest.approx(sensor[:, 0].std(), rel=1e-2)
    fewer = SampleSet(samples.episodes[:2], FeatureCache.open(mixed), sensor_window_size=13)
    assert not torch.allclose(training_statistics(fewer)["state_mean"], found["state_mean"])


@pytest.mark.parametrize("far", (80.0, 154.0))
def test_a_few_impossible_actions_neither_shrink_the_others_nor_pull_harder_than_the_farthest(mixed, far):
    """One glitched step in each dimension, which slipped through all checks, and three states of zeros."""
    samples = sample_set(mixed)
    before = training_statistics(samples)
    samples._action[3:5, :3] += torch.tensor([[far], [-far]])
    samples._action[7, 3] = 150.0
    samples._state[:3] = 1e3
    after = training_statistics(samples)
    for name in ("action_std", "state_std"):
        spread = before[name] > 1e-3
        assert (after[name][spread] / before[name][spread]).max() < 2, name  # not eight or more
    assert after["action_range"] < 4 * before["action_range"]
    normaliser = Normaliser(PolicyConfig("regression", ("View1_left", "View5"), 24, *[(0,) * 49] * 3))
    normaliser.load_statistics(after)
    healthy, glitch = normaliser.target(samples._action[20:30]), normaliser.target(samples._action[3])
    assert glitch.abs().max() == after["action_range"] and healthy.abs().max() < after["action_range"]
    back = normaliser.raw_action(healthy)
    assert torch.allclose(back, samples._action[20:30], atol=1e-4)


# ---- checks before a training


def mark_recordings(root, recordings):
    """Write into each prepared episode which recording it is of."""
    for folder, recording in zip(find_prepared(root), recordings, strict=True):
        content = read_checked(folder / DATA_NAME)
        content["metadata"]["recording"] = recording
        write_pickle(folder / DATA_NAME, content)


def test_copies_that_were_prepared_apart_count_once_and_never_stand_on_both_sides(mixed, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(mixed, root)
    keys = [folder.relative_to(root).as_posix() for folder in find_prepared(root)]
    mark_recordings(root, ["a", "b", "c", "a", "a", "b", "d", "e"])
    settings = AsyncSettings(dataset_root=root, sensor_window_size=13, val_fraction=0.3)
    data = prepare_data(settings)
    used = data.split["train"] + data.split["val"]
    recordings = [load_prepared(root / key).metadata["recording"] for key in used]
    assert sorted(recordings) == ["a", "b", "c", "d", "e"] and len(data.notes) == 2  # of a, of b
    said = " ".join(note.partition("copies are left out")[2] for note in data.notes)
    assert all((key in said) == (key not in used) for key in keys)
    shown = training_preflight.table("04_train_async", dataclasses.replace(settings, max_steps=1), data, 1)
    assert list(shown[shown["what"] == "note"]["value"]) == list(data.notes)
    left = next(key for key in keys if key not in used)
    old = {"train": [left], "val": [used[0]]}  # a run that began before goes on as it was
    assert prepare_data(settings, old).split == old


def test_a_dataset_that_no_table_names_is_told_with_its_weight_before_the_training(tmp_path):
    write_dataset(tmp_path, {"Pig_eye": 2, "part1": 1}, steps=10)
    data = prepare_data(AsyncSettings(dataset_root=tmp_path, sensor_window_size=13))
    assert len(data.notes) == 1 and "Pig_eye" in data.notes[0] and "weight 1" in data.notes[0]
    assert data.notes[0] in reporting.data_lines(data, tmp_path)


def test_no_cache_names_the_command_that_builds_it(tmp_path):
    import shutil

    write_dataset(tmp_path, {"part1": 2}, steps=10)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"python -m vla_lib.build_vl_cache --dataset-root \S+ --vlm-reuse-count 3 .*360"
    ):
        prepare_data(AsyncSettings(dataset_root=tmp_path))


def test_no_data_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(UserError, match="python -m vla_lib.preprocess"):
        prepare_data(AsyncSettings(dataset_root=tmp_path))
    with pytest.raises(UserError, match="is not a folder"):
        prepare_data(AsyncSettings(dataset_root=tmp_path / "none"))


def test_trap_17_another_picture_size_is_refused(mixed):
    with pytest.raises(UserError, match="image-resize-height is 360 in the cache, --image-resize-height 180 here"):
        prepare_data(AsyncSettings(dataset_root=mixed, image_resize_height=180))


def test_trap_16_another_instruction_than_the_cached_one_is_refused(tmp_path):
    folders = write_dataset(tmp_path, {"part1": 2}, steps=10)
    content = pickle.loads((folders[0] / "data.pkl").read_bytes())
    content["instruction"] = "Do something else"
    (folders[0] / "data.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="Insert the needle.*Do something else.*build_vl_cache"):
        prepare_data(AsyncSettings(dataset_root=tmp_path))


def test_missing_features_of_one_episode_are_an_error(tmp_path):
    write_dataset(tmp_path, {"part1": 3}, steps=10)
    next(cache_folder(tmp_path).glob("*/*.pt")).unlink()
    with pytest.raises(UserError, match="has no features in cache.*added by: .*build_vl_cache .*--vl-model tiny --vlm"):
        prepare_data(AsyncSettings(dataset_root=tmp_path))


def test_trap_01_sensor_asked_for_but_absent_is_an_error(tmp_path):
    write_dataset(tmp_path, {"part1": 2}, steps=10, sensor=False)
    settings = AsyncSettings(dataset_root=tmp_path)
    with pytest.raises(UserError, match="--no-sensor-enabled"):
        prepare_data(settings)
    data = prepare_data(dataclasses.replace(settings, sensor_enabled=False))
    assert "sensor" not in data.train.batch([0])
    assert not data.policy_config(dataclasses.replace(settings, sensor_enabled=False)).sensor_enabled


def test_loader_processes_read_what_is_read_here_and_end_with_the_epoch(mixed):
    """Batches from loader processes, in order; persistent_workers is False."""
    samples = sample_set(mixed)
    requests = [np.array([k, k + 5]) for k in range(6)]
    before = psutil.Process().children()
    loader = load(samples, 2, sampler=requests)
    assert len(psutil.Process().children()) == len(before) + 2
    for numbers, batch in zip(requests, loader, strict=True):
        here = samples.batch(numbers)
        assert batch.keys() == here.keys() and all(torch.equal(batch[name], here[name]) for name in here)
    assert psutil.Process().children() == before


@pytest.mark.parametrize(("hz", "span"), ((500.0, "26 ms"), (1000.0, "13 ms")))
def test_sensors_of_different_rates_do_not_train_together(mixed, tmp_path, hz, span):
    shutil.copytree(mixed, tmp_path / "data")
    settings = AsyncSettings(dataset_root=tmp_path / "data", sensor_window_size=13)
    path = next(folder for folder in find_prepared(tmp_path / "data") if load_prepared(folder).has_sensor) / DATA_NAME
    content = read_checked(path)
    content["metadata"]["sensor_hz"] = 700.0  # as much as the lab's own recorders differ
    write_pickle(path, content)
    prepare_data(settings)
    content["metadata"]["sensor_hz"] = hz
    write_pickle(path, content)
    with pytest.raises(UserError, match=f"{span} in .* one rate a training"):
        prepare_data(settings)
    prepare_data(dataclasses.replace(settings, sensor_enabled=False))
