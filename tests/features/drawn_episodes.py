"""Writes small prepared episodes whose pictures are drawn: a red disc that moves with the pose."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from vla_lib.episodes.data_pkl import write_pickle

VIEWS = ("View1_left", "View2_left", "View5")
T0 = 1_700_000_000.0


def draw(x: float, y: float, size: tuple[int, int], seed: int) -> Image.Image:
    """A picture with a red disc at (x, y), both in 0..1."""
    width, height = size
    rng = np.random.default_rng(seed)
    picture = Image.fromarray(rng.integers(90, 110, (height, width, 3), dtype=np.uint8))
    radius = height / 12
    ImageDraw.Draw(picture).ellipse(
        [x * width - radius, y * height - radius, x * width + radius, y * height + radius], fill=(200, 30, 30)
    )
    return picture


def make_episode(
    root: Path,
    key: str,
    steps: int = 20,
    views: tuple[str, ...] = VIEWS,
    size: tuple[int, int] = (96, 56),
    fingerprint: str | None = None,
    instruction: str = "Perform the insertion task",
    late: int = 0,
    camera_hz: float = 5.0,
    seed: int = 0,
) -> Path:
    """Write one prepared episode; `late`: steps before the first picture of the last view. Returns its folder."""
    folder = root / key
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *key.encode()])
    t = T0 + np.arange(steps) / 10.0
    pose = np.cumsum(rng.normal(0, 0.4, (steps + 1, 6)), axis=0)
    state = np.concatenate([np.zeros((steps, 6)), pose[:-1]], axis=1).astype(np.float32)
    content = {
        "action": np.concatenate([np.diff(pose, axis=0), np.ones((steps, 1))], axis=1).astype(np.float32),
        "timestamp": t,
        "valid": np.ones(steps, bool),
        "state": state,
        "image": {},
        "image_timestamp": {},
        "image_index": {},
        "sensor_data": None,
        "instruction": instruction,
        "metadata": {
            "schema_version": 1,
            "episode_name": folder.name,
            "dataset": key.split("/")[0],
            "layout": "F1",
            "fingerprint": fingerprint or f"fp-{key}",
            "action_hz": 10.0,
            "sensor_hz": 0.0,
            "num_actions": steps,
            "verdict": "good",
            "duration_seconds": steps / 10.0,
        },
    }
    count = max(1, int(np.ceil(steps / 10.0 * camera_hz)))
    for number, view in enumerate(views):
        times = T0 + np.arange(count) / camera_hz + (late / 10.0 if view == views[-1] else 0.0)
        paths = []
        (folder / view).mkdir(exist_ok=True)
        for picture, time in enumerate(times):
            path = f"{view}/{time:.3f}.jpg"
            step = min(steps - 1, int(picture * 10 / camera_hz))
            where = 0.5 + 0.1 * pose[step, [number % 3, (number + 1) % 3]]
            draw(*np.clip(where, 0.1, 0.9), size, picture).save(folder / path, quality=90)
            paths.append(path)
        content["image"][view] = paths
        content["image_timestamp"][view] = times
        content["image_index"][view] = (np.searchsorted(times, t + 1e-9, side="right") - 1).astype(np.int32)
    write_pickle(folder / "data.pkl", content)
    return folder
