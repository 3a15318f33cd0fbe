"""The flags of train_async and train_diffusion: plain values in, two validated frozen records out (no torch here)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import tyro

from vla_lib.core.errors import UserError

Alias = tyro.conf.arg

# What may differ between a run and its resumption: how it is run, not what is learnt.
RESUMABLE = {
    "dataset_root", "run_dir", "resume", "epochs", "max_steps", "num_workers", "checkpoint_every_s", "checkpoint_every_steps", "wandb_mode",
    "device", "precision", "compile", "log_every_s", "batch_size", "grad_accum_steps", "stage1_checkpoint",
}  # fmt: skip


class Checkpoints(NamedTuple):
    """Names of the files below checkpoints/: the newest state, the best held-out error, and the end ("" where none is written)."""

    latest: str
    best: str
    final: str


@dataclass(frozen=True)
class TrainingSettings:
    """What both trainings share."""

    dataset_root: Annotated[Path, Alias(aliases=("--dataset-dir",))] = Path("dataset")
    """Folder of the dataset: prepared episodes (data.pkl) and cache/qwen_vl_features below it."""
    cache_id: str = ""
    """Binding id of the VL cache; empty: the only one there is."""
    run_dir: Path | None = None
    """Run folder for metrics.jsonl, results.json and checkpoints/; default: runs/<UTC time>-<front door>."""
    resume: bool = False
    """Go on from the newest checkpoint in --run-dir; the result is the uninterrupted run's, bit for bit, on the same number of processes."""

    training_stage: Literal["stage1", "stage2"] = "stage1"
    """stage1: the VLM stays frozen and its features come from the cache; stage2: LoRA on its language model, run live in every step."""
    stage1_checkpoint: Path | None = None
    """Checkpoint of the same model that stage 2 starts from; its split and its normalisation hold on."""
    lora_rank: int = 16
    """Rank of stage 2's LoRA weights, beside every projection of the language model's layers that are computed."""
    lora_alpha: int = 32
    """LoRA's contribution is scaled by alpha / rank."""

    batch_size: int = 4
    """Samples in one forward pass of one process."""
    grad_accum_steps: Annotated[int, Alias(aliases=("--grad-accum",))] = 8
    """Forward passes of each process that make one optimiser step."""
    lr: float = 1e-4
    """Peak learning rate: linear warm-up, then a cosine to a hundredth of it."""
    epochs: int = 20
    """Passes over the training steps (as many draws as there are training steps)."""
    max_steps: int = 0
    """Stop after this many optimiser steps, the cosine ending there; 0: --epochs decides."""
    warmup_steps: int = 50
    """Optimiser steps over which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's weight decay (matrices only)."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    ema_decay: float = 0.99
    """Decay of the averaged weights that validation, checkpoints and the robot use; reached gradually; 0: no averaging."""
    seed: int = 0
    """Seed of the split, the initial weights, the draws and the noise."""
    val_fraction: float = 0.1
    """Share of the episodes of each dataset that is held out (at least one where there are two); 0: no validation."""

    vl_enabled: bool = True
    """Use the VL features; --no-vl-enabled hides every view and the text for good: what a policy can do without seeing."""
    sensor_enabled: bool = True
    """Use the force and OCT sensor; --no-sensor-enabled removes the encoder altogether."""
    sensor_window_size: int = 65
    """Sensor samples that end at the step's time (650 Hz: 65 = 100 ms)."""
    sensor_loss_weight: float = 2.0
    """The loss of a sample with a full sensor window counts this many times that of a sample without one."""
    fusion: Literal["concat", "cross_attention", "gated", "none"] = "concat"
    """How the sensor reaches the trunk: its tokens join the sequence, are attended to, or a gated mean is added; none: not at all."""
    vlm_reuse_count: int = 3
    """Action steps for which one set of VL features is used (10 Hz / 3 = 3.33 Hz)."""
    vlm_latency_ms: float = 0.0
    """Delay until features of a moment can be used; shifts the pairing of steps and features."""
    image_resize_height: int = 360
    """Picture height that the VL cache was made with (checked)."""
    image_resize_width: int = 640
    """Picture width that the VL cache was made with (checked)."""

    horizon: int = 8
    """Actions in a chunk."""
    width: int = 128
    """Width of the trunk."""
    layers: int = 3
    """Blocks of the trunk."""
    heads: int = 4
    """Attention heads."""
    dropout: float = 0.0
    """Dropout in the trunk."""
    view_dropout: float = 0.0
    """Chance that a camera view is hidden from a training sample: against learning scenes by heart, and for a camera that fails."""

    num_workers: int = 2
    """Loader processes of each training process; 0: load in the training process itself."""
    checkpoint_every_s: float = 60.0
    """Write the newest checkpoint at least this often (and at the end of each epoch)."""
    checkpoint_every_steps: int = 0
    """Also write it every so many steps; 0: by time alone."""
    precision: Literal["auto", "bf16", "float32"] = "auto"
    """auto: bf16 autocast where the GPU has it, float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    compile: bool = False
    """torch.compile the policy (no gain on a CPU, where it needs a C++ compiler; not measured on a GPU)."""
    wandb_mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where a Weights & Biases key is set, else offline."""
    log_every_s: float = 5.0
    """Seconds between two progress lines in a log that is no terminal."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "dataset_root", Path(self.dataset_root))
        for name in ("run_dir", "stage1_checkpoint"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, Path(getattr(self, name)))
        at_least_one = (
            "batch_size",
            "grad_accum_steps",
            "epochs",
            "sensor_window_size",
            "vlm_reuse_count",
            "horizon",
            "width",
            "layers",
            "heads",
            "lora_rank",
            "lora_alpha",
        )
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1.")
        not_negative = (
            "max_steps",
            "warmup_steps",
            "weight_decay",
            "vlm_latency_ms",
            "num_workers",
            "sensor_loss_weight",
            "checkpoint_every_s",
            "checkpoint_every_steps",
        )
        for name in not_negative:
            if getattr(self, name) < 0:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; it cannot be negative.")
        for name in ("lr", "clip_norm"):
            if not getattr(self, name) > 0:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; it must be above 0.")
        for name in ("val_fraction", "ema_decay", "dropout", "view_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{flag(name)} is {getattr(self, name)}; it must be at least 0 and below 1.")
        self._check_stage()

    def _check_stage(self) -> None:
        if self.training_stage == "stage1" and self.stage1_checkpoint is not None:
            raise UserError(
                "--stage1-checkpoint is what stage 2 starts from; pass --training-stage stage2 with it, or leave it out."
            )
        if self.training_stage == "stage2":
            if self.stage1_checkpoint is None and not self.resume:
                raise UserError(
                    "--training-stage stage2 goes on from a stage-1 checkpoint; train stage 1 and name it with --stage1-checkpoint."
                )
            if not self.vl_enabled:
                raise UserError(
                    "--training-stage stage2 trains the VL model, which --no-vl-enabled hides; drop one of the two."
                )

    @property
    def live_vlm(self) -> bool:
        """True where the VLM runs in every step (stage 2)."""
        return self.training_stage == "stage2"

    @property
    def uses_sensor(self) -> bool:
        """True where a sensor window is read at all."""
        return self.sensor_enabled and self.fusion != "none"

    def to_dict(self) -> dict[str, Any]:
        """Plain Python (paths as strings), for checkpoints and run records."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

    # what the two trainings differ in
    name = "train"  # the front door
    head = "regression"
    project = ""  # W&B
    loss_key = "train/loss_step"


