"""Settings of an evaluation and of one rollout on the simulated rig (no torch here)."""

from dataclasses import KW_ONLY
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge, Gt
from pydantic import BeforeValidator
from tyro.conf import arg

from vla_lib.core.errors import UserError
from vla_lib.core.settings import Settings, settings
from vla_lib.evaluation.sim_robot import DEFAULT_TASK

Count = Annotated[int, Ge(0)]
Positive = Annotated[int, Ge(1)]
Milliseconds = Annotated[float, Ge(0)]
Texts = Annotated[tuple[str, ...], BeforeValidator(lambda given: tuple(map(str, given)))]  # paths are taken, too


@settings
class ClosedLoopSettings(Settings):
    """How a policy is run on the simulated rig, whichever checkpoint it is from."""

    _: KW_ONLY  # so that the checkpoints of both records below stay their first arguments
    # a chunk of actions for its first one alone, at every step, or for several steps
    execution: Literal["first action", "chunk of n"] = "first action"
    chunk_steps: Positive = 4  # actions of a chunk that `chunk of n` follows
    vlm_jitter_ms: Milliseconds = 0.0  # on the rig: mean of an exponentially distributed further delay of VL features
    expert_latency_ms: Milliseconds = 0.0  # on the rig: how long the action expert takes
    expert_jitter_ms: Milliseconds = 0.0  # on the rig: mean of the exponentially distributed rest of that time
    ddim_steps: Count = 0  # denoising steps of a diffusion policy, on episodes and on the rig; 0: its own
    max_time_s: Annotated[float, Gt(0)] = 30.0  # longest rollout

    @property
    def steps_per_chunk(self) -> int:
        """Actions of a chunk that are executed before the policy is asked again."""
        return self.chunk_steps if self.execution == "chunk of n" else 1


@settings
class RolloutSettings(ClosedLoopSettings):
    """One rollout of a checkpoint, whose rates, views and sensor window hold; pictures are as in recordings."""

    checkpoint: Path
    without: Literal["nothing", "vl", "sensor"] = "nothing"  # input that is masked
    # delay of the VL features; None: as in training. 300 ms and more lower the VLM's rate: it does one moment at a time
    vlm_latency_ms: Milliseconds | None = None
    task: str = DEFAULT_TASK  # whose phantoms
    instruction: str = ""  # the task in the words of the training data; default: those of the built-in table
    disturbance: str = ""  # what has changed on the rig since the recordings, one of needle_rig's; "": nothing
    hiccup_ms: Milliseconds = 0.0  # how much longer the expert takes now and then
    picture_width: Positive = 320
    picture_height: Positive = 180
    camera_hz: Annotated[float, Gt(0)] = 5.0
    device: str = "cpu"

    def __post_init__(self) -> None:
        _must_exist(self.checkpoint)


@settings
class EvaluateSettings(ClosedLoopSettings):
    """Evaluate checkpoints: held-out errors beside three baselines, and rollouts on the simulated rig."""

    unnamed = "checkpoints ddim_steps device expert_jitter_ms expert_latency_ms run_dir skip_seeds vlm_jitter_ms"

    # checkpoint files, each PATH or NAME=PATH; the first is the one in question, the others are compared with it
    checkpoints: Annotated[Texts, arg(aliases=("--checkpoint",))] = ()
    # folder of the dataset; default: the one that each checkpoint was trained on
    dataset_root: Annotated[Path | None, arg(aliases=("--dataset-dir",))] = None
    episodes: Literal["val", "train"] = "val"  # which episodes of a checkpoint's recorded split
    batch_size: Positive = 64  # samples in one forward pass
    closed_loop_seeds: Count = 0  # unseen phantoms of the rig on which every checkpoint is tried; 0: none
    tuning: bool = False  # take seeds that are kept for choosing between variants: the reported ones stay unseen
    skip_seeds: Count = 0  # leave out so many of these phantoms, on which something was decided before
    masked: bool = False  # also the first checkpoint with its VL and with its sensor masked
    latency_sweep: bool = False  # also the first checkpoint with VL features that come 0, 381 and 600 ms late
    disturbed: bool = False  # also the first checkpoint under each disturbance of the rig, one at a time
    workers: Count = 0  # processes that try phantoms side by side; 0: one a CPU core
    # auto: a GPU where there is one. Rollouts on the rig always run on the CPU, so that they are repeatable
    device: Literal["auto", "cpu", "cuda"] = "auto"
    run_dir: Path | None = None  # folder that gets results.json; default: none, the results are printed only

    def __post_init__(self) -> None:
        if not self.checkpoints:
            raise UserError(
                "There is no checkpoint to evaluate; "
                "give one with --checkpoint PATH, or several with --checkpoints NAME=PATH ..."
            )
        for path in self.named().values():
            _must_exist(path)
        if self.dataset_root is not None and not self.dataset_root.is_dir():
            raise UserError(
                f"There is no dataset root {self.dataset_root}; "
                "give the folder that holds the datasets with --dataset-root."
            )

    def named(self) -> dict[str, Path]:
        """Name -> file of each checkpoint; one without a name has its file's. UserError where two are called alike."""
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


def _must_exist(checkpoint: Path) -> None:
    if not checkpoint.is_file():
        raise UserError(f"There is no checkpoint {checkpoint}; train one first, or give the path of its .pt file.")
