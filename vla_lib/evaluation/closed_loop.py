"""Checkpoints and unseen seeds in; success counts with intervals, errors, forces, times and reasons of failure on the simulated rig out.

    found = closed_loop({"async": RolloutSettings(checkpoint), "async, no VL": RolloutSettings(checkpoint, without="vl")}, unseen_seeds(100))
    found["async"].summary()

All variants meet the same phantoms. Rollouts run in fresh processes: no GL context and no thread of the caller is shared with them.
"""

import multiprocessing
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.core.processes import follow_parent
from vla_lib.core.progress import Progress
from vla_lib.evaluation.rollout import RolloutSettings, film, rollout
from vla_lib.evaluation.sim_robot import MANIFEST, check_drawing, prepare_gl
from vla_lib.runtime.run_log import distribution

FIRST_SEED = 7_000_000  # reported seeds begin here; recordings draw theirs from 62 bits
TUNING_SEED = 8_000_000  # for choosing between variants, so that the reported ones stay unseen


@dataclass(frozen=True)
class ClosedLoop:
    """The rollouts of one variant, in the order of their seeds; each is a record of `evaluation.rollout.judged` with its `path`."""

    settings: RolloutSettings
    rollouts: list[dict[str, Any]]

    def summary(self) -> dict[str, Any]:
        """Plain figures: `successes` of `rollouts`, `success_rate`, `interval_95` (Wilson), distributions (median, p90, max) of
        |lateral| and |depth| error in mm over punctured rollouts, peak force over all, time over successes, counts of reasons."""
        rows = self.rollouts
        wins, through = [row for row in rows if row["success"]], [row for row in rows if row["punctured"]]
        return {
            "rollouts": len(rows),
            "successes": len(wins),
            "success_rate": len(wins) / len(rows) if rows else None,
            "interval_95": wilson(len(wins), len(rows)) if rows else None,
            "punctured": len(through),
            "lateral_mm": distribution([row["lateral_mm"] for row in through], 90),
            "depth_error_mm": distribution([abs(row["depth_error_mm"]) for row in through], 90),
            "peak_force_mN": distribution([row["peak_force_mN"] for row in rows], 90),
            "time_to_target_s": distribution([row["time_s"] for row in wins], 90),
            "reasons": dict(Counter(row["reason"] for row in rows if not row["success"]).most_common()),
            "held_ticks": sum(row["runner"]["modes"].get("hold", 0) for row in rows),
        }

    def results(self) -> dict[str, Any]:
        """What results.json records: settings, summary, and every rollout without its path and events."""
        left_out = ("path", "events", "truth", "runner")
        rollouts = [{name: value for name, value in row.items() if name not in left_out} for row in self.rollouts]
        settings = {
            name: str(value) if isinstance(value, Path) else value for name, value in asdict(self.settings).items()
        }
        return {"settings": settings, "summary": self.summary(), "rollouts": rollouts}


