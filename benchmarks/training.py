"""Benchmark rows of training: batches read as batches, the loader against the step, two processes against one."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import BenchRow, seconds
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl
from vla_lib.core.run_folder import runs_root


def rows(fast: bool = False, dataset_root: Path | None = None) -> list[BenchRow]:
    """Measure on a prepared dataset with a VL cache; default: what `make demo` recorded. UserError without one."""
    root = dataset_root or runs_root() / "demo-data"
    if not root.is_dir():
        told = "The training benchmark needs a prepared dataset with a VL cache"
        raise UserError(f"{told}, and {root} is not there; run `make demo` first.")
    batches, steps, live = (40, 6, 2) if fast else (200, 30, 8)
    loaded = [row for head in ("regression", "diffusion") for row in loading(root, batches, head)]
    return [*loaded, *cold_reads(root, 5 * batches), two_processes(root, steps), *live_vlm(root, live)]


def _prepared(root: Path, head: str = "regression") -> tuple[Any, Any]:
    from vla_lib.training.data import prepare_data
    from vla_lib.training.settings import AsyncSettings, DiffusionSettings

    settings = (AsyncSettings if head == "regression" else DiffusionSettings)(dataset_root=root)
    return settings, prepare_data(settings)


def _step_time_s(policy: Any, batch: dict, count: int) -> float:
    import torch

    draws = policy.draw(len(batch["state"]), torch.Generator().manual_seed(0))

    def step() -> None:
        policy.zero_grad(set_to_none=True)
        policy(batch, draws).mean().backward()

    return float(np.mean(seconds(step, count, warm=2)))


def loading(root: Path, batches: int, head: str, batch_size: int = 32) -> list[BenchRow]:
    """Bytes of windows and features that become tensors in a second, from warm files.

    Against reading sample by sample, and against what the step takes.
    """
    import torch

    from vla_lib.policy.policy import Policy

    settings, data = _prepared(root, head)
    samples = data.train
    draws = np.random.default_rng(0).integers(0, len(samples), (batches, batch_size))

    def together() -> None:
        for numbers in draws:
            samples.batch(numbers)

    def one_by_one() -> None:
        for numbers in draws[:few]:
            single = [samples.batch([n]) for n in numbers]
            {k: torch.cat([s[k] for s in single]) for k in single[0]}

    few = max(4, batches // 10)
    ours_s = seconds(together, warm=1)[0] / batches
    each_s = seconds(one_by_one)[0] / few
    sample = samples.batch([0])
    kilobytes = sum(sample[name].nbytes for name in ("vl_tokens", "sensor")) / 1e3  # window and features of one
    size = kilobytes * batch_size / 1e6
    policy = Policy(data.policy_config(settings))
    step_s = _step_time_s(policy, samples.batch(draws[0]), 3)
    threads = torch.get_num_threads()
    note = f"{head}, batches of {batch_size}, {kilobytes:.0f} kB a sample, {threads} threads"
    name = "batch reading, against"
    return [
        BenchRow(f"{name} sample by sample", size / ours_s, size / each_s, "GB/s", ">= 1 GB/s", note),
        BenchRow(f"{name} what the step consumes", 1 / ours_s, 1 / step_s, "batches/s", ">= 5x", note),
    ]


def cold_reads(root: Path, count: int) -> list[BenchRow]:
    """Sensor windows and VL ticks a second while the system holds nothing of their files in memory: read alone, as
    samples are, against copied out of the mapped files, round which the system reads ahead."""
    from vla_lib.episodes import load_used
    from vla_lib.features.cache import FeatureCache

    draw = np.random.default_rng(0)
    episodes = [episode for episode in load_used(root).values() if episode.sensor_full(65).any()]
    features, others = (
        [cache.episode(e) for e in episodes] for cache in (FeatureCache.open(root), FeatureCache.open(root))
    )
    for one in features:
        one.tick(0)  # finds where its tokens begin, once
    numbers = draw.integers(0, len(episodes), count)
    steps = [int(draw.choice(np.flatnonzero(episodes[n].sensor_full(65)))) for n in numbers]
    ticks = [int(draw.integers(len(features[n].tick_step))) for n in numbers]

    def mapped(number: int, step: int) -> None:
        end = int(episodes[number].sensor_index[step])
        np.array(episodes[number].sensor[end - 65 : end])

    def rate(files: list[Path], read: Callable[[int, int], Any], rows: list[int]) -> float:
        for path in files:
            with open(path, "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        begin = time.perf_counter()
        for number, row in zip(numbers, rows, strict=True):
            read(number, row)
        return count / (time.perf_counter() - begin)

    sensor, cached = [e.path / "sensor.npy" for e in episodes], [f.path for f in features]
    windows = rate(sensor, lambda n, step: episodes[n].sensor_window(step, 65), steps), rate(sensor, mapped, steps)
    tokens = (
        rate(cached, lambda n, tick: features[n].tick(tick), ticks),
        rate(cached, lambda n, tick: others[n].tokens[tick].clone(), ticks),
    )
    ahead = [path.read_text().strip() for path in Path("/sys/block").glob("*/queue/read_ahead_kb")]
    note = f"{len(episodes)} episodes; the disks read ahead {', '.join(sorted(set(ahead)))} kB"
    return [
        BenchRow("cold sensor windows, against mapped files", *windows, "windows/s", "", note),
        BenchRow("cold VL features, against mapped files", *tokens, "ticks/s", "", note),
    ]


def two_processes(root: Path, steps: int) -> BenchRow:
    """Samples a second of two processes against one, one thread each; efficiency is half the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        rates = {n: _rate(root, Path(folder) / str(n), n, steps) for n in (1, 2)}
    note = f"efficiency {rates[2] / rates[1] / 2:.0%}, batch 16 a process"
    return BenchRow("two processes, against one", rates[2], rates[1], "samples/s", "", note)


