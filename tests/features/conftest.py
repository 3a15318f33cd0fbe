"""Small prepared datasets with drawn pictures, and tiny checkpoints, shared by the tests of the features room."""

import os
import shutil
from functools import lru_cache
from pathlib import Path

import pytest
from drawn_episodes import VIEWS, make_episode

from vla_lib.features.builder import build
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.features.form import FeatureForm
from vla_lib.features.settings import CacheSettings
from vla_lib.features.vlm import load_processor, load_vlm, open_checkpoint, resolve_layer


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
    build(CacheSettings(dataset_root=root, vl_model="tiny", num_workers=0, device="cpu"))
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
