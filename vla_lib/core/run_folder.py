"""A run's folder `runs/<UTC time>-<name>/`: its record run.json, whose state is always true, and its results.json. Both
are written here only.

run.json holds state (running, done, failed, cancelled, lost), parameters, git, versions, times, the owner's process and
the error. It is written atomically at every change. A record that says `running` while its process is gone is read as
`lost` (see `read_record`).
"""

import contextlib
import importlib.metadata
import itertools
import os
import platform
import socket
import subprocess
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json

PROJECT = Path(__file__).resolve().parents[2]
STATES = ("running", "done", "failed", "cancelled", "lost")
VERSIONS_OF = ("vla-workbench", "torch", "transformers", "accelerate", "diffusers", "numpy", "papermill", "mujoco")


def runs_root() -> Path:
    """Folder that holds the run folders, absolute: `$VLA_RUNS` if set, else `runs/` of the project."""
    return Path(os.environ.get("VLA_RUNS") or PROJECT / "runs").expanduser().absolute()


@dataclass
class RunFolder:
    """One run's folder and its record. `create` makes it; exactly one process owns it and calls `finish`."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def create(cls, name: str, parameters: dict[str, Any], path: Path | None = None, **extra: Any) -> "RunFolder":
        """Make the folder (or use the given empty one) and write a `running` record owned by this process."""
        path = new_folder(name) if path is None else Path(path).expanduser().absolute()
        path.mkdir(parents=True, exist_ok=True)
        return cls(path, {"name": name, **_opened(parameters), **extra})._saved()

    @classmethod
    def resume(cls, path: Path, parameters: dict[str, Any]) -> "RunFolder":
        """Open the ended record of `path` again, as `running` and owned by this process; `first_started` keeps when it
        first began."""
        before = read_json(path / "run.json")
        first = before.get("first_started") or before["started"]
        return cls(path, {**before, **_opened(parameters), "first_started": first})._saved()

    def _saved(self) -> "RunFolder":
        write_json(self.path / "run.json", self.record)
        return self

    def finish(self, state: str, error: str | None = None, mended: bool = False) -> None:
        """Close the record as `done`, `failed`, `cancelled` or `lost`. The first closing holds; only where the run is
        `mended`, one as failed or cancelled does not."""
        if state not in STATES[1:]:
            raise ValueError(f"a run cannot end as {state!r}")
        if self.record["state"] not in (("running", "failed", "cancelled") if mended else ("running",)):
            return
        ended = datetime.now(UTC)
        took = round((ended - datetime.fromisoformat(self.record["started"])).total_seconds(), 3)
        self.record.update(state=state, error=error, ended=ended.isoformat(timespec="milliseconds"), duration_s=took)
        self._saved()


def read_record(path: Path) -> dict[str, Any]:
    """The record of the run folder `path`, with `state` = `lost` where it says running but its process is gone.

    Raises UserError where the folder has no readable run.json.
    """
    record = read_json(Path(path) / "run.json")
    if not isinstance(record, dict) or record.get("state") not in STATES:
        raise UserError(f"{path}/run.json is not a run record; remove the folder or restore the file.")
    if record["state"] == "running" and record.get("host") == socket.gethostname() and not _alive(record):
        record["state"] = "lost"
    return record


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of the run folder `path`, empty where it has none yet. Raises UserError where it is no JSON
    object."""
    file = Path(path) / "results.json"
    found = read_json(file) if file.exists() else {}
    if not isinstance(found, dict):
        raise UserError(f"{file} is not a table of results; remove or restore it.")
    return found


def write_results(path: Path, results: dict[str, Any]) -> dict[str, Any]:
    """Merge `results` into the results.json of the run folder `path`, its only writer; returns all of them."""
    merged = {**read_results(path), **results}
    write_json(Path(path) / "results.json", merged)
    return merged


def _opened(parameters: dict[str, Any]) -> dict[str, Any]:
    """The part of a record that a start decides, owned by this process."""
    process = psutil.Process()
    return {
        "state": "running",
        "started": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "ended": None,
        "duration_s": None,
        "parameters": parameters,
        "error": None,
        "pid": process.pid,
        "pid_created": process.create_time(),
        "host": socket.gethostname(),
        "git": git_state(),
        "versions": versions(),
    }


def _alive(record: dict[str, Any]) -> bool:
    try:
        process = psutil.Process(record["pid"])
        # numbers are used again: the owner is known by when it began, too
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - record["pid_created"]) < 1.0
    except (psutil.NoSuchProcess, KeyError, TypeError):
        return False


def new_folder(name: str) -> Path:
    """Make `runs/<UTC time>-<name>`, a folder that no run has had; returns its path."""
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    path = runs_root() / f"{stamp}-{name}"
    for number in itertools.count(1):
        try:
            path.mkdir(parents=True)
            break
        except FileExistsError:  # of two runs in the same second
            path = runs_root() / f"{stamp}.{number}-{name}"
    return path


def git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the project's checkout, None outside one."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(PROJECT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        changed = len(git("status", "--porcelain").splitlines())
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed": changed,
        }
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in VERSIONS_OF:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
