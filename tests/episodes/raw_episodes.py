"""Writes raw episodes of every layout with known truth: a smooth motion, numbered samples, pictures named by time."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from PIL import Image
from scipy.spatial.transform import Rotation

T0 = 1761003616.25
SENSOR_HZ = 650.0
SERIALS = {1: "41182735", 2: "49429257", 3: "44377151", 4: "49045152"}


@cache
def jpeg(value: int = 90) -> bytes:
    """A small picture with content; of another `value` (0..255) it is another picture."""
    stream = BytesIO()
    place = np.arange(18)[:, None] * 5 + np.arange(32) * 3
    pixels = np.stack([(place + value) % 256, place, 255 - place], axis=-1).astype(np.uint8)
    Image.fromarray(pixels).save(stream, "JPEG")
    return stream.getvalue()


JPEG = jpeg()


def smooth_pose(t: np.ndarray) -> np.ndarray:
    """(..., 6) mm and degrees at seconds t since the start: what a slow arm does."""
    t = np.asarray(t, float)
    place = [180 + 3 * np.sin(1.1 * t), -10 + 2 * np.sin(0.7 * t + 1), 150 - 3 * t + np.sin(1.7 * t)]
    angles = [3 * np.sin(0.5 * t), -2 + np.sin(0.9 * t), 12 + 3 * t]
    return np.stack([*place, *angles], axis=-1)


def true_action(pose: Callable[[np.ndarray], np.ndarray], t: np.ndarray, dt: float = 0.1) -> np.ndarray:
    """(N, 6): base-frame displacement in mm and rotation vector in degrees, straight from the definition."""
    before, after = pose(np.asarray(t)), pose(np.asarray(t) + dt)
    first, second = (Rotation.from_euler("XYZ", p[..., 3:], degrees=True) for p in (before, after))
    return np.concatenate([after[..., :3] - before[..., :3], (second * first.inv()).as_rotvec(degrees=True)], axis=-1)


def samples(count: int, first: int = 0) -> np.ndarray:
    """(count, 1026) float32: every channel tells which sample it is."""
    number = np.arange(first, first + count, dtype=np.float32)
    return number[:, None] + (np.arange(1026, dtype=np.float32) * 0.25)[None, :]


def layered(way_mm: np.ndarray) -> np.ndarray:
    """(n, 1025) A-scans of five surfaces 1.9 mm apart, 8 um a bin, that come nearer by what the tip moved (n,)."""
    depth_mm = 0.008 * np.arange(1025)
    first_mm = np.mod(3.1 - way_mm, 1.9)[:, None]
    scans = np.full((len(way_mm), 1025), 12.0)
    for number in range(5):
        scans += (50 - 8 * number) / (1 + ((depth_mm - first_mm - 1.9 * number) / 0.05) ** 2)
    return scans + np.random.default_rng(5).normal(0, 1.5, scans.shape)


def seen(pose: np.ndarray, view: int) -> bytes:
    """A picture of stripes that move as the tip does."""
    y, x = np.mgrid[0:36, 0:64]
    across, along = x / 9 + 0.4 * pose[0] + 0.1 * pose[2] * view, y / 7 + 0.4 * pose[1] - 0.3 * pose[2]
    grey = 128 + 60 * np.sin(across) + 50 * np.cos(along)
    stream = BytesIO()
    Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB").save(stream, "JPEG", quality=90)
    return stream.getvalue()


@dataclass(frozen=True)
class Raw:
    """What to record. Times in seconds since the start."""

    layout: str = "F1"
    seconds: float = 3.0
    pose: Callable[[np.ndarray], np.ndarray] = smooth_pose
    row_times: np.ndarray | None = None
    camera_hz: float = 5.0
    first_picture: dict[int, float] = field(default_factory=dict)
    views: tuple[int, ...] = (1, 2, 3, 4, 5)
    right: bool = False
    flat: bool = False
    tail: float = 0.0
    sensor: bool = True
    sensor_times: np.ndarray | None = None
    sensor_ahead: float = 0.0
    tissue: bool = False  # A-scans show layers that move with the tip; else every channel tells the sample's number
    scenery: bool = False  # pictures show stripes that move with the tip
    cameras_ahead: float = 0.0
    stride: int = 130
    compressed: bool = False
    keys: tuple[str, str, str] = ("timestamps", "forces", "alines")
    sensor_name: str | None = None
    refresh_hz: float | None = None
    edit_rows: Callable[[np.ndarray], np.ndarray] | None = None
    force_column: np.ndarray | None = None
    start: float = T0

    def write(self, folder: Path, name: str | None = None) -> Path:
        names = {
            "F0": "ZED_Captures_1th",
            "F1": "recv_all_20251020_224016",
            "F2": "episode_20251020_224016",
            "F3": "data_collection_20251020_224016",
        }
        path = Path(folder) / (name or names[self.layout])
        path.mkdir(parents=True)
        self._robot(path)
        self._pictures(path)
        if self.sensor and self.layout != "F0":
            self._sensor(path)
        if self.layout == "F2":
            metadata = {
                "camera_views": ["View5", "View1"],
                "sensor_hz": 650,
                "camera_frames_count": 0,
                "robot_states_count": -3,
            }
            (path / "metadata.json").write_text(json.dumps(metadata))
        return path

    def _robot(self, path: Path) -> None:
        t = self.row_times if self.row_times is not None else np.arange(0, self.seconds, 0.01)
        seen = np.floor(t * self.refresh_hz + 1e-9) / self.refresh_hz if self.refresh_hz else t
        # they rest when the arm rests; a hair apart in each folder, for equal logs would be one recording
        joints = 0.1 * self.pose(seen) + 1e-6 * (crc32(f"{path.parent.name}/{path.name}".encode()) % 1000)
        force = self.force_column if self.force_column is not None else np.zeros(len(t))
        rows = np.column_stack([self.start + t + 0.002, self.start + t, self.start + t, force, joints, self.pose(seen)])
        rows = self.edit_rows(rows) if self.edit_rows else rows
        pose, joint = [f"pose_{k}" for k in "xyzabr"], [f"joint_{k}" for k in range(1, 7)]
        header = [
            "recv_timestamp",
            "origin_timestamp",
            "send_timestamp",
            "force" if self.layout == "F2" else "force_placeholder",
            *joint,
            *pose,
        ]
        file = {"F0": "robot_rt_1.csv", "F2": "robot_states.csv"}.get(self.layout, "robot_state_20251020.csv")
        if self.layout == "F0":
            rows = np.column_stack([rows[:, 1], rows[:, 4:]])
            header = ["epoch_s", *[f"joint_angle_{k}" for k in range(1, 7)], *[f"EE_{k}" for k in "xyzabr"]]
        lines = [",".join("" if np.isnan(v) else f"{v:.6f}" for v in row) for row in rows]
        (path / file).write_text("\n".join([",".join(header), *lines]) + "\n")

    def picture_times(self, view: int) -> np.ndarray:
        """Seconds since the start at which a view took its pictures."""
        begin = self.first_picture.get(view, 0.011 * view - 0.06)  # the cameras run when the robot's log begins
        return np.round(np.arange(begin, self.seconds + self.tail, 1 / self.camera_hz), 3)

    def _pictures(self, path: Path) -> None:
        for view in self.views:
            for t in self.picture_times(view):
                for side in ("left", "right") if self.right and view < 5 else ("left",):
                    file = path / self._picture_name(view, side, self.start + t + self.cameras_ahead)
                    file.parent.mkdir(parents=True, exist_ok=True)
                    picture = seen(self.pose(t), view) if self.scenery else jpeg(round(t * 100) % 251)
                    file.write_bytes(picture)

    def _picture_name(self, view: int, side: str, at: float) -> str:
        serial = SERIALS.get(view)
        if self.layout == "F2":
            return f"images/View{view}/{at:.6f}.jpg"
        if self.layout == "F3":
            return f"View{view}/ZED_{serial}_left_{at:.3f}.jpg" if serial else f"View5/OAK_{at:.3f}.jpg"
        low = self.layout == "F0"
        if not serial:
            return f"view5_oak/oak_1944301_{at:.3f}.jpg" if low else f"View5/oak_CAM_A_{at:.3f}.jpg"
        between = "" if self.flat else f"{side}/"
        return f"{'view' if low else 'View'}{view}/{between}zed_{serial}_{side}_{at:.3f}.jpg"

    def way(self, t: np.ndarray) -> np.ndarray:
        """(n,) mm that the tip has moved along its tool's z axis at seconds t; it rests before the start."""
        fine = np.arange(0, max(t[-1], 0.01) + 0.002, 0.001)
        pose = self.pose(fine)
        axis = Rotation.from_euler("XYZ", pose[:, 3:], degrees=True).apply([0.0, 0.0, 1.0])
        steps = (np.diff(pose[:, :3], axis=0) * axis[:-1]).sum(axis=1)
        return np.interp(t, fine, np.concatenate([[0.0], np.cumsum(steps)]))

    def _sensor(self, path: Path) -> None:
        # the recorder of F2 fills its first window before it begins: that window ends at the first robot row
        before = 649 if self.layout == "F2" and self.sensor_times is None else 0
        t = self.sensor_times
        if t is None:
            t = np.arange(-before, int((self.seconds + self.tail) * SENSOR_HZ)) / SENSOR_HZ
        at = self.start + t + self.sensor_ahead
        values = samples(len(t), -before)
        if self.tissue:
            values[:, 1:] = layered(self.way(t))
        save: Any = np.savez_compressed if self.compressed else np.savez
        if self.layout == "F2":
            ends = np.arange(650, len(t) + 1, self.stride)
            save(
                path / (self.sensor_name or "sensor_data.npz"),
                timestamps=at[ends - 1],
                data=np.stack([values[e - 650 : e] for e in ends]),
            )
            return
        time, force, aline = self.keys
        name = self.sensor_name or (
            "sensor_data_20251020_1761003616.npz" if self.layout == "F1" else "sensor_data_20251020.npz"
        )
        save(path / name, **{time: at, "send_timestamps": at + 0.01, force: values[:, 0], aline: values[:, 1:]})


def but(raw: Raw, **changes: Any) -> Raw:
    return replace(raw, **changes)
