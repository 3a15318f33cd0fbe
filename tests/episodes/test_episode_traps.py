"""Mistakes of earlier systems, each planted and shown not to happen: traps 1-10, time and alignment."""

import numpy as np
import pytest
from raw_episodes import T0, Raw, samples, smooth_pose, true_action

from vla_lib.episodes import Episode, build_steps
from vla_lib.episodes.poses import rotation


@pytest.mark.parametrize("layout", ("F1", "F3"))
@pytest.mark.parametrize(
    "keys", (("timestamps", "forces", "alines"), ("timestamp", "force", "aline"), ("times", "Force_data", "bscan"))
)
def test_trap_01_sensor_is_found_whatever_file_and_keys_are_called(tmp_path, layout, keys):
    raw = Raw(layout, seconds=1.0, keys=keys, sensor_name="force_and_oct_final.npz")
    episode = Episode.open(raw.write(tmp_path / "d"))
    assert episode.sensor is not None and len(episode.sensor) == 650
    np.testing.assert_array_equal(episode.sensor.rows(np.array([0, 649])), samples(650)[[0, 649]])


def test_trap_01_a_sensor_file_that_cannot_be_used_is_said(tmp_path):
    path = Raw(seconds=1.0, sensor=False).write(tmp_path / "d")
    np.savez(path / "sensor.npz", timestamps=np.arange(10.0) + T0, forces=np.zeros(10))
    episode = Episode.open(path)
    said = [f for f in episode.findings if f.stream == "sensor"]
    assert episode.sensor is None and said and said[0].left_out
    assert "A-lines" in said[0].text and "forces (10,)" in said[0].text


def test_trap_02_a_window_of_65_samples_spans_a_tenth_of_a_second(prepare):
    episode = prepare(Raw())
    window = episode.sensor_window(10, 65)
    assert window.shape == (65, 1026)
    np.testing.assert_array_equal(np.diff(window[:, 0]), 1.0)  # neighbouring samples, none left out
    end = episode.sensor_index[10]
    assert episode.sensor_timestamp[end - 1] - episode.sensor_timestamp[end - 65] == pytest.approx(64 / 650, abs=1e-4)


@pytest.mark.parametrize("layout", ("F1", "F2"))
def test_trap_03_nothing_in_a_sample_comes_from_the_future(prepare, layout):
    episode = prepare(Raw(layout, tail=0.5))
    for k, t in enumerate(episode.timestamp):
        end = episode.sensor_index[k]
        assert episode.sensor_timestamp[end - 1] <= t < episode.sensor_timestamp[end]
        window = episode.sensor_window(k, 65)
        assert (window is None) == (end < 65)
        if window is not None:  # the newest sample of the window was taken at or before t_k, by its own number
            assert window[-1, 0] / 650 <= t - T0 + 2e-4 < (window[-1, 0] + 1) / 650 + 4e-4
        for view in episode.views:
            number = episode.image_index[view][k]
            assert number < 0 or episode.image_timestamp[view][number] <= t


def test_trap_04_picture_number_is_neither_step_nor_row(prepare):
    episode = prepare(Raw(camera_hz=5.0, seconds=4.0))
    late = len(episode) - 2
    time_in_name = float(episode.picture_path("View1_left", late).stem.split("_")[-1])
    assert 0 <= episode.timestamp[late] - time_in_name < 0.2 + 1e-3
    assert episode.image_index["View1_left"][late] < len(episode.image_timestamp["View1_left"]) - 1 or late > 35
    assert len(np.unique(episode.image_index["View1_left"])) >= 19  # never clamped to the last picture


def test_trap_05_views_are_aligned_by_time(prepare):
    raw = Raw(first_picture={1: 0.0, 3: 0.2})
    episode = prepare(raw)
    for view, key in ((1, "View1_left"), (3, "View3_left")):
        times = T0 + raw.picture_times(view)
        expected = [int(np.sum(times <= t + 1e-7)) - 1 for t in episode.timestamp]
        assert episode.image_index[key].tolist() == expected
    assert episode.image_index["View3_left"][1] == -1
    assert episode.picture_path("View3_left", 1) is None


def wrapping(t):
    return np.stack(
        [
            *smooth_pose(t)[..., :3].T,
            *(((np.array([170, 10, 178])[:, None] + np.array([12, 1, 6])[:, None] * t) + 180) % 360 - 180),
        ],
        -1,
    )


