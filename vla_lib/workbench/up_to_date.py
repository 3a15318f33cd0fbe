"""Whether what a notebook would make is there already, made from the same inputs, and the reason in one line.

Looks at files only: the lab book's records, `data.pkl`, the cache's files, checkpoints. Code is not compared: `vla
rerun` says what changed there.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import read_record, read_results
from vla_lib.episodes.datasets import Marks
from vla_lib.episodes.prepare import PreprocessSettings
from vla_lib.features.settings import CacheSettings
from vla_lib.workbench import runs
from vla_lib.workbench.notebook import dataset_path

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


@dataclass(frozen=True)
class Check:
    """How a finished run is known to be one of the same step: `same` says so; `differs` (run, record) says what is not
    the same, "" where all is. `inputs`: digest of the recordings, where they and not the prepared data are read."""

    same: str
    differs: Callable[[Path, Values], str] = lambda run, record: ""
    inputs: str = ""
    aside: tuple[str, ...] = ()  # parameters that `differs` compares


def look(notebook: str, values: Values) -> Found:
    """Whether a step of the guide's flow is up to date: the newest finished run of the notebook on the same root, with
    the same parameters and inputs, has made it. `values`: all its parameters. Raises UserError where its inputs cannot
    be read."""
    if values.get("overwrite"):
        return Found(False, "overwrite is asked for")
    if notebook == "03_cache_vl_features":
        return _cached(notebook, values)
    check, reason = CHECKS[notebook](values), ""
    data = (runs.data_state(values) or {}).get("fingerprint")
    for run in _finished(notebook, values):
        record = read_record(run)
        then = record["parameters"] | {"dataset_root": values["dataset_root"]}  # the same folder, however it is written
        changed = [name for name in values | then if name not in check.aside and then.get(name) != values.get(name)]
        why = ", ".join(f"{name} was {then.get(name)!r}, now {values.get(name)!r}" for name in changed)
        if check.inputs and record.get("inputs") != check.inputs:
            why = why or "the recordings have changed since"
        if not check.inputs and (record.get("data") or {}).get("fingerprint") != data:
            why = why or "the prepared data have changed since"
        try:
            read_results(run)  # the flow's next steps take from it what they need
            why = why or check.differs(run, record)
        except UserError as error:  # a damaged file of that run: the step is made again
            why = why or str(error)
        if not why:
            return Found(True, f"{check.same} {run.name}", run)
        reason = reason or f"{run.name}: {why}"
    noted = {"inputs": check.inputs} if check.inputs else {}
    return Found(False, reason or "no finished run on this dataset", noted=noted)


def _finished(notebook: str, values: Values) -> list[Path]:
    """The finished runs of a notebook on the same dataset root, newest first."""
    found = []
    for run in reversed(runs.find_runs(notebook)):
        record = read_record(run)
        then = dataset_path(str(record.get("parameters", {}).get("dataset_root") or ""))
        if record["state"] == "done" and then.resolve() == dataset_path(values["dataset_root"]).resolve():
            found.append(run)
    return found


def _inspected(values: Values) -> Check:
    from vla_lib.episodes import find_episodes

    root = dataset_path(values["dataset_root"])
    logs = [files.robot_log for files in find_episodes(root) if files.robot_log is not None]
    state: list[Any] = sorted((str(log), log.stat().st_size, log.stat().st_mtime_ns) for log in logs)
    state += sorted(Marks.load(root).entries.items())
    return Check("the recordings and their marks are unchanged since", inputs=runs.digest(state))


def _prepared(values: Values) -> Check:
    from vla_lib import preprocess
    from vla_lib.episodes import load_prepared

    jobs = [job for job in preprocess.make_jobs(PreprocessSettings.of(values)) if not job.left_out]
    now = preprocess.raw_state(jobs)

    def current(job: Any) -> bool:
        try:
            return load_prepared(job.out).metadata["inputs"] == now[job.key]
        except UserError:
            return False

    def differs(run: Path, record: Values) -> str:
        missing = read_results(run).get("prepared", 0) - sum(map(current, jobs))
        return f"{missing} prepared episodes are gone" if missing > 0 else ""

    return Check("the recordings and data.pkl are unchanged since", differs, runs.digest(sorted(now.items())))


def _cached(notebook: str, values: Values) -> Found:
    from vla_lib.features.preflight import plan

    preflight, *_ = plan(CacheSettings.of(values))
    name, count, todo = preflight.binding["id"], len(preflight.episodes), len(preflight.todo())
    facts = {"binding_id": name}
    if todo:
        return Found(False, f"{todo} of {count} episodes are missing or stale in cache {name}", facts=facts)
    why = f"cache {name} covers all {count} episodes as they are"
    for run in _finished(notebook, values):
        with contextlib.suppress(UserError):  # a damaged file of that run
            if read_results(run).get("binding_id") == name:
                return Found(True, why, run, facts)
    return Found(True, why, facts=facts)


def _trained(values: Values) -> Check:
    def differs(run: Path, record: Values) -> str:
        results = read_results(run)
        if results.get("cache") != values["cache_id"]:
            return f"it used cache {results.get('cache')}"
        whole = results.get("state") == "done" and Path(str(results.get("checkpoint"))).is_file()
        return "" if whole else "its checkpoint is gone"

    return Check("trained with these parameters, data and cache by", differs, aside=("cache_id",))


def _evaluated(values: Values) -> Check:
    given = (values["checkpoint"], *values["compare_with"])
    files = [Path(text if Path(text).exists() else text.partition("=")[2]) for text in given]

    def differs(run: Path, record: Values) -> str:
        begun = datetime.fromisoformat(record["started"]).timestamp()
        older = all(file.stat().st_mtime < begun for file in files)
        return "" if older else "the checkpoint has changed since"

    return Check("this checkpoint is evaluated by", differs)


CHECKS: dict[str, Callable[[Values], Check]] = {
    "01_inspect_episodes": _inspected,
    "02_detect_hz": _prepared,
    "04_train_async": _trained,
    "05_train_diffusion": _trained,
    "06_evaluate": _evaluated,
}
