"""A run's folder `runs/<UTC time>-<name>/`: run.json, whose state is always true, and results.json; written here only.

run.json holds state (running, done, failed, cancelled, lost, pruned), parameters, git, versions, times, the owner's
process and the error. It is written atomically at every change. A record that says `running` while its process is gone
is read as `lost` (see `read_record`).
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
from typing import Annotated, Any, Literal

import psutil
from annotated_types import Gt, Le
from pydantic import AfterValidator, BaseModel, ValidationError

from vla_lib.core.errors import UserError, needing_room
from vla_lib.core.files import read_json, reserve, write_json, write_reserved
from vla_lib.core.owner import Owner, alive, elsewhere, living, owner_file

PROJECT = Path(__file__).resolve().parents[2]
STATES = ("running", "done", "failed", "cancelled", "lost", "pruned", "submitted")
UNREADABLE = "unreadable"  # what stands for the state of a record that is none
RUN = "run"  # the role of whoever writes run.json
VERSIONS_OF = ("vla-workbench", "torch", "transformers", "accelerate", "diffusers", "numpy", "papermill", "mujoco")


def runs_root() -> Path:
    """Folder that holds the run folders, absolute: `$VLA_RUNS` if set, else `runs/` of the project."""
    return Path(os.environ.get("VLA_RUNS") or PROJECT / "runs").expanduser().absolute()


class _Git(BaseModel, strict=True):
    commit: str
    changed: int


class _Data(BaseModel, strict=True):
    episodes: int
    fingerprint: str
    caches: list[str]


class _Record(BaseModel, strict=True):
    """What readers take from a record without asking; there may be more."""

    name: str
    state: Literal["running", "done", "failed", "cancelled", "lost", "pruned", "submitted"]
    started: Annotated[str, AfterValidator(datetime.fromisoformat)]
    parameters: dict[str, Any] = {}
    duration_s: float | None = None
    error: str | None = None
    notebook: str = ""
    host: str = ""
    pid: Annotated[int, Gt(0), Le(2**31)] = 1
    pid_created: float = 0.0
    git: _Git | None = None
    data: _Data | None = None
    versions: dict[str, str] = {}


@dataclass
class RunFolder:
    """One run's folder and its record. `create` makes it; exactly one process owns it and calls `finish`."""

    path: Path
    record: dict[str, Any] = field(default_factory=dict)
    owner: Owner | None = None

    @classmethod
    def create(cls, name: str, parameters: dict[str, Any], path: Path | None = None, **extra: Any) -> "RunFolder":
        """Make the folder (or use the given one) and write a `running` record owned by this process. Raises UserError
        where the folder holds a run already, another process works in it, or it cannot be written."""
        made = True  # by us: `vla runs rm` removes no folder that was there before
        if path is not None:
            path = Path(path).expanduser().absolute()
            made = not path.exists() or not {file.name for file in path.iterdir()} - {owner_file(path).name}
        with needing_room(path or runs_root(), "Make room there, or set VLA_RUNS to a folder that can be written."):
            return cls(path or new_folder(name))._open({"name": name, **_opened(parameters), "made": made, **extra})

    @classmethod
    def resume(cls, path: Path, parameters: dict[str, Any]) -> "RunFolder":
        """Open the ended record of `path` again, as `running` and owned by this process; `first_started` keeps when it
        first began. Raises UserError where it is no record, or another process works there."""
        before = read_record(path)
        if before["state"] == UNREADABLE:
            raise UserError(before["error"])
        first = before.get("first_started") or before["started"]
        return cls(path)._open({**before, **_opened(parameters), "first_started": first}, again=True)

    def _open(self, record: dict[str, Any], again: bool = False) -> "RunFolder":
        self.owner = Owner.take(self.path, RUN)
        try:
            if not again and (self.path / "run.json").exists():
                raise UserError(f"{self.path} holds a run already; give another folder.")
            self.record = record
            write_json(self.path / "run.json", record)
        except BaseException:
            self.owner.release()
            raise
        reserve(self.path / "run.json")
        return self

    def note_parameters(self, parameters: dict[str, Any]) -> None:
        """Write other parameters into the record."""
        self.record["parameters"] = dict(parameters)
        write_json(self.path / "run.json", self.record)

    def finish(self, state: str, error: str | None = None, mended: bool = False) -> None:
        """Close the record as `done`, `failed`, `cancelled`, `lost`, or `submitted` to a cluster. The first closing
        holds; only where the run is `mended`, one as failed or cancelled does not."""
        if state not in STATES[1:]:
            raise ValueError(f"a run cannot end as {state!r}")
        if self.record["state"] not in (("running", "failed", "cancelled") if mended else ("running",)):
            return
        ended = datetime.now(UTC)
        took = round((ended - datetime.fromisoformat(self.record["started"])).total_seconds(), 3)
        self.record.update(state=state, error=error, ended=ended.isoformat(timespec="milliseconds"), duration_s=took)
        write_reserved(self.path / "run.json", self.record)  # also where the disk is full
        if self.owner is not None:
            self.owner.release()


def read_record(path: Path) -> dict[str, Any]:
    """The record of the run folder `path`, with `state` = `lost` where it says running but its process is gone.

    A file that is no record gives one that says so, with the state UNREADABLE and the remedy as its error: one damaged
    folder hides no other. Raises UserError where there is no run.json.
    """
    path = Path(path)
    try:
        record = read_json(path / "run.json")
        _Record.model_validate(record)
    except (UserError, ValidationError) as error:
        if not (path / "run.json").exists():
            raise
        why = f"{error}" if isinstance(error, UserError) else _in_words(path / "run.json", error)
        return {"name": path.name, "state": UNREADABLE, "started": "", "parameters": {}, "error": why}
    if record["state"] == "running" and not _running(path, record):
        record["state"] = "lost"
    return {"parameters": {}, **record}


def _in_words(file: Path, error: ValidationError) -> str:
    odd = "; ".join(f"{'.'.join(map(str, one['loc'])) or 'it'}: {one['msg']}" for one in error.errors()[:3])
    return f"{file} is not a run record ({odd}); restore the file, or remove its folder by hand."


def _running(path: Path, record: dict[str, Any]) -> bool:
    """Whether the process that wrote a running record lives, as far as this machine can know."""
    if elsewhere(owner_file(path, RUN)):
        return bool(living(owner_file(path, RUN)))
    return record.get("host") != socket.gethostname() or alive(record.get("pid"), record.get("pid_created"))


def close_as_pruned(path: Path, why: str) -> None:
    """Say of a run that was cancelled that a sweep has stopped it as a poor one."""
    record = read_record(path)
    if record["state"] == "cancelled":
        write_json(Path(path) / "run.json", record | {"state": "pruned", "error": why})


def read_results(path: Path) -> dict[str, Any]:
    """The results.json of the run folder `path`, empty where it has none. UserError where it is no JSON object."""
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
