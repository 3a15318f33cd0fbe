"""Raw episodes on disk, an F1 or F2 folder a demonstration, as the lab's recorders write them (no truth inside).

    F1  ROOT/White_silicone_white_circle/recv_all_<session>/  robot_state_<session>.csv,
        View1..4/left/zed_<serial>_left_<%.3f>.jpg, View5/oak_CAM_A_<%.3f>.jpg,
        sensor_data_<session>_<int(first time)>.npz with every sample once
    F2  ROOT/New_dataset/<Task>/episode_<session>/  robot_states.csv, images/ViewN/<%.6f>.jpg,
        sensor_data.npz with overlapping windows of 650 samples (stamped with the time of their last),
        metadata.json whose counts are wrong and whose views come in odd order

Robot rows come at ~100 Hz with jitter while the pose inside is refreshed at ~60 Hz; views start up to 200 ms apart;
cameras and sensor go on for an idle tail after the robot's log ends; sensor and robot begin together.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from needle_rig.arm import POSE_REFRESH_HZ, TICK_HZ, states
from needle_rig.demonstrator import Demonstration
from needle_rig.render import jpeg
from needle_rig.settings import PlannedEpisode, RecordSettings
from needle_rig.world import VIEWS, latest, stream

if TYPE_CHECKING:
    from needle_rig.scene import Scene

SERIALS = {"View1": "41182735", "View2": "49429257", "View3": "44377151", "View4": "49045152"}
ROBOT_ROW_HZ = 100.0
WINDOW = 650
WINDOW_STEP = 130
_CAMERA_STAGGER_S = 0.2
_STATE = [f"joint_{k}" for k in range(1, 7)] + [f"pose_{k}" for k in "xyzabr"]


@dataclass(frozen=True)
class EpisodeWriter:
    """Writes one demonstration, which includes the idle tail, as the episode that was planned."""

    folder: Path
    settings: RecordSettings
    episode: PlannedEpisode
    shown: Demonstration
    scene: "Scene"

    def write(self) -> int:
        """Make the folder and write everything into it. Returns the number of pictures."""
        self.folder.mkdir(parents=True)
        # one stream for all parts, in this order: the same seed gives the same files
        rng = stream(self.shown.world.seed, "recording")
        rows = self._write_robot_log(rng)
        pictures = self._write_pictures(rng)
        windows = self._write_sensor(rng)
        if self.episode.layout == "F2":
            self._write_metadata(rng, rows, windows)
        return pictures

    def _write_robot_log(self, rng: np.random.Generator) -> int:
        """The robot's log over the motion, without the tail; returns its number of rows."""
        f1, start_s = self.episode.layout == "F1", self.episode.start_s
        t = np.arange(0, self.shown.seconds - self.settings.idle_tail_s, 1 / ROBOT_ROW_HZ)
        t = np.sort(np.maximum(t + rng.normal(0, 0.0006, t.size), 0))
        refreshed = np.maximum(latest(t, POSE_REFRESH_HZ, rng.uniform(0, 1 / POSE_REFRESH_HZ)), 0)
        received = np.maximum.accumulate(t + 0.0002 + rng.gamma(2.0, 0.0008, t.size))
        times = [start_s + received, start_s + t, start_s + t + 0.0002]
        rows = np.column_stack([*times, np.zeros(t.size), states(*self.shown.at(refreshed))])
        force = "force_placeholder" if f1 else "force"
        names = ["recv_timestamp", "origin_timestamp", "send_timestamp", force, *_STATE]
        path = self.folder / (f"robot_state_{self.episode.session}.csv" if f1 else "robot_states.csv")
        np.savetxt(path, rows, fmt="%.6f", delimiter=",", header=",".join(names), comments="")
        return len(rows)

    def _write_pictures(self, rng: np.random.Generator) -> int:
        self.scene.show(self.shown.world)
        f1, start_s, written = self.episode.layout == "F1", self.episode.start_s, 0
        digits = 3 if f1 else 6
        for key in VIEWS:
            view = key.split("_")[0]
            t = np.arange(rng.uniform(0.005, _CAMERA_STAGGER_S), self.shown.seconds, 1 / self.settings.camera_hz)
            t = np.maximum(t + np.clip(rng.normal(0, 0.001, t.size), -0.003, 0.003), 0)
            stamps = np.round(start_s + t, digits)  # the picture is drawn for the time that its name tells
            if not f1:
                place, prefix = self.folder / "images" / view, ""
            elif view in SERIALS:
                place, prefix = self.folder / view / "left", f"zed_{SERIALS[view]}_left_"
            else:
                place, prefix = self.folder / view, "oak_CAM_A_"
            place.mkdir(parents=True)
            for stamp, position, rotvec in zip(stamps, *self.shown.at(stamps - start_s), strict=True):
                picture = jpeg(self.scene.picture(key, position, rotvec))
                (place / f"{prefix}{stamp:.{digits}f}.jpg").write_bytes(picture)
                written += 1
        return written

    def _write_sensor(self, rng: np.random.Generator) -> int:
        """All samples, the tail's too; returns how many, or how many windows of them."""
        shown, n = self.shown, len(self.shown.force_mN)
        begin_s = self.episode.start_s + self.settings.sensor_clock_offset_ms / 1000
        t = begin_s + np.arange(n) / TICK_HZ + rng.normal(0, 2e-5, n)
        samples = shown.tissue.measure(shown.position_mm[:, 2], shown.force_mN, shown.punctured)
        if self.episode.layout == "F1":
            sent = t + 0.002 + rng.gamma(2.0, 0.001, n)
            path = self.folder / f"sensor_data_{self.episode.session}_{int(t[0])}.npz"
            np.savez(path, timestamps=t, send_timestamps=sent, forces=samples[:, 0], alines=samples[:, 1:])
            return n
        ends = np.arange(WINDOW, n + 1, WINDOW_STEP)
        windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW, axis=0)[ends - WINDOW]  # (W, 1026, 650)
        np.savez(self.folder / "sensor_data.npz", timestamps=t[ends - 1], data=windows.transpose(0, 2, 1))
        return len(ends)

    def _write_metadata(self, rng: np.random.Generator, rows: int, windows: int) -> None:
        """The recorder's own summary: as careless as the lab's. Readers must not believe its counts or its order."""
        views = [view.split("_")[0] for view in VIEWS]
        start_s, seconds = self.episode.start_s, self.shown.seconds - self.settings.idle_tail_s
        metadata = {
            "episode_name": self.folder.name,
            "start_time": start_s,
            "end_time": start_s + seconds,
            "camera_views": [views[i] for i in rng.permutation(5)],
            "camera_hz": self.settings.camera_hz,
            "sensor_hz": 650,
            "robot_hz": 100,
            "sensor_window_size": WINDOW,
            "action_horizon": 8,
            "action_dim": 7,
            "camera_frames_count": 0,
            "sensor_windows_count": windows + int(rng.integers(1, 4)),
            "robot_states_count": rows,
        }
        (self.folder / "metadata.json").write_text(json.dumps(metadata, indent=2))
