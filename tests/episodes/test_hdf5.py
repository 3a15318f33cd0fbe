"""The gamepad recorder's episodes (F4): one HDF5 file each; times rebuilt, pictures taken out, the file unchanged."""

from pathlib import Path

import h5py
import numpy as np
import pytest
from preparing import prepare_all
from raw_episodes import JPEG, T0, jpeg, layered, smooth_pose, true_action

from vla_lib.episodes import Episode, find_episodes, find_prepared, load_prepared
from vla_lib.episodes.clocks import CONFIRMED, FOUND

PERIOD_S = 0.0682  # of a sleeping loop that is to run at 15 Hz


def lively(t):
    """(..., 6) mm and degrees: a motion whose speed changes all the time."""
    t = np.asarray(t, float)
    depth = 140 - 2 * t + 2 * np.sin(2.3 * t) + 0.7 * np.sin(5.2 * t + 2)
    return np.stack([170 + 4 * np.sin(1.9 * t), 5 + np.sin(1.3 * t), depth, 177 + t * 0, t * 0, 10 + t], axis=-1)


def layered_way(t):
    """(n, 1025) A-scans of layers that come nearer as the tip of `lively` goes down; at rest before the start."""
    return layered(lively(np.maximum(t, 0))[:, 2] - 140)


def write_h5(
    folder: Path, seconds: float = 10.0, trimmed: bool = False, cameras=(1, 2, 3), layers=None, rng=None
) -> Path:
    """An episode as the recorder writes it: UNIX times as float32, samples at 700 Hz over the frames' span."""
    folder.mkdir(parents=True)
    path = folder / "episode_20251020_234016.h5"  # local time of a place an hour ahead of T0's UTC
    t = np.arange(int(seconds / PERIOD_S)) * PERIOD_S
    pose = smooth_pose if layers is None else lively
    if rng is not None:  # the loop sleeps a little more or less
        t = np.cumsum(PERIOD_S + rng.gamma(1.5, 0.001, len(t)) - 0.0015)
        t -= t[0]
    count = len(t) if trimmed else int(t[-1] * 700)
    with h5py.File(path, "w") as file:
        file["action"] = np.full((len(t), 6), 7.0, np.float32)
        file["timestamp"] = (T0 + t).astype(np.float32)
        file["observations/qpos"] = (0.1 * pose(t)).astype(np.float32)
        file["observations/ee_pose"] = pose(t).astype(np.float32)
        for camera in cameras:
            kept = file.create_dataset(f"observations/images/camera{camera}", len(t), h5py.vlen_dtype(np.uint8))
            for number in range(len(t)):
                kept[number] = np.frombuffer(jpeg(number % 200), np.uint8)
        file["observations/sensor/force"] = (np.arange(count) % 2048).astype(np.float16)
        scans = np.full((count, 1025), 3) if layers is None else layers(np.arange(count) / 700)
        file["observations/sensor/aline"] = scans.astype(np.float16)
        if not trimmed:
            file["observations/sensor/timestamp"] = np.full(count, T0, np.float32)
    return path


def test_an_h5_file_is_an_episode_with_rebuilt_times_and_motion_of_its_poses(tmp_path):
    path = write_h5(tmp_path / "New_dataset" / "Red_point")
    before = path.read_bytes()
    (report,) = prepare_all(tmp_path)
    assert report.status == "written" and report.verdict == "good" and "ms a frame" in " ".join(report.reasons)
    (folder,) = find_prepared(tmp_path)
    assert folder == path.with_suffix("") and path.read_bytes() == before
    episode, raw = load_prepared(folder), Episode.open(folder)
    assert (episode.layout, episode.task, episode.views) == ("F4", "Red_point", ["camera1", "camera2", "camera3"])
    t = raw.robot.t_s - raw.robot.t_s[0]
    assert np.abs(t - np.arange(len(t)) * PERIOD_S).max() < 1.5 / 15
    assert abs(raw.robot.t_s[0] - T0) < 1.0
    expected = true_action(smooth_pose, episode.timestamp - episode.timestamp[0])
    assert np.abs(episode.action[:, :6] - expected)[:-1].max() < 0.05
    step = len(episode) // 2
    number = int(episode.image_index["camera2"][step])
    assert episode.picture_path("camera2", step).read_bytes() == jpeg(number % 200)
    sample = int(episode.sensor_index[step]) - 1
    assert episode.sensor.dtype == np.float32 and episode.sensor_force[sample] == sample % 2048
    assert abs(sample / 700 - (episode.timestamp[step] - episode.timestamp[0])) < 0.1
    assert [r.status for r in prepare_all(tmp_path)] == ["unchanged"] and len(find_episodes(tmp_path)) == 1


def test_the_sensor_is_compared_with_the_motion_and_only_more_than_half_a_frame_shifts_it(tmp_path):
    rng = np.random.default_rng(8)
    for number, late_s in enumerate((0.0, 0.12)):
        folder = tmp_path / str(number) / "part1"
        path = write_h5(folder, seconds=12.0, layers=lambda t, late_s=late_s: layered_way(t - late_s), rng=rng)
        (report,) = prepare_all(tmp_path / str(number))
        offset = load_prepared(path.with_suffix("")).clocks.sensor
        row = next(row for row in report.clocks if row["stream"] == "sensor")
        assert row["session"].startswith("part1 (F4)") and abs(row["offset_ms"] - 1e3 * late_s) < 33
        assert offset.how == (FOUND if number else CONFIRMED)
        assert abs(offset.offset_s - late_s) < (0.033 if number else 1e-9)


def test_a_trimmed_file_is_read_without_its_sensor_and_says_so(tmp_path):
    write_h5(tmp_path / "part1", 3.0, trimmed=True, cameras=(1, 3))
    (report,) = prepare_all(tmp_path)
    assert report.status == "written" and any("cut by the numbers of frames" in text for text in report.left_out)
    assert any(text.startswith("camera2") for text in report.left_out)
    assert not load_prepared(find_prepared(tmp_path)[0]).has_sensor


def test_pictures_can_be_looked_at_before_anything_is_prepared(tmp_path):
    path = write_h5(tmp_path / "part1", 2.0)
    episode = Episode.open(find_episodes(tmp_path)[0])
    assert episode.picture(episode.pictures["camera1"].paths[3]).read_bytes() == jpeg(3)
    assert sorted(tmp_path.rglob("*")) == [path.parent, path]


@pytest.mark.parametrize("content", (b"", b"garbage", JPEG))
def test_a_damaged_file_is_an_episode_to_record_again(tmp_path, content):
    path = tmp_path / "part1" / "episode_20251020_234016.h5"
    path.parent.mkdir()
    path.write_bytes(content)
    (report,) = prepare_all(tmp_path)
    assert report.status == "rejected" and "cannot be read as an HDF5 episode" in report.reasons[0]
    assert path.read_bytes() == content
