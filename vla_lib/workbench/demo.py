"""The demo: from nothing (or from a user's recordings) to an evaluated policy; a table and a report out.

Records a data set on the simulated rig unless one is given, then runs notebooks 01, 02, 03, 04 and 06, each into a run folder of its own.
"""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib import simulate
from vla_lib.core.errors import UserError
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import RunFolder, runs_root
from vla_lib.episodes import find_episodes
from vla_lib.workbench.flow import Flow, Stage, StageFailed
from vla_lib.workbench.notebook import shown
from vla_lib.workbench.runs import results_of

NOTEBOOKS = ("01_inspect_episodes", "02_detect_hz", "03_cache_vl_features", "04_train_async", "06_evaluate")


@dataclass(frozen=True)
class Size:
    """How much the demo records, trains and tries on the rig."""

    simulate: dict[str, Any]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    free_bytes: float


REGULARISED = {"dropout": 0.2, "view_dropout": 0.2, "weight_decay": 0.1}  # a few hundred episodes at most: little to learn places from
SIZES = {
    "demo": Size(
        {"episodes_f1": 132, "episodes_f2": 12, "idle_tail_s": 2.0},
        {"batch_size": 16, "grad_accum_steps": 1, "lr": 5e-4, "epochs": 4, **REGULARISED},
        {"closed_loop_seeds": 20, "masked": False},
        14e9,
    ),
    "long": Size(
        {"episodes_f1": 400, "episodes_f2": 0, "idle_tail_s": 0.5},
        {"batch_size": 16, "grad_accum_steps": 1, "lr": 1e-3, "epochs": 6, "dropout": 0.1, "num_workers": 1},
        {"closed_loop_seeds": 100, "masked": True, "latency_sweep": True},
        30e9,
    ),
    "small": Size(
        {"episodes_f1": 24, "episodes_f2": 2, "picture_width": 160, "picture_height": 90, "idle_tail_s": 0.5},
        {"batch_size": 16, "grad_accum_steps": 1, "lr": 1e-3, "epochs": 4, "val_fraction": 0.2, **REGULARISED},
        {"closed_loop_seeds": 3, "masked": False, "max_time_s": 8.0, "films": 1},
        3e9,
    ),
}


def run(dataset_root: Path | None, vl_model: str, nproc_per_node: int, size_name: str) -> int:
    """Run the demo; prints the summary and the report's path. Returns 0, or 1 where a stage fails, 2 where it refuses its input, 130 where it was cancelled.

    Raises UserError for bad input before anything expensive starts.
    """
    size = SIZES[size_name]
    own_data = dataset_root is not None
    root = Path(dataset_root).expanduser().resolve() if own_data else runs_root() / f"{size_name}-data"
    preflight(root, own_data, vl_model, nproc_per_node, size.free_bytes)
    folder = RunFolder.create(
        "demo", {"dataset_root": str(root), "vl_model": vl_model, "nproc_per_node": nproc_per_node, "size": size_name}
    )
    flow = Flow(folder)
    state, error, exit_status = "failed", None, 1
    try:
        if not own_data:
            print("=== recording on the simulated rig", flush=True)
            start = time.monotonic()
            simulate.main(simulate.Settings(dataset_root=root, **size.simulate))
            flow.times_s["recording"] = time.monotonic() - start
        train, evaluate = ({}, {}) if own_data else (size.train, size.evaluate)  # a user's data are trained to the guide's letter
        before, after = stages(root, vl_model, nproc_per_node, train, evaluate)
        flow.run(before)
        after[0].parameters["cache_id"] = results_of(flow.runs[-1].path)["binding_id"]  # an older cache may lie beside the new one
        flow.run(after)
        state, exit_status = "done", 0
    except StageFailed as failure:
        state, error, exit_status = failure.result.state, str(failure), failure.result.exit_status
    except KeyboardInterrupt:
        state, error, exit_status = "cancelled", "interrupted", 130
    except Exception as failure:
        error = f"{type(failure).__name__}: {failure}"
        raise
    finally:
        folder.finish(state, error)
        summary, notes = summarise(flow)
        page = flow.report("VLA workbench demo", summary, notes)
    if error:
        print(f"\nerror: {error}", flush=True)
    print(f"\n{summary.to_string(index=False)}\n")
    for note in notes:
        print(note)
    print(f"\nreport: {shown(page)}")
    return exit_status


