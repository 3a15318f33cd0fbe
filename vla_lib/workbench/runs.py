"""The lab book: the run folders below `runs/`, as a table, by name, and by the checkpoints that they hold."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json
from vla_lib.core.owner import living, owner_file
from vla_lib.core.run_folder import PROJECT, UNREADABLE, read_record, read_results, runs_root

# A run's first few of these stand in short tables.
KEY_RESULTS = [
    "success_rate",
    "successes",
    "rollouts",
    "val_mae_mm",
    "val_mae_deg",
    "val_action_loss",
    "step",
    "episodes",
    "ticks",
]
COLUMNS = ["run", "name", "state", "started", "duration_s", "error", "data", "cache", "git", "host"]
ABOUT = {"label": "", "star": False, "note": ""}  # what a person says of a run, in its about.json


def find_runs(name: str = "") -> list[Path]:
    """Run folders (those with a run.json), oldest first; `name` keeps the runs of one notebook or front door."""
    found = sorted((*_time_and_name(path.parent), path.parent) for path in runs_root().glob("*/run.json"))
    return [path for _, of, path in found if not name or of == name]


def _time_and_name(run: Path) -> tuple[str, str]:
    """When a run began and what of, from the folder's name; from its record where --run-dir gave it another one."""
    if re.match(r"\d{8}-\d{6}", run.name):
        return run.name, run.name.split("-", 2)[-1]
    record = read_record(run)
    started = f"{datetime.fromisoformat(record['started']):%Y%m%d-%H%M%S}" if record["started"] else ""
    return started, record["name"]


def find_run(name: str) -> Path:
    """The run folder whose name begins with, or ends in, `name`, or the folder itself. Raises UserError where none or
    several match."""
    if (Path(name) / "run.json").exists():
        return Path(name).absolute()
    found = [run for run in find_runs() if run.name.startswith(name) or run.name.endswith(name)]
    if len(found) != 1:
        which = f": {', '.join(run.name for run in found[:8])}" if found else ""
        raise UserError(f"{len(found)} runs match {name!r}{which}; `vla runs` lists them, give one name.")
    return found[0]


def plain_results(run: Path) -> dict[str, Any]:
    """The results of a run that are one number or text each."""
    return {key: value for key, value in read_results(run).items() if isinstance(value, int | float | str)}


def table(name: str = "", of: Iterable[Path] | None = None) -> pd.DataFrame:
    """One row a run (`of`: of these folders), oldest first: COLUMNS (data: fingerprint of the prepared episodes; git:
    commit, + where files were changed), its parameters as `p.<name>` and its plain results as `r.<name>`."""
    rows = []
    for path in find_runs(name) if of is None else of:
        record, results = read_record(path), {}
        try:
            results = plain_results(path)
        except UserError as error:
            record["error"] = record.get("error") or str(error)
        git = record.get("git")
        row = {key: record.get(key) for key in COLUMNS} | {
            "run": path.name,
            "data": (record.get("data") or {}).get("fingerprint"),
            "cache": results.get("cache") or results.get("binding_id"),
            "git": f"{git['commit'][:8]}{'+' if git['changed'] else ''}" if git else None,
        }
        row |= {f"p.{key}": value for key, value in record.get("parameters", {}).items()}
        rows.append(row | {f"r.{key}": value for key, value in results.items()})
    return pd.DataFrame(rows, columns=None if rows else COLUMNS)


def short(frame: pd.DataFrame, columns: Iterable[str]) -> pd.DataFrame:
    """`columns` of a `table`, then the parameters in which its runs differ and the key results that they have."""
    given = [name for name in frame.columns if name.startswith("p.")]
    differ = [name for name in given if frame[name].astype(str).nunique(dropna=False) > 1]
    key = [f"r.{name}" for name in KEY_RESULTS if f"r.{name}" in frame.columns][:4]
    return frame[[*columns, *differ, *key]].rename(columns={name: name[2:] for name in [*differ, *key]})


def about(run: Path) -> dict[str, Any]:
    """What a person says of a run: label, star, note."""
    try:
        said = read_json(run / "about.json")
    except UserError:  # nothing was said, or it is damaged
        said = {}
    known = said if isinstance(said, dict) else {}
    return {name: known.get(name, default) for name, default in ABOUT.items()}


def annotate(run: Path, **said: Any) -> None:
    """Change what a person says of a run."""
    write_json(run / "about.json", about(run) | said)


def label_of(run: Path) -> str:
    """The name that a person gave a run, else its folder's."""
    return about(run)["label"] or run.name


def facts(run: Path) -> dict[str, dict[str, Any]]:
    """What is known of a run: its parameters, code, data, versions and plain results."""
    record = read_record(run)
    known = {title: record.get(title) or {} for title in ("parameters", "git", "data", "versions")}
    return known | {"results": plain_results(run)}


def diff(first: Path, second: Path) -> pd.DataFrame:
    """In what two runs differ: a row a value, of their state, parameters, code, data, versions and results."""
    found = []
    for run in (first, second):
        parts = {"run": {"state": read_record(run)["state"]}} | facts(run)
        found.append({(part, name): value for part, values in parts.items() for name, value in values.items()})
    differ = [key for key in found[0] | found[1] if found[0].get(key) != found[1].get(key)]
    rows = [[part, name, *(str(one.get((part, name), "")) for one in found)] for part, name in differ]
    return pd.DataFrame(rows, columns=["of", "what", "first", "second"])


