"""The settings of train_async and train_diffusion: data, policy, learning, running. No torch here."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from annotated_types import Ge, Gt
from tyro.conf import arg

from vla_lib.core.errors import UserError
from vla_lib.core.settings import Settings, flag, named_root, settings
from vla_lib.policy.config import PolicySettings, Positive, Share

Count = Annotated[int, Ge(0)]
Amount = Annotated[float, Ge(0)]
AmountAbove0 = Annotated[float, Gt(0)]


class Checkpoints(NamedTuple):
    """Names of the files below checkpoints/: the newest state, the best held-out error, the end ("": none)."""

    latest: str
    best: str
    final: str


@settings
class DataSettings(Settings):
    """Which episodes and features, and how they are paired."""

    # dataset folder: prepared episodes (data.pkl) and cache/qwen_vl_features below it; default: $VLA_DATASET_ROOT
    dataset_root: Annotated[Path, arg(aliases=("--dataset-dir",))] = field(
        default_factory=lambda: named_root() or Path("dataset")
    )
    cache_id: str = ""  # binding id of the VL cache; empty: the only one there is
    image_resize_height: Positive = 360  # picture height that the VL cache was made with (checked)
    image_resize_width: Positive = 640  # picture width that the VL cache was made with (checked)
    vlm_reuse_count: Positive = 3  # action steps for which one set of VL features is used (10 Hz / 3 = 3.33 Hz)
    vlm_latency_ms: Amount = 0.0  # delay until features of a moment can be used; shifts which features a step gets
    # above --vlm-latency-ms: each sample draws its delay from between the two, anew in every epoch, so that one policy
    # serves a VLM of any such speed
    vlm_latency_max_ms: Amount = 700.0
    # share of the episodes of each dataset that is held out (at least one where there are two); 0: no validation
    val_fraction: Share = 0.1


@settings
class LearningSettings(Settings):
    """How the weights are found."""

    # stage1: the VLM is frozen, its features come from the cache; stage2: LoRA on its language model, run in every step
    training_stage: Literal["stage1", "stage2"] = "stage1"
    # checkpoint of the same model that stage 2 starts from; its split and its normalisation hold on
    stage1_checkpoint: Path | None = None
    lora_rank: Positive = 16  # rank of stage 2's LoRA weights, beside every projection of the VLM's layers in use
    lora_alpha: Positive = 32  # LoRA's contribution is scaled by alpha / rank

    batch_size: Positive = 4  # samples in one forward pass of one process
    # forward passes of each process that make one optimiser step
    grad_accum_steps: Annotated[int, Ge(1), arg(aliases=("--grad-accum",))] = 8
    lr: AmountAbove0 = 1e-4  # peak learning rate: linear warm-up, then a cosine to a hundredth of it
    epochs: Positive = 20  # passes over the training steps (as many draws as there are training steps)
    max_steps: Count = 0  # stop after this many optimiser steps, the cosine ending there; 0: --epochs decides
    warmup_steps: Count = 50  # optimiser steps over which the learning rate rises
    weight_decay: Amount = 0.01  # AdamW's weight decay (matrices only)
    clip_norm: AmountAbove0 = 1.0  # gradients are scaled down to this norm
    # decay of the averaged weights that validation, checkpoints and the robot use; reached gradually; 0: no averaging
    ema_decay: Share = 0.99
    sensor_loss_weight: Amount = 2.0  # a sample with a full sensor window counts this many times one without
    seed: int = 0  # of the split, the initial weights, the draws and the noise


@settings
class RunningSettings(Settings):
    """Where and on what it runs; nothing here changes what is learnt."""

    # run folder for metrics.jsonl, results.json and checkpoints/; default: runs/<UTC time>-<front door>
    run_dir: Path | None = None
    # go on from the newest checkpoint in --run-dir: the uninterrupted run, bit for bit, on as many processes
    resume: bool = False
    num_workers: Count = 2  # loader processes of each training process; 0: load in the training process itself
    checkpoint_every_s: Amount = 60.0  # write the newest checkpoint at least this often (and at the end of each epoch)
    checkpoint_every_steps: Count = 0  # also write it every so many steps; 0: by time alone
    precision: Literal["auto", "bf16", "float32"] = "auto"  # auto: bf16 autocast where the GPU has it, else float32
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: a GPU where there is one
    # auto: online where a Weights & Biases key is set, else offline
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    log_every_s: Amount = 5.0  # seconds between two progress lines in a log that is no terminal


@settings
class TrainingSettings(RunningSettings, LearningSettings, PolicySettings, DataSettings):
    """What both models share."""

    name: ClassVar[str]  # the front door
    head: ClassVar[str]
    project: ClassVar[str]  # W&B's
    loss_key: ClassVar[str]
    unnamed = (
        "checkpoint_every_s checkpoint_every_steps clip_norm device ema_decay heads horizon layers log_every_s "
        "lora_alpha lora_rank precision resume run_dir wandb_mode warmup_steps width"
    )

    def __post_init__(self) -> None:
        if self.training_stage == "stage1" and self.stage1_checkpoint is not None:
            raise UserError("--stage1-checkpoint is stage 2's; pass --training-stage stage2 with it, or drop it.")
        if self.live_vlm and self.stage1_checkpoint is None and not self.resume:
            raise UserError("--training-stage stage2 goes on from a stage-1 checkpoint; give --stage1-checkpoint.")
        if self.live_vlm and not self.vl_enabled:
            raise UserError("--training-stage stage2 trains the VL model, which --no-vl-enabled hides; drop one.")

    @property
    def live_vlm(self) -> bool:
        """True where the VLM runs in every step (stage 2)."""
        return self.training_stage == "stage2"

    @property
    def checkpoints(self) -> Checkpoints:
        """File names of the checkpoints."""
        raise NotImplementedError


@settings
class AsyncSettings(TrainingSettings):
    """Train the async model: a chunk of 8 actions by regression from reused VL features, 100 ms of sensor, the robot
    state."""

    name, head, project, loss_key = "train_async", "regression", "QwenVLA-Async", "train/loss_step"

    @property
    def checkpoints(self) -> Checkpoints:
        stem = "qwen_vla_async" + ("_stage2" if self.live_vlm else "")
        return Checkpoints(f"{stem}.pt", f"{stem}_best.pt", f"{stem}_final.pt")


@settings
class DiffusionSettings(TrainingSettings):
    """Train the diffusion model: a chunk of 8 actions by DDPM from VL features, 1 s of sensor, the robot state."""

    sensor_window_size: Positive = 650  # sensor samples that end at the step's time (650 Hz: 650 = 1 s)
    diffusion_timesteps: Positive = 100  # timesteps of the DDPM noise schedule (cosine)
    ddim_steps: Positive = 10  # denoising steps at inference and in validation

    name, head, project, loss_key = "train_diffusion", "diffusion", "QwenVLA-Diffusion", "train/noise_loss"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ddim_steps > self.diffusion_timesteps:
            above = f"--ddim-steps {self.ddim_steps} is above --diffusion-timesteps {self.diffusion_timesteps}"
            raise UserError(f"{above}; change one.")

    @property
    def checkpoints(self) -> Checkpoints:
        """File names of the checkpoints; the newest one is the final one too."""
        return Checkpoints(f"diffusion_{self.training_stage}_latest.pt", f"diffusion_{self.training_stage}_best.pt", "")


# Beside how it runs, what --resume may change: where the data lie now, how long, and how a step's samples are divided.
RESUMABLE = {"dataset_root", "epochs", "max_steps", "batch_size", "grad_accum_steps", "stage1_checkpoint"}
RESUMABLE |= RunningSettings.__dataclass_fields__.keys()


def resume_conflicts(before: dict[str, Any], now: TrainingSettings) -> list[str]:
    """Settings that --resume must not change, as `--flag: checkpoint X, now Y`; `before`: the checkpoint's record."""
    known = type(now)(run_dir=now.run_dir).record() | before  # it may be older than a setting
    return [
        f"{flag(name)}: checkpoint {known[name]!r}, now {value!r}"
        for name, value in sorted(now.record().items())
        if name not in RESUMABLE and known[name] != value
    ]