def live_vlm(root: Path, count: int, batch_size: int = 16) -> list[BenchRow]:
    """A training step of either model with features from the cache, against one that runs the VLM on the pictures.

    The VLM runs to the cached layer, without gradient; timed from sample numbers to gradients. The pictures are brought
    to the size at which the VLM reads the lab's (640x360 by default) beforehand; their decoding is not counted.
    """
    import torch

    from vla_lib.features.extractor import FeatureExtractor
    from vla_lib.policy.policy import Policy

    found = []
    for name, head in (("async", "regression"), ("diffusion", "diffusion")):
        settings, data = _prepared(root, head)
        samples, policy = data.train, Policy(data.policy_config(settings))
        extractor = FeatureExtractor.from_binding(data.binding)
        draws = policy.draw(batch_size, torch.Generator().manual_seed(0))
        taken: dict[bool, list[float]] = {False: [], True: []}
        for numbers in np.random.default_rng(0).integers(0, len(samples), (count + 1, batch_size)):
            pictures, ticks = _pictures(
                extractor, samples, numbers, (settings.image_resize_width, settings.image_resize_height)
            )
            for live in (False, True):
                begin = time.perf_counter()
                batch = samples.batch(numbers)
                if live:
                    prepared = [torch.from_numpy(extractor.recipe.prepare(picture)) for picture in pictures]
                    batch["vl_tokens"], batch["vl_mask"] = extractor.forward(
                        prepared, ticks, samples.episodes[0].instruction
                    )
                policy.zero_grad(set_to_none=True)
                policy(batch, draws).mean().backward()
                taken[live].append(time.perf_counter() - begin)
        cached_s, live_s = (float(np.median(taken[live][1:])) for live in (False, True))
        size = f"{settings.image_resize_width}x{settings.image_resize_height}"
        seen = f"{len(extractor.views)} views of {size}, {data.binding['model']}, {extractor.device.type}"
        note = f"batch {batch_size}, {seen}"
        row = f"{name} training step with cached features, against the live VLM"
        found.append(BenchRow(row, 1 / cached_s, 1 / live_s, "steps/s", ">= 10x", note))
    return found


def _pictures(
    extractor: Any, samples: Any, numbers: np.ndarray, size: tuple[int, int]
) -> tuple[list[Any], list[list[int]]]:
    """The pictures behind the features of the samples at `size` (width, height).

    Also the number of each view's picture (-1: none yet) for each sample.
    """
    from PIL import Image

    pictures: list[Any] = []
    ticks = []
    for number in numbers:
        episode, tick = samples.episodes[samples.episode[number]], int(samples.step[number] - samples.age_steps[number])
        paths = [episode.picture_path(view, tick) for view in extractor.views]
        before = [len(pictures) + sum(path is not None for path in paths[:k]) for k in range(len(paths))]
        ticks.append([-1 if path is None else number for path, number in zip(paths, before, strict=True)])
        pictures += [Image.open(path).convert("RGB").resize(size) for path in paths if path is not None]
    return pictures, ticks


def _rate(root: Path, run_dir: Path, processes: int, steps: int) -> float:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "-m"]
    return 16 * processes * training_steps(command, root, run_dir, steps, "--batch-size", "16", "--num-workers", "0")


def training_steps(command: list[str], root: Path, run_dir: Path, steps: int, *words: str) -> float:
    """Optimiser steps a second of train_async, of one pass each, without the first ones; its first error is raised."""
    command = [*command, "vla_lib.train_async", "--dataset-root", str(root), "--run-dir", str(run_dir), *words]
    command += ["--max-steps", str(steps), "--grad-accum-steps", "1", "--wandb-mode", "disabled"]
    command += ["--checkpoint-every-s", "1e9"]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    taken = [r["elapsed_s"] for r in read_jsonl(run_dir / "metrics.jsonl") if "train/loss_step" in r]
    skip = min(2, len(taken) - 2)
    return (len(taken) - 1 - skip) / (taken[-1] - taken[skip])
