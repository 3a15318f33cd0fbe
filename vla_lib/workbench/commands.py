"""`vla runs ls|show|stop|rm`, `vla rerun`, `vla cache` and `vla lab`: functions whose arguments are the command's words
(see `vla_lib.cli`).

Each prints and returns the exit status. Raises UserError for a name that is not there, and for what would lose
something by mistake.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, Literal
from unicodedata import east_asian_width

import pandas as pd
from tyro.conf import FlagCreatePairsOff, Positional, arg

from vla_lib.core.errors import UserError
from vla_lib.core.owner import alive
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import PROJECT, UNREADABLE, git_state, read_record, runs_root, versions
from vla_lib.workbench import runs, slurm
from vla_lib.workbench.parameters import read_parameters

Run = Annotated[Positional[str], arg(metavar="RUN", help="name of the run, or its beginning or end")]
LISTED = ["run", "state", "started", "duration_s", "data", "cache", "git"]


def ls(
    name: Annotated[Positional[str], arg(metavar="NAME", help="only runs of this notebook, e.g. 04_train_async")] = "",
    state: Literal["", "running", "done", "failed", "cancelled", "lost", "pruned", "submitted", "unreadable"] = "",
    sort: str = "",
) -> int:
    """List the runs, newest last.

    Args:
        state: only runs in this state.
        sort: sort by this column of the table.
    """
    frame = runs.table(name)
    frame = frame[frame["state"] == state] if state else frame
    if not len(frame):
        print("no such runs" if name or state else "no runs yet")
        return 0
    frame["started"] = frame["started"].str.slice(0, 16).str.replace("T", " ")
    # runs of different notebooks have too many parameters to show
    shortened = runs.short(frame, LISTED)
    few = shortened if name else shortened.filter([*LISTED, *runs.KEY_RESULTS])
    if sort and sort not in few:
        raise UserError(f"There is no column {sort} to sort by; there are {', '.join(few.columns)}.")
    few = few.sort_values(sort) if sort else few
    if jobs := slurm.states(runs_root() / name for name in few["run"]):
        few.insert(2, "slurm", few["run"].map(jobs))
    print(_within(few.dropna(axis="columns", how="all"), 120, sort))
    for error in frame.loc[frame["state"] == UNREADABLE, "error"]:
        print(error)
    return 0


def _within(frame: pd.DataFrame, columns: int, keep: str) -> str:
    """The table as text, without what says least where it would be wider than a terminal's `columns`."""
    for name in ["", "git", "started", "data", "cache", *reversed(frame.columns)]:
        frame = frame.drop(columns=[name] if name in frame and name not in ("run", "state", "slurm", keep) else [])
        with pd.option_context("display.unicode.east_asian_width", True):
            text = frame.to_string(index=False, na_rep="")
        wide = [sum(1 + (east_asian_width(letter) in "WF") for letter in line) for line in text.splitlines()]
        if max(wide) <= columns:
            break
    return text


def show(run: Run) -> int:
    """What is known of a run."""
    path = runs.find_run(run)
    record = read_record(path)
    took = clock(record["duration_s"]) if record.get("duration_s") is not None else "not ended"
    print(f"{path.name}: {record['state']}, begun {record['started']}, {took}")
    if record.get("error"):
        print(f"error: {record['error']}")
    files = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = {file.name: f"{file.stat().st_size / 1e6:.2f} MB" for file in files}
    for title, values in (runs.facts(path) | {"files": sizes}).items():
        if values:
            print("\n  ".join([f"\n{title}", *(f"{key}: {value}" for key, value in values.items())]))
    return 0


def stop(run: Run) -> int:
    """Stop a run: it saves its checkpoint first. One that was submitted to Slurm is cancelled there."""
    path = runs.find_run(run)
    record = read_record(path)
    if slurm.holds(path, record["state"]):
        print(slurm.cancel(path))
        return 0
    if record["state"] != "running":
        print(f"{path.name} does not run ({record['state']})")
        return 0
    if not alive(record.get("pid"), record.get("pid_created")):
        raise UserError(f"{path.name} runs on {record.get('host')}; stop it there.")
    os.kill(record["pid"], signal.SIGTERM)
    print(f"{path.name} is asked to stop (process {record['pid']})")
    return 0


def rm(
    names: Annotated[Positional[tuple[str, ...]], arg(metavar="RUN ...")], yes: FlagCreatePairsOff[bool] = False
) -> int:
    """Remove run folders below runs/, checkpoints included: never a running one, one that the parameters of another run
    name, nor a folder that was there before its run.

    Args:
        yes: really.
    """
    if not names:
        raise UserError("Name the runs to remove; `vla runs` lists them.")
    paths, size = runs.removable(names)
    if not yes:
        named = ", ".join(path.name for path in paths)
        raise UserError(f"{named}: {size:.0f} MB would be removed, checkpoints included; say --yes to do it.")
    print(runs.remove(names))
    return 0


