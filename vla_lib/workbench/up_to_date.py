"""A notebook and its parameters in; whether what it would make is there already, made from the same inputs, and the reason in one line, out.

Looks at files only: the lab book's records, `data.pkl`, the cache's files, checkpoints. Code is not looked at: `vla rerun` says what changed there.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import read_record
from vla_lib.workbench import runs
from vla_lib.workbench.notebook import dataset_path

Values = dict[str, Any]


@dataclass(frozen=True)
class Standing:
    """Whether a step is up to date and `why` (not); the `run` that made what is there; `facts` for later steps; `record`: what a new run notes."""

    current: bool
    why: str
    run: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    record: dict[str, Any] = field(default_factory=dict)


def standing(notebook: str, values: Values) -> Standing:
    """How a step of the guide's flow stands; `values`: all its parameters. Raises UserError where its inputs cannot be read."""
    if values.get("overwrite"):
        return Standing(False, "overwrite is asked for")
    return LOOK[notebook](notebook, values)


def _inspected(notebook: str, values: Values) -> Standing:
    from vla_lib.episodes import find_episodes

    logs = [
        log for files in find_episodes(dataset_path(values["dataset_root"])) if (log := files.robot_log) is not None
    ]
    inputs = _digest(sorted((str(log), log.stat().st_size, log.stat().st_mtime_ns) for log in logs))
    return _newest(
        notebook,
        values,
        lambda _, record: _inputs(record, inputs),
        "the recordings are unchanged since",
        {"inputs": inputs},
    )


def _prepared(notebook: str, values: Values) -> Standing:
    from vla_lib import preprocess
    from vla_lib.episodes import load_prepared
    from vla_lib.episodes.pipeline import raw_state

    settings = preprocess.Settings(**preprocess_settings(values))
    jobs = preprocess.plan(settings)
    now = raw_state(jobs)
    inputs = _digest(sorted(now.items()))

    def current(job: Any) -> bool:
        try:
            return load_prepared(job.out).fingerprint == now[job.key]
        except UserError:
            return False

    def differs(run: Path, record: Values) -> str:
        missing = runs.results_of(run).get("prepared", 0) - sum(map(current, jobs))
        return _inputs(record, inputs) or (f"{missing} prepared episodes are gone" if missing > 0 else "")

    return _newest(notebook, values, differs, "the recordings and data.pkl are unchanged since", {"inputs": inputs})


def _cached(notebook: str, values: Values) -> Standing:
    from vla_lib.features.builder import plan
    from vla_lib.features.settings import CacheSettings

    preflight, *_ = plan(CacheSettings(**cache_settings(values)))
    name, todo = preflight.binding["id"], preflight.todo()
    facts = {"binding_id": name}
    if todo:
        return Standing(
            False,
            f"{len(todo)} of {len(preflight.episodes)} episodes are missing or stale in cache {name}",
            facts=facts,
        )
    made = [
        run
        for run in runs.find_runs(notebook)
        if runs.results_of(run).get("binding_id") == name and _same_root(read_record(run), values)
    ]
    return Standing(
        True,
        f"cache {name} covers all {len(preflight.episodes)} episodes as they are",
        made[-1] if made else None,
        facts,
    )


def _trained(notebook: str, values: Values) -> Standing:
    data = runs.data_state(values) or {}

    def differs(run: Path, record: Values) -> str:
        results = runs.results_of(run)
        if (record.get("data") or {}).get("fingerprint") != data.get("fingerprint"):
            return "the prepared data have changed since"
        if results.get("cache") != values["cache_id"]:
            return f"it used cache {results.get('cache')}"
        return (
            "" if results.get("state") == "done" and Path(results["checkpoint"]).is_file() else "its checkpoint is gone"
        )

    return _newest(notebook, values, differs, "trained with these parameters, data and cache by", aside=("cache_id",))


def _evaluated(notebook: str, values: Values) -> Standing:
    data = runs.data_state(values) or {}
    files = [
        Path(text if Path(text).exists() else text.partition("=")[2])
        for text in (values["checkpoint"], *values["compare_with"])
    ]

    def differs(_: Path, record: Values) -> str:
        if (record.get("data") or {}).get("fingerprint") != data.get("fingerprint"):
            return "the prepared data have changed since"
        begun = datetime.fromisoformat(record["started"]).timestamp()
        return "" if all(file.stat().st_mtime < begun for file in files) else "the checkpoint has changed since"

    return _newest(notebook, values, differs, "this checkpoint is evaluated by")


LOOK = {
    "01_inspect_episodes": _inspected,
    "02_detect_hz": _prepared,
    "03_cache_vl_features": _cached,
    "04_train_async": _trained,
    "05_train_diffusion": _trained,
    "06_evaluate": _evaluated,
}


def preprocess_settings(values: Values) -> Values:
    """The keywords of `preprocess.Settings` that notebook 02's parameters stand for."""
    from vla_lib.preprocess import Settings

    text = values["sensor_clock_offset_ms"]
    try:
        offset_ms = None if text == "auto" else float(text)
    except ValueError:
        raise UserError(f"sensor_clock_offset_ms is {text!r}; give a number of milliseconds, or auto.") from None
    return _known(values, Settings) | {"sensor_clock_offset_ms": offset_ms}


def cache_settings(values: Values) -> Values:
    """The keywords of `build_vl_cache.Settings` that notebook 03's parameters stand for."""
    from vla_lib.features.settings import CacheSettings

    return _known(values, CacheSettings) | {"views": tuple(values["views"])}


def training_settings(values: Values, settings_class: type) -> Values:
    """The keywords of `train_async.Settings` or `train_diffusion.Settings` that a training notebook's parameters stand for."""
    first = values["stage1_checkpoint"]
    return _known(values, settings_class) | {"stage1_checkpoint": dataset_path(first) if first else None}


def _known(values: Values, settings_class: type) -> Values:
    names = settings_class.__dataclass_fields__
    return {name: value for name, value in values.items() if name in names} | {
        "dataset_root": dataset_path(values["dataset_root"])
    }


def _newest(
    notebook: str,
    values: Values,
    differs: Callable[[Path, Values], str],
    current: str,
    record: Values | None = None,
    aside: tuple[str, ...] = (),
) -> Standing:
    """The newest finished run of the notebook on the same root with the same parameters (but those `aside`) in which nothing `differs`."""
    reason = ""
    for run in reversed(runs.find_runs(notebook)):
        known = read_record(run)
        if known["state"] != "done" or not _same_root(known, values):
            continue
        why = _parameters(known.get("parameters", {}), values, ("dataset_root", *aside)) or differs(run, known)
        if not why:
            return Standing(True, f"{current} {run.name}", run)
        reason = reason or f"{run.name}: {why}"
    return Standing(False, reason or "no finished run on this dataset", record=record or {})


def _parameters(then: Values, now: Values, aside: tuple[str, ...]) -> str:
    found = [name for name in dict.fromkeys([*now, *then]) if name not in aside and then.get(name) != now.get(name)]
    return ", ".join(f"{name} was {then.get(name)!r}, now {now.get(name)!r}" for name in found)


def _inputs(record: Values, inputs: str) -> str:
    return "" if record.get("inputs") == inputs else "the recordings have changed since"


def _same_root(record: Values, values: Values) -> bool:
    then = str(record.get("parameters", {}).get("dataset_root") or "")
    return dataset_path(then).resolve() == dataset_path(values["dataset_root"]).resolve()


def _digest(value: Any) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]
