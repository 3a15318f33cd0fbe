"""A list of named notebook runs in; each run headless, a failing one survived, what is done kept; one comparison table out.

    vla sweep 04_train_async --grid lr=1e-4,5e-5 vlm_reuse_count=3,4 --parallel 2
    vla night jobs.yaml          # - {name: wide, notebook: 04_train_async, parameters: {width: 256}}

The queue's folder below runs/ holds queue.json (what is asked for, and each entry's run) and comparison.csv. The same command again goes
on with a queue that was stopped or had failures: what is done is not done again. Entries are processes of their own (`vla run`), so a crash
of one touches no other.
"""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json, write_text
from vla_lib.core.processes import die_with_parent
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import RunFolder, new_folder, read_record, runs_root
from vla_lib.workbench import runs
from vla_lib.workbench.headless import LOG_NAME
from vla_lib.workbench.notebook import shown
from vla_lib.workbench.parameters import notebook_path, resolve

POLL_S = 0.2


@dataclass(frozen=True)
class Entry:
    """One run of a queue: a name, a notebook and its parameters as command-line words."""

    name: str
    notebook: str
    parameters: dict[str, str] = field(default_factory=dict)


def grid(notebook: str, axes: Sequence[str], fixed: dict[str, str]) -> list[Entry]:
    """Every combination of `name=value,value` axes over the `fixed` parameters. Raises UserError for an axis or a value that the notebook does not take."""
    values: dict[str, list[str]] = {}
    for axis in axes:
        name, equals, words = axis.partition("=")
        if not equals or not name or not all(words.split(",")):
            raise UserError(f"--grid wants NAME=VALUE,VALUE..., not {axis!r}.")
        if name in values or name in fixed:
            raise UserError(f"Parameter {name} is given twice; give it once.")
        values[name] = words.split(",")
        if len(set(values[name])) < len(values[name]):
            raise UserError(f"--grid {axis}: a value of {name} is given twice; give each once.")
    found = []
    for combination in itertools.product(*values.values()):
        chosen = dict(zip(values, combination, strict=True))
        found.append(
            Entry(" ".join(f"{name}={value}" for name, value in chosen.items()), notebook, {**fixed, **chosen})
        )
    return found


def read_list(path: Path) -> list[Entry]:
    """The entries of a YAML list of `{name, notebook, parameters}`; values mean what the same words mean on a command line.

    Raises UserError naming the file and the entry for anything else.
    """
    try:
        listed = yaml.load(
            Path(path).read_text(), Loader=yaml.BaseLoader
        )  # text as it stands: neither dates nor `no` for False
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(listed, list) or not listed:
        raise UserError(
            f"{path} must hold a list of runs: `- {{name: wide, notebook: 04_train_async, parameters: {{lr: 1e-4}}}}`."
        )
    found: list[Entry] = []
    for number, row in enumerate(listed, 1):
        where = f"{path}, entry {number}"
        if (
            not isinstance(row, dict)
            or set(row) - {"name", "notebook", "parameters"}
            or not isinstance(row.get("notebook"), str)
        ):
            raise UserError(f"{where}: wants a notebook, and may have a name and parameters; it is {row!r}.")
        parameters = row.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise UserError(f"{where}: parameters are NAME: VALUE pairs, not {parameters!r}.")
        words = {name: _word(value, f"{where}: parameter {name}") for name, value in parameters.items()}
        name = row.get("name") or f"{number} {row['notebook']}"
        if not isinstance(name, str):
            raise UserError(f"{where}: its name is text, not {name!r}.")
        found.append(Entry(name, row["notebook"], words))
    names = [entry.name for entry in found]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"{path}: two entries are named {name!r}; name each once.")
    return found


