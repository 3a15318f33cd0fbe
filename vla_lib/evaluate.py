"""Evaluates a checkpoint on its held-out episodes beside the zero, mean and persistence baselines."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json


@dataclass(frozen=True)
class Settings:
    """Evaluate a checkpoint on the episodes that its training held out."""

    checkpoint: Path
    """Checkpoint file, e.g. runs/<run>/checkpoints/qwen_vla_async_best.pt."""
    dataset_root: Annotated[Path, tyro.conf.arg(aliases=("--dataset-dir",))] = Path("dataset")
    """Folder of the data set that the checkpoint was trained on."""
    episodes: Literal["val", "train"] = "val"
    """Which episodes of the checkpoint's recorded split."""
    batch_size: int = 64
    """Samples in one forward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    run_dir: Path | None = None
    """Folder that gets results.json; default: none, the results are printed only."""

    def __post_init__(self) -> None:
        if not Path(self.checkpoint).is_file():
            raise UserError(f"There is no checkpoint {self.checkpoint}; train one first, or give the path of its .pt file.")
        if not Path(self.dataset_root).is_dir():
            raise UserError(f"There is no dataset root {self.dataset_root}; give the folder that holds the datasets with --dataset-root.")
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; give 1 or more.")


def main(settings: Settings) -> dict[str, Any]:
    """Evaluate, print the table, write results.json into the run folder; returns the results."""
    import torch

    from vla_lib.evaluation.open_loop import evaluate_open_loop
    from vla_lib.evaluation.summary import error_table, results

    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    found = evaluate_open_loop(settings.checkpoint, settings.dataset_root, settings.episodes, settings.batch_size, device)
    summary = {"checkpoint": str(settings.checkpoint), "episodes": settings.episodes, **results(found)}
    print(error_table(found.metrics()).to_string(index=False, float_format="{:.3f}".format))
    if settings.run_dir is not None:
        write_json(settings.run_dir / "results.json", summary)
    return summary


if __name__ == "__main__":
    frontdoor.start(Settings, main)
