"""The cell of notebook 04 that trains, as a person sees and stops it."""

from pathlib import Path
from typing import Any

from vla_lib.core.files import read_json, read_jsonl
from vla_lib.core.run_folder import read_record
from vla_lib.training.checkpoint import read_checkpoint

# few steps of a few episodes
FEW = {"batch_size": 8, "grad_accum_steps": 1, "max_steps": 4, "val_fraction": 0.3, "num_workers": 0, "ddim_steps": 2}


def shows_curves(desk, cell: Any) -> bool:
    assert desk.errors() == []
    return "ETA" in cell.inner_text() and cell.locator("img.jupyter-widgets.widget-image").is_visible()


def stop(desk, cell: Any, found: Path, steps: int) -> None:
    """Press Stop; the job ends with a checkpoint of all its steps."""
    cell.locator("button.jupyter-button", has_text="Stop").click()
    desk.until(lambda: read_record(found)["state"] != "running")
    assert read_record(found)["state"] == "cancelled" and read_json(found / "job.json")["state"] == "ended"
    assert read_checkpoint(found / "checkpoints" / "qwen_vla_async.pt")["step"] >= steps
    desk.until(lambda: "; saved; go on with resume_run" in cell.inner_text())


def step(found: Path) -> int:
    return max(row["step"] for row in read_jsonl(found / "metrics.jsonl") if "step" in row)