def removable(names: Iterable[str]) -> tuple[list[Path], float]:
    """The run folders of those names, and their size in MB. Raises UserError where one must stay: a running one, one
    that the parameters of another run name, one that was there before its run or lies elsewhere, and a link."""
    paths = list(dict.fromkeys(find_run(name) for name in names))
    others = [read_record(path) for path in find_runs() if path not in paths]
    for path in paths:
        if path.is_symlink() or path.resolve().parent != runs_root().resolve():
            raise UserError(f"{path} is no run folder in {runs_root()}; only those are removed here, and no links.")
        record = read_record(path)
        if not record.get("made", re.match(r"\d{8}-\d{6}", path.name)):  # records of old do not say it
            raise UserError(f"{path} was there before its run, with other files in it; remove what you want by hand.")
        if record["state"] == UNREADABLE:
            raise UserError(record["error"])
        if record["state"] == "running" or living(owner_file(path)):
            raise UserError(f"{path.name} is running; stop it first.")
        if users := [one["started"] for one in others if path.name in json.dumps(one.get("parameters", {}))]:
            which = f"{len(users)} other runs (one begun {users[0]})"
            raise UserError(f"{path.name} is named by the parameters of {which}; remove those first.")
    return paths, sum(file.lstat().st_size for path in paths for file in path.rglob("*")) / 1e6


def remove(names: Iterable[str]) -> str:
    """Remove run folders, checkpoints included; returns a sentence. Raises UserError as `removable` does."""
    paths, size = removable(names)
    for path in paths:
        shutil.rmtree(path)
    return f"removed {', '.join(path.name for path in paths)}: {size:.0f} MB freed"


def data_state(parameters: dict[str, Any]) -> dict[str, Any] | None:
    """Number and fingerprint of the prepared episodes that a run's `dataset_root` holds (and of the weights that they
    are drawn with), how many more the marks leave out, and the caches there; None where it names no folder."""
    from vla_lib.episodes.datasets import TABLE_NAME
    from vla_lib.episodes.survey import all_prepared

    root = PROJECT / Path(str(parameters.get("dataset_root") or "")).expanduser()
    if not parameters.get("dataset_root") or not root.is_dir():
        return None
    prepared = all_prepared(root)
    files = [file for folder, why in prepared.items() if not why and (file := folder / "data.pkl").is_file()]
    state: list[Any] = [
        (file.relative_to(root).as_posix(), file.stat().st_size, file.stat().st_mtime_ns) for file in files
    ]
    state += [table.read_text() for table in (root / TABLE_NAME,) if table.is_file()]
    caches = sorted(path.parent.name for path in root.glob("cache/qwen_vl_features/*/binding.json"))
    left_out = len(prepared) - len(files)
    return {"episodes": len(files), "left_out": left_out, "fingerprint": digest(state, 12), "caches": caches}


def digest(value: Any, characters: int = 16) -> str:
    """A short hash of a value's repr."""
    return hashlib.sha256(repr(value).encode()).hexdigest()[:characters]


def find_checkpoints(pattern: str = "*.pt") -> list[Path]:
    """The checkpoints of every run whose file names fit, newest run first, the best one of a run first."""
    return [path for run in reversed(find_runs()) for path in checkpoints_of(run, pattern)]


def checkpoints_of(run: Path, pattern: str = "*.pt") -> list[Path]:
    """The checkpoints of one run whose file names fit, the best one first."""
    return sorted((run / "checkpoints").glob(pattern), key=lambda path: ("_best" not in path.stem, path.name))


def newest_checkpoint(pattern: str) -> Path:
    """The checkpoint of the newest run that has one matching `pattern` (e.g. `*_best.pt`). Raises UserError where there
    is none."""
    if found := find_checkpoints(pattern):
        return found[0]
    remedy = "train one first (notebook 04 or 05), or give its path"
    raise UserError(f"No run below {runs_root()} has a checkpoint {pattern}; {remedy}.")


def name_of(checkpoint: Path) -> str:
    """A short name for tables and plots: what was trained, without which input, when; the file's own name outside a run
    folder."""
    run = checkpoint.parent.parent
    if checkpoint.parent.name != "checkpoints" or not (run / "run.json").exists():
        return checkpoint.stem
    parameters = read_record(run).get("parameters", {})
    inputs = {"vl_enabled": "VL", "sensor_enabled": "sensor"}
    without = "".join(f" no {name}" for key, name in inputs.items() if parameters.get(key) is False)
    kind = "diffusion" if checkpoint.name.startswith("diffusion") else "async"
    which = "" if "_best" in checkpoint.stem else " final" if "_final" in checkpoint.stem else " latest"
    stamp = re.match(r"\d{4}(\d{4}-\d{6}[.\d]*)", run.name)
    return f"{kind}{without}{which} {stamp[1] if stamp else run.name}"
