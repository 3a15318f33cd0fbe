"""Closed loop: variants of checkpoints on the same unseen phantoms; successes with intervals, errors, forces, reasons.

found = closed_loop({"async": RolloutSettings(checkpoint), "async, no VL": RolloutSettings(checkpoint, without="vl")},
unseen_seeds(100))
    found["async"].summary()

Rollouts run in fresh processes: no GL context and no thread of the caller is shared with them. How a checkpoint was
judged is kept beside it (`NAME.judged.json`): deployment takes execution, chunk steps, denoising steps and the greatest
age of VL features from there, unless a person says otherwise.
"""

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest

from vla_lib.core.errors import UserError
from vla_lib.core.files import file_checksum, read_json, write_json
from vla_lib.core.pool import WorkerDied, run_jobs
from vla_lib.core.progress import Progress
from vla_lib.evaluation.rollout import rig_limits, rollout
from vla_lib.evaluation.settings import ClosedLoopSettings, RolloutSettings
from vla_lib.evaluation.sim_robot import LATERAL_TOLERANCE_MM, MANIFEST, check_drawing, prepare_gl
from vla_lib.policy.config import PolicyConfig
from vla_lib.runtime.run_log import distribution
from vla_lib.training.checkpoint import read_checkpoint

FIRST_SEED = 7_000_000  # reported seeds begin here; recordings draw theirs from 62 bits
TUNING_SEED = 8_000_000  # for choosing between variants, so that the reported ones stay unseen
FIGURES = ("rollouts", "successes", "success_rate", "interval_95")


@dataclass(frozen=True)
class ClosedLoop:
    """The rollouts of one variant by their seeds; each is a record of `evaluation.rollout.judged` with its `path`.

    `lost_seeds`: seeds that are left out because a process died on them, with this variant or another one.
    """

    settings: RolloutSettings
    rollouts: list[dict[str, Any]]
    lost_seeds: tuple[int, ...] = ()

    def summary(self) -> dict[str, Any]:
        """Plain figures: `successes` of `rollouts`, `success_rate`, `interval_95` (Wilson), distributions (median, p90,
        max) of |lateral| and |depth| error in mm over punctured rollouts, peak force over all, time over successes,
        counts of reasons."""
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
        left_out = ("path", "events", "truth", "runner", "frames", "sensor", "sensor_t_s")
        rollouts = [{name: value for name, value in row.items() if name not in left_out} for row in self.rollouts]
        settings = self.settings.record()
        lost = {"lost_seeds": list(self.lost_seeds)} if self.lost_seeds else {}
        return {"settings": settings, "summary": self.summary(), "rollouts": rollouts} | lost


