"""Raw episodes on disk: a demonstration in, an F1 or F2 episode folder out, as the lab's recorders write them (no truth inside).

    F1  ROOT/White_silicone_white_circle/recv_all_<session>/  robot_state_<session>.csv, View1..4/left/zed_<serial>_left_<%.3f>.jpg,
        View5/oak_CAM_A_<%.3f>.jpg, sensor_data_<session>_<int(first time)>.npz with every sample once
    F2  ROOT/New_dataset/<Task>/episode_<session>/  robot_states.csv, images/ViewN/<%.6f>.jpg, sensor_data.npz with overlapping windows of
        650 samples (stamped with the time of their last), metadata.json whose counts are wrong and whose views come in odd order

Robot rows come at ~100 Hz with jitter while the pose inside is refreshed at ~60 Hz; views start up to 200 ms apart; cameras and sensor go
on for an idle tail after the robot's log ends; sensor and robot begin together.
"""

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from needle_rig.arm import TICK_HZ, states
from needle_rig.demonstration import Demonstration
from needle_rig.render import PictureMaker, jpeg
from needle_rig.world import VIEWS, stream, task_of

SERIALS = {"View1": "41182735", "View2": "49429257", "View3": "44377151", "View4": "49045152"}
ROBOT_ROW_HZ = 100.0
POSE_REFRESH_HZ = 60.0
WINDOW = 650
WINDOW_STEP = 130
_CAMERA_STAGGER_S = 0.2
_COLUMNS = [f"joint_{k}" for k in range(1, 7)] + [f"pose_{k}" for k in "xyzabr"]


@dataclass(frozen=True)
class Recording:
    """How to record: layout "F1" or "F2", camera rate, idle tail after the motion, offset of the sensor host's clock."""

    layout: str
    camera_hz: float = 5.0
    idle_tail_s: float = 3.0
    sensor_clock_offset_ms: float = 0.0


def session_of(start_s: float) -> str:
    """The session stamp of a start time: YYYYmmdd_HHMMSS, UTC."""
    return datetime.fromtimestamp(start_s, UTC).strftime("%Y%m%d_%H%M%S")


def episode_folder(layout: str, task: str, start_s: float) -> Path:
    """The episode's path below the dataset root."""
    name = f"recv_all_{session_of(start_s)}" if layout == "F1" else f"episode_{session_of(start_s)}"
    return Path(*task_of(task)["folders"], name)


def write_episode(folder: Path, how: Recording, shown: Demonstration, start_s: float, maker: PictureMaker) -> int:
    """Write one episode into `folder` (made here); `shown` must include the idle tail. Returns the number of pictures written."""
    folder.mkdir(parents=True)
    rng = stream(shown.world.seed, "recording")
    seconds = shown.seconds - how.idle_tail_s
    session = session_of(start_s)
    rows = _robot_rows(rng, shown, start_s, seconds)
    name = f"robot_state_{session}.csv" if how.layout == "F1" else "robot_states.csv"
    force_column = "force_placeholder" if how.layout == "F1" else "force"
    header = ",".join(["recv_timestamp", "origin_timestamp", "send_timestamp", force_column, *_COLUMNS])
    np.savetxt(folder / name, rows, fmt="%.6f", delimiter=",", header=header, comments="")
    pictures = _write_pictures(rng, folder, how, shown, start_s, maker)
    windows = _write_sensor(rng, folder, how, shown, start_s, session)
    if how.layout == "F2":
        _write_metadata(folder, how, rng, start_s, seconds, len(rows), windows)
    return pictures


def _robot_rows(rng: np.random.Generator, shown: Demonstration, start_s: float, seconds: float) -> np.ndarray:
    t = np.arange(0, seconds, 1 / ROBOT_ROW_HZ)
    t = np.sort(np.maximum(t + rng.normal(0, 0.0006, t.size), 0))
    phase = rng.uniform(0, 1 / POSE_REFRESH_HZ)
    refreshed = np.maximum(np.floor((t - phase) * POSE_REFRESH_HZ) / POSE_REFRESH_HZ + phase, 0)
    received = np.maximum.accumulate(t + 0.0002 + rng.gamma(2.0, 0.0008, t.size))
    joints_and_pose = states(*shown.at(refreshed))
    return np.column_stack([start_s + received, start_s + t, start_s + t + 0.0002, np.zeros(t.size), joints_and_pose])


def _write_pictures(
    rng, folder: Path, how: Recording, shown: Demonstration, start_s: float, maker: PictureMaker
) -> int:
    maker.show(shown.world)
    written = 0
    digits = 3 if how.layout == "F1" else 6
    for key in maker.views:
        view = key.split("_")[0]
        t = np.arange(rng.uniform(0.005, _CAMERA_STAGGER_S), shown.seconds, 1 / how.camera_hz)
        t = np.maximum(t + np.clip(rng.normal(0, 0.001, t.size), -0.003, 0.003), 0)
        stamps = np.round(start_s + t, digits)  # the picture is drawn for the time that its name tells
        if how.layout == "F2":
            place = folder / "images" / view
        elif view in SERIALS:
            place = folder / view / "left"
        else:
            place = folder / view
        place.mkdir(parents=True)
        prefix = "" if how.layout == "F2" else f"zed_{SERIALS[view]}_left_" if view in SERIALS else "oak_CAM_A_"
        for stamp, position, rotvec in zip(stamps, *shown.at(stamps - start_s), strict=True):
            (place / f"{prefix}{stamp:.{digits}f}.jpg").write_bytes(jpeg(maker.picture(key, position, rotvec)))
            written += 1
    return written


def _write_sensor(rng, folder: Path, how: Recording, shown: Demonstration, start_s: float, session: str) -> int:
    n = len(shown.force_mN)
    t = start_s + how.sensor_clock_offset_ms / 1000 + np.arange(n) / TICK_HZ + rng.normal(0, 2e-5, n)
    samples = shown.tissue.measure(shown.position_mm[:, 2], shown.force_mN, shown.punctured)
    if how.layout == "F1":
        sent = t + 0.002 + rng.gamma(2.0, 0.001, n)
        path = folder / f"sensor_data_{session}_{int(t[0])}.npz"
        np.savez(path, timestamps=t, send_timestamps=sent, forces=samples[:, 0], alines=samples[:, 1:])
        return n
    ends = np.arange(WINDOW, n + 1, WINDOW_STEP)
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW, axis=0)[ends - WINDOW]  # (W, 1026, 650)
    np.savez(folder / "sensor_data.npz", timestamps=t[ends - 1], data=windows.transpose(0, 2, 1))
    return len(ends)


def _write_metadata(folder: Path, how: Recording, rng, start_s: float, seconds: float, rows: int, windows: int) -> None:
    """The recorder's own summary: as careless as the lab's. Readers must not believe its counts or its order of views."""
    views = [view.split("_")[0] for view in VIEWS]
    metadata = {
        "episode_name": folder.name,
        "start_time": start_s,
        "end_time": start_s + seconds,
        "camera_views": [views[i] for i in rng.permutation(5)],
        "camera_hz": how.camera_hz,
        "sensor_hz": 650,
        "robot_hz": 100,
        "sensor_window_size": WINDOW,
        "action_horizon": 8,
        "action_dim": 7,
        "camera_frames_count": 0,
        "sensor_windows_count": windows + int(rng.integers(1, 4)),
        "robot_states_count": rows,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2))
