"""Build settings in, a complete feature cache out: planned by the first rank, shared over all, resumable, atomic episode by episode."""

import os
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vla_lib.core.errors import UserError
from vla_lib.core.files import append_jsonl, write_json
from vla_lib.core.progress import Progress
from vla_lib.features import binding as bindings
from vla_lib.features import preflight as preflights
from vla_lib.features.cache import cache_folder, feature_file, read_binding, write_features
from vla_lib.features.extractor import FeatureExtractor, default_device, default_dtype
from vla_lib.features.form import FeatureForm
from vla_lib.features.ranks import Ranks
from vla_lib.features.reader import Batch, plan_batches, read_ahead
from vla_lib.features.settings import CacheSettings
from vla_lib.features.vlm import load_processor, load_vlm, open_checkpoint, resolve_layer

STALE_PARTIAL_S = 600.0


def plan(settings: CacheSettings, device: str | None = None) -> tuple[preflights.Preflight, Any, FeatureForm, Any]:
    """Look at data, checkpoint and cache without loading the model: (preflight, checkpoint, form, processor)."""
    root = Path(settings.dataset_root)
    episodes = preflights.load_episodes(root)
    checkpoint = open_checkpoint(settings.vl_model)
    processor = load_processor(checkpoint)
    views = preflights.choose_views(episodes, settings.views)
    form = FeatureForm(processor, views, settings.vl_pooling, settings.image_resize_height, settings.image_resize_width)
    dtype = default_dtype(device or _device(settings)) if settings.dtype == "auto" else settings.dtype
    binding = form.binding(checkpoint, resolve_layer(settings.vl_layer, checkpoint.depth), settings.tick_stride, dtype)
    return preflights.plan_build(root, episodes, binding), checkpoint, form, processor


def build(settings: CacheSettings) -> dict[str, Any]:
    """Build (or finish) the cache that `settings` ask for; returns counts, seconds by stage, findings and the binding's id.

    Under torchrun every rank calls this; all return the same results. Raises UserError for bad input before a model is loaded.
    """
    with Ranks() as ranks:
        root, device, start = Path(settings.dataset_root), _device(settings), time.perf_counter()
        found = _first_plans(ranks, settings, device)
        binding, folder = found.binding, cache_folder(root) / found.binding["id"]
        todo = found.todo(settings.overwrite)
        if settings.preflight_only or not todo:
            return _finish(ranks, settings, found, [_statistics()], start)
        share = preflights.share_out(todo, ranks.world)[ranks.rank]
        checkpoint = open_checkpoint(settings.vl_model)
        processor = load_processor(checkpoint)
        form = FeatureForm(
            processor,
            binding["views"],
            binding["pooling"],
            binding["image_resize_height"],
            binding["image_resize_width"],
        )
        bindings.check(
            binding,
            form.binding(checkpoint, binding["layer"], binding["tick_stride"], binding["dtype"]),
            "The first rank's plan",
        )
        extractor = FeatureExtractor(load_vlm(checkpoint, processor, binding["layer"], device, binding["dtype"]), form)
        if ranks.first:
            print(
                f"model {checkpoint.name}, {binding['layer']} of {checkpoint.depth} layers, {binding['dtype']} on {device}, {ranks.world} rank(s)",
                flush=True,
            )
        total = sum(episode.ticks for episode in todo)
        with Progress(total, "features", "ticks", show=ranks.first) as progress:
            told = _Told(ranks, progress, settings.run_dir, total)
            statistics = build_share(root, share, extractor, binding, folder, settings, ranks.local_world, told.ticks)
            told.wait_for_all()
        return _finish(ranks, settings, found, ranks.gather(statistics), start)


