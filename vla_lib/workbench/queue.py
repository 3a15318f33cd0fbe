"""Named notebook runs, some at a time, each in a process of its own: a failing one stops nothing, what is done is not
done again.

    vla sweep 04_train_async --grid lr=1e-4,5e-5 vlm_reuse_count=3,4 --parallel 2
    vla night jobs.yaml          # - {name: wide, notebook: 04_train_async, parameters: {width: 256}}

The queue's folder below runs/ holds queue.json (what is asked for, and each entry's run), the supervised jobs, and
comparison.csv. The same command goes on with a queue that was stopped or had failures. An entry is a `vla run`, so that
a crash touches no other entry.
"""

import asyncio
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json, write_text
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import RunFolder, new_folder, read_record, runs_root
from vla_lib.workbench import runs
from vla_lib.workbench.jobs import GRACE_S, Job, JobCancelled, JobFailed
from vla_lib.workbench.notebook import shown
from vla_lib.workbench.parameters import notebook_path, resolve


@dataclass(frozen=True)
class Entry:
    """One run of a queue: a name, a notebook and its parameters as command-line words."""

    name: str
    notebook: str
    parameters: dict[str, str] = field(default_factory=dict)


def grid(notebook: str, axes: Sequence[str], fixed: dict[str, str]) -> list[Entry]:
    """Every combination of `name=value,value` axes over the `fixed` parameters. Raises UserError for anything else than
    such an axis."""
    values: dict[str, list[str]] = {}
    for axis in axes:
        name, _, words = axis.partition("=")
        if not name or not all(words.split(",")):
            raise UserError(f"--grid wants NAME=VALUE,VALUE..., not {axis!r}.")
        if name in values or name in fixed:
            raise UserError(f"Parameter {name} is given twice; give it once.")
        values[name] = words.split(",")
        if len(set(values[name])) < len(values[name]):
            raise UserError(f"--grid {axis}: a value of {name} is given twice; give each once.")
    chosen = [dict(zip(values, combination, strict=True)) for combination in itertools.product(*values.values())]
    return [Entry(" ".join(f"{key}={value}" for key, value in one.items()), notebook, fixed | one) for one in chosen]


