"""Training benchmarks: batches read as batches, the loader against the step, two processes against one, torch.compile. Rows out."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import BenchRow
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl
from vla_lib.core.run_folder import runs_root


def rows(fast: bool = False, dataset_root: Path | None = None) -> list[BenchRow]:
    """Measure on `dataset_root` (prepared, with a VL cache; default: what `make demo` recorded). Raises UserError where there is none."""
    root = dataset_root or runs_root() / "demo-data"
    if not root.is_dir():
        raise UserError(
            f"The training benchmark needs a prepared dataset with a VL cache, and {root} is not there; run `make demo` first."
        )
    few = (40, 5, 6, 2) if fast else (200, 20, 30, 8)
    loaded = [row for head in ("regression", "diffusion") for row in loading(root, few[0], head)]
    return [*loaded, *compiled(root, few[1]), two_processes(root, few[2]), *live_vlm(root, few[3])]


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

    step()
    step()
    begin = time.perf_counter()
    for _ in range(count):
        step()
    return (time.perf_counter() - begin) / count


def loading(root: Path, batches: int, head: str, batch_size: int = 32) -> list[BenchRow]:
    """Bytes of windows and features into tensors a second, from warm files; against reading sample by sample, and against the step."""
    import torch

    from vla_lib.policy.policy import Policy

    settings, data = _prepared(root, head)
    samples = data.train
    draws = np.random.default_rng(0).integers(0, len(samples), (batches, batch_size))
    for numbers in draws:
        samples.batch(numbers)  # warm
    begin = time.perf_counter()
    for numbers in draws:
        samples.batch(numbers)
    ours_s = (time.perf_counter() - begin) / batches
    begin = time.perf_counter()
    for numbers in draws[: max(4, batches // 10)]:
        single = [samples.batch([n]) for n in numbers]
        {k: torch.cat([s[k] for s in single]) for k in single[0]}
    each_s = (time.perf_counter() - begin) / max(4, batches // 10)
    size = samples.bytes_per_sample() * batch_size / 1e9
    policy = Policy(data.policy_config(settings))
    step_s = _step_time_s(policy, samples.batch(draws[0]), 3)
    note = f"{head}, batches of {batch_size}, {samples.bytes_per_sample() / 1e3:.0f} kB a sample, {torch.get_num_threads()} threads"
    return [
        BenchRow(
            "batch reading, against sample by sample",
            size / ours_s,
            size / each_s,
            "GB/s",
            each_s / ours_s,
            ">= 1 GB/s",
            note,
        ),
        BenchRow(
            "batch reading, against what the step consumes",
            1 / ours_s,
            1 / step_s,
            "batches/s",
            step_s / ours_s,
            ">= 5x",
            note,
        ),
    ]


def compiled(root: Path, count: int) -> list[BenchRow]:
    """Forward and backward with torch.compile against without; no row where there is no compiler."""
    from vla_lib.policy.policy import Policy

    if shutil.which("g++") is None and shutil.which("clang++") is None:
        return []
    settings, data = _prepared(root)
    batch = data.train.batch(np.arange(min(32, len(data.train))))
    policy = Policy(data.policy_config(settings))
    plain_s = _step_time_s(policy, batch, count)
    try:
        policy.compile()
        compiled_s = _step_time_s(policy, batch, count)
    except Exception as error:  # a broken tool chain is no result of ours
        print(f"torch.compile does not work here: {str(error).splitlines()[0]}", flush=True)
        return []
    return [
        BenchRow(
            "step with torch.compile, against without",
            1 / compiled_s,
            1 / plain_s,
            "steps/s",
            plain_s / compiled_s,
            "",
            "batch 32",
        )
    ]


def two_processes(root: Path, steps: int) -> BenchRow:
    """Samples a second of two processes against one, one thread each; efficiency is half the ratio."""
    with tempfile.TemporaryDirectory() as folder:
        rates = {n: _rate(root, Path(folder) / str(n), n, steps) for n in (1, 2)}
    ratio = rates[2] / rates[1]
    return BenchRow(
        "two processes, against one",
        rates[2],
        rates[1],
        "samples/s",
        ratio,
        "",
        f"efficiency {ratio / 2:.0%}, batch 16 a process",
    )


def live_vlm(root: Path, count: int, batch_size: int = 16) -> list[BenchRow]:
    """A training step of either model with features from the cache, against the same step that runs the VLM on the samples' pictures
    (to the cached layer, without gradient): seconds from sample numbers to gradients.

    The pictures are brought to the size at which the VLM reads the lab's (640x360 by default) beforehand; their decoding is not counted.
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
        note = f"batch {batch_size}, {len(extractor.views)} views of {size}, {data.binding['model']}, {extractor.device.type}"
        row = f"{name} training step with cached features, against the live VLM"
        found.append(BenchRow(row, 1 / cached_s, 1 / live_s, "steps/s", live_s / cached_s, ">= 10x", note))
    return found


def _pictures(
    extractor: Any, samples: Any, numbers: np.ndarray, size: tuple[int, int]
) -> tuple[list[Any], list[list[int]]]:
    """The pictures behind the features of the samples at `size` (width, height), and for each sample the number of each view's picture (-1: none yet)."""
    from PIL import Image

    pictures: list[Any] = []
    ticks = []
    for number in numbers:
        episode, tick = samples.episodes[samples.episode[number]], int(samples.step[number] - samples.age_steps[number])
        paths = [episode.picture_path(view, tick) for view in extractor.views]
        ticks.append(
            [
                -1 if path is None else len(pictures) + sum(p is not None for p in paths[:k])
                for k, path in enumerate(paths)
            ]
        )
        pictures += [Image.open(path).convert("RGB").resize(size) for path in paths if path is not None]
    return pictures, ticks


def _rate(root: Path, run_dir: Path, processes: int, steps: int) -> float:
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
        "-m",
        "vla_lib.train_async",
    ]
    words += ["--dataset-root", str(root), "--run-dir", str(run_dir), "--max-steps", str(steps), "--batch-size", "16"]
    words += [
        "--grad-accum-steps",
        "1",
        "--num-workers",
        "0",
        "--wandb-mode",
        "disabled",
        "--checkpoint-every-s",
        "1e9",
    ]
    subprocess.run(words, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    taken = [r["elapsed_s"] for r in read_jsonl(run_dir / "metrics.jsonl") if "train/loss_step" in r]
    skip = min(2, len(taken) - 2)
    return 16 * processes * (len(taken) - 1 - skip) / (taken[-1] - taken[skip])
