"""Rows of the episodes room: reading a sample, opening many, preparing against copying, two processes against one.

The raw episodes are written for the occasion; every row measures both figures in the same run.
"""

import gc
import io
import os
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image

from benchmarks.rows import BenchRow, seconds
from vla_lib.episodes import Episode, build_steps, find_episodes, find_prepared, load_prepared
from vla_lib.episodes.steps import image_index, sensor_index
from vla_lib.preprocess import Settings, make_jobs, run_jobs

T0 = 1_761_003_616.25
VIEWS = (("View1", "41182735"), ("View2", "49429257"), ("View3", "44377151"), ("View4", "49045152"), ("View5", ""))


def rows(fast: bool = False) -> list[BenchRow]:
    """All rows. `fast`: shorter episodes and fewer of them (about 10 s instead of a minute)."""
    with tempfile.TemporaryDirectory() as name:
        folder, length_s = Path(name), 10.0 if fast else 30.0
        write_raw(folder / "raw" / "part1" / "recv_all_20251020_000000", length_s, windows=False)
        write_raw(folder / "raw" / "New_dataset" / "Red_point" / "episode_20251020_000000", length_s / 3, windows=True)
        found = [prepare_row(folder, "part1", "F1"), prepare_row(folder, "New_dataset", "F2")]
        run_jobs(make_jobs(Settings(folder / "raw")), 1, show=False)
        found += [
            sample_row(folder / "raw" / "part1" / "recv_all_20251020_000000"),
            *open_rows(folder, 200 if fast else 1000),
        ]
        shutil.rmtree(folder / "many")
        return [*found, workers_row(folder, 4 if fast else 24, length_s)]


def write_raw(path: Path, length_s: float, windows: bool) -> None:
    """One raw episode: 100 Hz rows, five views at 5 Hz of 640x360, a 650 Hz sensor; `windows`: as F2 stores it."""
    path.mkdir(parents=True)
    stream = io.BytesIO()
    shades = np.add.outer(np.arange(360), np.arange(640))[..., None] * [1, 2, 3] % 256
    Image.fromarray(shades.astype(np.uint8)).save(stream, "JPEG")
    picture = stream.getvalue()
    t = np.arange(0, length_s, 0.01)
    pose = np.stack([180 + 3 * np.sin(t), np.cos(t), 150 - 0.5 * t, 3 * np.sin(t), np.cos(t), 12 + t], axis=1)
    stamps = T0 + t
    columns = ["recv_timestamp", "origin_timestamp", "send_timestamp", "force" if windows else "force_placeholder"]
    columns += [f"joint_{k}" for k in range(1, 7)] + [f"pose_{k}" for k in "xyzabr"]
    body = np.column_stack([stamps + 0.002, stamps, stamps, 0 * t, *(np.sin(t + k) for k in range(6)), pose])
    pd.DataFrame(body, columns=columns).to_csv(path / "robot_states.csv", index=False, float_format="%.6f")
    for number, (view, serial) in enumerate(VIEWS):
        folder = path / (f"images/{view}" if windows else f"{view}/left" if serial else view)
        folder.mkdir(parents=True)
        for count, at in enumerate(T0 + 0.01 * number + np.arange(0, length_s, 0.2)):
            comment = (
                b"\xff\xfe" + (2 + count % 50).to_bytes(2, "big") + bytes(count % 50)
            )  # no two neighbours are equal
            f1 = f"zed_{serial}_left_{at:.3f}.jpg" if serial else f"oak_CAM_A_{at:.3f}.jpg"
            (folder / (f"{at:.6f}.jpg" if windows else f1)).write_bytes(picture[:2] + comment + picture[2:])
    count = int(length_s * 650)
    values = np.random.default_rng(0).random((count, 1026), np.float32)
    times = T0 + np.arange(count) / 650
    if windows:
        ends = np.arange(650, count + 1, 130)
        data = np.stack([values[end - 650 : end] for end in ends])
        np.savez(path / "sensor_data.npz", timestamps=times[ends - 1], data=data)
    else:
        parts = {"timestamps": times, "send_timestamps": times, "forces": values[:, 0], "alines": values[:, 1:]}
        np.savez(path / "sensor_data_1.npz", **parts)


