"""Builds a feature cache: planned by the first rank, shared over all, resumable, atomic episode by episode."""

import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from torch.distributed import HashStore, Store, TCPStore  # type: ignore[attr-defined]  # documented, not in __all__

from vla_lib.core.errors import UserError, needing_room
from vla_lib.core.files import append_jsonl, write_json
from vla_lib.core.loader import load
from vla_lib.core.progress import Progress
from vla_lib.core.run_folder import write_results
from vla_lib.episodes import load_prepared
from vla_lib.features.cache import FeatureCache, cache_folder, read_binding
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.features.preflight import PlannedEpisode, Preflight, device_of, plan, share_out
from vla_lib.features.reader import backing_off, plan_batches, read_batch, tick_steps
from vla_lib.features.settings import CacheSettings

STALE_PARTIAL_S = 600.0


@dataclass
class Statistics:
    """What a rank did: counts, seconds by stage (`read_s` in workers, `write_s` behind the model), findings."""

    episodes: int = 0
    ticks: int = 0
    pictures: int = 0
    bytes: int = 0
    read_s: float = 0.0
    wait_s: float = 0.0
    forward_s: float = 0.0
    write_s: float = 0.0
    batch_size: int = 0
    workers: int = 0
    findings: list[str] = field(default_factory=list)


def build(settings: CacheSettings) -> dict[str, Any]:
    """Build (or finish) the cache that `settings` ask for; returns counts, seconds, findings and the binding's id.

    Under torchrun every rank calls this; all return the same results. Raises UserError for bad input before a model is
    loaded.
    """
    start = time.perf_counter()
    # Several ranks exchange small objects only, by gloo, so that two may share a GPU; one may wait long for the others.
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    ranks = PartialState(cpu=several, timeout=timedelta(hours=24))
    found = _plan_of_the_first(ranks, settings)
    binding, todo = found.binding, found.todo(settings.overwrite)
    statistics = Statistics(batch_size=settings.batch_size)
    if todo and not settings.preflight_only:
        extractor = FeatureExtractor.from_binding(binding, device_of(settings))
        if ranks.is_main_process:
            layers = f"{binding['layer']} of {binding['depth']} layers, {binding['dtype']} on {extractor.device}"
            print(f"model {binding['model']}, {layers}, {ranks.num_processes} rank(s)", flush=True)
        share = share_out(todo, ranks.num_processes)[ranks.process_index]
        total = sum(episode.ticks for episode in todo)
        with Progress(total, "features", "ticks", show=ranks.is_main_process) as progress:
            ticks = _Ticks(ranks, progress, settings.run_dir)
            statistics = build_share(settings, binding, share, extractor, ticks.add)
            ticks.wait_for_all()
    results = _results(settings, found, gather_object([statistics]), time.perf_counter() - start)
    if ranks.is_main_process:
        _report(results)
        if settings.run_dir is not None:
            write_results(settings.run_dir, results)
    ranks.wait_for_everyone()
    ranks.destroy_process_group()
    return results


def build_share(
    settings: CacheSettings,
    binding: dict[str, Any],
    share: list[PlannedEpisode],
    extractor: FeatureExtractor,
    add_ticks: Callable[[int], None] = lambda count: None,
) -> Statistics:
    """Compute and write one rank's episodes; returns what was done. `add_ticks` hears of each episode's ticks.

    Raises UserError where the features cannot be written or a single tick does not fit into memory.
    """
    start, root, cache = time.perf_counter(), settings.dataset_root, FeatureCache(settings.dataset_root, binding)
    left, statistics = list(share), Statistics(workers=_workers(settings, extractor.device.type))

    writing: list[Future[None]] = []  # one episode's features, while the model computes the next one's

    def write(*features: Any) -> None:
        begin = time.perf_counter()
        statistics.bytes += cache.write(*features)
        statistics.write_s += time.perf_counter() - begin

    def wait_for_writer() -> None:
        with needing_room(cache.folder, "Free some space or check the folder, then run again."):
            while writing:
                writing.pop().result()

    def compute(batch_size: int) -> None:
        """Compute the episodes that are left; each is taken from the list when its features go to be written."""
        if batch_size < settings.batch_size:
            print(f"out of memory: going on with {batch_size} ticks at a time", flush=True)
        statistics.batch_size = batch_size
        planned, episodes = list(left), [load_prepared(one.path) for one in left]
        steps = [tick_steps(episode, binding["tick_stride"]) for episode in episodes]
        plans = [
            plan
            for number, episode in enumerate(episodes)
            for plan in plan_batches(number, episode, steps[number], binding["views"], batch_size)
        ]
        read = partial(read_batch, recipe=extractor.recipe, root=root)
        ahead = load(plans, statistics.workers, extractor.device.type == "cuda", collate_fn=read)
        for number, batches in groupby(ahead, key=lambda batch: batch.plan.episode):
            episode = episodes[number]
            parts, findings = [], set[str]()
            for batch in batches:
                begin = time.perf_counter()
                parts.append(extractor.forward(batch.pictures(extractor.device), batch.ticks, episode.instruction))
                statistics.forward_s += time.perf_counter() - begin
                statistics.read_s += batch.seconds
                statistics.pictures += len(batch.shapes)
                findings.update(batch.findings)
            tokens, mask = (torch.cat(part) for part in zip(*parts, strict=True))
            tick_step = torch.tensor(steps[number], dtype=torch.int64)
            wait_for_writer()
            writing.append(writer.submit(write, episode, tokens, mask, tick_step, sorted(findings)))
            left.remove(planned[number])
            statistics.findings += sorted(findings)
            statistics.episodes += 1
            statistics.ticks += len(tick_step)
            add_ticks(len(tick_step))

    with ThreadPoolExecutor(1) as writer:
        backing_off(compute, settings.batch_size)()
        wait_for_writer()
    statistics.wait_s = time.perf_counter() - start - statistics.forward_s
    return statistics


