"""Settings of an evaluation: how a policy is run on the simulated rig, one rollout there, and the flags of `python -m vla_lib.evaluate`.

No torch here: a notebook's parameters and `--help` are read from this module.
"""

from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Literal

import tyro
from annotated_types import Ge, Gt
from pydantic import BeforeValidator

from needle_rig.world import DEFAULT_TASK  # without torch and mujoco
from vla_lib.core.errors import UserError
from vla_lib.core.settings import Settings, settings

Ms = Annotated[float, Ge(0)]


@settings
class ClosedLoopSettings(Settings):
    """How a policy is run on the simulated rig, whichever checkpoint it is from."""

    _: KW_ONLY  # so that the checkpoints of both records below stay their first arguments
    execution: Literal["first action", "chunk of n"] = "first action"
    """How chunks of actions are executed: a new chunk at every step, of which the first action is taken, or one chunk for several steps."""
    chunk_steps: Annotated[int, Ge(1)] = 4
    """Actions of a chunk that `chunk of n` follows."""
    vlm_jitter_ms: Ms = 0.0
    """On the rig: mean of the exponentially distributed rest by which VL features come later still."""
    expert_latency_ms: Ms = 0.0
    """On the rig: how long the action expert takes."""
    expert_jitter_ms: Ms = 0.0
    """On the rig: mean of the exponentially distributed rest of that time."""
    ddim_steps: Annotated[int, Ge(0)] = 0
    """Denoising steps of a diffusion policy, on episodes and on the rig; 0: its own."""
    max_time_s: Annotated[float, Gt(0)] = 30.0
    """Longest rollout."""

    @property
    def steps_per_chunk(self) -> int:
        """Actions of a chunk that are executed before the policy is asked again."""
        return self.chunk_steps if self.execution == "chunk of n" else 1


@settings
class RolloutSettings(ClosedLoopSettings):
    """One rollout of a checkpoint. The pictures are as the recorder makes them; rates, views and sensor window come from the checkpoint."""

    checkpoint: Path
    without: Literal["nothing", "vl", "sensor"] = "nothing"
    """Input that is masked."""
    vlm_latency_ms: Ms | None = None
    """Delay of the VL features; None: the one that the policy was trained with. 300 ms and more lower the VLM's rate: it does one at a time."""
    task: str = DEFAULT_TASK
    """Whose phantoms."""
    instruction: str = ""
    """The task in the words of the training data; default: those of the built-in table."""
    picture_width: Annotated[int, Gt(0)] = 320
    picture_height: Annotated[int, Gt(0)] = 180
    camera_hz: Annotated[float, Gt(0)] = 5.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        checkpoint_exists(self.checkpoint)


@settings
class EvaluateSettings(ClosedLoopSettings):
    """Evaluate checkpoints: held-out errors beside three baselines, and rollouts on the simulated rig."""

    checkpoints: Annotated[
        tuple[str, ...],
        BeforeValidator(lambda given: tuple(map(str, given))),
        tyro.conf.arg(aliases=("--checkpoint",)),
    ] = ()
    """Checkpoint files, each PATH or NAME=PATH; the first is the one in question, the others are compared with it."""
    dataset_root: Annotated[Path | None, tyro.conf.arg(aliases=("--dataset-dir",))] = None
    """Folder of the dataset; default: the one that each checkpoint was trained on."""
    episodes: Literal["val", "train"] = "val"
    """Which episodes of a checkpoint's recorded split."""
    batch_size: Annotated[int, Ge(1)] = 64
    """Samples in one forward pass."""
    closed_loop_seeds: Annotated[int, Ge(0)] = 0
    """Unseen phantoms of the simulated rig on which every checkpoint is tried; 0: none."""
    tuning: bool = False
    """Take the seeds that are kept for choosing between variants, so that those which are reported stay unseen."""
    masked: bool = False
    """Also the first checkpoint with its VL and with its sensor masked."""
    latency_sweep: bool = False
    """Also the first checkpoint with VL features that come 0, 300 and 600 ms late."""
    workers: Annotated[int, Ge(0)] = 0
    """Processes that try phantoms side by side; 0: one a CPU core."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one. Rollouts on the rig always run on the CPU, so that they are repeatable."""
    run_dir: Path | None = None
    """Folder that gets results.json; default: none, the results are printed only."""

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise UserError(
                "There is no checkpoint to evaluate; "
                "give one with --checkpoint PATH, or several with --checkpoints NAME=PATH ..."
            )
        for path in self.named().values():
            checkpoint_exists(path)
        if self.dataset_root is not None and not self.dataset_root.is_dir():
            raise UserError(
                f"There is no dataset root {self.dataset_root}; "
                "give the folder that holds the datasets with --dataset-root."
            )

    def named(self) -> dict[str, Path]:
        """Name -> file of each checkpoint; a file without a name is called by its own. UserError where two have the same name."""
        named: dict[str, Path] = {}
        for text in self.checkpoints:
            name, equals, path = text.partition("=")
            if not equals or Path(text).exists():
                name, path = Path(text).stem, text
            if name in named:
                raise UserError(
                    f"Two checkpoints are called {name}; name them apart: --checkpoints one=PATH other=PATH."
                )
            named[name] = Path(path).expanduser()
        return named


def checkpoint_exists(path: Path) -> None:
    """Raise UserError where it does not."""
    if not path.is_file():
        raise UserError(f"There is no checkpoint {path}; train one first, or give the path of its .pt file.")