def rerun(run: Run) -> int:
    """Repeat a run of a notebook, saying what has changed since."""
    from vla_lib.workbench.headless import run_and_print

    path = runs.find_run(run)
    record = read_record(path)
    if "notebook" not in record:
        by_hand = f"its record holds the settings to start it by hand (`vla runs show {path.name}`)"
        raise UserError(f"{path.name} is no run of a notebook; {by_hand}.")
    notebook, then = Path(record["notebook"]), record["parameters"]
    if not notebook.is_file():
        remedy = "restore it, or run another notebook"
        raise UserError(f"{path.name} ran {notebook}, which is not there any more; {remedy}.")
    known = read_parameters(notebook)
    gone, new = sorted(then.keys() - known.keys()), sorted(known.keys() - then.keys())
    changed = changes(record)
    changed += [f"{notebook.stem} has no parameter {key} any more (it was {then[key]!r})" for key in gone]
    changed += [f"{notebook.stem} has a new parameter {key} (it is {known[key].default!r})" for key in new]
    for line in changed:
        print(f"changed since: {line}")
    given = {key: value for key, value in then.items() if key in known and value != known[key].default}
    return run_and_print(notebook, given)


def changes(record: dict[str, Any]) -> list[str]:
    """In words, how code, data, caches and packages differ from those of a run's record."""
    git, data, packages = (record.get(key) or {} for key in ("git", "data", "versions"))
    git_now, packages_now = git_state() or {}, versions()
    data_now = runs.data_state(record.get("parameters", {})) or {}

    found = []
    if git.get("commit") != git_now.get("commit"):
        then, now = ((state.get("commit") or "unknown")[:8] for state in (git, git_now))
        found.append(f"code: commit {then} then, {now} now")
    if git.get("changed") or git_now.get("changed"):
        found.append(f"code: {git.get('changed', 0)} changed files then, {git_now.get('changed', 0)} now")
    if data.get("fingerprint") != data_now.get("fingerprint"):
        then, now = (state.get("episodes", "no") for state in (data, data_now))
        found.append(f"data: {then} prepared episodes then, {now} now, or other ones")
    if data.get("caches") != data_now.get("caches"):
        then, now = (", ".join(state.get("caches") or ["none"]) for state in (data, data_now))
        found.append(f"caches: {then} then, {now} now")
    for name in packages:
        if packages[name] != packages_now.get(name):
            found.append(f"{name}: {packages[name]} then, {packages_now.get(name)} now")
    return found


def cache(
    action: Positional[Literal["ls", "verify", "rm"]],
    binding: Annotated[Positional[str], arg(metavar="ID", help="the cache's id (verify: all without it)")] = "",
    dataset_root: Path = PROJECT / "runs" / "demo-data",
) -> int:
    """List, verify or remove VL feature caches. Returns 1 where `verify` finds damage."""
    from vla_lib.features import cache

    root = dataset_root
    if not root.is_dir():
        raise UserError(f"There is no dataset root {root}; give it with --dataset-root.")
    if action == "rm":
        if not binding:
            why = "caches take long to build, none is removed by default"
            raise UserError(f"Name the cache to remove (its id; `vla cache ls` lists them): {why}.")
        print(f"removed {binding}: {cache.remove(root, binding) / 1e6:.1f} MB freed")
        return 0
    rows = cache.list_bindings(root, runs_root())
    if action == "ls":
        table = pd.DataFrame(
            {
                **{name: row.get(name, "") for name in ("id", "model", "layer", "pooling")},
                "MB": round(row["bytes"] / 1e6, 1),
                "age (h)": round(row["age_s"] / 3600, 1),
                "covered": f"{row['covered']} of {row['episodes']}" if "covered" in row else "",
                "used by": ", ".join(row.get("used_by", [])),
                "problem": row["problem"],
            }
            for row in rows
        )
        print(table.to_string(index=False) if rows else f"no cache below {root}")
        return 0
    found = {name: cache.verify(root, name) for name in ([binding] if binding else [row["id"] for row in rows])}
    for name, one in found.items():
        print(f"{name}: {one['files']} files, {one['bytes'] / 1e6:.1f} MB, {len(one['bad'])} damaged")
        for sentence in one["bad"]:
            print(f"  {sentence}")
    return int(any(one["bad"] for one in found.values()))


def lab(port: int = 8888, no_browser: FlagCreatePairsOff[bool] = False) -> int:
    """Open JupyterLab on the notebooks.

    Args:
        no_browser: do not open a browser (a remote machine).
    """
    command = lab_command(PROJECT / "notebooks", port, not no_browser)
    os.execve(command[0], command, lab_environment())


def lab_command(folder: Path, port: int, browser: bool = True) -> list[str]:
    """The command line of JupyterLab on `folder`. Raises UserError where the port is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            raise UserError(f"Port {port} is in use; give another one: make lab ARGS='--port {port + 1}'.") from None
    words = [sys.executable, "-m", "jupyterlab", str(folder), f"--port={port}", "--ServerApp.port_retries=0"]
    words += [] if browser else ["--no-browser"]
    return words + (["--allow-root"] if os.geteuid() == 0 else [])


def lab_environment() -> dict[str, str]:
    """This process's environment with our defaults of JupyterLab, so that saved notebooks keep their widgets
    (`labconfig/default_setting_overrides.json`); what a person has set counts more."""
    paths = [str(Path(__file__).parent), os.environ.get("JUPYTER_CONFIG_PATH", "")]
    return {**os.environ, "JUPYTER_CONFIG_PATH": os.pathsep.join(filter(None, paths))}
