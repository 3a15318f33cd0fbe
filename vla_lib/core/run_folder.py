"""A run folder: a name and parameters in; `runs/<UTC time>-<name>/run.json` with a truthful state out.

`run.json` holds state (running, done, failed, cancelled), parameters, git, versions, times, the owner's process and the error. It is written
atomically at every change. A record that says `running` while its process is gone is read as `lost` (see `read_record`).
"""

import importlib.metadata
import os
import platform
import socket
import subprocess
import time
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
        run = cls(path, {"name": name, **_opened(parameters), **extra})
        run.save()
        return run

    @classmethod
    def resume(cls, path: Path, parameters: dict[str, Any]) -> "RunFolder":
        """Open the ended record of `path` again, as `running` and owned by this process; `first_started` keeps when it first began."""
        before = read_json(path / "run.json")
        run = cls(
            path, {**before, **_opened(parameters), "first_started": before.get("first_started") or before["started"]}
        )
        run.save()
        return run

    def save(self) -> None:
        """Write the record."""
        write_json(self.path / "run.json", self.record)

    def reopen(self) -> None:
        """Make a record that was closed as failed or cancelled a running one again."""
        if self.record["state"] in ("failed", "cancelled"):
            self.record.update(state="running", error=None, ended=None, duration_s=None)

    def finish(self, state: str, error: str | None = None) -> None:
        """Close the record as `done`, `failed`, `cancelled` or `lost`; the first closing holds unless it is `reopen`ed."""
        if state not in STATES[1:]:
            raise ValueError(f"a run cannot end as {state!r}")
        if self.record.get("state") != "running":
            return
        ended = datetime.now(UTC)
        started = datetime.fromisoformat(self.record["started"])
        self.record.update(
            state=state,
            error=error,
            ended=ended.isoformat(timespec="milliseconds"),
            duration_s=round((ended - started).total_seconds(), 3),
        )
        self.save()


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
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - record["pid_created"]) < 1.0
    except (psutil.NoSuchProcess, KeyError, TypeError):
        return False


def new_folder(name: str) -> Path:
    """Make `runs/<UTC time>-<name>`, a folder that no run has had; returns its path."""
    root = runs_root()
    while True:
        stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
        for suffix in ("", *(f".{k}" for k in range(1, 100))):
            path = root / f"{stamp}{suffix}-{name}"
            try:
                path.mkdir(parents=True)
                return path
            except FileExistsError:
                continue
        time.sleep(0.2)


def git_state() -> dict[str, Any] | None:
    """Commit and cleanliness of the project's checkout, None outside one."""

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PROJECT), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return {
            "commit": git("rev-parse", "HEAD"),
            "branch": git("rev-parse", "--abbrev-ref", "HEAD"),
            "changed": len(git("status", "--porcelain").splitlines()),
        }
    except (OSError, subprocess.SubprocessError):
        return None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for package in VERSIONS_OF:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of the run folder `path`, empty where it has none yet. Raises UserError where it is no JSON object."""
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
