"""Whether what a notebook would make is there already, made from the same inputs, and the reason in one line.

Looks at files only: the lab book's records, `data.pkl`, the cache's files, checkpoints. Code is not compared: `vla
rerun` says what changed there.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import read_record, read_results
from vla_lib.workbench import runs
from vla_lib.workbench.notebook import dataset_path, settings_of

Values = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """Whether a step is up to date and `why` (not); the `run` that made what is there; `facts` for later steps;
    `noted`: for a new run's record."""

    current: bool
    why: str
    run: Path | None = None
    facts: Values = field(default_factory=dict)
    noted: Values = field(default_factory=dict)


def look(notebook: str, values: Values) -> Found:
    """Whether a step of the guide's flow is up to date; `values`: all its parameters. Raises UserError where its inputs
    cannot be read."""
    if values.get("overwrite"):
        return Found(False, "overwrite is asked for")
    return LOOK[notebook](notebook, values)


def _inspected(notebook: str, values: Values) -> Found:
    from vla_lib.episodes import find_episodes

    found = find_episodes(dataset_path(values["dataset_root"]))
    logs = [files.robot_log for files in found if files.robot_log is not None]
    inputs = runs.digest(sorted((str(log), log.stat().st_size, log.stat().st_mtime_ns) for log in logs))
    same = "the recordings are unchanged since"
    return _newest(notebook, values, lambda _, record: _inputs(record, inputs), same, {"inputs": inputs})


def _prepared(notebook: str, values: Values) -> Found:
    from vla_lib import preprocess
    from vla_lib.episodes import load_prepared
    from vla_lib.episodes.pipeline import raw_state

    jobs = preprocess.plan(settings_of(preprocess.Settings, values))
    now = raw_state(jobs)
    inputs = runs.digest(sorted(now.items()))

    def current(job: Any) -> bool:
        try:
            return load_prepared(job.out).fingerprint == now[job.key]
        except UserError:
            return False

    def differs(run: Path, record: Values) -> str:
        missing = read_results(run).get("prepared", 0) - sum(map(current, jobs))
        return _inputs(record, inputs) or (f"{missing} prepared episodes are gone" if missing > 0 else "")

    same = "the recordings and data.pkl are unchanged since"
    return _newest(notebook, values, differs, same, {"inputs": inputs})


def _cached(notebook: str, values: Values) -> Found:
    from vla_lib import build_vl_cache
    from vla_lib.features.builder import plan

    preflight, *_ = plan(settings_of(build_vl_cache.Settings, values))
    name, count, todo = preflight.binding["id"], len(preflight.episodes), len(preflight.todo())
    facts = {"binding_id": name}
    if todo:
        return Found(False, f"{todo} of {count} episodes are missing or stale in cache {name}", facts=facts)
    made = [run for run in runs.find_runs(notebook) if read_results(run).get("binding_id") == name]
    made = [run for run in made if _same_root(read_record(run), values)]
    return Found(True, f"cache {name} covers all {count} episodes as they are", made[-1] if made else None, facts)


def _trained(notebook: str, values: Values) -> Found:
    def differs(run: Path, record: Values) -> str:
        results = read_results(run)
        if results.get("cache") != values["cache_id"]:
            return _data(record, values) or f"it used cache {results.get('cache')}"
        whole = results.get("state") == "done" and Path(results["checkpoint"]).is_file()
        return _data(record, values) or ("" if whole else "its checkpoint is gone")

    same = "trained with these parameters, data and cache by"
    return _newest(notebook, values, differs, same, aside=("dataset_root", "cache_id"))


def _evaluated(notebook: str, values: Values) -> Found:
    given = (values["checkpoint"], *values["compare_with"])
    files = [Path(text if Path(text).exists() else text.partition("=")[2]) for text in given]

    def differs(_: Path, record: Values) -> str:
        begun = datetime.fromisoformat(record["started"]).timestamp()
        older = all(file.stat().st_mtime < begun for file in files)
        return _data(record, values) or ("" if older else "the checkpoint has changed since")

    return _newest(notebook, values, differs, "this checkpoint is evaluated by")


LOOK: dict[str, Callable[[str, Values], Found]] = {
    "01_inspect_episodes": _inspected,
    "02_detect_hz": _prepared,
    "03_cache_vl_features": _cached,
    "04_train_async": _trained,
    "05_train_diffusion": _trained,
    "06_evaluate": _evaluated,
}


def _newest(
    notebook: str,
    values: Values,
    differs: Callable[[Path, Values], str],
    same: str,
    noted: Values | None = None,
    aside: tuple[str, ...] = ("dataset_root",),  # parameters that are compared in another way
) -> Found:
    """The newest finished run of the notebook on the same root with the same parameters (but those `aside`) in which
    nothing `differs`."""
    reason = ""
    for run in reversed(runs.find_runs(notebook)):
        record = read_record(run)
        if record["state"] != "done" or not _same_root(record, values):
            continue
        then = record.get("parameters", {})
        names = [name for name in values | then if name not in aside and then.get(name) != values.get(name)]
        changed = [f"{name} was {then.get(name)!r}, now {values.get(name)!r}" for name in names]
        why = ", ".join(changed) or differs(run, record)
        if not why:
            return Found(True, f"{same} {run.name}", run)
        reason = reason or f"{run.name}: {why}"
    return Found(False, reason or "no finished run on this dataset", noted=noted or {})


def _inputs(record: Values, inputs: str) -> str:
    return "" if record.get("inputs") == inputs else "the recordings have changed since"


def _data(record: Values, values: Values) -> str:
    now, then = runs.data_state(values) or {}, record.get("data") or {}
    return "" if then.get("fingerprint") == now.get("fingerprint") else "the prepared data have changed since"


def _same_root(record: Values, values: Values) -> bool:
    then = str(record.get("parameters", {}).get("dataset_root") or "")
    return dataset_path(then).resolve() == dataset_path(values["dataset_root"]).resolve()