def _word(value: Any, where: str) -> str:
    """A value of a YAML list as a command-line word; a list of words is one too."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{where} is one value or a list of words, not {value!r}.")
    return value


def run(kind: str, entries: list[Entry], parallel: int = 1) -> int:
    """Run the entries, `parallel` at a time; prints each one's start and end, then the comparison. Returns 0, 1 where one failed, 130 where it was stopped.

    Raises UserError for an unknown notebook, parameter or value before anything starts.
    """
    if parallel < 1:
        raise UserError(f"--parallel is {parallel}; give 1 or more.")
    for entry in entries:
        try:
            resolve(notebook_path(entry.notebook), entry.parameters, text=True)
        except UserError as error:
            raise UserError(f"{kind}, {entry.name}: {error}") from None
    folder, found = _open(kind, entries)
    waiting = [entry for entry in entries if found.get(entry.name, {}).get("state") != "done"]
    print(f"{kind}: {len(entries)} runs, {len(entries) - len(waiting)} done already; {shown(folder.path)}", flush=True)
    running: dict[str, subprocess.Popen] = {}
    started: dict[str, float] = {}
    state, error = "failed", None
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                entry = waiting.pop(0)
                target = new_folder(notebook_path(entry.notebook).stem)
                found[entry.name] = {"run": target.name, "state": "running"}
                _write(folder, entries, found)
                running[entry.name], started[entry.name] = _start(entry, target), time.monotonic()
                print(f"{_now()} started {entry.name}: {shown(target)}", flush=True)
            time.sleep(POLL_S)
            for name in [name for name, process in running.items() if process.poll() is not None]:
                running.pop(name)
                found[name]["state"] = _state(found[name]["run"])
                _write(folder, entries, found)
                print(
                    f"{_now()} {found[name]['state']} after {clock(time.monotonic() - started[name])}: {name}{_cause(found[name])}",
                    flush=True,
                )
        failed = [entry.name for entry in entries if found[entry.name]["state"] != "done"]
        state, error = (
            ("failed", f"{len(failed)} of {len(entries)} runs did not end as done: {', '.join(failed)}")
            if failed
            else ("done", None)
        )
        return 1 if failed else 0
    except KeyboardInterrupt:
        state, error = "cancelled", "interrupted; the same command goes on"
        for process in running.values():
            process.terminate()  # not SIGINT: a child that is not up yet may ignore that one
        for name, process in running.items():
            process.wait()
            found[name]["state"] = _state(found[name]["run"])
        return 130
    finally:
        folder.finish(state, error)
        _write(folder, entries, found)
        table = comparison(entries, found)
        write_text(folder.path / "comparison.csv", table.to_csv(index=False))
        print(f"\n{table.to_string(index=False, na_rep='')}\n\n{shown(folder.path / 'comparison.csv')}", flush=True)
        if error:
            print(f"error: {error}", file=sys.stderr)


def comparison(entries: Sequence[Entry], found: dict[str, dict[str, Any]]) -> pd.DataFrame:
    """One row an entry that was started: name, state, duration, the parameters that differ between entries, the key results; `lost`
    alone where it never began."""
    started = {entry.name: runs_root() / found[entry.name]["run"] for entry in entries if entry.name in found}
    begun = {name: path for name, path in started.items() if (path / "run.json").exists()}
    table = runs.table(of=begun.values())
    table.insert(0, "entry", list(begun))
    table = runs.short(table, ("entry", "state", "duration_s")).astype(object).set_index("entry").reindex(list(started))
    table["state"] = table["state"].fillna("lost")
    return table.reset_index()


def _open(kind: str, entries: list[Entry]) -> tuple[RunFolder, dict[str, dict[str, Any]]]:
    """The queue's folder: the newest unfinished one that asks for the same, else a new one; and what is known of each entry."""
    asked = [asdict(entry) for entry in entries]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    for path in reversed(runs.find_runs(kind)):
        record = read_record(path)
        if record.get("parameters", {}).get("digest") != digest or record["state"] == "done":
            continue
        if record["state"] == "running":
            raise UserError(
                f"The same {kind} is running already (process {record['pid']}, {path.name}); wait for it, or stop it with Ctrl-C there."
            )
        found = read_json(path / "queue.json")["runs"] if (path / "queue.json").exists() else {}
        kept = {name: {**row, "state": _state(row["run"])} for name, row in found.items()}
        return RunFolder.create(kind, {"digest": digest, "entries": len(entries)}, path=path), kept
    return RunFolder.create(kind, {"digest": digest, "entries": len(entries)}), {}


def _write(folder: RunFolder, entries: list[Entry], found: dict[str, dict[str, Any]]) -> None:
    write_json(folder.path / "queue.json", {"entries": [asdict(entry) for entry in entries], "runs": found})


def _start(entry: Entry, target: Path) -> subprocess.Popen:
    words = [word for name, value in entry.parameters.items() for word in ("-p", name, value)]
    command = [
        sys.executable,
        "-m",
        "vla_lib.cli",
        "run",
        str(notebook_path(entry.notebook)),
        "--run-dir",
        str(target),
        *words,
    ]
    with open(target / LOG_NAME, "ab") as log:  # its lines it writes there itself; this is for what it dies of
        # a session of its own: Ctrl-C reaches it once, from here; where this process is killed it is told to stop
        how = {"start_new_session": True, "preexec_fn": partial(die_with_parent, signal.SIGTERM), "cwd": os.getcwd()}
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, **how)


def _state(run: str) -> str:
    path = runs_root() / run
    return read_record(path)["state"] if (path / "run.json").exists() else "lost"


def _cause(row: dict[str, Any]) -> str:
    if row["state"] == "done":
        return ""
    path = runs_root() / row["run"]
    error = read_record(path).get("error") if (path / "run.json").exists() else f"it never began, see {path / LOG_NAME}"
    return f"\n  {(error or '').splitlines()[0] if error else ''}"


def _now() -> str:
    return time.strftime("%H:%M:%S")
