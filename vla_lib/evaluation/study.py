"""Some checkpoints in; their errors on held-out episodes and, on the simulated rig, their rollouts on the same unseen seeds out.

    found = evaluate(Settings(checkpoints=("async=runs/A/checkpoints/qwen_vla_async_best.pt", "no VL=runs/B/..."), closed_loop_seeds=100))
    found.results()

The first checkpoint is the one in question: masked inputs and later VL features are tried on it. The others are compared with it as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from vla_lib.core.errors import UserError
from vla_lib.runtime.execution import Execution, ExecutionSettings

ON_THE_RIG = (
    "execution",
    "chunk_steps",
    "vlm_jitter_ms",
    "expert_latency_ms",
    "expert_jitter_ms",
    "ddim_steps",
    "max_time_s",
)


@dataclass(frozen=True)
class Settings:
    """Evaluate checkpoints: held-out errors beside three baselines, and rollouts on the simulated rig."""

    checkpoints: Annotated[tuple[str, ...], tyro.conf.arg(aliases=("--checkpoint",))] = ()
    """Checkpoint files, each PATH or NAME=PATH; the first is the one in question, the others are compared with it."""
    dataset_root: Annotated[Path | None, tyro.conf.arg(aliases=("--dataset-dir",))] = None
    """Folder of the dataset; default: the one that each checkpoint was trained on."""
    episodes: Literal["val", "train"] = "val"
    """Which episodes of a checkpoint's recorded split."""
    batch_size: int = 64
    """Samples in one forward pass."""
    closed_loop_seeds: int = 0
    """Unseen phantoms of the simulated rig on which every checkpoint is tried; 0: none."""
    tuning: bool = False
    """Take the seeds that are kept for choosing between variants, so that those which are reported stay unseen."""
    masked: bool = False
    """Also the first checkpoint with its VL and with its sensor masked."""
    latency_sweep: bool = False
    """Also the first checkpoint with VL features that come 0, 300 and 600 ms late."""
    execution: Execution = "first action"
    """How chunks of actions are executed."""
    chunk_steps: int = 4
    """Actions of a chunk that `chunk of n` follows."""
    vlm_jitter_ms: float = 0.0
    """On the rig: mean of the exponentially distributed rest by which VL features come later still."""
    expert_latency_ms: float = 0.0
    """On the rig: how long the action expert takes."""
    expert_jitter_ms: float = 0.0
    """On the rig: mean of the exponentially distributed rest of that time."""
    ddim_steps: int = 0
    """Denoising steps of a diffusion policy, on episodes and on the rig; 0: its own."""
    max_time_s: float = 30.0
    """Longest rollout."""
    workers: int = 0
    """Processes that try phantoms side by side; 0: one a CPU core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. Rollouts on the rig always run on the CPU, so that they are repeatable."""
    run_dir: Path | None = None
    """Folder that gets results.json; default: none, the results are printed only."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoints", tuple(str(text) for text in self.checkpoints))
        if not self.checkpoints:
            raise UserError(
                "There is no checkpoint to evaluate; give one with --checkpoint PATH, or several with --checkpoints NAME=PATH ..."
            )
        for path in self.named().values():
            if not path.is_file():
                raise UserError(f"There is no checkpoint {path}; train one first, or give the path of its .pt file.")
        if self.dataset_root is not None and not Path(self.dataset_root).is_dir():
            raise UserError(
                f"There is no dataset root {self.dataset_root}; give the folder that holds the datasets with --dataset-root."
            )
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; give 1 or more.")
        for name in (
            "closed_loop_seeds",
            "workers",
            "vlm_jitter_ms",
            "expert_latency_ms",
            "expert_jitter_ms",
            "ddim_steps",
        ):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name):g}; give 0 or more.")
        if not self.max_time_s > 0:
            raise UserError(f"--max-time-s is {self.max_time_s:g}; it must be above 0.")
        ExecutionSettings(self.execution, self.chunk_steps)

    def named(self) -> dict[str, Path]:
        """Name -> file of each checkpoint; a file without a name is called by its own. Raises UserError where two have the same name."""
        pairs = []
        for text in self.checkpoints:
            name, equals, path = text.partition("=")
            pairs.append((name, Path(path)) if equals and not Path(text).exists() else (Path(text).stem, Path(text)))
        if twice := {name for name, _ in pairs if [other for other, _ in pairs].count(name) > 1}:
            raise UserError(
                f"Two checkpoints are called {min(twice)}; name them apart: --checkpoints one=PATH other=PATH."
            )
        return {name: path.expanduser() for name, path in pairs}


@dataclass
class Study:
    """What was found: for each checkpoint its OpenLoop, for each variant its ClosedLoop (empty where none was asked for)."""

    checkpoints: dict[str, Path]
    open_loop: dict[str, Any] = field(default_factory=dict)
    closed_loop: dict[str, Any] = field(default_factory=dict)

    @property
    def first(self) -> str:
        """Name of the checkpoint in question."""
        return next(iter(self.checkpoints))

    def results(self) -> dict[str, Any]:
        """What results.json records: the first checkpoint's figures; the others below `compared_with`, every variant below `closed_loop`."""
        from vla_lib.evaluation.closed_loop import compare
        from vla_lib.evaluation.summary import results

        each = {
            name: {"checkpoint": str(self.checkpoints[name])} | results(found) for name, found in self.open_loop.items()
        }
        record = (
            {"name": self.first}
            | each[self.first]
            | {"compared_with": {name: each[name] for name in each if name != self.first}}
        )
        if self.closed_loop:
            main = self.closed_loop[self.first]
            record |= {name: main.summary()[name] for name in ("rollouts", "successes", "success_rate", "interval_95")}
            record["closed_loop"] = {name: found.results() for name, found in self.closed_loop.items()}
            record["pairs"] = {
                name: compare(main, found) for name, found in self.closed_loop.items() if name != self.first
            }
        return record


