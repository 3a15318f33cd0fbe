"""What a training knows in; the sentences of its log, its results and its out-of-memory advice out."""

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vla_lib.core.errors import UserError
from vla_lib.training.data import TrainingData
from vla_lib.training.settings import TrainingSettings
from vla_lib.training.validation import BASELINES

if TYPE_CHECKING:
    from vla_lib.training.loop import Trainer

GPU = "train/gpu_memory_gib"
CPU_FULL = "can't allocate memory"  # of torch's CPU allocator
STARVED = 0.2  # share of the time waited for data above which the loader is called the bottleneck


def out_of_memory(settings: TrainingSettings) -> str:
    """The guide's three remedies, filled in with this run's numbers; those that --resume does not admit ask for a new run."""
    pictures = f"--image-resize-height {settings.image_resize_height // 2} --image-resize-width {settings.image_resize_width // 2}"
    pictures = f"smaller pictures: {pictures}, with a VL cache built for them"
    if settings.batch_size == 1:
        return f"Out of memory at batch size 1. Start a new run with (1) a smaller --width than {settings.width}, or (2) {pictures}."
    smaller = settings.batch_size // 2
    more = math.ceil(settings.batch_size * settings.grad_accum_steps / smaller)
    return (
        f"Out of memory. Remedies, in this order: (1) --batch-size {smaller} instead of {settings.batch_size}, (2) with it --grad-accum-steps "
        f"{more} instead of {settings.grad_accum_steps} (the same effective batch), and go on with --resume; (3) in a new run, {pictures}."
    )


@contextlib.contextmanager
def memory_remedies(settings: TrainingSettings) -> Iterator[None]:
    """Inside is trained: memory of the GPU or of the machine that does not suffice becomes a UserError with its remedies."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class of its own for the GPU's memory only
        if (
            isinstance(error, RuntimeError)
            and not isinstance(error, torch.OutOfMemoryError)
            and CPU_FULL not in str(error)
        ):
            raise
        raise UserError(out_of_memory(settings)) from error


def data_lines(data: TrainingData) -> list[str]:
    """One line a dataset: episodes, steps, weight, share of the draws."""
    return [
        f"{row['dataset']}: {row['train_episodes']} training and {row['val_episodes']} held-out episodes, {row['train_steps']} steps, "
        f"weight {row['weight']:g}, {100 * row['share']:.1f} % of the draws"
        for row in data.weights_table()
    ]


def epoch_lines(row: dict[str, Any], num_workers: int) -> list[str]:
    """The line of a validation, and the loader's complaint where it starves the training."""
    waited = row["train/loader_wait_share"]
    text = f"epoch {row['epoch']:g} (step {row['step']}): loader wait {100 * waited:.0f} %"
    if "val/action_loss" in row:
        baselines = ", ".join(f"{b} {row[f'val/baseline_{b}_action_loss']:.3f}" for b in BASELINES)
        text += f", held-out error {row['val/action_loss']:.3f} ({baselines}), {row['val/mae_mm']:.3f} mm, {row['val/mae_deg']:.3f} deg"
    if waited <= STARVED:
        return [text]
    complaint = f"The loader starves the training: {100 * waited:.0f} % of the time was waited for data. Raise --num-workers (now {num_workers}), "
    return [text, complaint + "or put the dataset on a faster disk."]


def step_row(
    trainer: "Trainer",
    shared: np.ndarray,
    loss: float,
    lr: float,
    norm: float,
    timesteps: list[np.ndarray],
    waited_s: float,
) -> dict[str, Any]:
    """The row of one optimiser step; `shared`: the samples of all processes, `timesteps`: what the diffusion head drew for them."""
    s, samples = trainer.settings, trainer.data.train
    row: dict[str, Any] = {
        "step": trainer.step,
        "elapsed_s": round(trainer._elapsed(), 3),
        s.loss_key: loss,
        "train/lr": lr,
        "train/grad_norm": norm,
        "train/loader_wait_s": round(waited_s, 4),
    }
    row["train/vl_reuse_counter"] = float(samples.age_steps[shared].mean())
    if s.sensor_enabled:
        row["train/sensor_samples"] = int(samples.sensor_full[shared].sum())
    if timesteps:
        row["train/diffusion_t"] = float(np.concatenate(timesteps).mean())
    if trainer.accelerator.device.type == "cuda":
        row[GPU] = torch.cuda.max_memory_allocated() / 2**30
    return row


def step_note(row: dict[str, Any], loss_key: str, epoch: int, wait_share: float) -> str:
    """What stands behind the bar: epoch, loss, learning rate, the share of the epoch's time waited for data, GPU memory where there is one."""
    note = (
        f"epoch {epoch + 1}, loss {row[loss_key]:.4f}, lr {row['train/lr']:.2e}, loader wait {100 * wait_share:.0f} %"
    )
    return note + (f", GPU memory {row[GPU]:.1f} GiB" if GPU in row else "")


def results(trainer: "Trainer") -> dict[str, Any]:
    """What results.json holds; the errors are those of the best validation."""
    data, best = trainer.data, trainer.best.get("metrics", {})
    return {
        "step": trainer.step,
        "epochs": trainer.epoch,
        "state": "stopped" if trainer.stopped else "done",
        "train_episodes": len(data.split["train"]),
        "val_episodes": len(data.split["val"]),
        "train_samples": len(data.train),
        "val_loss": best.get("val/loss_epoch"),
        "best_step": trainer.best.get("step"),
        "val_action_loss": best.get("val/action_loss"),
        "val_mae_mm": best.get("val/mae_mm"),
        "val_mae_deg": best.get("val/mae_deg"),
        "baselines": {
            b: {k: best.get(f"val/baseline_{b}_{k}") for k in ("action_loss", "mae_mm", "mae_deg")} for b in BASELINES
        }
        if best
        else {},
        "parameters": sum(weight.numel() for weight in trainer.trained.parameters()),
        "processes": trainer.world,
        "wall_s": round(trainer._elapsed(), 3),
        "cache": data.binding.get("id"),
        "checkpoint": str(trainer.latest),
        "run_dir": str(trainer.run_dir),
    }
