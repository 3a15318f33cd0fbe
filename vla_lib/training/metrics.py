"""The metrics of a run: the same rows in metrics.jsonl and in W&B, no step doubled or missing after a resumption."""

import contextlib
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from vla_lib.core.errors import needing_room
from vla_lib.core.files import append_jsonl, read_jsonl, write_text

REACH_S = 30.0  # how long a run waits for W&B when it starts
UPLOAD_S = 120.0  # and for its last figures to be taken when it ends
END_S = 10.0  # and for its service process to end


def truncate(path: Path, step: int, validated: int) -> None:
    """Drop what a run wrote after its newest checkpoint: rows beyond `step`, validations beyond `validated`."""
    rows = [row for row in read_jsonl(path) if row.get("step", 0) <= (validated if "epoch" in row else step)]
    if path.exists():
        with needing_room(path):
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def wandb_mode(asked: str) -> str:
    """`auto`: `online` where a key is set (environment, or `wandb login`), else `offline`. Asks no network."""
    os.environ.setdefault("WANDB_SILENT", "true")  # else `login` asks its server for the name in "logged in as"
    if asked != "auto":
        return asked
    if (mode := os.environ.get("WANDB_MODE")) in ("offline", "disabled", "dryrun"):
        return "disabled" if mode == "disabled" else "offline"
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        import wandb

        return "online" if wandb.login(prompt=False, verify=False) else "offline"
    except Exception:  # a spoilt key or settings file
        return "offline"


class MetricsLog:
    """Appends to `<run_dir>/metrics.jsonl` and logs to W&B. Only the main process makes one.

    A row is `{"step", "time", "elapsed_s", "train/..."}` for each optimiser step or `{"epoch", "step", ...,
    "val/..."}` after each validation. W&B continues the run whose id the first start put into the checkpoint: rows
    that it lacks are sent again from metrics.jsonl, which `truncate` has cut back to the checkpoint. A failure of W&B
    never stops a run."""

    def __init__(self, run_dir: Path, project: str, mode: str, config: dict[str, Any], wandb_id: str) -> None:
        self.path = run_dir / "metrics.jsonl"
        with needing_room(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()
        # of the program that started this one: it keeps the id of a killed run in use
        os.environ.pop("WANDB_SERVICE", None)
        options = {"project": project, "id": wandb_id, "name": run_dir.name, "config": config, "dir": str(run_dir)}
        self._wandb = _start(wandb_mode(mode), options)
        if self._wandb is not None:
            for row in read_jsonl(self.path):
                if row["step"] >= self._wandb.starting_step:  # 0 in a new or an offline run
                    self._send(row)
            # of starts before this one, which has all of theirs
            for folder in run_dir.glob(f"wandb/*run-*-{wandb_id}"):
                if folder != self._folder:
                    shutil.rmtree(folder, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return Path(self._wandb.dir).parent

    def log(self, row: dict[str, Any]) -> None:
        """Write one row; its `step` is W&B's step. Raises UserError on a full disk: no step must be missing."""
        row = {**row, "time": time.time()}
        with needing_room(self.path):
            append_jsonl(self.path, row)
        self._send(row)

    def _send(self, row: dict[str, Any]) -> None:
        if self._wandb is None:
            return
        values = {k: v for k, v in row.items() if isinstance(v, int | float) and k not in ("step", "time")}
        try:
            # a validation that an interrupted run still owed its last step lies before W&B's first one
            step = max(row["step"], self._wandb.starting_step)
            self._wandb.log({**values, "_timestamp": row["time"]}, step=step)
        except Exception as error:
            print(f"W&B stopped taking figures ({error}); metrics.jsonl has every one.", flush=True)
            self._wandb = None

    def close(self) -> None:
        """Finish the W&B run; where its figures are not taken in time, say how to upload them later."""
        if self._wandb is None:
            return
        folder = self._folder
        try:
            self._wandb.finish()
        except Exception as error:
            print(f"W&B has not taken every figure ({error}); `wandb sync {folder}` uploads them.", flush=True)
        self._wandb = None
        _end_service()


def _start(mode: str, options: dict[str, Any]) -> Any:
    """The W&B run, offline where W&B cannot be reached; None where there is to be none, or none can be."""
    if mode == "disabled":
        return None
    try:
        import wandb

        patience = wandb.Settings(
            init_timeout=REACH_S, finish_timeout=UPLOAD_S, finish_timeout_raises=True, console="off"
        )
        if mode == "online":
            try:
                return wandb.init(mode="online", resume="allow", settings=patience, **options)
            except Exception as error:
                print(f"W&B cannot be reached ({' '.join(str(error).split())}).", flush=True)
                _end_service()  # what is left of this try holds the run's id
        run = wandb.init(mode="offline", settings=patience, **options)
        print(f"W&B keeps this run offline; `wandb sync {Path(run.dir).parent}` uploads it.", flush=True)
        return run
    except Exception as error:
        print(f"W&B is not available ({error}); metrics.jsonl has every figure.", flush=True)
        return None


def _end_service() -> None:
    """End W&B's service process; kill it where it does not end (seen after a run's end): a run must not wait."""
    import wandb

    services = [process for process in psutil.Process().children() if "wandb-core" in process.name()]
    ending = threading.Thread(target=wandb.teardown, daemon=True)
    ending.start()
    ending.join(END_S)
    for process in services:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    ending.join(END_S)
