"""Runs benchmarks: prints ratios of two ways of doing the same thing, measured side by side in one run.

python -m benchmarks --rooms episodes needle_rig --fast
"""

import importlib
import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import tyro
from annotated_types import Gt

from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json
from vla_lib.core.settings import Settings, settings

ROOMS = ("episodes", "features", "runtime", "robots", "needle_rig", "training", "workbench")
ALL = (*ROOMS, "gpu")


@settings
class BenchmarkSettings(Settings):
    """Run the benchmarks of some rooms, or of all."""

    rooms: tuple[str, ...] = ROOMS
    """Which benchmarks to run; gpu: a VL model of Qwen2.5-VL-3B's size, on a CUDA GPU."""
    dataset_root: Annotated[Path | None, tyro.conf.arg(aliases=("--dataset-dir",))] = None
    """Prepared dataset with a VL cache, for the training rows; default: what `make demo` recorded."""
    fast: bool = False
    """Small sizes, seconds a room: to see that they run, not to quote."""
    soak_s: Annotated[float, Gt(0)] = 60.0
    """How long the robots' streams run beside the control loop."""
    output: Path | None = None
    """Write the rows as JSON to this file as well."""

    def __post_init__(self) -> None:
        unknown = set(self.rooms) - set(ALL)
        if unknown:
            raise UserError(f"There is no benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}.")


def main(settings: BenchmarkSettings) -> dict[str, Any]:
    """Run and print each row as it is measured; returns machine and rows."""
    results: dict[str, Any] = {"machine": machine(), "rows": []}
    print(json.dumps(results["machine"]), flush=True)
    for room in settings.rooms:
        own: dict[str, dict[str, Any]] = {
            "training": {"dataset_root": settings.dataset_root},
            "robots": {"soak_s": settings.soak_s},
        }
        given = own.get(room, {})
        for row in importlib.import_module(f"benchmarks.{room}").rows(fast=settings.fast, **given):
            results["rows"].append({"room": room, **asdict(row), "ratio": row.ratio})
            figures = f"{row.ours:.4g} against {row.baseline:.4g} {row.unit}, ratio {row.ratio:.3g}"
            target = f", target {row.target}" if row.target else ""
            print(f"{room:10} {row.name}: {figures}{target}{f'  ({row.note})' if row.note else ''}", flush=True)
    if settings.output is not None:
        write_json(settings.output, results)
    return results


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_GB": round(psutil.virtual_memory().total / 1e9),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    frontdoor.start(BenchmarkSettings, main)
