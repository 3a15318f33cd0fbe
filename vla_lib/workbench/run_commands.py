"""`vla runs ls|show|diff|open|rm` and `vla rerun`: names of runs in; the lab book as printed tables, or a run repeated, out."""

import json
import shutil
import sys
import webbrowser
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import git_state, read_record, versions
from vla_lib.workbench import runs
from vla_lib.workbench.notebook import shown


def ls(name: str, state: str, sort: str) -> int:
    """Print the runs, oldest first or by the column `sort`."""
    frame = runs.table(name)
    frame = frame[frame["state"] == state] if state else frame
    if not len(frame):
        print("no runs yet" if not name and not state else "no such runs")
        return 0
    frame["started"] = frame["started"].str.slice(0, 16).str.replace("T", " ")
    columns = ("run", "state", "started", "duration_s", "data", "cache", "git")
    few = (
        runs.short(frame, columns)
        if name
        else frame[list(columns)].join(runs.short(frame, ()).filter(list(runs.KEY_RESULTS)))
    )
    if sort and sort not in few:
        raise UserError(f"There is no column {sort} to sort by; there are {', '.join(few.columns)}.")
    few = few.sort_values(sort) if sort else few
    print(few.dropna(axis="columns", how="all").to_string(index=False, na_rep=""))
    return 0


def show(name: str) -> int:
    """Print what is known of one run."""
    path = runs.find_run(name)
    record, results = read_record(path), runs.results_of(path)
    took = clock(record["duration_s"]) if record.get("duration_s") is not None else "not ended"
    print(f"{path.name}: {record['state']}, begun {record['started']}, {took}")
    if record.get("error"):
        print(f"error: {record['error']}")
    for title in ("parameters", "git", "data", "versions"):
        _section(title, record.get(title) or {})
    _section("results", {key: value for key, value in results.items() if isinstance(value, int | float | str)})
    _section(
        "files",
        {file.name: f"{file.stat().st_size / 1e6:.2f} MB" for file in sorted(path.rglob("*")) if file.is_file()},
    )
    return 0


def diff(one: str, other: str) -> int:
    """Print in what two runs differ: parameters, code, data, versions, results."""
    paths = [runs.find_run(one), runs.find_run(other)]
    records = [read_record(path) for path in paths]
    print(f"{paths[0].name} | {paths[1].name}")
    for title in ("state", "parameters", "git", "data", "versions"):
        values = [record.get(title) for record in records]
        sides = [value if isinstance(value, dict) else {title: value} for value in values]
        _differences(title, *sides)
    _differences(
        "results",
        *({k: v for k, v in runs.results_of(path).items() if isinstance(v, int | float | str)} for path in paths),
    )
    return 0


def open_page(name: str) -> int:
    """Open the run's page in the browser and print its path."""
    path = runs.find_run(name)
    pages = [page for page in (path / "report.html", path / "notebook.html") if page.exists()]
    if not pages:
        raise UserError(f"{path.name} has no page: it wrote neither report.html nor notebook.html.")
    webbrowser.open(pages[0].resolve().as_uri())
    print(shown(pages[0]))
    return 0


def rm(names: list[str], sure: bool) -> int:
    """Remove run folders; only with `sure`, never a running one nor one whose checkpoint another run was given."""
    paths = list(dict.fromkeys(runs.find_run(name) for name in names))
    others = [read_record(path) for path in runs.find_runs() if path not in paths]
    for path in paths:
        if read_record(path)["state"] == "running":
            raise UserError(f"{path.name} is running; stop it first.")
        users = [record["started"] for record in others if path.name in json.dumps(record.get("parameters", {}))]
        if users:
            raise UserError(
                f"{path.name} is named by the parameters of {len(users)} other runs (one begun {users[0]}); remove those first."
            )
    size = sum(file.stat().st_size for path in paths for file in path.rglob("*") if file.is_file())
    if not sure:
        raise UserError(
            f"{', '.join(path.name for path in paths)}: {size / 1e6:.0f} MB would be removed, checkpoints included; say --yes to do it."
        )
    for path in paths:
        shutil.rmtree(path)
    print(f"removed {', '.join(path.name for path in paths)}: {size / 1e6:.0f} MB freed")
    return 0


def rerun(name: str) -> int:
    """Repeat a notebook's run with its parameters, after saying what has changed since. Returns the new run's exit status."""
    from vla_lib.workbench.headless import run_notebook
    from vla_lib.workbench.parameters import read_parameters

    path = runs.find_run(name)
    record = read_record(path)
    if "notebook" not in record:
        raise UserError(
            f"{path.name} is no run of a notebook; its record holds the settings to start it by hand (`vla runs show {path.name}`)."
        )
    notebook = Path(record["notebook"])
    if not notebook.is_file():
        raise UserError(
            f"{path.name} ran {notebook}, which is not there any more; restore it, or run another notebook."
        )
    for line in changes(record):
        print(f"changed since: {line}")
    known = read_parameters(notebook)
    given = {key: value for key, value in record["parameters"].items() if key in known and value != known[key].default}
    for gone in sorted(set(record["parameters"]) - set(known)):
        print(
            f"changed since: {notebook.stem} has no parameter {gone} any more (it was {record['parameters'][gone]!r})"
        )
    for new in sorted(set(known) - set(record["parameters"])):
        print(f"changed since: {notebook.stem} has a new parameter {new} (it is {known[new].default!r})")
    result = run_notebook(notebook, given)
    if result.error:
        print(f"error: {result.error}", file=sys.stderr)
    print(result.told)
    return result.exit_status


def changes(record: dict[str, Any]) -> list[str]:
    """In words, how code, data, caches and packages differ from those of a run's record."""
    found = []
    then, now = record.get("git") or {}, git_state() or {}
    if then.get("commit") != now.get("commit"):
        found.append(
            f"code: commit {(then.get('commit') or 'unknown')[:8]} then, {(now.get('commit') or 'unknown')[:8]} now"
        )
    if then.get("changed") or now.get("changed"):
        found.append(f"code: {then.get('changed', 0)} changed files then, {now.get('changed', 0)} now")
    data, data_now = record.get("data") or {}, runs.data_state(record.get("parameters", {})) or {}
    if data.get("fingerprint") != data_now.get("fingerprint"):
        found.append(
            f"data: {data.get('episodes', 'no')} prepared episodes then, {data_now.get('episodes', 'no')} now, or other ones"
        )
    if data.get("caches") != data_now.get("caches"):
        found.append(
            f"caches: {', '.join(data.get('caches') or ['none'])} then, {', '.join(data_now.get('caches') or ['none'])} now"
        )
    packages, packages_now = record.get("versions") or {}, versions()
    return found + [
        f"{name}: {packages[name]} then, {packages_now.get(name)} now"
        for name in packages
        if packages[name] != packages_now.get(name)
    ]


def _section(title: str, values: dict[str, Any]) -> None:
    if values:
        print(f"\n{title}")
        for name, value in values.items():
            print(f"  {name}: {value}")


def _differences(title: str, one: dict[str, Any], other: dict[str, Any]) -> None:
    lines = [
        f"  {key}: {one.get(key)!r} | {other.get(key)!r}"
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]
    if lines:
        print(f"\n{title}")
        print("\n".join(lines))
