"""The lab book: the folders below `runs/` in; a table of all runs, or the newest one of a kind, out."""

from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.core.run_folder import read_record, runs_root


def find_runs(name: str = "", root: Path | None = None) -> list[Path]:
    """Run folders (those with a run.json), oldest first; `name` keeps the runs of one notebook or front door."""
    root = root or runs_root()
    found = sorted(path.parent for path in root.glob("*/run.json"))
    return [path for path in found if not name or path.name.split("-", 2)[-1] == name]


def table(name: str = "", root: Path | None = None) -> pd.DataFrame:
    """One row a run: run, name, state, started, duration_s, its parameters as `p.<name>` and its plain results as `r.<name>`."""
    rows = []
    for path in find_runs(name, root):
        record = read_record(path)
        row = {"run": path.name, **{key: record.get(key) for key in ("name", "state", "started", "duration_s", "error")}}
        row |= {f"p.{key}": value for key, value in record.get("parameters", {}).items()}
        results = results_of(path)
        row |= {f"r.{key}": value for key, value in results.items() if isinstance(value, int | float | str)}
        rows.append(row)
    return pd.DataFrame(rows, columns=None if rows else ["run", "name", "state", "started", "duration_s", "error"])


def results_of(run: Path) -> dict[str, Any]:
    """The run's results.json, empty where it wrote none."""
    path = Path(run) / "results.json"
    return read_json(path) if path.exists() else {}


def find_checkpoints(root: Path | None = None) -> list[Path]:
    """Every checkpoint of every run, newest run first, the best one of a run first."""
    found = []
    for run in reversed(find_runs(root=root)):
        found += sorted((run / "checkpoints").glob("*.pt"), key=lambda path: ("_best" not in path.stem, path.name))
    return found


def name_of(checkpoint: Path) -> str:
    """A short name for tables and plots: what was trained, without which input, when; the file's own name outside a run folder."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (run / "run.json").exists():
        return checkpoint.stem
    parameters = read_record(run).get("parameters", {})
    without = "".join(f" no {name}" for key, name in (("vl_enabled", "VL"), ("sensor_enabled", "sensor")) if parameters.get(key) is False)
    kind = "diffusion" if checkpoint.name.startswith("diffusion") else "async"
    which = "" if "_best" in checkpoint.stem else " final" if "_final" in checkpoint.stem else " latest"
    return f"{kind}{without}{which} {run.name.split('-', 2)[0][4:]}-{run.name.split('-', 2)[1]}"


def newest_checkpoint(pattern: str, root: Path | None = None) -> Path:
    """The checkpoint of the newest run that has one matching `pattern` (e.g. `qwen_vla_async_best.pt`). Raises UserError where there is none."""
    for run in reversed(find_runs(root=root)):
        found = sorted((run / "checkpoints").glob(pattern))
        if found:
            return found[-1]
    raise UserError(
        f"No run below {root or runs_root()} has a checkpoint {pattern}; train one first (notebook 04 or 05), or give its path."
    )
