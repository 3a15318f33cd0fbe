"""The demo: from nothing to an evaluated policy. Records a dataset on the simulated rig, then runs the guide's whole flow on it (`run_all`)."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from needle_rig import __main__ as simulate
from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import runs_root
from vla_lib.evaluation.sim_robot import check_drawing, rig_errors
from vla_lib.workbench import run_all
from vla_lib.workbench.run_all import ASYNC, CACHE, EVALUATE, Plan


@dataclass(frozen=True)
class Size:
    """How much the demo records, trains and tries on the rig."""

    simulate: dict[str, Any]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    free_bytes: float


REGULARISED = {
    "dropout": 0.2,
    "view_dropout": 0.2,
    "weight_decay": 0.1,
}  # a few hundred episodes at most: little to learn places from
SIZES = {
    "demo": Size(
        {"episodes_f1": 132, "episodes_f2": 12, "idle_tail_s": 2.0},
        {"batch_size": 16, "grad_accum_steps": 1, "lr": 5e-4, "epochs": 4, **REGULARISED},
        {"closed_loop_seeds": 20, "masked": False},
        14e9,
    ),
    "small": Size(
        {"episodes_f1": 24, "episodes_f2": 2, "picture_width": 160, "picture_height": 90, "idle_tail_s": 0.5},
        {"batch_size": 16, "grad_accum_steps": 1, "lr": 1e-3, "epochs": 3, "val_fraction": 0.2, **REGULARISED},
        {"closed_loop_seeds": 3, "masked": False, "max_time_s": 8.0, "films": 1},
        3e9,
    ),
}


def run(vl_model: str, nproc_per_node: int, size_name: str) -> int:
    """Run the demo. Returns as `run_all.carry_out`; raises UserError for bad input before anything expensive starts."""
    size = SIZES[size_name]
    processes = {"nproc_per_node": nproc_per_node}
    given = {CACHE: {"vl_model": vl_model, **processes}, ASYNC: {**size.train, **processes}, EVALUATE: size.evaluate}
    plan = Plan(runs_root().resolve() / f"{size_name}-data", given)
    run_all.check(plan)
    _check_rig(plan.root, size.free_bytes)

    def record() -> None:
        print("=== recording on the simulated rig", flush=True)
        with rig_errors():
            simulate.main(simulate.Settings(dataset_root=plan.root, **size.simulate))

    return run_all.carry_out("demo", "VLA workbench demo", plan, record)


def _check_rig(root: Path, free_bytes: float) -> None:
    check_drawing()
    root.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root.parent).free
    if not root.exists() and free < free_bytes:
        raise UserError(
            f"The demo needs {free_bytes / 1e9:.0f} GB below {root.parent}, {free / 1e9:.1f} GB are free; free some, or set VLA_RUNS."
        )