def closed_loop(
    variants: Mapping[str, RolloutSettings], seeds: Sequence[int], workers: int = 0, show: bool = True
) -> dict[str, ClosedLoop]:
    """Try every variant on every seed, in `workers` processes (0: one a CPU core). Results do not depend on their number.

    Variants of equal settings share their rollouts. Raises UserError where a checkpoint, its VLM or EGL is missing, or where a rollout's process dies.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("A closed-loop evaluation needs at least one seed, and each seed once.")
    names = {settings: name for name, settings in reversed(variants.items())}  # one name for equal settings, the first
    jobs = [(settings, seed) for seed in seeds for settings in dict.fromkeys(variants.values())]
    found: dict[RolloutSettings, dict[int, dict[str, Any]]] = {settings: {} for settings in names}
    workers = min(len(jobs), workers or _cores())
    with Progress(len(jobs), "closed loop", "rollouts", show=show) as progress, _processes(workers) as pool:
        futures: dict[Future[dict[str, Any]], tuple[RolloutSettings, int]] = {}
        try:
            for settings, seed in jobs:
                futures[pool.submit(rollout, settings, seed)] = settings, seed
            for future in as_completed(futures):
                settings, seed = futures[future]
                found[settings][seed] = future.result()
                wins, tried = sum(row["success"] for row in found[settings].values()), len(found[settings])
                progress.update(1, note=f"{names[settings]}: {wins} of {tried}")
        except BrokenProcessPool:
            done = Counter(
                names[settings] for future, (settings, _) in futures.items() if future.done() and not future.exception()
            )
            told = ", ".join(
                f"{names[settings]}: {done[names[settings]]}" for settings in dict.fromkeys(variants.values())
            )
            raise UserError(
                f"A process of the closed-loop evaluation died (out of memory?) when {done.total()} of {len(jobs)} rollouts were done "
                f"({told}); they are not kept; run it again with fewer workers than {workers}, or fewer seeds."
            ) from None
        finally:
            for future in futures:
                future.cancel()
    return {
        name: ClosedLoop(settings, [found[settings][seed] for seed in seeds]) for name, settings in variants.items()
    }


def masked(settings: RolloutSettings) -> dict[str, RolloutSettings]:
    """The variants of a checkpoint without VL and without the sensor (masked as missing inputs are)."""
    return {"VL masked": replace(settings, without="vl"), "sensor masked": replace(settings, without="sensor")}


def latency_sweep(
    settings: RolloutSettings, delays_ms: Sequence[float] = (0.0, 300.0, 600.0)
) -> dict[str, RolloutSettings]:
    """The variants of a checkpoint with VL features that come later and later."""
    return {f"VLM delay {delay:g} ms": replace(settings, vlm_latency_ms=float(delay)) for delay in delays_ms}


def films(settings: RolloutSettings, seeds: Sequence[int], frames: int = 12, workers: int = 0) -> list[dict[str, Any]]:
    """Film of the rollouts of `seeds` (see `evaluation.rollout.film`), made by running them again. UserError where a process dies."""
    workers = min(len(seeds), workers or _cores()) or 1
    try:
        with _processes(workers) as pool:
            return list(pool.map(film, [settings] * len(seeds), seeds, [frames] * len(seeds)))
    except BrokenProcessPool:
        raise UserError(
            "A process that films rollouts died (out of memory?); "
            f"film fewer seeds than {len(seeds)}, or with fewer workers than {workers}."
        ) from None


def unseen_seeds(count: int, dataset_roots: Sequence[Path] = (), first: int = FIRST_SEED) -> list[int]:
    """`count` seeds from `first` on; those that the recordings below `dataset_roots` used are left out."""
    if count < 1:
        raise UserError(f"A closed-loop evaluation of {count} seeds cannot be; give 1 or more.")
    manifests = [Path(root) / MANIFEST for root in dataset_roots]
    used = {int(entry["seed"]) for path in manifests if path.is_file() for entry in read_json(path)["episodes"]}
    seeds: list[int] = []
    while len(seeds) < count:
        if first not in used:
            seeds.append(first)
        first += 1
    return seeds


def compare(one: ClosedLoop, other: ClosedLoop) -> dict[str, Any]:
    """Two variants on the same seeds: how many both, only one, only the other and neither managed; exact two-sided sign test.

    Raises UserError where the seeds differ.
    """
    if [row["seed"] for row in one.rollouts] != [row["seed"] for row in other.rollouts]:
        raise UserError("Only runs on the same seeds can be compared; evaluate both on the same ones.")
    from scipy.stats import binomtest

    pairs = Counter((bool(a["success"]), bool(b["success"])) for a, b in zip(one.rollouts, other.rollouts, strict=True))
    only_one, only_other = pairs[True, False], pairs[False, True]
    p = float(binomtest(only_one, only_one + only_other).pvalue) if only_one + only_other else 1.0
    return {
        "both": pairs[True, True],
        "only_one": only_one,
        "only_other": only_other,
        "neither": pairs[False, False],
        "p_value": p,
    }


def wilson(successes: int, rollouts: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927)."""
    from scipy.stats import binomtest

    interval = binomtest(successes, rollouts).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processes(workers: int) -> ProcessPoolExecutor:
    check_drawing()  # once, with a sentence, before many processes fail
    context = multiprocessing.get_context("spawn")  # neither a GL context nor torch's threads survive a fork
    return ProcessPoolExecutor(workers, context, initializer=_begin)


def _begin() -> None:
    """A worker follows its parent, and computes on one thread: seeds run beside each other."""
    follow_parent()
    prepare_gl()  # imports triton first: after Mesa's first picture its import would crash the process
    import torch

    torch.set_num_threads(1)
