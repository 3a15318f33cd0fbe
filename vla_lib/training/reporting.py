"""What a run says of itself: run.json where no notebook keeps one, its log's lines, its results, its remedies."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from vla_lib.core.errors import UserError, in_words, needing_room
from vla_lib.core.run_folder import UNREADABLE, RunFolder, read_record
from vla_lib.episodes.survey import left_out
from vla_lib.features.binding import model_words
from vla_lib.training.data import TrainingData, cache_command
from vla_lib.training.process import StopRequest
from vla_lib.training.settings import TrainingSettings
from vla_lib.training.state import TrainState
from vla_lib.training.validation import BASELINES

GPU = "train/gpu_memory_gib"
CPU_FULL = "can't allocate memory"  # of torch's CPU allocator
STARVED = 0.2  # share of the time waited for data above which the loader is called the bottleneck


@contextlib.contextmanager
def recorded(run_dir: Path, settings: TrainingSettings, stop: StopRequest) -> Iterator[None]:
    """Inside is trained: run.json is opened, or this front door's again, and closed as done, cancelled or failed."""
    path = run_dir / "run.json"
    run = None
    with needing_room(path):
        if not path.exists():
            run = RunFolder.create(settings.name, settings.record(), path=run_dir)
        elif (before := read_record(run_dir))["state"] == UNREADABLE or before["name"] == settings.name:
            run = RunFolder.resume(run_dir, settings.record())  # else it is a notebook's, which keeps it itself
    try:
        yield
    except BaseException as error:
        with contextlib.suppress(OSError):  # the error counts, not that the full disk takes no record of it
            if run is not None:
                run.finish("cancelled" if isinstance(error, KeyboardInterrupt) else "failed", in_words(error))
        raise
    with needing_room(path):
        if run is not None:
            run.finish("cancelled" if stop.agreed else "done", f"stopped by {stop.agreed}" if stop.agreed else None)


@contextlib.contextmanager
def memory_remedies(settings: TrainingSettings) -> Iterator[None]:
    """Inside is trained: too little memory of the GPU or the machine becomes a UserError with its remedies."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own for the GPU's memory only
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_FULL in str(error):
            raise UserError(_out_of_memory(settings)) from error
        raise


def _out_of_memory(settings: TrainingSettings) -> str:
    """The guide's three remedies with this run's numbers; what --resume does not admit asks for a new run."""
    height, width = settings.image_resize_height // 2, settings.image_resize_width // 2
    size = f"--image-resize-height {height} --image-resize-width {width}"
    smaller_pictures = replace(settings, image_resize_height=height, image_resize_width=width)
    pictures = f"smaller pictures: {size}, with a VL cache built for them: {cache_command(smaller_pictures)}"
    if settings.batch_size == 1:
        smaller_policy = f"a smaller --width than {settings.width}"
        return f"Out of memory at batch size 1. Start a new run with (1) {smaller_policy}, or (2) {pictures}."
    smaller = settings.batch_size // 2
    more = math.ceil(settings.batch_size * settings.grad_accum_steps / smaller)
    return (
        f"Out of memory. Remedies, in this order: (1) --batch-size {smaller} instead of {settings.batch_size}, "
        f"(2) with it --grad-accum-steps {more} instead of {settings.grad_accum_steps} (the same effective batch), "
        f"and go on with --resume; (3) in a new run, {pictures}."
    )


def not_finite(settings: TrainingSettings, step: int, largest: list[tuple[float, str]]) -> str:
    """What to do about a loss or gradient that is not finite; `largest`: each process's largest loss, its sample."""
    spoilt = [where for loss, where in largest if not math.isfinite(loss)]
    odd = f"it comes from {spoilt[0]}" if spoilt else f"its gradient is; the largest loss is of {max(largest)[1]}"
    remedy = f"look for spoilt values there (notebook 01), or lower --lr ({settings.lr:g})"
    return f"The loss is not finite at step {step}: {odd}; {remedy}."


def data_lines(data: TrainingData, root: Path) -> list[str]:
    """What the marks leave out; a line a dataset (episodes, steps, weight, share of the draws); the data's notes."""
    rows = [f"VL features of {model_words(data.binding)}"]
    rows += [f"left out: {words}"] if (words := left_out(root)) else []
    rows += [
        f"{row['dataset']}: {row['train_episodes']} training and {row['val_episodes']} held-out episodes, "
        f"{row['train_steps']} steps, weight {row['weight']:g}, {100 * row['share']:.1f} % of the draws"
        for row in data.weights_table()
    ]
    return [*rows, *data.notes]


def step_note(row: dict[str, Any], loss_key: str, epoch: int, wait_share: float) -> str:
    """What is behind the bar: epoch, loss, learning rate, share of the epoch's time waited for data, a GPU's memory."""
    note = (
        f"epoch {epoch + 1}, loss {row[loss_key]:.4f}, lr {row['train/lr']:.2e}, loader wait {100 * wait_share:.0f} %"
    )
    return note + (f", GPU memory {row[GPU]:.1f} GiB" if GPU in row else "")


def epoch_lines(row: dict[str, Any], num_workers: int) -> list[str]:
    """The line of a validation, and a complaint about the loader where it starves the training."""
    waited = f"{100 * row['train/loader_wait_share']:.0f} %"
    lines = [f"epoch {row['epoch']:g} (step {row['step']}): loader wait {waited}"]
    if "val/action_loss" in row:
        baselines = ", ".join(f"{name} {row[f'val/baseline_{name}_action_loss']:.3f}" for name in BASELINES)
        lines[0] += f", held-out error {row['val/action_loss']:.3f} ({baselines})"
        lines[0] += f", {row['val/mae_mm']:.3f} mm, {row['val/mae_deg']:.3f} deg"
    if row["train/loader_wait_share"] > STARVED:
        lines += [
            f"The loader starves the training: {waited} of the time was waited for data. "
            f"Raise --num-workers (now {num_workers}), or put the dataset on a faster disk."
        ]
    return lines


def results(state: TrainState, data: TrainingData, stopped: bool, latest: Path, world: int) -> dict[str, Any]:
    """What results.json holds; the errors are those of the best validation."""
    best = state.best.get("metrics", {})
    parts = ("action_loss", "mae_mm", "mae_deg")
    baselines = {name: {part: best.get(f"val/baseline_{name}_{part}") for part in parts} for name in BASELINES}
    return {
        "step": state.step,
        "epochs": state.epoch,
        "state": "stopped" if stopped else "done",
        "train_episodes": len(data.split["train"]),
        "val_episodes": len(data.split["val"]),
        "train_samples": len(data.train),
        "val_loss": best.get("val/loss_epoch"),
        "best_step": state.best.get("step"),
        "val_action_loss": best.get("val/action_loss"),
        "val_mae_mm": best.get("val/mae_mm"),
        "val_mae_deg": best.get("val/mae_deg"),
        "baselines": baselines if best else {},
        "parameters": sum(weight.numel() for weight in state.trained.parameters()),
        "processes": world,
        "wall_s": round(state.elapsed_s, 3),
        "cache": data.binding.get("id"),
        "checkpoint": str(latest),
        "run_dir": str(latest.parent.parent),
    }
