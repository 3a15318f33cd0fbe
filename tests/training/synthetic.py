"""A folder in; a prepared dataset with its VL cache and known truth out: data.pkl, sensor.npy and feature files as
the workbench writes them.

The scene: a target lies at a random place, seen only by the "cameras" (bumps in the token grids); a membrane lies at
a random depth, seen only by the sensor (the peak of the A-scan). Each action goes a tenth of the way to the target
(more in short episodes, so that all end there) and stops at the membrane, so a policy needs both inputs, and its
held-out error tells whether it uses them.
"""

import pickle
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from vla_lib.features.binding import TokenLayout, make_binding
from vla_lib.features.cache import FeatureCache, cache_folder

VIEWS = ("View1_left", "View5")
ROWS, COLS, DIM = 4, 6, 24
HZ, SENSOR_HZ = 10.0, 650.0


def write_dataset(
    root: Path,
    datasets: dict[str, int],
    steps: int = 40,
    seed: int = 0,
    stride: int = 1,
    sensor: bool = True,
    lead_s: float = 1.2,
    views: tuple[str, ...] = VIEWS,
) -> list[Path]:
    """`{"New_dataset/Task": episodes, ...}` -> episode folders. `lead_s`: sensor seconds before the first step."""
    rng = np.random.default_rng(seed)
    look = np.random.default_rng(77).normal(size=(2, DIM)).astype(np.float32)  # what target and needle look like
    layout = TokenLayout(views, ROWS, COLS, True)
    binding = test_binding(layout, stride)
    folder = cache_folder(root) / binding["id"]
    folder.mkdir(parents=True, exist_ok=True)
    from vla_lib.core.files import write_json

    write_json(folder / "binding.json", binding)
    made = []
    for dataset, count in datasets.items():
        for number in range(count):
            path = root / dataset / f"recv_all_20250101_{number:06d}"
            made.append(path)
            prepared = _episode(path, dataset, rng, steps, sensor, lead_s, views)
            ticks = np.arange(0, steps, stride)
            tokens = _tokens(prepared["truth"], ticks, look, len(views), rng)
            mask = torch.ones(len(ticks), layout.tokens, dtype=torch.bool)
            from vla_lib.episodes import load_prepared

            features = torch.from_numpy(tokens).half(), mask, torch.from_numpy(ticks)
            FeatureCache(root, binding).write(load_prepared(path), *features, [])
    return made


def test_binding(layout: TokenLayout, stride: int, **changes) -> dict:
    """A binding like the cache builder's."""
    fields = {
        "source": "tiny",
        "model": "tiny",
        "weights_sha256": "0" * 64,
        "family": "qwen2_5_vl",
        "layer": 2,
        "depth": 2,
        "hidden_size": DIM,
        "pooling": f"grid:{layout.rows}x{layout.cols}",
        "image_resize_height": 360,
        "image_resize_width": 640,
        "image_backend": "torchvision",
        "views": layout.views,
        "prompt": "{instruction}",
        "text_tokens": "mean",
        "tick_stride": stride,
        "dtype": "float16",
        "transformers": "5",
        "layout": asdict(layout),
    } | changes
    import vla_lib.features.binding as bindings

    return make_binding(**{k: v for k, v in fields.items() if k in (*bindings.FIELDS, "source")})


test_binding.__test__ = False


