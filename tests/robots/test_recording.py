"""What a robot sees becomes a raw episode: whole, on one clock, after a crash too; judged by a person."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from fake_rig import VIEWS, CameraHost, SensorHost, mapping, write

from benchmarks.fake_arm import FakeArm
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, read_jsonl
from vla_lib.episodes.datasets import DatasetTable
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.survey import survey
from vla_lib.robots import recording as module
from vla_lib.robots.recording import Recording, enter, finish_left, judge


def test_a_run_becomes_a_whole_raw_episode(rig, drive, tmp_path):
    with rig(clock_s=0.7, sensor_age_s=1, hold_s=5, follow_mm=20) as it:
        with Recording(tmp_path / "rollouts", it.robot, {"kind": "rollout", "checkpoint": "x.pt"}) as recording:
            begun_s, start = time.time(), it.arm.place.copy()

            def watch(tick, observation):
                recording.watch(tick, observation)
                if tick.t_s > 1.5 and np.ptp([start[0], it.arm.place[0]]) > 1.5:  # a busy machine holds it at times
                    it.runner.request_stop("far enough")

            log = drive(it, watch=watch, max_s=30)
            recording.close(log)
        ended_s, arm = time.time(), it.arm.place.copy()
    (found,) = survey(tmp_path).episodes
    assert (found.layout, found.dataset, len(found.sensor_files)) == ("F3", "rollouts", 1)
    episode = Episode.open(found)
    np.testing.assert_allclose(episode.robot.pose[-1, :3], arm, atol=0.3)  # the last rows came while it stopped
    assert np.ptp(episode.robot.pose[:, 0]) > 1.0
    assert {view: len(one) > 5 for view, one in episode.pictures.items()} == dict.fromkeys(VIEWS, True)
    spans = [episode.robot.t_s, episode.sensor.t_s, *(one.t_s for one in episode.pictures.values())]
    # on one clock: not 0.7 s ahead
    assert all(begun_s - 0.3 < t_s[0] and t_s[-1] < ended_s + 0.1 for t_s in spans)
    ordered = read_jsonl(recording.folder / "ordered.jsonl")
    assert [line["step"] for line in ordered] == [tick.step for tick in log.ticks]
    assert [line["action"] for line in ordered] == [list(tick.action) for tick in log.ticks]
    record = read_json(recording.folder / "rollout.json")
    assert record["complete"] and record["ended"] == "far enough" and record["checkpoint"] == "x.pt"
    assert record["runner"]["ticks"] == len(log.ticks) and record["outcome"] is None
    offsets = {row["stream"]: row["clock_offset_ms"] for row in record["streams"]}
    assert offsets["sensor"] == pytest.approx(-700, abs=200)


def test_a_recording_is_whole_after_its_process_was_killed(tmp_path):
    code = """
import sys
from pathlib import Path
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.recording import Recording
from vla_lib.robots.settings import RobotSettings
robot = LabRobot(RobotSettings.load(sys.argv[1]))
robot.wait_ready()
recording = Recording(Path(sys.argv[2]), robot, {"kind": "recording"})
print(recording.folder, flush=True)
sys.stdin.read()
"""
    with FakeArm() as arm:
        content = mapping(arm)
        path = write(tmp_path / "robot.yaml", content)
        command = [sys.executable, "-c", code, str(path), str(tmp_path / "recordings")]
        with CameraHost(content["zmq_port"]), SensorHost(content["sensor"]["port"]):
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            folder = Path(child.stdout.readline().strip())
            while not (raw := list(folder.glob("*.raw"))) or raw[0].stat().st_size < 400 * 4120:
                time.sleep(0.02)
            assert not finish_left(folder.parent)  # somebody records there
            os.kill(child.pid, signal.SIGKILL)
            child.communicate()
        deadline = time.monotonic() + 30
        while list(folder.glob("*.raw")) or not read_json(folder / "rollout.json")["complete"]:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    episode = Episode.open(folder)
    assert len(episode.sensor.t_s) >= 400 and set(episode.pictures) == set(VIEWS)
    assert "ended before its recording" in read_json(folder / "rollout.json")["ended"]


def test_what_a_power_cut_left_is_finished_by_the_next_recording(tmp_path):
    folder = tmp_path / "data_collection_20260101_000000"
    folder.mkdir()
    records = np.zeros(10, module.RAW)
    records["t_s"] = 1e9 + np.arange(10) / 650
    (folder / "sensor_data_20260101_000000.raw").write_bytes(records.tobytes() + b"half a record")
    assert finish_left(tmp_path) == [folder]
    with np.load(folder / "sensor_data_20260101_000000.npz") as found:
        assert {name: found[name].shape for name in found} == {
            "timestamps": (10,),
            "send_timestamps": (10,),
            "forces": (10,),
            "alines": (10, 1025),
        }
    assert not list(folder.glob("*.raw"))


def test_what_the_disk_does_not_take_is_told_and_stops_nothing(rig, drive, tmp_path, monkeypatch):
    with rig(sensor_age_s=1) as it:
        recording = Recording(tmp_path, it.robot, {})
        monkeypatch.setattr(recording, "_write", lambda item: (_ for _ in ()).throw(OSError(28, "No space left")))
        log = drive(it, max_s=0.5, watch=recording.watch)
        with pytest.raises(UserError, match="not whole: disk full"):
            recording.close(log)
    assert log.ended == "time limit" and "disk full" in read_json(recording.folder / "rollout.json")["failure"]


def test_a_person_judges_and_failures_lie_apart(tmp_path):
    for name in ("data_collection_1", "data_collection_2"):
        (tmp_path / "rollouts" / name).mkdir(parents=True)
        (tmp_path / "rollouts" / name / "rollout.json").write_text("{}")
    good = judge(tmp_path / "rollouts" / "data_collection_1", True, "clean", "Kim")
    bad = judge(tmp_path / "rollouts" / "data_collection_2", False, "beside", "Kim")
    assert (good.parent.name, bad.parent.name) == ("rollouts", "rollouts_failed")
    told = read_json(bad / "rollout.json")["outcome"]
    assert (told["success"], told["note"], told["by"]) == (False, "beside", "Kim")


def test_recordings_get_their_row_in_the_table_and_a_persons_table_stays(tmp_path):
    assert enter(tmp_path, "rollouts", "Insert it, 'now'") == ""
    assert enter(tmp_path, "rollouts", "other words") == ""
    assert enter(tmp_path, "second", "Insert") == ""
    table = DatasetTable.load(tmp_path)
    assert table.instruction("rollouts") == "Insert it, 'now'" and table.weight("rollouts_failed") == 0.1
    assert table.knows("second")
    (tmp_path / "datasets.yaml").write_text("mine: {weight: 2}\n")
    assert "add the row: rollouts: {weight: 1" in enter(tmp_path, "rollouts", "Insert")
    assert (tmp_path / "datasets.yaml").read_text() == "mine: {weight: 2}\n"
