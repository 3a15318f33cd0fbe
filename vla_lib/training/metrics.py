"""Metric rows in; the same rows in metrics.jsonl and in Weights & Biases out, without a doubled or missing step after a resumption."""

import contextlib
import json
import netrc
import os
import time
from pathlib import Path
from typing import Any

from vla_lib.core.files import append_jsonl, read_jsonl, write_text


def truncate(path: Path, step: int, epochs: float) -> None:
    """Drop what an interrupted run wrote after its newest checkpoint: rows beyond `step`, and validations beyond `epochs` epochs."""
    rows = read_jsonl(path)
    kept = [r for r in rows if r.get("step", 0) <= step and r.get("epoch", 0) <= epochs]
    if path.exists():
        write_text(path, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))


def wandb_mode(asked: str) -> str:
    """`auto` becomes `online` where a key is set (environment or netrc), else `offline`: a run never waits for a network."""
    if asked != "auto":
        return asked
    if os.environ.get("WANDB_MODE") in ("offline", "disabled", "dryrun"):
        return "disabled" if os.environ["WANDB_MODE"] == "disabled" else "offline"
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    with contextlib.suppress(OSError, netrc.NetrcParseError):
        if netrc.netrc().authenticators("api.wandb.ai"):
            return "online"
    return "offline"


class MetricsLog:
    """Appends to `<run_dir>/metrics.jsonl` and logs to W&B. Only the main process makes one.

    A row is `{"step", "time", "elapsed_s", "train/..."}` for each optimiser step or `{"epoch", "step", ..., "val/..."}` after each
    validation. W&B continues the run whose id the first start put into the checkpoint; a failure of W&B never stops a training.
    """

    def __init__(self, run_dir: Path, project: str, mode: str, config: dict[str, Any], wandb_id: str):
        self.path = run_dir / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        self._wandb = self._start(project, wandb_mode(mode), config, wandb_id, run_dir)

    @staticmethod
    def _start(project: str, mode: str, config: dict[str, Any], wandb_id: str, run_dir: Path) -> Any:
        if mode == "disabled":
            return None
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            options = {"project": project, "id": wandb_id, "name": run_dir.name, "config": config, "dir": str(run_dir)}
            try:
                resume = {"resume": "allow"} if mode == "online" else {}
                return wandb.init(mode=mode, settings=wandb.Settings(init_timeout=30, console="off"), **options, **resume)
            except Exception as error:
                if mode == "offline":
                    raise
                print(f"W&B cannot be reached ({error}); this run is kept offline, `wandb sync` uploads it later.", flush=True)
                return wandb.init(mode="offline", settings=wandb.Settings(console="off"), **options)
        except Exception as error:
            print(f"W&B is not available ({error}); metrics.jsonl has every figure.", flush=True)
            return None

    def log(self, row: dict[str, Any]) -> None:
        """Write one row; its `step` is W&B's step."""
        append_jsonl(self.path, {**row, "time": time.time()})
        if self._wandb is not None:
            values = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
            try:
                self._wandb.log(values, step=row["step"])
            except Exception as error:
                print(f"W&B stopped taking figures ({error}); metrics.jsonl has every one.", flush=True)
                self._wandb = None

    def close(self) -> None:
        """Finish the W&B run."""
        if self._wandb is not None:
            with contextlib.suppress(Exception):
                self._wandb.finish(quiet=True)
            self._wandb = None
