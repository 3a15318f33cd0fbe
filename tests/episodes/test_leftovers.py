"""What else lies in an episode's folder: converted logs, derived sensor files, what a policy ordered; frozen logs."""

import json
import shutil

import numpy as np
import pytest
from preparing import prepare_all
from raw_episodes import T0, Raw, but, smooth_pose

from vla_lib.episodes import Episode, find_episodes, load_prepared, measure
from vla_lib.episodes.survey import survey
from vla_lib.workbench.viewer import payload

SMALL = Raw("F3", seconds=2.0, camera_hz=4.0)


def converted(path, name="robot_states.npz"):
    """The lab's script that writes a robot log as arrays: times of receipt."""
    rows = np.loadtxt(next(path.glob("*.csv")), delimiter=",", skiprows=1)
    joints, poses = rows[:, 4:10].astype(np.float32), rows[:, 10:].astype(np.float32)
    robot = np.hstack([joints, poses])
    np.savez(path / name, timestamps=rows[:, 0], robot_states=robot, joints=joints, poses=poses)


def test_a_log_of_which_only_the_arrays_are_left_is_one(tmp_path):
    paths = [SMALL.write(tmp_path / place / "part1") for place in ("whole", "left")]
    converted(paths[1])
    next(paths[1].glob("*.csv")).unlink()
    (whole,), (left,) = prepare_all(tmp_path / "whole"), prepare_all(tmp_path / "left")
    assert left.status == "written" and left.verdict == whole.verdict and left.left_out == whole.left_out
    assert any("robot_states.npz is used, whose times are the recorder's" in text for text in left.reasons)
    one, other = load_prepared(paths[0]), load_prepared(paths[1])
    assert other.layout == "F3" and other.has_sensor and abs(len(one) - len(other)) <= 1
    shared = min(len(one), len(other)) - 1
    assert np.abs(one.action[:shared] - other.action[:shared]).max() < 0.02  # 2 ms later, and float32
    assert np.abs(one.state[:shared, :6] - other.state[:shared, :6]).max() < 0.02


def test_arrays_beside_their_log_are_no_sensor_file_and_no_second_recording(tmp_path):
    path = SMALL.write(tmp_path / "part1")
    before = prepare_all(tmp_path)[0].reasons
    converted(path)
    (files,) = find_episodes(tmp_path)
    assert files.robot_log.suffix == ".csv" and [file.name for file in files.sensor_files] == [
        "sensor_data_20251020.npz"
    ]
    assert prepare_all(tmp_path)[0].reasons == before


def test_a_copy_of_which_only_the_arrays_are_left_is_the_same_recording(tmp_path):
    path, copy = SMALL.write(tmp_path / "part1"), tmp_path / "backup" / "data_collection_20251020_224016"
    shutil.copytree(path, copy)
    converted(copy)
    next(copy.glob("*.csv")).unlink()
    other = but(SMALL, start=T0 + 60).write(tmp_path / "part2")  # of the same name, at another time
    assert survey(tmp_path).copies == {copy: path}
    next(other.glob("*.csv")).unlink()
    assert survey(tmp_path).copies == {copy: path}


def derive(path, change=0.0):
    """The lab's script that cuts windows of 650 from the raw samples: the first begins with the first sample."""
    with np.load(next(path.glob("sensor_data_*.npz"))) as raw:
        values = np.concatenate([raw["forces"][:, None], raw["alines"]], axis=1)
        ends = np.arange(650, len(values) + 1, 130)
        windows = np.stack([values[end - 650 : end] for end in ends]) + np.float32(change)
        np.savez(path / "sensor_data.npz", timestamps=raw["timestamps"][ends - 1], data=windows)


def test_a_derived_windowed_file_counts_once_and_shifts_nothing(tmp_path):
    path = but(SMALL, seconds=3.0).write(tmp_path / "part1")
    before = prepare_all(tmp_path)[0]
    derive(path)
    after = prepare_all(tmp_path)[0]
    assert after.left_out == before.left_out and after.verdict == before.verdict
    assert sum("sensor_data.npz holds the samples of sensor_data_20251020.npz again" in t for t in after.reasons) == 1
    episode = load_prepared(path)
    assert len(episode.sensor) == 1950 and episode.clocks.sensor.offset_s == 0
    next(path.glob("sensor_data_2*.npz")).unlink()  # only the derived one is left: it begins with its first sample
    (left,) = prepare_all(tmp_path)
    assert not any("begins" in text or "clock" in text for text in left.reasons if text.startswith("sensor"))
    assert len(load_prepared(path).sensor) == 1950 and load_prepared(path).clocks.sensor.offset_s == 0