def preflight(root: Path, own_data: bool, vl_model: str, nproc_per_node: int, free_bytes: float) -> None:
    """Everything that can be refused cheaply. Raises UserError with the remedy."""
    from vla_lib.features.vlm import open_checkpoint
    from vla_lib.sim.render import check_gl

    if nproc_per_node < 1:
        raise UserError(f"--nproc-per-node is {nproc_per_node}; give 1 or more processes.")
    open_checkpoint(vl_model)
    if own_data:
        if not root.is_dir():
            raise UserError(f"There is no dataset root {root}; give the folder that holds the datasets.")
        if not find_episodes(root):
            raise UserError(f"{root} holds no recorded episode (a folder with a robot log, one or two levels below a dataset folder).")
        return
    check_gl()
    root.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root.parent).free
    if not root.exists() and free < free_bytes:
        raise UserError(
            f"The demo needs {free_bytes / 1e9:.0f} GB below {root.parent}, {free / 1e9:.1f} GB are free; free some, or set VLA_RUNS."
        )


def stages(
    root: Path, vl_model: str, nproc_per_node: int, train: dict[str, Any], evaluate: dict[str, Any]
) -> tuple[list[Stage], list[Stage]]:
    """The demo's notebooks and what they are told: those up to the cache, and those that use it."""
    data = {"dataset_root": str(root)}
    told = {
        "03_cache_vl_features": {"vl_model": vl_model, "nproc_per_node": nproc_per_node},
        "04_train_async": {"nproc_per_node": nproc_per_node, **train},
        "06_evaluate": evaluate,
    }
    every = [Stage(name, {**data, **told.get(name, {})}) for name in NOTEBOOKS]
    return every[:3], every[3:]


def summarise(flow: Flow) -> tuple[pd.DataFrame, list[str]]:
    """The closing table (what, value) and the lines below it, from the stages' results files."""
    results = {result.path.name.split("-", 2)[-1]: results_of(result.path) for result in flow.runs}
    rows: list[tuple[str, str]] = []
    prepared, cached = results.get("02_detect_hz", {}), results.get("03_cache_vl_features", {})
    trained, evaluated = results.get("04_train_async", {}), results.get("06_evaluate", {})
    rows += [(f"rate of {name}", f"{value:.1f} Hz") for name, value in prepared.get("rates_hz", {}).items()]
    if prepared:
        rows.append(("episodes prepared", f"{prepared['prepared']} of {prepared['episodes']}, {prepared['steps']} action steps"))
    if cached:
        rows.append(("VL feature cache", f"{cached['ticks']} ticks, {cached['bytes'] / 1e6:.0f} MB"))
    if trained:
        rows.append(("training", f"{trained['step']} optimiser steps, {trained['parameters'] / 1e6:.2f} M parameters"))
    notes = []
    for name, found in evaluated.get("metrics", {}).items():
        rows.append((f"held-out RMS error, {name}", f"{found['translation_rmse_mm']:.3f} mm, {found['rotation_rmse_deg']:.3f} deg a step"))
    if evaluated:
        lost_to = [name for name, won in evaluated["beats"].items() if not won]
        verdict = f"does NOT beat {', '.join(lost_to)}" if lost_to else "beats the zero, mean and persistence baselines"
        notes.append(
            f"On {evaluated['held_out_episodes']} held-out episodes the policy {verdict} (RMS errors of translation and of rotation)."
        )
    if "closed_loop" in evaluated:
        low, high = (100 * value for value in evaluated["interval_95"])
        told = f"{evaluated['successes']} of {evaluated['attempts']} unseen phantoms"
        rows.append(("closed-loop success", f"{told} ({100 * evaluated['success_rate']:.0f} %, 95 % interval {low:.0f} to {high:.0f} %)"))
    rows += [(f"time of {name}", clock(took)) for name, took in flow.times_s.items()]
    rows.append(("time in all", clock(sum(flow.times_s.values()))))
    return pd.DataFrame(rows, columns=["what", "value"]), notes