def build_share(
    root: Path,
    share: list[preflights.PlannedEpisode],
    extractor: FeatureExtractor,
    binding: dict[str, Any],
    folder: Path,
    settings: CacheSettings,
    local_world: int = 1,
    on_ticks: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Compute and write one rank's episodes; returns its statistics."""
    from vla_lib.episodes import load_prepared

    statistics = _statistics()
    episodes = [load_prepared(planned.path) for planned in share]
    steps = [preflights.tick_steps(episode, binding["tick_stride"]) for episode in episodes]
    plans = [
        batch
        for number, episode in enumerate(episodes)
        for batch in plan_batches(number, episode, steps[number], binding["views"], settings.batch_size)
    ]
    workers = _workers(settings, local_world, extractor.device.type)
    forward = BackingOff(extractor, settings.batch_size)
    done: dict[int, dict[str, Any]] = {}
    with Writer() as writer:
        asked = time.perf_counter()
        for batch in read_ahead(plans, extractor.recipe, root, workers, pin=extractor.device.type == "cuda"):
            ready = time.perf_counter()
            statistics["wait_s"] += ready - asked
            statistics["read_s"] += batch.seconds
            episode = episodes[batch.episode]
            store = done.setdefault(batch.episode, _empty(len(steps[batch.episode]), extractor))
            last = batch.first + len(batch.ticks)
            store["tokens"][batch.first : last], store["mask"][batch.first : last] = forward(batch, episode.instruction)
            store["left"] -= len(batch.ticks)
            store["findings"] += batch.failures
            asked = time.perf_counter()
            statistics["forward_s"] += asked - ready
            statistics["pictures"] += len(batch.shapes)
            statistics["ticks"] += len(batch.ticks)
            if not store["left"]:
                planned, ready_store = share[batch.episode], done.pop(batch.episode)
                findings = sorted(set(ready_store["findings"]))
                statistics["findings"] += findings
                statistics["episodes"] += 1
                tick_step = torch.tensor(list(steps[batch.episode]), dtype=torch.int64)
                path, parts = feature_file(folder, planned.key), (ready_store["tokens"], ready_store["mask"], tick_step)
                writer.put(
                    lambda path=path, episode=episode, key=planned.key, parts=parts, findings=findings: write_features(
                        path, binding, episode, key, *parts, findings
                    )
                )
                asked = time.perf_counter()
            on_ticks(len(batch.ticks))
    statistics |= {"write_s": writer.seconds, "bytes": writer.bytes, "batch_size": forward.limit, "workers": workers}
    return statistics


class BackingOff:
    """Calls the extractor on a batch; when memory runs out it halves the number of ticks that go through together, and goes on."""

    def __init__(self, extractor: FeatureExtractor, limit: int):
        self.extractor, self.limit = extractor, limit

    def __call__(self, batch: Batch, instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens (ticks, T, D) and mask (ticks, T) of a batch; ticks that show the same pictures are computed once."""
        different = list(dict.fromkeys(batch.ticks))
        parts, start = [], 0
        while start < len(different):
            chunk = different[start : start + self.limit]
            try:
                parts.append(self._chunk(batch, chunk, instruction))
            except torch.OutOfMemoryError:
                if self.limit == 1 or len(chunk) == 1:
                    raise UserError(
                        "One tick alone does not fit into the GPU's memory; take smaller pictures (--image-resize-height/width), fewer --views, "
                        "a lower --vl-layer, or free the GPU."
                    ) from None
                self.limit = max(1, min(self.limit, len(chunk)) // 2)
                print(f"out of memory: going on with {self.limit} ticks at a time", flush=True)
            else:
                start += len(chunk)
                continue
            if torch.cuda.is_available():  # outside the handler: its traceback holds the failed pass's tensors
                torch.cuda.empty_cache()
        place = {tick: number for number, tick in enumerate(different)}
        order = [place[tick] for tick in batch.ticks]
        return torch.cat([part[0] for part in parts])[order], torch.cat([part[1] for part in parts])[order]

    def _chunk(self, batch: Batch, ticks: list[tuple[int, ...]], instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        used = sorted({number for tick in ticks for number in tick if number >= 0})
        renumber = {-1: -1, **{number: place for place, number in enumerate(used)}}
        pictures = batch.pictures(self.extractor.device)
        chosen = [pictures[number] for number in used]
        return self.extractor.forward(
            chosen, [tuple(renumber[number] for number in tick) for tick in ticks], instruction
        )


class Writer:
    """Writes behind the model in a thread; an error there ends the build at the next call. Use as a context manager."""

    def __init__(self) -> None:
        self.seconds, self.bytes = 0.0, 0
        self._error: BaseException | None = None
        self._jobs: queue.Queue[Callable[[], int] | None] = queue.Queue(maxsize=2)
        self._thread = threading.Thread(target=self._work, name="feature-writer", daemon=True)

    def put(self, job: Callable[[], int]) -> None:
        """Queue a job that writes and returns its bytes; waits while two are queued."""
        self._raise()
        self._jobs.put(job)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            start = time.perf_counter()
            try:
                if self._error is None:
                    self.bytes += job()
            except BaseException as error:  # handed to the main thread
                self._error = error
            self.seconds += time.perf_counter() - start

    def _raise(self) -> None:
        if isinstance(self._error, OSError):
            raise UserError(
                f"The features cannot be written: {self._error}; free some space or check the folder, then run again."
            ) from self._error
        if self._error is not None:
            raise self._error

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        self._jobs.put(None)
        self._thread.join()
        if kind is None:
            self._raise()


class _Told:
    """Counts ticks over all ranks; the first rank shows them and writes them to metrics.jsonl."""

    def __init__(self, ranks: Ranks, progress: Progress, run_dir: Path | None, total: int):
        self.ranks, self.progress, self.run_dir, self.total = ranks, progress, run_dir, total
        self._shown, self._start, self._last = 0, time.perf_counter(), 0.0

    def ticks(self, count: int) -> None:
        self.ranks.add("ticks", count)
        self.show()

    def show(self, force: bool = False) -> None:
        if not self.ranks.first:
            return
        now = self.ranks.add("ticks", 0)
        self.progress.update(now - self._shown)
        self._shown, seconds = now, time.perf_counter() - self._start
        if self.run_dir is not None and (force or seconds - self._last >= 1.0):
            self._last = seconds
            row = {
                "time": time.time(),
                "features/ticks": now,
                "features/ticks_total": self.total,
                "features/ticks_per_s": now / max(seconds, 1e-9),
            }
            append_jsonl(Path(self.run_dir) / "metrics.jsonl", row)

    def wait_for_all(self) -> None:
        self.ranks.add("finished", 1)
        while self.ranks.first and self.ranks.add("finished", 0) < self.ranks.world:
            self.show()
            time.sleep(0.2)
        self.show(force=True)


def _first_plans(ranks: Ranks, settings: CacheSettings, device: str) -> preflights.Preflight:
    """The first rank's preflight on every rank (what is missing must be judged once, before anyone writes)."""
    found: Any = None
    if ranks.first:
        try:
            found = plan(settings, device)[0]
            print(found.text(settings.overwrite), flush=True)
            if not settings.preflight_only:
                found.check_space(settings.overwrite)
                _prepare_folder(Path(settings.dataset_root), found.binding)
        except UserError as error:
            found = error
    found = ranks.share(found)
    if isinstance(found, UserError):
        raise found
    return found


def _prepare_folder(root: Path, binding: dict[str, Any]) -> None:
    folder = cache_folder(root) / binding["id"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "binding.json").exists():
            read_binding(folder)
        else:
            if any(folder.iterdir()):
                raise UserError(f"{folder} exists but holds no binding.json, so it is not ours; move it away.")
            write_json(folder / "binding.json", binding)
        for partial in folder.glob(".*.partial"):  # left by a killed build
            if time.time() - partial.stat().st_mtime > STALE_PARTIAL_S:
                partial.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(
            f"The cache folder {folder} cannot be written ({error.strerror or error}); check its permissions."
        ) from None


def _finish(
    ranks: Ranks, settings: CacheSettings, found: preflights.Preflight, statistics: list[dict[str, Any]], start: float
) -> dict[str, Any]:
    summed = {
        name: sum(one[name] for one in statistics)
        for name in ("episodes", "ticks", "pictures", "bytes", "read_s", "wait_s", "forward_s", "write_s")
    }
    findings = sorted(finding for one in statistics for finding in one["findings"])
    results = {
        "binding_id": found.binding["id"],
        "cache_folder": str(cache_folder(settings.dataset_root) / found.binding["id"]),
        **summed,
        "seconds": time.perf_counter() - start,
        "ranks": ranks.world,
        "batch_size": min(one["batch_size"] or settings.batch_size for one in statistics),
        "already_covered": len(found.episodes) - len(found.todo(settings.overwrite)),
        "findings": findings,
        "preflight": found.to_dict(),
    }
    if ranks.first:
        for finding in findings:
            print(f"picture left out: {finding}", flush=True)
        print(
            f"{summed['episodes']} episodes, {summed['ticks']} ticks written ({summed['bytes'] / 1e6:.1f} MB), {results['already_covered']} were there; "
            f"{len(findings)} unreadable pictures; {results['seconds']:.1f} s (reading {summed['read_s']:.1f} in workers, waiting {summed['wait_s']:.1f}, "
            f"forward {summed['forward_s']:.1f}, writing {summed['write_s']:.1f} behind)",
            flush=True,
        )
        if settings.run_dir is not None:
            write_json(Path(settings.run_dir) / "results.json", results)
    return results


def _statistics() -> dict[str, Any]:
    numbers = dict.fromkeys(("episodes", "ticks", "pictures", "bytes", "batch_size", "workers"), 0)
    return {**numbers, **dict.fromkeys(("read_s", "wait_s", "forward_s", "write_s"), 0.0), "findings": []}


def _empty(ticks: int, extractor: FeatureExtractor) -> dict[str, Any]:
    tokens = torch.empty(ticks, extractor.layout.tokens, extractor.hidden_size, dtype=extractor.dtype)
    return {
        "tokens": tokens,
        "mask": torch.empty(ticks, extractor.layout.tokens, dtype=torch.bool),
        "left": ticks,
        "findings": [],
    }


def _device(settings: CacheSettings) -> str:
    if settings.device == "auto":
        return default_device()
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {settings.device}: this machine has no usable GPU; take auto or cpu.")
    return settings.device


def _workers(settings: CacheSettings, local_world: int, device_type: str) -> int:
    """Given, or: on a GPU up to 8 of this rank's cores, on a CPU half of them (the model needs the others)."""
    if settings.num_workers >= 0:
        return settings.num_workers
    cores = (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) // local_world
    return min(8, cores) if device_type == "cuda" else min(8, cores // 2)
