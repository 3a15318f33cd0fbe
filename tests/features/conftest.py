"""Small prepared datasets with drawn pictures, and tiny checkpoints, shared by the tests of the features room."""

import os
import shutil
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from vla_lib.episodes.data_pkl import write_pickle
from vla_lib.features.builder import build
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.features.form import FeatureForm
from vla_lib.features.settings import CacheSettings
from vla_lib.features.vlm import load_processor, load_vlm, open_checkpoint, resolve_layer

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


@pytest.fixture(scope="session", autouse=True)
def _own_cache_folder(tmp_path_factory):
    """Tiny checkpoints go to a folder of this test session, never to the user's."""
    before = os.environ.get("VLA_CACHE_DIR")
    os.environ["VLA_CACHE_DIR"] = str(tmp_path_factory.mktemp("vla-cache"))
    yield
    if before is None:
        del os.environ["VLA_CACHE_DIR"]
    else:
        os.environ["VLA_CACHE_DIR"] = before


@pytest.fixture
def dataset(tmp_path, prepared) -> Path:
    """A copy of the three prepared episodes, without a cache."""
    return shutil.copytree(prepared, tmp_path / "dataset", ignore=shutil.ignore_patterns("cache"))


@pytest.fixture
def built(tmp_path, prepared) -> Path:
    """A copy of the three prepared episodes with the cache of the default settings."""
    return shutil.copytree(prepared, tmp_path / "built")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """Three short episodes in two datasets, one of them two levels deep and without View5, and their cache."""
    root = tmp_path_factory.mktemp("prepared")
    make_episode(root, "White_silicone_white_circle/recv_all_1", steps=20)
    make_episode(root, "White_silicone_white_circle/recv_all_2", steps=10, late=4)
    make_episode(
        root,
        "New_dataset/Needle_insertion/episode_1",
        steps=13,
        views=VIEWS[:2],
        instruction="Perform Needle insertion task",
    )
    build(CacheSettings(dataset_root=root, num_workers=0, device="cpu"))
    return root


@pytest.fixture(scope="session")
def extractor_for():
    """extractor_for(name, views, layer=0, pooling=..., height=..., width=...): a loaded extractor, one a setting."""

    def make(name, views, layer=0, pooling="grid:4x6", height=360, width=640):
        return _extractor(name, tuple(views), layer, pooling, height, width)

    return make


@lru_cache(maxsize=64)
def _extractor(name, views, layer, pooling, height, width):
    checkpoint = open_checkpoint(name)
    processor = load_processor(checkpoint)
    form = FeatureForm(processor, views, pooling, height, width)
    return FeatureExtractor(load_vlm(checkpoint, processor, resolve_layer(layer, checkpoint.depth)), form)
