"""Benchmark rows of the feature cache, with the tiny model on the CPU: building, serving, opening.

The plain way is what the cache replaces: the whole model with lm_head and all hidden states, one sample at a time, at
every action step.
"""

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.rows import BenchRow, seconds

VIEWS = ("View1_left", "View2_left", "View3_left", "View4_left", "View5")
INSTRUCTION = "Insert into the white square silicone with a white circle sticker attached"


def rows(fast: bool = False) -> list[BenchRow]:
    """Each ratio measured in this run: building, serving, opening 1,000 episodes (`fast`: 200), random access."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        make_dataset(root, episodes=2 if fast else 4, steps=60, size=(320, 180))
        built, plain_rate = build_row(root, "tiny", plain_samples=4 if fast else 12)
        return [built, *serve_rows(root, plain_rate), open_row(200 if fast else 1000)]


def build_row(
    root: Path, name: str, plain_samples: int, extractor: Any = None, plain: Any = None
) -> tuple[BenchRow, float]:
    """Action steps a second that a build makes features for, against the plain way; and the plain rate."""
    from vla_lib.features import preflight
    from vla_lib.features.builder import build_share
    from vla_lib.features.cache import cache_folder
    from vla_lib.features.form import FeatureForm
    from vla_lib.features.settings import CacheSettings
    from vla_lib.features.vlm import load_processor, load_vlm, open_checkpoint

    episodes = preflight.load_episodes(root)
    checkpoint = open_checkpoint("tiny")
    if extractor is None:
        processor = load_processor(checkpoint)
        form = FeatureForm(processor, preflight.choose_views(episodes, ()), "grid:4x6", 360, 640)
        from vla_lib.features.extractor import FeatureExtractor

        extractor = FeatureExtractor(load_vlm(checkpoint, processor, 2), form)
    binding = extractor.form.binding(checkpoint, extractor.vlm.layer, 3, str(extractor.dtype).removeprefix("torch."))
    binding["hidden_size"] = extractor.hidden_size
    planned = preflight.plan_build(root, episodes, binding).episodes
    settings = CacheSettings(dataset_root=root)
    build_share(settings, binding, planned[:1], extractor)  # warm: worker start-up, kernels, page cache
    start = time.perf_counter()
    statistics = build_share(settings, binding, planned, extractor)
    took = time.perf_counter() - start
    _write_binding(cache_folder(root) / binding["id"], binding)
    ours = sum(len(episode) for episode in episodes) / took
    baseline = plain_way(plain or plain_model(checkpoint), extractor, episodes[0], plain_samples)
    note = (
        f"{name}, {len(extractor.views)} views, {statistics.ticks} ticks in {took:.1f} s: "
        f"forward {100 * statistics.forward_s / took:.0f} %, waiting for pictures "
        f"{100 * statistics.wait_s / took:.0f} %, {statistics.read_s:.1f} s decoding and resizing in "
        f"{statistics.workers} workers, {statistics.write_s:.1f} s writing behind"
    )
    target = ">= 20" if extractor.device.type == "cuda" else ">= 5"
    name = f"features.build ({extractor.device.type})"
    return BenchRow(name, ours, baseline, "action steps/s", target, note), baseline


def serve_rows(root: Path, plain_rate: float) -> list[BenchRow]:
    """Samples a second out of the cache, in batches of 64: against the plain way, and memory itself."""
    import torch

    from vla_lib.episodes import find_prepared, load_prepared
    from vla_lib.features.cache import FeatureCache

    cache = FeatureCache.open(root)
    episodes = [load_prepared(folder) for folder in find_prepared(root)]
    rng = np.random.default_rng(0)
    picks = [(rng.integers(0, len(episodes), 64), rng.integers(0, 60, 64)) for _ in range(50)]

    def serve() -> None:
        for numbers, steps in picks:
            found = [cache.episode(episodes[number]) for number in numbers]
            newest = [np.searchsorted(one.tick_step, at, "right") - 1 for one, at in zip(found, steps, strict=True)]
            torch.stack([one.tokens[int(tick)] for one, tick in zip(found, newest, strict=True)])

    rate = 64 * len(picks) / float(np.median(seconds(serve, 3, warm=1)))
    tokens = torch.cat([cache.episode(episode).tokens for episode in episodes]).clone()
    index = [torch.from_numpy(rng.integers(0, len(tokens), 64)) for _ in picks]
    memory = 64 * len(picks) / float(np.median(seconds(lambda: [tokens[one] for one in index], 3, warm=1)))
    size = tokens[0].numel() * tokens.element_size()
    note = f"batches of 64, {size / 1e3:.0f} kB a sample, {rate * size / 1e9:.2f} GB/s"
    held = "baseline: one indexed read of all tokens held in memory"
    return [
        BenchRow("features.serve", rate, plain_rate, "samples/s", ">= 5", note),
        BenchRow("features.random_access", rate, memory, "samples/s", "near 1", held),
    ]


def open_row(count: int) -> BenchRow:
    """Seconds to open a cache of `count` episodes and map every file, against reading the files whole."""
    import torch

    from vla_lib.features import binding as bindings
    from vla_lib.features.cache import FeatureCache, cache_folder

    class Stub:
        """What the cache asks of a prepared episode."""

        fingerprint, instruction = "fp", INSTRUCTION

        def __init__(self, path: Path):
            self.path = path

        def __len__(self) -> int:
            return 300

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        layout = {"views": list(VIEWS), "rows": 4, "cols": 6, "text": True}
        binding = bindings.make_binding(**{**dict.fromkeys(bindings.FIELDS[1:], 0), "model": "bench", "layout": layout})
        target = cache_folder(root) / binding["id"]
        tokens, mask = torch.zeros(20, 121, 128, dtype=torch.bfloat16), torch.ones(20, 121, dtype=torch.bool)
        stubs = [Stub(root / "part1" / f"episode_{number:04d}") for number in range(count)]
        for stub in stubs:
            FeatureCache(root, binding).write(stub, tokens, mask, torch.arange(0, 60, 3), [])
        _write_binding(target, binding)

        def whole() -> None:
            for path in sorted(target.glob("*.pt")):
                torch.load(path, weights_only=True)

        def ours() -> None:
            cache = FeatureCache.open(root)
            for stub in stubs:
                cache.episode(stub)

        mapped = float(np.median(seconds(ours, 3, warm=1)))
        baseline = seconds(whole)[0]
    note = f"{count} episodes, every file mapped and its fingerprint checked; baseline: torch.load of each"
    return BenchRow(f"features.open_{count}", mapped, baseline, "s", "< 1 s for 1,000 episodes", note, less=True)


def plain_way(model: Any, extractor: Any, episode: Any, samples: int) -> float:
    """Samples a second with the plain processor and the whole model, all hidden states kept, at every action step."""
    import torch
    from PIL import Image

    processor, device, dtype = extractor.vlm.processor, extractor.device, extractor.dtype
    text = extractor.form.prompt(extractor.views, episode.instruction)

    def sample(step: int) -> None:
        images = [extractor.recipe.shrink(Image.open(episode.picture_path(view, step))) for view in extractor.views]
        inputs = processor(text=[text], images=images, return_tensors="pt").to(device)
        inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
        with torch.inference_mode():
            model(**inputs, output_hidden_states=True).hidden_states[extractor.vlm.layer].float().cpu()

    sample(10)
    start = time.perf_counter()
    for number in range(samples):
        sample(11 + number)
    return samples / (time.perf_counter() - start)


def plain_model(checkpoint: Any) -> Any:
    """The whole model as transformers loads it by itself."""
    import torch
    from transformers import AutoModelForImageTextToText

    from vla_lib.features.vlm import quiet_transformers

    with quiet_transformers():
        return AutoModelForImageTextToText.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()


def make_dataset(
    root: Path, episodes: int, steps: int, size: tuple[int, int], views: tuple[str, ...] = VIEWS, camera_hz: float = 5.0
) -> None:
    """Prepared episodes with JPEG pictures of drifting blobs, as a camera at `camera_hz` would have taken them."""
    from PIL import Image

    from vla_lib.episodes.data_pkl import write_pickle

    rng = np.random.default_rng(0)
    grain = rng.integers(-12, 12, (size[1], size[0], 3))
    for number in range(episodes):
        folder = root / "part1" / f"episode_{number:03d}"
        t = 1_700_000_000.0 + np.arange(steps) / 10.0
        content: dict[str, Any] = {"image": {}, "image_timestamp": {}, "image_index": {}, "sensor_data": None}
        content |= {"instruction": INSTRUCTION, "timestamp": t, "valid": np.ones(steps, bool)}
        content |= {"action": np.zeros((steps, 7), np.float32), "state": np.zeros((steps, 12), np.float32)}
        names = {"episode_name": folder.name, "dataset": "part1", "layout": "F0", "fingerprint": str(number)}
        names |= {"action_hz": 10.0, "sensor_hz": 0.0, "verdict": "good", "duration_seconds": steps / 10.0}
        content["metadata"] = {"schema_version": 1, "num_actions": steps, **names}
        for view in views:
            times = t[0] + np.arange(int(steps / 10 * camera_hz)) / camera_hz
            (folder / view).mkdir(parents=True)
            paths = []
            for place, moment in enumerate(times):
                small = Image.fromarray(rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)).resize(
                    size, Image.Resampling.BICUBIC
                )
                paths.append(f"{view}/{moment:.3f}.jpg")
                picture = np.clip(np.roll(np.asarray(small, np.int16) + grain, place, 1), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / paths[-1], quality=90)
            content["image"][view], content["image_timestamp"][view] = paths, times
            content["image_index"][view] = (np.searchsorted(times, t + 1e-6, side="right") - 1).astype(np.int32)
        write_pickle(folder / "data.pkl", content)


def _write_binding(folder: Path, binding: dict[str, Any]) -> None:
    from vla_lib.core.files import write_json

    write_json(folder / "binding.json", binding)