def closed_loop(
    variants: Mapping[str, RolloutSettings], seeds: Sequence[int], workers: int = 0, frames: int = 0, show: bool = True
) -> dict[str, ClosedLoop]:
    """Try every variant on every seed, in `workers` processes (0: one a CPU core), whose number changes no result.

    `frames`: as many moments of each rollout, to be looked at (see `rollout`); the same settings and seed give the same
    rollout again. Variants of equal settings share their rollouts. A seed on which a process dies is left out of every
    variant, and the others go on. Raises UserError where a checkpoint, its VLM or EGL is missing, or where no seed is
    left.
    """
    seeds = [int(seed) for seed in seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError("A closed-loop evaluation needs at least one seed, and each seed once.")
    name_of: dict[RolloutSettings, str] = {}
    for name, settings in variants.items():
        name_of.setdefault(settings, name)
    found: dict[RolloutSettings, dict[int, dict[str, Any]]] = {settings: {} for settings in name_of}
    jobs = [(settings, seed, frames) for seed in seeds for settings in found]
    workers = min(len(jobs), workers or len(os.sched_getaffinity(0)))
    lost: set[int] = set()
    check_drawing()  # once, with a sentence, before many processes fail
    with Progress(len(jobs), "closed loop", "rollouts", show=show) as progress:
        for (settings, seed, _), record in run_jobs(_rollout, jobs, workers, _begin):
            rows = found[settings]
            if isinstance(record, Exception) and not isinstance(record, WorkerDied):
                raise record
            if isinstance(record, WorkerDied):
                lost.add(seed)
                if not any(found.values()):
                    break  # the very first one: nothing is lost with the others, which would die too
            else:
                rows[seed] = record
            progress.update(1, f"{name_of[settings]}: {sum(row['success'] for row in rows.values())} of {len(rows)}")
    if lost:
        done = ", ".join(f"{name}: {len(found[settings])}" for settings, name in name_of.items())
        died = (
            f"A process of the closed-loop evaluation died (out of memory?); {sum(map(len, found.values()))} of "
            f"{len(jobs)} rollouts were done ({done}). Run it again with fewer workers than {workers}"
        )
        if not any(found.values()) or lost.issuperset(seeds):
            raise UserError(f"{died}, or fewer seeds.")
        print(f"{died} to have the seeds {', '.join(map(str, sorted(lost)))}, which are left out.", flush=True)
    kept = [seed for seed in seeds if seed not in lost]
    return {
        name: ClosedLoop(settings, [found[settings][seed] for seed in kept], tuple(sorted(lost)))
        for name, settings in variants.items()
    }


def unseen_seeds(count: int, dataset_roots: Sequence[Path] = (), first: int = FIRST_SEED) -> list[int]:
    """`count` seeds from `first` on; those that the recordings below `dataset_roots` used are left out."""
    if count < 1:
        raise UserError(f"A closed-loop evaluation of {count} seeds cannot be; give 1 or more.")
    manifests = [Path(root) / MANIFEST for root in dataset_roots]
    used = {int(entry["seed"]) for path in manifests if path.is_file() for entry in read_json(path)["episodes"]}
    return [seed for seed in range(first, first + count + len(used)) if seed not in used][:count]


def compare(one: ClosedLoop, other: ClosedLoop) -> dict[str, Any]:
    """`sign_test` of two variants on the same seeds. Raises UserError where the seeds differ."""
    if [row["seed"] for row in one.rollouts] != [row["seed"] for row in other.rollouts]:
        raise UserError("Only runs on the same seeds can be compared; evaluate both on the same ones.")
    both = zip(one.rollouts, other.rollouts, strict=True)
    return sign_test([(bool(a["success"]), bool(b["success"])) for a, b in both])


def sign_test(wins: Sequence[tuple[bool, bool]]) -> dict[str, Any]:
    """(one, other) on the same phantoms: how many both, one, the other, neither managed; exact two-sided sign test."""
    pairs = Counter(wins)
    counts = {
        "both": pairs[True, True],
        "only_one": pairs[True, False],
        "only_other": pairs[False, True],
        "neither": pairs[False, False],
    }
    differing = counts["only_one"] + counts["only_other"]
    return counts | {"p_value": float(binomtest(counts["only_one"], differing).pvalue) if differing else 1.0}


def wilson(successes: int, rollouts: int) -> tuple[float, float]:
    """95 % interval of a success rate (Wilson 1927)."""
    interval = binomtest(successes, rollouts).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def closed_loop_table(found: Mapping[str, ClosedLoop]) -> pd.DataFrame:
    """One row a variant: successes with their 95 % interval; median / 90th percentile of lateral and depth error
    (punctured rollouts), peak force (all) and time to target (successes); the reasons of failure."""
    rows = []
    for name, loop in found.items():
        summary = loop.summary()
        low, high = (100 * value for value in summary["interval_95"])
        rows.append(
            {
                "variant": name,
                "success": f"{summary['successes']} of {summary['rollouts']}",
                "95 % interval": f"{low:.0f} to {high:.0f} %",
                "punctured": summary["punctured"],
                "lateral (mm)": _spread(summary["lateral_mm"], 2),
                "depth (mm)": _spread(summary["depth_error_mm"], 2),
                "force (mN)": _spread(summary["peak_force_mN"], 0),
                "time (s)": _spread(summary["time_to_target_s"], 1),
                "reasons": ", ".join(f"{reason} {count}" for reason, count in summary["reasons"].items()) or "-",
            }
        )
    return pd.DataFrame(rows)


def failure_table(loop: ClosedLoop) -> pd.DataFrame:
    """Failures of one variant that are alike, the most frequent first: reason, side of the target on which the needle
    ended (base frame), how many; medians of lateral and depth error (mm) and of the peak force (mN); the seeds."""
    failed = [row | {"seed": str(row["seed"]), "side": _side(row)} for row in loop.rollouts if not row["success"]]
    medians = {"lateral (mm)": "lateral_mm", "depth error (mm)": "depth_error_mm", "force (mN)": "peak_force_mN"}
    table = (
        pd.DataFrame(failed, columns=["reason", "side", "seed", *medians.values()])
        .groupby(["reason", "side"], sort=False)
        .agg(
            rollouts=("seed", "size"),
            **{title: (name, "median") for title, name in medians.items()},
            seeds=("seed", ", ".join),
        )
    )
    return table.sort_values("rollouts", ascending=False, kind="stable").reset_index()


def _side(row: Mapping[str, Any]) -> str:
    """`+x`, `-x`, `+y` or `-y`: where the needle ended, seen from the target; "" within the tolerance."""
    off = np.array(row["path"]["position_mm"][-1][:2]) - row["truth"]["target_xy_mm"]
    axis = int(np.abs(off).argmax())
    return f"{'+' if off[axis] > 0 else '-'}{'xy'[axis]}" if row["lateral_mm"] > LATERAL_TOLERANCE_MM else ""


def pair_table(found: Mapping[str, ClosedLoop]) -> pd.DataFrame:
    """The first variant against each other one on the same seeds: who succeeds where, p value of the sign test."""
    (first, main), *others = found.items()
    rows = [{"first": first, "other": name, **compare(main, loop)} for name, loop in others]
    table = pd.DataFrame(rows).rename(columns=lambda name: name.replace("_", " "))
    table["p value"] = table["p value"].map("{:.2g}".format)
    return table.rename(columns={"only one": "only the first", "only other": "only the other"})


def recipe_of(name: str) -> str:
    """What trainings of one recipe are called: `async` of `async@1`, `async@2`, ...; also in a variant's name."""
    return re.sub(r"@\d+", "", name)


def over_trainings(found: Mapping[str, ClosedLoop]) -> dict[str, dict[str, Any]]:
    """Of each recipe that was trained more than once: `trainings`, `rollouts` of each, and the mean, the spread (sample
    standard deviation) and the worst of their success rates. An interval over phantoms says nothing about these."""
    rates: dict[str, list[float]] = {}
    for name, loop in found.items():
        rates.setdefault(recipe_of(name), []).append(float(np.mean([row["success"] for row in loop.rollouts])))
    rollouts = min(len(loop.rollouts) for loop in found.values())
    return {
        recipe: {
            "trainings": len(each),
            "rollouts": rollouts,
            "mean": float(np.mean(each)),
            "spread": float(np.std(each, ddof=1)),
            "worst": min(each),
        }
        for recipe, each in rates.items()
        if len(each) > 1
    }


def recipe_table(found: Mapping[str, ClosedLoop]) -> pd.DataFrame:
    """`over_trainings` as a table, one row a recipe, in percent."""
    rows = over_trainings(found)
    table = pd.DataFrame([{"recipe": name, **row} for name, row in rows.items()])
    percent = {
        f"{name} (%)": [f"{100 * row[name]:.1f}" for row in rows.values()] for name in ("mean", "spread", "worst")
    }
    return table.drop(columns=["mean", "spread", "worst"], errors="ignore").assign(**percent)


def _spread(found: dict[str, float] | None, digits: int) -> str:
    return f"{found['median']:.{digits}f} / {found['p90']:.{digits}f}" if found else ""


def _begin() -> None:
    """Rollouts run beside each other, so each process computes on one thread."""
    prepare_gl()  # imports triton first: after Mesa's first picture its import would crash the process
    torch.set_num_threads(1)


def _rollout(job: tuple[RolloutSettings, int, int]) -> dict[str, Any]:
    return rollout(*job)


# ---------------------------------------------------------------- the judgement beside a checkpoint


def judged_file(checkpoint: Path) -> Path:
    """Where a checkpoint's judgement lies."""
    return checkpoint.with_suffix(".judged.json")


def write_judged(checkpoint: Path, loop: ClosedLoop, vlm_latency_ms: float) -> None:
    """Keep the settings, limits and figures of its closed loop; `vlm_latency_ms`: the delay that it ran with."""
    settings: RolloutSettings = loop.settings
    config = PolicyConfig.from_dict(read_checkpoint(checkpoint)["policy_config"])
    record: dict[str, Any] = {one.name: getattr(settings, one.name) for one in fields(ClosedLoopSettings)}
    limits = rig_limits(config, vlm_latency_ms, settings.vlm_jitter_ms)
    record |= {"vlm_latency_ms": vlm_latency_ms, "limits": vars(limits)}
    record |= {name: value for name, value in loop.summary().items() if name in FIGURES}
    write_json(judged_file(checkpoint), record | {"checkpoint_checksum": file_checksum(checkpoint)})


def read_judged(checkpoint: Path) -> dict[str, Any]:
    """The judgement of this very file; empty where there is none, or another file's. UserError where unreadable."""
    path = judged_file(checkpoint)
    record: dict[str, Any] = read_json(path) if path.is_file() else {}
    return record if record.get("checkpoint_checksum") == file_checksum(checkpoint) else {}