class _Ticks:
    """Counts ticks over all ranks; the first one shows them and writes them to metrics.jsonl."""

    def __init__(self, ranks: PartialState, progress: Progress, run_dir: Path | None):
        self.ranks, self.progress, self.run_dir = ranks, progress, run_dir
        self._start, self._row_s = time.perf_counter(), 0.0
        self._counter: Store = HashStore()
        if ranks.num_processes > 1:  # the store at which torchrun's processes met
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            self._counter = TCPStore(*address, is_master=False)

    def add(self, count: int) -> None:
        """Add this rank's ticks; 0 to see those of the others."""
        now = self._counter.add("vla/ticks", count)
        if not self.ranks.is_main_process or now == self.progress.done:
            return
        self.progress.update(now - self.progress.done)
        seconds = time.perf_counter() - self._start
        if self.run_dir is not None and (now == self.progress.total or seconds - self._row_s >= 1.0):
            self._row_s = seconds
            row = {"time": time.time(), "features/ticks": now, "features/ticks_total": self.progress.total}
            append_jsonl(self.run_dir / "metrics.jsonl", {**row, "features/ticks_per_s": now / seconds})

    def wait_for_all(self) -> None:
        """Show on the first rank what the others do, until nothing is left to do."""
        while self.ranks.is_main_process and self.progress.done < self.progress.total:
            time.sleep(0.2)
            self.add(0)


def _plan_of_the_first(ranks: PartialState, settings: CacheSettings) -> Preflight:
    """The first rank's preflight on every rank: what is missing must be judged once, before anyone writes."""
    found: Preflight | UserError | None = None
    if ranks.is_main_process:
        try:
            found = plan(settings)[0]
            print(found.text(settings.overwrite), flush=True)
            if not settings.preflight_only:
                found.check_space(settings.overwrite)
                _prepare_folder(cache_folder(settings.dataset_root) / found.binding["id"], found.binding)
        except UserError as error:
            found = error
    (found,) = broadcast_object_list([found])
    if isinstance(found, UserError):
        raise found
    assert found is not None
    return found


def _prepare_folder(folder: Path, binding: dict[str, Any]) -> None:
    with needing_room(folder, "Check its permissions."):
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / "binding.json").exists():
            read_binding(folder)
        elif any(folder.iterdir()):
            raise UserError(f"{folder} exists but holds no binding.json, so it is not ours; move it away.")
        else:
            write_json(folder / "binding.json", binding)
        for partial in folder.glob(".*.partial"):  # left by a killed build
            if time.time() - partial.stat().st_mtime > STALE_PARTIAL_S:
                partial.unlink(missing_ok=True)


def _results(settings: CacheSettings, found: Preflight, ranks: list[Statistics], seconds: float) -> dict[str, Any]:
    summed = ("episodes", "ticks", "pictures", "bytes", "read_s", "wait_s", "forward_s", "write_s")
    return {
        "binding_id": found.binding["id"],
        "cache_folder": str(cache_folder(settings.dataset_root) / found.binding["id"]),
        **{name: sum(getattr(one, name) for one in ranks) for name in summed},
        "seconds": seconds,
        "ranks": len(ranks),
        "batch_size": min(one.batch_size for one in ranks),
        "already_covered": len(found.episodes) - len(found.todo(settings.overwrite)),
        "findings": sorted(finding for one in ranks for finding in one.findings),
        "preflight": found.to_dict(),
    }


def _report(results: dict[str, Any]) -> None:
    for finding in results["findings"]:
        print(f"picture left out: {finding}")
    counts = "{episodes} episodes, {ticks} ticks written ({MB:.1f} MB), {already_covered} were there; "
    counts += "{unreadable} unreadable pictures; {seconds:.1f} s (reading {read_s:.1f} in workers, "
    counts += "waiting {wait_s:.1f}, forward {forward_s:.1f}, writing {write_s:.1f} behind)"
    unreadable = len(results["findings"])
    print(counts.format(**results, MB=results["bytes"] / 1e6, unreadable=unreadable), flush=True)


def _workers(settings: CacheSettings, device_type: str) -> int:
    """Given, or: on a GPU up to 8 of this rank's cores, on a CPU half of them (the model needs the others)."""
    if settings.num_workers >= 0:
        return settings.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return min(8, cores if device_type == "cuda" else cores // 2)
