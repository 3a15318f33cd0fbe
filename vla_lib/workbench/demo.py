"""The demo: from nothing to an evaluated policy. Records a dataset on the simulated rig, then runs the guide's whole
flow on it (`run_all`)."""

import shutil
from dataclasses import dataclass
from typing import Any

from needle_rig.__main__ import main as record_on_rig
from needle_rig.settings import RecordSettings
from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import runs_root
from vla_lib.evaluation.sim_robot import check_drawing, rig_errors
from vla_lib.workbench import run_all
from vla_lib.workbench.run_all import ASYNC, CACHE, EVALUATE, FlowPlan


@dataclass(frozen=True)
class Size:
    """How much the demo records, caches, trains and tries on the rig: parameters of the recorder and of the
    notebooks."""

    record: dict[str, Any]
    cache: dict[str, Any]
    train: dict[str, Any]
    evaluate: dict[str, Any]
    free_bytes: float


# A few hundred episodes at most: little to learn places from, so the policy must not learn scenes by heart.
REGULARISED = {"batch_size": 16, "grad_accum_steps": 1, "weight_decay": 0.1}
REGULARISED |= {"dropout": 0.1, "view_dropout": 0.2, "token_noise": 0.5}
QUARTER = {"image_resize_height": 180, "image_resize_width": 320}
SIZES = {
    "demo": Size(
        record={"episodes_f1": 226, "episodes_f2": 14, "idle_tail_s": 0.5},
        cache={},
        train={"lr": 1e-3, "max_steps": 2000, **REGULARISED},
        evaluate={"closed_loop_seeds": 50, "masked": False},
        free_bytes=22e9,
    ),
    "small": Size(
        record={"episodes_f1": 18, "episodes_f2": 2, "picture_width": 160, "picture_height": 90, "idle_tail_s": 0.5},
        cache=QUARTER,
        train={"lr": 1e-3, "epochs": 3, "val_fraction": 0.2, **REGULARISED, **QUARTER},
        evaluate={"closed_loop_seeds": 3, "masked": False, "max_time_s": 4.0, "films": 1},
        free_bytes=3e9,
    ),
}


def run(vl_model: str, nproc_per_node: int, size_name: str) -> int:
    """Run the demo. Returns as `run_all.run`; raises UserError for bad input before anything expensive starts."""
    size = SIZES[size_name]
    processes = {"nproc_per_node": nproc_per_node}
    cache = {"vl_model": vl_model, **processes, **size.cache}
    given = {CACHE: cache, ASYNC: {**size.train, **processes}, EVALUATE: size.evaluate}
    plan = FlowPlan(runs_root() / f"{size_name}-data", given)
    plan.check()
    check_drawing()
    plan.root.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(plan.root.parent).free
    if not plan.root.exists() and free < size.free_bytes:
        needs = f"The demo needs {size.free_bytes / 1e9:.0f} GB below {plan.root.parent}, {free / 1e9:.1f} GB are free"
        raise UserError(f"{needs}; free some, or set VLA_RUNS.")

    def record() -> None:
        print("=== recording on the simulated rig", flush=True)
        with rig_errors():
            record_on_rig(RecordSettings(dataset_root=plan.root, **size.record))

    return run_all.run("demo", "VLA workbench demo", plan, record)