def near_ninety(t):
    turned = rotation(np.array([[5.0, 89.95, 20.0]])) * rotation(np.stack([2 * t, 3 * t - 4, 1.5 * t], -1))
    return np.concatenate([smooth_pose(t)[..., :3], turned.as_euler("XYZ", degrees=True)], -1)


@pytest.mark.parametrize("pose", (wrapping, near_ninety), ids=("wrap", "beta_90"))
@pytest.mark.parametrize("jitter_s", (0.0, 0.005))
def test_trap_06_rotations_are_never_subtracted_angles(prepare, pose, jitter_s):
    t = np.sort(np.arange(0, 3, 0.01) + np.random.default_rng(1).normal(0, jitter_s, 300) * (np.arange(300) > 0))
    episode = prepare(Raw(pose=pose, row_times=t))
    expected = true_action(pose, episode.timestamp - T0)
    assert np.abs(episode.action[:, :3] - expected[:, :3]).max() < 0.02
    assert np.abs(episode.action[:, 3:6] - expected[:, 3:]).max() < 0.02
    assert np.abs(episode.action[:, 3:6]).max() < 3  # no jump at the wrap


def test_trap_06_euler_actions_are_wrap_corrected(prepare):
    episode = prepare(Raw(pose=wrapping), rotation="euler")
    assert np.abs(episode.action[:, 3:6] - [1.2, 0.1, 0.6]).max() < 0.01
    assert episode.metadata["rotation"] == "euler"


def test_trap_07_the_grid_is_exact_however_uneven_the_rows(prepare):
    t = np.cumsum(np.random.default_rng(0).uniform(0.008, 0.012, 600)) - 0.008
    episode = prepare(Raw(row_times=np.concatenate([[0.0], t]), seconds=6.0))
    steps = episode.timestamp - episode.timestamp[0]
    np.testing.assert_allclose(steps, np.arange(len(episode)) / 10, atol=1e-6)
    expected = true_action(smooth_pose, episode.timestamp - T0)
    assert np.abs(episode.action[:, :6] - expected).max() < 0.02
    assert np.abs(episode.action[:, :6].sum(0) - expected.sum(0)).max() < 0.02  # nothing drifts


def test_trap_08_overlapping_windows_become_one_stream(prepare):
    episode = prepare(Raw("F2", seconds=3.0, tail=0.5), dataset="New_dataset/Red_point")
    np.testing.assert_array_equal(
        episode.sensor[:, 0], np.arange(len(episode.sensor)) - 649
    )  # every sample once, none missing
    k = 20
    assert episode.sensor_window(k, 65)[-1, 0] == pytest.approx((episode.timestamp[k] - T0) * 650, abs=1.1)
    assert episode.sensor_hz == pytest.approx(650, rel=0.01)


def test_trap_09_times_keep_their_microseconds(prepare):
    episode = prepare(Raw())
    for times in (episode.timestamp, episode.sensor_timestamp, *episode.image_timestamp.values()):
        assert times.dtype == np.float64
    assert episode.timestamp[7] - episode.timestamp[0] == pytest.approx(0.7, abs=1e-6)
    np.testing.assert_allclose(episode.image_timestamp["View1_left"] - T0, Raw().picture_times(1), atol=1e-5)


@pytest.mark.parametrize("layout", ("F1", "F2"))
def test_trap_10_steps_end_with_the_robot_log(prepare, layout):
    episode = prepare(Raw(layout, seconds=2.0, tail=2.0))
    assert len(episode) == 19  # rows at 0.00 .. 1.99 s cover 19 whole steps
    assert episode.valid.all()
    assert episode.sensor_timestamp[-1] - T0 > 3.5 and episode.image_timestamp["View5"][-1] - T0 > 3.5
    assert episode.metadata["duration_seconds"] == pytest.approx(1.99, abs=1e-3)


def test_gaps_make_steps_invalid_and_only_those(tmp_path):
    t = np.arange(0, 4, 0.01)
    sensor = np.arange(2600) / 650
    raw = Raw(
        row_times=t[(t < 1.015) | (t > 1.405)], sensor_times=sensor[(sensor < 2.52) | (sensor > 2.83)], seconds=4.0
    )
    steps = build_steps(Episode.open(raw.write(tmp_path / "d")))
    assert np.flatnonzero(~steps.valid).tolist() == [10, 11, 12, 13, 14, 25, 26, 27, 28]
    assert set(steps.gaps) == {"robot", "sensor"}
