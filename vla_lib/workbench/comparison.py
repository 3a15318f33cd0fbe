"""Runs side by side: the table to choose from, curves, parameters, results with intervals, the same phantoms."""

import json
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import optuna
import pandas as pd

from vla_lib.core.files import read_jsonl
from vla_lib.core.run_folder import read_record, read_results, runs_root
from vla_lib.workbench import runs
from vla_lib.workbench.queue import entry_rows, open_study

FIRST = ["run", "star", "state", "started", "min"]
LAST = ["data", "cache", "git", "host"]
EVALUATE = "06_evaluate"
NOT_COMPARED = ("sweep", "night", "run-all", "demo", "09_compare_runs")  # runs of runs


def overview(sweep: str = "", notebook: str = "") -> pd.DataFrame:
    """One row a run, newest first, indexed by its folder's name: what a person says of it, state, time, where they
    differ parameters, data, code and machine, key results. `sweep`: its entries alone with their objective, best first.
    """
    entries = {row["run"]: row for row in sweep_rows(sweep) if row["run"]} if sweep else {}
    folders = [runs_root() / name for name in entries] if sweep else runs.find_runs(notebook)
    folders = [path for path in folders if (path / "run.json").exists()]
    folders = [path for path in folders if read_record(path)["name"] not in NOT_COMPARED]
    frame = runs.table(of=folders)
    if not folders:
        return pd.DataFrame(columns=FIRST)
    frame["min"] = (frame["duration_s"].astype(float) / 60).round(1)
    frame["started"] = frame["started"].str.slice(0, 16).str.replace("T", " ")
    said = [runs.about(path) for path in folders]
    frame["star"] = ["★" if one["star"] else "" for one in said]
    shown = runs.short(frame, [*FIRST, *LAST])
    names = list(shown.pop("run"))
    shown.insert(0, "run", [one["label"] or name for one, name in zip(said, names, strict=True)])
    shown["note"] = [one["note"] for one in said]
    if sweep:
        shown.insert(1, "setting", [entries[name]["setting"] for name in names])
        shown["state"] = [entries[name]["state"] for name in names]
        shown["objective"] = [entries[name]["value"] for name in names]
    shown.index = pd.Index(names)
    alike = [name for name in LAST if shown[name].astype(str).nunique() < 2]
    last = [*(name for name in LAST if name not in alike), "note"]
    ordered = [*(name for name in shown.columns if name not in [*LAST, "note"]), *last]
    newest_first = shown[ordered].iloc[::-1]
    if sweep:
        return newest_first.sort_values("objective", ascending=not _large_is_good(sweep), kind="stable")
    return newest_first


def sweep_rows(sweep: str) -> list[dict[str, Any]]:
    """The entries of a sweep or night, as its study has them now. Raises UserError where there is none."""
    return list(entry_rows(study_of(sweep)).values())


def study_of(sweep: str) -> optuna.Study:
    """The Optuna study of a sweep or night. Raises UserError where there is none."""
    return open_study(runs.find_run(sweep))


def objective(sweep: str) -> str:
    """The result that a sweep makes small or large."""
    return str(read_record(runs.find_run(sweep))["parameters"].get("objective", "objective"))


def curves(chosen: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """The rows of each run's metrics.jsonl, by its label; runs without any are left out."""
    found = {runs.label_of(path): read_jsonl(path / "metrics.jsonl") for path in chosen}
    return {label: rows for label, rows in found.items() if rows}


def parameters(chosen: Sequence[Path]) -> pd.DataFrame:
    """The parameters in which the runs differ, a row each, a column a run."""
    known = {runs.label_of(path): read_record(path)["parameters"] for path in chosen}
    names = dict.fromkeys(name for one in known.values() for name in one)
    rows = [{"parameter": name} | {label: _text(one.get(name, "")) for label, one in known.items()} for name in names]
    return pd.DataFrame([row for row in rows if len({*list(row.values())[1:]}) > 1], columns=["parameter", *known])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else json.dumps(value)


def evaluations(chosen: Iterable[Path]) -> dict[str, dict[str, Any]]:
    """What newer evaluations found in closed loop, of the runs themselves and of the trainings whose checkpoints they
    name: label -> {"summary", "rollouts", ...}. The newest evaluation of a checkpoint counts."""
    found: dict[str, dict[str, Any]] = {}
    chosen = list(chosen)
    for evaluation in runs.find_runs(EVALUATE):
        known = read_results(evaluation)
        plain = {known.get("name"), *known.get("compared_with", {})}  # without masked or late inputs
        for name, loop in known.get("closed_loop", {}).items():
            of = Path(loop["settings"]["checkpoint"]).parent.parent
            for path in chosen:
                if path == evaluation:
                    found[f"{runs.label_of(path)}: {name}"] = loop
                elif path.resolve() == of.resolve() and name in plain:
                    found[runs.label_of(path)] = loop
    return found


def results(chosen: Sequence[Path]) -> pd.DataFrame:
    """One row a run: its key results, and of its evaluation the successes with their 95 % interval."""
    rows = []
    loops = evaluations(chosen)
    for path in chosen:
        label, plain = runs.label_of(path), runs.plain_results(path)
        row: dict[str, Any] = {"run": label} | {name: plain[name] for name in runs.KEY_RESULTS if name in plain}
        if (loop := loops.get(label)) and loop["summary"]["rollouts"]:
            low, high = (100 * value for value in loop["summary"]["interval_95"])
            row["closed loop"] = f"{loop['summary']['successes']} of {loop['summary']['rollouts']}"
            row["95 % interval"] = f"{low:.0f} to {high:.0f} %"
        rows.append(row)
    return pd.DataFrame(rows)


def pairs(chosen: Sequence[Path]) -> pd.DataFrame:
    """Every two closed loops on the phantoms that both met: who succeeded where, p value of the exact sign test."""
    from vla_lib.evaluation.closed_loop import sign_test

    wins = {
        label: {row["seed"]: bool(row["success"]) for row in loop["rollouts"]}
        for label, loop in evaluations(chosen).items()
    }
    rows = []
    for (first, one), (other, two) in combinations(wins.items(), 2):
        if seeds := sorted(one.keys() & two.keys()):
            counted = sign_test([(one[seed], two[seed]) for seed in seeds])
            rows.append({"first": first, "other": other, "phantoms": len(seeds), **counted})
    return pd.DataFrame(rows).rename(columns=lambda name: str(name).replace("_", " "))


def checkpoints(chosen: Iterable[Path]) -> pd.DataFrame:
    """The best checkpoint of each run that has one, else its newest: for `checkpoint` of notebooks 06 and 07."""
    rows = [(runs.label_of(path), str(file)) for path in chosen for file in runs.checkpoints_of(path)[:1]]
    return pd.DataFrame(rows, columns=["run", "checkpoint"])


def settings(sweep: str) -> pd.DataFrame:
    """One row a setting of a sweep, best first: its repetitions that ended, mean, smallest and largest value of the
    objective."""
    frame = pd.DataFrame(sweep_rows(sweep)).dropna(subset=["value"])
    spread = frame.astype({"value": float}).groupby("setting", sort=False)["value"].agg(["count", "mean", "min", "max"])
    return spread.sort_values("mean", ascending=not _large_is_good(sweep)).reset_index()


def _large_is_good(sweep: str) -> bool:
    return study_of(sweep).direction == optuna.study.StudyDirection.MAXIMIZE