def evaluate(settings: Settings, done: Callable[[Study], Any] = lambda study: None) -> Study:
    """Evaluate all checkpoints; `done(study)` is called after the open loop and again after the closed one, to save what there is.

    Raises UserError where an episode, a cache or a VLM is missing, or where a closed loop is asked for and impossible (`rig_refusal`).
    """
    import torch

    from vla_lib.evaluation.closed_loop import FIRST_SEED, TUNING_SEED, closed_loop, unseen_seeds
    from vla_lib.evaluation.open_loop import evaluate_open_loop
    from vla_lib.evaluation.origin import dataset_of

    study = Study(settings.named())
    roots = {name: dataset_of(path, settings.dataset_root) for name, path in study.checkpoints.items()}
    if settings.closed_loop_seeds:
        tried = variants(settings)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if settings.device == "auto" else settings.device
    for name, path in study.checkpoints.items():
        print(f"open loop of {name}: {path}", flush=True)
        masked = settings.masked and name == study.first
        how = (settings.episodes, settings.batch_size, device, masked, settings.ddim_steps)
        study.open_loop[name] = evaluate_open_loop(path, roots[name], *how)
    done(study)
    if settings.closed_loop_seeds:
        seeds = unseen_seeds(
            settings.closed_loop_seeds, list(roots.values()), TUNING_SEED if settings.tuning else FIRST_SEED
        )
        study.closed_loop = closed_loop(tried, seeds, settings.workers)
        done(study)
    return study


def variants(settings: Settings) -> dict[str, Any]:
    """Name -> RolloutSettings of everything that is tried on the rig. Raises UserError where a checkpoint cannot be (`rig_refusal`)."""
    from dataclasses import replace

    from vla_lib.evaluation.closed_loop import latency_sweep, masked
    from vla_lib.evaluation.open_loop import inputs_of
    from vla_lib.evaluation.origin import rig_settings
    from vla_lib.policy.config import PolicyConfig
    from vla_lib.training.checkpoint import read_checkpoint

    found: dict[str, Any] = {}
    for name, path in settings.named().items():
        found[name] = replace(
            rig_settings(path, settings.dataset_root), **{name: getattr(settings, name) for name in ON_THE_RIG}
        )
    first, whole = next(iter(found.items()))
    more: dict[str, Any] = {}
    if settings.masked:
        used = inputs_of(PolicyConfig.from_dict(read_checkpoint(whole.checkpoint)["policy_config"]))
        more |= {name: variant for name, variant in masked(whole).items() if name in used}
    if settings.latency_sweep:
        more |= latency_sweep(whole)
    return found | {f"{first}, {name}": variant for name, variant in more.items()}