def sample_row(path: Path) -> BenchRow:
    """Open an episode and read one training sample: from data.pkl, and from the raw files."""
    step = len(load_prepared(path)) // 2

    def prepared() -> tuple[object, ...]:
        episode = load_prepared(path)
        pictures = [episode.picture_path(view, step) for view in episode.views]
        return episode.state[step], episode.action[step : step + 8], pictures, np.array(episode.sensor_window(step, 65))

    def raw() -> tuple[object, ...]:
        episode = Episode.open(find_episodes(path.parent)[0])
        steps = build_steps(episode)
        pictures = [p.paths[image_index(p, steps.t_s)[step]] for p in episode.pictures.values()]
        assert episode.sensor is not None
        end = int(sensor_index(episode.sensor.t_s, steps.t_s)[step])
        with np.load(episode.files.sensor_files[0]) as held:
            window = np.column_stack([held["forces"][end - 65 : end], held["alines"][end - 65 : end]])
        return steps.state[step], steps.action[step : step + 8], pictures, window

    same = all(np.array_equal(prepared()[k], raw()[k]) for k in (0, 1, 3))
    ours, baseline = min(seconds(prepared, 20, warm=1)) * 1e3, min(seconds(raw, 5, warm=1)) * 1e3
    note = f"open and read one sample; same values: {same}"
    return BenchRow("episodes.sample", ours, baseline, "ms", ">= 100 times", note, less=True)


def open_rows(folder: Path, count: int) -> list[BenchRow]:
    """Open many prepared episodes: seconds, and memory that stays."""
    source = folder / "raw" / "part1" / "recv_all_20251020_000000" / "data.pkl"
    many = folder / "many" / "part1"
    for number in range(count):
        place = many / f"recv_all_{number:08d}_000000"
        place.mkdir(parents=True)
        shutil.copyfile(source, place / "data.pkl")
    gc.collect()
    load_prepared(source)
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    opened = [load_prepared(path) for path in find_prepared(folder / "many")]
    took = (time.perf_counter() - start) * 1000 / len(opened)
    grown = (psutil.Process().memory_info().rss - before) / len(opened) / 1e3
    size = source.stat().st_size / 1e3
    found, held = f"{count} episodes found, opened and checked on one core", f"data.pkl is {size:.0f} KB"
    return [
        BenchRow("episodes.open", took, 2.0, "s per 1000", "< 2 s", found, less=True),
        BenchRow("episodes.memory", max(grown, 1e-3), 100.0, "KB an episode", "< 100 KB", held, less=True),
    ]


def prepare_row(folder: Path, dataset: str, layout: str) -> BenchRow:
    """Prepare one episode, against copying its robot log and sensor file; both written to disk for good."""
    settings = Settings(folder / "raw", (folder / "raw" / dataset,), output_root=folder / "out")
    job = make_jobs(settings)[0]
    files = [path for path in (job.files.robot_log, *job.files.sensor_files) if path]

    def copy() -> None:
        (folder / "copy").mkdir()
        for path in files:
            with open(path, "rb") as source, open(folder / "copy" / path.name, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 21)
                target.flush()
                os.fsync(target.fileno())

    def prepare() -> None:
        assert [report.status for report in run_jobs([job], 1, show=False)] == ["written"]

    copies, prepares = [], []
    for _ in range(4):  # alternating, so that both meet the same disk
        copies += seconds(copy)
        shutil.rmtree(folder / "copy")
        prepares += seconds(prepare)
        shutil.rmtree(folder / "out")
    ours, baseline = min(prepares), min(copies)
    size = sum(path.stat().st_size for path in files) / 1e6
    note = f"{layout}, {size:.0f} MB; baseline: copying robot log and sensor file, flushed to disk as well"
    target = ">= 0.5 (twice the time of copying)"
    return BenchRow(f"episodes.prepare_{layout}", ours, baseline, "s", target, note, less=True)


def workers_row(folder: Path, count: int, length_s: float) -> BenchRow:
    """Prepare several episodes with two processes and with one; the start of the processes counts."""
    for number in range(count):
        write_raw(folder / "several" / "part1" / f"recv_all_20251020_{number:06d}", length_s, windows=False)
    took: dict[int, list[float]] = {1: [], 2: []}
    for workers in (1, 2, 1, 2):
        os.sync()  # what the run before left for the disk to do is not this run's
        jobs = make_jobs(Settings(folder / "several", output_root=folder / "out"))
        took[workers] += seconds(partial(run_jobs, jobs, workers, show=False))
        shutil.rmtree(folder / "out")
    one, two = min(took[1]), min(took[2])
    note = f"{count} episodes of {length_s:g} s; two processes, their start included, against one"
    return BenchRow("episodes.two_processes", two, one, "s", "nearly 2 times", note, less=True)
