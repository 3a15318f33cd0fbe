"""More episodes than open files, and datasets that are links: cached, trained on, evaluated."""

import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from front_doors import SMALL
from PIL import Image
from ranks import fork
from synthetic import VIEWS, write_dataset

from vla_lib.core.errors import UserError
from vla_lib.episodes import find_prepared, load_prepared
from vla_lib.evaluation.open_loop import evaluate_open_loop
from vla_lib.features.builder import build
from vla_lib.features.cache import FeatureCache, cache_folder
from vla_lib.features.preflight import plan
from vla_lib.features.settings import CacheSettings
from vla_lib.training.data import prepare_data
from vla_lib.training.loop import train as train_async
from vla_lib.training.settings import AsyncSettings
from vla_lib.workbench.training_preflight import table

CACHE = {"vl_model": "tiny", "vl_layer": 1, "vl_pooling": "grid:1x1", "device": "cpu"}
CACHE |= {"image_resize_height": 28, "image_resize_width": 28}
TRAIN = SMALL | {"max_steps": 2, "batch_size": 64, "grad_accum_steps": 1, "val_fraction": 0.5}
TRAIN |= {"image_resize_height": 28, "image_resize_width": 28}
OPEN_FILES, EPISODES = 130, 271


def with_pictures(folder: Path) -> None:
    """Small pictures, all of one file."""
    for view in VIEWS:
        (folder / view).mkdir()
        for number in range(len(load_prepared(folder).image_timestamp[view])):
            Image.fromarray(np.full((28, 28, 3), 20 * number, np.uint8)).save(folder / view / f"{number:04d}.jpg")


def test_more_episodes_than_open_files_are_cached_trained_and_evaluated(tmp_path):
    """As 5,000 on a machine that allows 1,024; every sensor file is read in training and in evaluation."""
    root = tmp_path / "data"
    (first,) = write_dataset(root, {"part1": 1}, steps=2, lead_s=0.1)
    with_pictures(first)
    shutil.rmtree(cache_folder(root))
    for number in range(EPISODES - 1):
        copy = first.with_name(f"recv_all_20250102_{number:06d}")
        shutil.copytree(first, copy, copy_function=os.link)
    run = tmp_path / "run"

    def few_files():
        limit = OPEN_FILES + len(os.listdir("/proc/self/fd"))  # earlier tests of this process may hold some
        assert limit < EPISODES
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        made = build(CacheSettings(dataset_root=root, num_workers=1, batch_size=64, **CACHE))
        trained = train_async(AsyncSettings(dataset_root=root, run_dir=run, **TRAIN | {"num_workers": 2, "epochs": 1}))
        found = evaluate_open_loop(run / "checkpoints" / "qwen_vla_async_best.pt", root)
        print(made["ticks"], trained["step"], len(set(found.episode)))

    statuses, output = fork(few_files)
    assert statuses == [0], output
    assert output.split()[-3:] == ["271", "2", "136"]


def test_linked_datasets_and_episodes_are_cached_trained_and_evaluated(tmp_path, capsys):
    disk, root = tmp_path / "disk", tmp_path / "root"
    for folder in write_dataset(disk, {"part1": 2, "elsewhere": 2}, steps=9):
        with_pictures(folder)
    shutil.rmtree(cache_folder(disk))
    (root / "New_dataset" / "Task").mkdir(parents=True)
    (root / "part1").symlink_to(disk / "part1")
    for folder in sorted((disk / "elsewhere").iterdir()):
        (root / "New_dataset" / "Task" / folder.name).symlink_to(folder)
    build(CacheSettings(dataset_root=root, num_workers=0, **CACHE))
    keys = sorted(folder.relative_to(root).as_posix() for folder in find_prepared(root))
    assert len(keys) == 4 and all(key.startswith(("part1/", "New_dataset/Task/")) for key in keys)
    cache = FeatureCache.open(root)
    assert [cache.episode(load_prepared(root / key)).key for key in keys] == keys
    result = train_async(AsyncSettings(dataset_root=root, run_dir=tmp_path / "run", **TRAIN))
    found = evaluate_open_loop(Path(result["checkpoint"]), root)
    assert result["step"] == 2 and set(found.episode) < set(keys) and len(set(found.episode)) == 2
    assert not list(disk.rglob("*.pt")), "features lie below the root that was given"
    what_is_excluded_is_left_out_and_counted(root, Path(result["checkpoint"]), sorted(set(found.episode)), capsys)


def what_is_excluded_is_left_out_and_counted(root, checkpoint, held_out, capsys):
    """By evaluation, and before caching and training."""
    (root / "marks.yaml").write_text(f"{held_out[0]}: {{exclude: true, note: the needle was bent}}\n")
    capsys.readouterr()
    assert set(evaluate_open_loop(checkpoint, root).episode) == set(held_out[1:])
    why = "excluded in marks.yaml (the needle was bent)"
    assert f"1 of 2 val episodes are left out ({held_out[0]}: {why})" in capsys.readouterr().out
    preflight, _ = plan(CacheSettings(dataset_root=root, num_workers=0, **CACHE))
    settings = AsyncSettings(dataset_root=root, **TRAIN)
    rows = table("04_train_async", settings, prepare_data(settings), 1).set_index("what")["value"]
    assert preflight.left_out == rows["left out"] == "1 of 4 prepared episodes: 1 excluded in marks.yaml"
    assert len(preflight.episodes) == 3
    (root / "marks.yaml").write_text("".join(f"{key}: {{exclude: true}}\n" for key in held_out))
    with pytest.raises(UserError, match="2 of 2 val episodes are left out .*; none is left to evaluate on"):
        evaluate_open_loop(checkpoint, root)