def _episode(path: Path, dataset: str, rng, steps: int, sensor: bool, lead_s: float, views) -> dict:
    path.mkdir(parents=True)
    target = rng.uniform(-8, 8, 2)
    membrane = rng.uniform(3, 9)  # mm of depth
    pose = np.zeros((steps + 1, 6))
    pose[0, :2] = rng.uniform(-8, 8, 2)
    pose[:, 5] = 90.0
    for k in range(steps):
        pose[k + 1] = pose[k]
        pose[k + 1, :2] += max(0.1, 4 / steps) * (target - pose[k, :2])
        pose[k + 1, 2] += np.clip(0.15 * (membrane - pose[k, 2]), -0.4, 0.4)
        pose[k + 1, 3] += 0.05 * np.sin(target[0])
    action = np.zeros((steps, 7), np.float32)
    action[:, :3] = np.diff(pose[:, :3], axis=0)
    action[:, 3] = np.diff(pose[:, 3])
    action[:, 6] = 1.0
    start = 1.7e9 + int(rng.integers(1000, 9000))
    timestamp = start + np.arange(steps) / HZ
    state = np.concatenate([np.tile(np.arange(6.0), (steps, 1)), pose[:steps]], 1).astype(np.float32)
    data = {
        "action": action,
        "timestamp": timestamp,
        "valid": np.ones(steps, bool),
        "state": state,
        "image": {v: [f"{v}/{k:04d}.jpg" for k in range(steps)] for v in views},
        "image_timestamp": {v: timestamp.copy() for v in views},
        "image_index": {v: np.arange(steps, dtype=np.int32) for v in views},
        "sensor_data": None,
        "instruction": "Insert the needle",
    }
    if sensor:
        time = start - lead_s + np.arange(int((steps / HZ + lead_s) * SENSOR_HZ)) / SENSOR_HZ
        depth = np.interp(time, timestamp, pose[:steps, 2])
        peak = 150 + 80 * (membrane - depth)  # bins
        bins = np.arange(1025)
        stream = np.empty((len(time), 1026), np.float32)
        stream[:, 0] = 20 + 5 * np.maximum(depth - membrane + 1, 0) + rng.normal(0, 0.2, len(time))
        stream[:, 1:] = 100 + 50 * np.exp(-0.5 * ((bins - peak[:, None]) / 12) ** 2)
        np.save(path / "sensor.npy", stream)
        index = np.searchsorted(time, timestamp, side="right").astype(np.int64)
        data["sensor_data"] = {"force": stream[:, 0].copy(), "timestamp": time, "index": index, "array": "sensor.npy"}
    top, _, task = dataset.partition("/")
    data["metadata"] = {
        "episode_name": path.name,
        "dataset": top,
        "task": task,
        "layout": "F1",
        "robot_hz": 100.0,
        "robot_pose_hz": 60.0,
        "action_hz": HZ,
        "num_actions": steps,
        "num_robot_states": steps * 10,
        "duration_seconds": steps / HZ,
        "has_sensor": sensor,
        "sensor_hz": SENSOR_HZ if sensor else 0.0,
        "camera_hz": {v: 10.0 for v in views},
        "clock_offsets": {},
        "findings": [],
        "quality_findings": [],
        "schema": 1,
        "verdict": "good",
        "schema_version": 1,
        "fingerprint": f"{abs(hash(path.as_posix())):064x}"[:64],
    }
    with open(path / "data.pkl", "wb") as file:
        pickle.dump(data, file)
    return {"truth": {"target": target, "needle": pose[:steps, :2]}}


def _tokens(truth: dict, ticks: np.ndarray, look: np.ndarray, views: int, rng) -> np.ndarray:
    """(ticks, T, DIM): smooth bumps where target and needle are, on a still background."""
    row, col = np.meshgrid(np.linspace(-10, 10, ROWS), np.linspace(-10, 10, COLS), indexing="ij")
    tokens = np.zeros((len(ticks), views, ROWS * COLS, DIM), np.float32)
    tokens += np.random.default_rng(5).normal(size=(1, views, ROWS * COLS, DIM))
    for kind, place in enumerate((np.tile(truth["target"], (len(ticks), 1)), truth["needle"][ticks])):
        for view in range(views):
            x, y = (place[:, 0], place[:, 1]) if view % 2 == 0 else (place[:, 1], -place[:, 0])
            bump = np.exp(-0.5 * (((col - x[:, None, None]) / 4) ** 2 + ((row - y[:, None, None]) / 5) ** 2))
            tokens[:, view] += 3 * bump.reshape(len(ticks), -1, 1) * look[kind]
    tokens += rng.normal(0, 0.02, tokens.shape)
    tokens = tokens.reshape(len(ticks), -1, DIM)
    return np.concatenate([tokens, np.ones((len(ticks), 1, DIM))], 1).astype(np.float32)