def read_list(path: Path) -> list[Entry]:
    """The entries of a YAML list of `{name, notebook, parameters}`; values mean what the same words mean on a command
    line.

    Raises UserError naming the file and the entry for anything else.
    """
    try:  # the base loader leaves text as it is: neither dates nor `no` for False
        listed = yaml.load(Path(path).read_text(), Loader=yaml.BaseLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(listed, list) or not listed:
        example = "`- {name: wide, notebook: 04_train_async, parameters: {lr: 1e-4}}`"
        raise UserError(f"{path} must hold a list of runs: {example}.")
    found: list[Entry] = []
    for number, row in enumerate(listed, 1):
        where = f"{path}, entry {number}"
        known = isinstance(row, dict) and not set(row) - {"name", "notebook", "parameters"}
        if not known or not isinstance(row.get("notebook"), str):
            raise UserError(f"{where}: wants a notebook, and may have a name and parameters; it is {row!r}.")
        parameters, name = row.get("parameters") or {}, row.get("name") or f"{number} {row['notebook']}"
        if not isinstance(parameters, dict):
            raise UserError(f"{where}: parameters are NAME: VALUE pairs, not {parameters!r}.")
        if not isinstance(name, str):
            raise UserError(f"{where}: its name is text, not {name!r}.")
        if name in [entry.name for entry in found]:
            raise UserError(f"{path}: two entries are named {name!r}; name each once.")
        words = {key: _word(value, f"{where}: parameter {key}") for key, value in parameters.items()}
        found.append(Entry(name, row["notebook"], words))
    return found


def _word(value: Any, where: str) -> str:
    """A value of a YAML list as a command-line word; a list of words is one too."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return json.dumps(value)
    if not isinstance(value, str):
        raise UserError(f"{where} is one value or a list of words, not {value!r}.")
    return value


def run(kind: str, entries: list[Entry], parallel: int = 1) -> int:
    """Run the entries, `parallel` at a time; prints each one's start and end, then the comparison. Returns 0, 1 where
    one failed, 130 where it was stopped. Raises UserError for an unknown notebook, parameter or value before anything
    starts."""
    if parallel < 1:
        raise UserError(f"--parallel is {parallel}; give 1 or more.")
    for entry in entries:
        try:
            resolve(notebook_path(entry.notebook), entry.parameters, text=True)
        except UserError as error:
            raise UserError(f"{kind}, {entry.name}: {error}") from None
    queue = Queue.open(kind, entries)
    waiting = [entry for entry in entries if queue.found.get(entry.name, {}).get("state") != "done"]
    done = len(entries) - len(waiting)
    print(f"{kind}: {len(entries)} runs, {done} done already; {shown(queue.folder.path)}", flush=True)
    state, why = "failed", ""
    try:
        asyncio.run(queue.work(waiting, parallel))
        failed = [name for name, row in queue.found.items() if row["state"] != "done"]
        state = "failed" if failed else "done"
        why = f"{len(failed)} of {len(entries)} runs did not end as done: {', '.join(failed)}" if failed else ""
    except KeyboardInterrupt:
        state, why = "cancelled", "interrupted; the same command goes on"
    finally:
        queue.folder.finish(state, why or None)
        table = queue.comparison()
        write_text(queue.folder.path / "comparison.csv", table.to_csv(index=False))
        where = shown(queue.folder.path / "comparison.csv")
        print(f"\n{table.to_string(index=False, na_rep='')}\n\n{where}", flush=True)
        if why:
            print(f"error: {why}", file=sys.stderr)
    return {"done": 0, "cancelled": 130}.get(state, 1)


@dataclass
class Queue:
    """A queue's folder, its entries, and of each that was started its run and state."""

    folder: RunFolder
    entries: list[Entry]
    found: dict[str, dict[str, str]]

    @classmethod
    def open(cls, kind: str, entries: list[Entry]) -> "Queue":
        """The newest unfinished queue that asks for the same, else a new one. Raises UserError where that one is
        running."""
        asked = runs.digest([asdict(entry) for entry in entries])
        same = [path for path in runs.find_runs(kind) if read_record(path)["parameters"].get("digest") == asked]
        same = [path for path in same if read_record(path)["state"] != "done"]
        path, found = (same[-1] if same else None), {}
        if path and read_record(path)["state"] == "running":
            which = f"process {read_record(path)['pid']}, {path.name}"
            raise UserError(f"The same {kind} is running already ({which}); wait for it, or stop it with Ctrl-C there.")
        if path and (path / "queue.json").exists():
            rows = read_json(path / "queue.json")["runs"]
            found = {name: {**row, "state": _state(row["run"])} for name, row in rows.items()}
        wanted = {"digest": asked, "entries": len(entries)}
        return cls(RunFolder.resume(path, wanted) if path else RunFolder.create(kind, wanted), entries, found)

    async def work(self, waiting: list[Entry], parallel: int) -> None:
        """Run the entries, `parallel` at a time."""
        slots = asyncio.Semaphore(parallel)
        await asyncio.gather(*(self.run(entry, slots) for entry in waiting))

    async def run(self, entry: Entry, slots: asyncio.Semaphore) -> None:
        """Run one entry to its end, however that is, once there is a slot for it."""
        async with slots:
            target, start = new_folder(notebook_path(entry.notebook).stem), time.monotonic()
            row = self.found[entry.name] = {"run": target.name, "state": "running"}
            self.save()
            job = self.job(entry, target)
            print(f"{_now()} started {entry.name}: {shown(target)}", flush=True)
            try:
                await job.watch(lambda lines: None)
            except (JobFailed, JobCancelled) as error:
                task = asyncio.current_task()
                if task and task.cancelling():  # Ctrl-C: this entry is stopped, and so is the queue
                    raise asyncio.CancelledError from error
            finally:
                row["state"] = _state(target.name)
                self.save()
            cause = "" if row["state"] == "done" else f"\n  {_cause(target, job.log)}"
            print(f"{_now()} {row['state']} after {clock(time.monotonic() - start)}: {entry.name}{cause}", flush=True)

    def job(self, entry: Entry, target: Path) -> Job:
        """The supervised `vla run` of an entry in the run folder `target`; it is given time to stop a training of its
        own."""
        words = [word for name, value in entry.parameters.items() for word in ("-p", name, value)]
        command = [sys.executable, "-m", "vla_lib.cli", "run", str(notebook_path(entry.notebook))]
        folder = self.folder.path / "jobs" / target.name
        return Job([*command, "--run-dir", str(target), *words], folder, "vla.log", grace_s=2 * GRACE_S + 15)

    def save(self) -> None:
        """Write queue.json."""
        asked = [asdict(entry) for entry in self.entries]
        write_json(self.folder.path / "queue.json", {"entries": asked, "runs": self.found})

    def comparison(self) -> pd.DataFrame:
        """One row an entry that was started: name, state, duration, the parameters that differ between entries, the key
        results; `lost` alone where it never began."""
        known = [entry.name for entry in self.entries if entry.name in self.found]
        folders = {name: runs_root() / self.found[name]["run"] for name in known}
        begun = {name: path for name, path in folders.items() if (path / "run.json").exists()}
        table = runs.table(of=begun.values())
        table.insert(0, "entry", list(begun))
        table = runs.short(table, ("entry", "state", "duration_s")).astype(object).set_index("entry").reindex(known)
        table["state"] = table["state"].fillna("lost")
        return table.reset_index()


def _state(run: str) -> str:
    path = runs_root() / run
    return read_record(path)["state"] if (path / "run.json").exists() else "lost"


def _cause(run: Path, log: Path) -> str:
    if not (run / "run.json").exists():
        return f"it never began, see {log}"
    return (read_record(run).get("error") or "").partition("\n")[0]


def _now() -> str:
    return time.strftime("%H:%M:%S")