@dataclass(frozen=True)
class AsyncSettings(TrainingSettings):
    """Train the async model: a chunk of 8 actions by regression from reused VL features, a 100 ms sensor window and the robot state."""

    name = "train_async"
    project = "QwenVLA-Async"

    @property
    def checkpoints(self) -> Checkpoints:
        """File names."""
        stem = "qwen_vla_async" + ("_stage2" if self.live_vlm else "")
        return Checkpoints(f"{stem}.pt", f"{stem}_best.pt", f"{stem}_final.pt")


@dataclass(frozen=True)
class DiffusionSettings(TrainingSettings):
    """Train the diffusion model: DDPM on a chunk of 8 actions from VL features, a 1 s sensor window and the robot state."""

    sensor_window_size: int = 650
    """Sensor samples that end at the step's time (650 Hz: 650 = 1 s)."""
    diffusion_timesteps: int = 100
    """Timesteps of the DDPM noise schedule (cosine)."""
    ddim_steps: int = 10
    """Denoising steps at inference and in validation."""

    name = "train_diffusion"
    head = "diffusion"
    project = "QwenVLA-Diffusion"
    loss_key = "train/noise_loss"

    @property
    def checkpoints(self) -> Checkpoints:
        """File names; the newest one is the final one too."""
        return Checkpoints(f"diffusion_{self.training_stage}_latest.pt", f"diffusion_{self.training_stage}_best.pt", "")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.ddim_steps <= self.diffusion_timesteps:
            raise UserError(
                f"--ddim-steps {self.ddim_steps} must lie between 1 and --diffusion-timesteps {self.diffusion_timesteps}; change one of them."
            )


def flag(name: str) -> str:
    """The flag of a field."""
    return "--" + name.replace("_", "-")


def resume_conflicts(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Settings that must not change on --resume, as `--flag: checkpoint X, now Y`."""
    before = {
        name: value for name, value in DiffusionSettings().to_dict().items() if name in now
    } | before  # it may be older than a setting
    keys = (set(before) | set(now)) - RESUMABLE
    return [
        f"{flag(k)}: checkpoint {before.get(k)!r}, now {now.get(k)!r}"
        for k in sorted(keys)
        if before.get(k) != now.get(k)
    ]