def test_other_samples_of_the_same_time_are_left_out_by_name(tmp_path):
    path = but(SMALL, seconds=3.0).write(tmp_path / "part1")
    derive(path, change=0.5)
    (report,) = prepare_all(tmp_path)
    assert any("sensor_data.npz holds other samples of the same time" in text for text in report.left_out)
    assert len(load_prepared(path).sensor) == 1950


# --- rollouts of the lab's receiver -----------------------------------------------------------------------------
def rollout(folder, wrapped=False):
    """An async_inference folder: a chunk of 8 actions at 10 Hz, on the recorder's clock (2 ms ahead)."""
    path = SMALL.write(folder, "async_inference_20251020_224016")
    times = np.arange(0.3, 1.9, 0.1)
    made = [{"timestamp": T0 + t + 0.002, "actions": [[t + k, 2, 3, 4, 5, 6, 1.0] for k in range(8)], "delta": [],
             "inference_time": 0.02, "vl_update_number": 3, "robot_state": None} for t in times.tolist()]  # fmt: skip
    made[3] = {"timestamp": None}
    content = {"model": "x", "results": made} if wrapped else made
    (path / "inference_results_20251020_224016.json").write_text(json.dumps(content))
    return path, np.delete(times, 3)


@pytest.mark.parametrize("wrapped", (False, True))
def test_what_a_policy_ordered_is_a_stream_and_is_drawn(tmp_path, wrapped):
    path, times = rollout(tmp_path / "part1", wrapped)
    episode = Episode.open(path)
    assert episode.layout == "F3" and episode.commands is not None
    assert np.abs(episode.commands.t_s - T0 - times).max() < 1e-6
    assert np.abs(episode.commands.action - np.c_[times, np.tile([2.0, 3, 4, 5, 6], (15, 1))]).max() < 1e-6
    assert measure(episode)["policy"].count == 15 and abs(measure(episode)["policy"].hz - 10) < 0.1
    assert any("15 of its 16 predictions" in finding.text for finding in episode.findings)
    ordered = [trace for trace in payload(episode, 10.0)["traces"] if "what the policy ordered" in trace["title"]]
    assert [values[0] for trace in ordered for values in trace["values"]] == pytest.approx([0.3, 2, 3, 4, 5, 6])
    (report,) = prepare_all(tmp_path)
    assert report.status == "written" and report.summary["views"] == 5


@pytest.mark.parametrize("content", ("", "{}", "[1, null]", '"x"', "[" * 100_000, '[{"timestamp": 1, "actions": "a"}]'))
def test_a_file_that_holds_no_predictions_is_said_and_costs_nothing_else(tmp_path, content):
    path, _ = rollout(tmp_path / "part1")
    next(path.glob("*.json")).write_text(content)
    (report,) = prepare_all(tmp_path)
    assert report.status == "written" and any("inference_results_20251020_224016.json" in t for t in report.reasons)


# --- a frozen log ------------------------------------------------------------------------------------------------
def stands_still(pose, begin, end):
    return lambda t: pose(np.where((np.asarray(t) > begin) & (np.asarray(t) < end), begin, t))


def thawed(pose, begin, end):
    """Rests from `begin` to `end` and goes on from there."""
    return lambda t: pose(np.where(np.asarray(t) < begin, t, np.maximum(np.asarray(t) - (end - begin), begin)))


@pytest.mark.parametrize("seen_by", ("sensor", "pictures"))
@pytest.mark.parametrize("frozen", (True, False), ids=("frozen", "resting"))
def test_a_log_that_stands_still_while_the_arm_moves_is_excluded_and_a_resting_arm_is_not(tmp_path, seen_by, frozen):
    raw = Raw(seconds=6.0, camera_hz=10.0, views=(1, 2), tissue=seen_by == "sensor", sensor=seen_by == "sensor")
    raw = but(raw, scenery=seen_by == "pictures", pose=thawed(smooth_pose, 1.5, 2.8))  # a rest, to know it by
    path = raw.write(tmp_path / "root" / "part1")
    if frozen:  # the same recording, but its log repeats one row from 3.6 s on for as long as the arm comes back
        log = but(raw, pose=stands_still(raw.pose, 4.0, 9.0), sensor=False, views=()).write(tmp_path / "log" / "part1")
    else:
        raw = but(raw, pose=thawed(raw.pose, 4.0, 6.5))
        path = raw.write(tmp_path / "root" / "part1", "recv_all_20251020_224017")
        log = path
    (path / next(log.glob("*.csv")).name).write_text(next(log.glob("*.csv")).read_text())
    report = next(report for report in prepare_all(tmp_path / "root") if report.key.endswith(path.name))
    said = [text for text in report.reasons if "it was frozen" in text]
    assert report.status == "written" and len(said) == frozen, report.reasons
    if frozen:
        assert "stands still from 4.0" in said[0] or "stands still from 3.9" in said[0]
        valid = load_prepared(path).valid
        assert valid[5:38].all() and not valid[42:].any()
