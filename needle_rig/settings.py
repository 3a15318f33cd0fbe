"""What is recorded: the settings of a recording, which are its flags, and the episodes that they plan."""

import dataclasses
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from annotated_types import Ge, Interval
from pydantic import ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from needle_rig.disturbances import varied
from needle_rig.world import DEFAULT_TASK, RigError, World, sample_world, stream, task_of

EPOCH_S = 1_761_000_000.0  # the first day of recording; each seed has a day of its own
_EPISODE_SPACING_S = 120.0


@dataclasses.dataclass(frozen=True)
class PlannedEpisode:
    """One episode of a recording: its seed (of the first try), and its start in seconds since 1970."""

    index: int
    layout: Literal["F1", "F2"]
    task: str
    seed: int
    start_s: float

    @property
    def session(self) -> str:
        """The stamp that its files are named after: YYYYmmdd_HHMMSS, UTC."""
        return datetime.fromtimestamp(self.start_s, UTC).strftime("%Y%m%d_%H%M%S")

    @property
    def folder(self) -> str:
        """Its path below the dataset root."""
        name = f"recv_all_{self.session}" if self.layout == "F1" else f"episode_{self.session}"
        return "/".join((*task_of(self.task).folders, name))


@dataclass(frozen=True, config=ConfigDict(extra="forbid", allow_inf_nan=False))
class RecordSettings:
    """Record demonstrations on the simulated rig (MuJoCo, EGL) as raw F1 and F2 episodes."""

    dataset_root: Path = Path("data/simulated")
    """Dataset root to write: an empty or new folder, or one that already holds exactly this recording (it is kept)."""
    episodes_f1: Annotated[int, Ge(0)] = 30
    """Number of F1 episodes (White_silicone_white_circle)."""
    episodes_f2: Annotated[int, Ge(0)] = 10
    """Number of F2 episodes (New_dataset/<task>)."""
    task: str = "Silicone_block"
    """Task folder of the F2 episodes."""
    seed: Annotated[int, Ge(0)] = 0
    """Seed of the whole recording: the same seed and settings give the same episodes."""
    workers: Annotated[int, Ge(1)] = 2
    """Processes that record in parallel."""
    picture_width: Annotated[int, Interval(ge=16, le=2048)] = 320
    """Width of the pictures, pixels."""
    picture_height: Annotated[int, Interval(ge=16, le=1536)] = 180
    """Height of the pictures, pixels."""
    camera_hz: Annotated[float, Interval(ge=0.5, le=60)] = 5.0
    """Pictures a second and view."""
    idle_tail_s: Annotated[float, Interval(ge=0, le=120)] = 3.0
    """Seconds for which cameras and sensor go on after the robot's log ended."""
    sensor_clock_offset_ms: float = 0.0
    """How far the sensor host's clock is ahead of the robot's."""
    disturbances: bool = True
    """Inject pushes, so that recoveries are in the data."""
    varied: bool = False
    """Draw light, camera places, the needle's colour, the target's size, the force's drift and the OCT's contrast of
    each episode widely, so that a policy learns to bear such changes."""

    @model_validator(mode="wrap")
    @classmethod
    def _refuse_in_a_sentence(cls, values: Any, make: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return make(values)
        except ValidationError as error:
            found = [(str(one["loc"][0]).replace("_", "-"), one["msg"], one["input"]) for one in error.errors()]
            said = (f"--{flag} {message.removeprefix('Input ')}, not {given!r}" for flag, message, given in found)
            raise RigError("; ".join(said) + ".") from None

    def __post_init__(self) -> None:
        task_of(self.task)  # a name that no folder can have is refused here
        if self.episodes_f1 + self.episodes_f2 == 0:
            raise RigError("Nothing to record: --episodes-f1 0 and --episodes-f2 0; ask for one episode or more.")

    def plan(self) -> dict[str, Any]:
        """What changes the recorded data and nothing else, as the manifest keeps it: the same plan is the same data."""
        left_out = {"dataset_root", "workers"} | (set() if self.varied else {"varied"})  # older manifests lack it
        names = [field.name for field in fields(self) if field.name not in left_out]
        renamed = {"task": "task_f2", "disturbances": "pushes"}  # as manifests have had them from the first
        return {renamed.get(name, name): getattr(self, name) for name in names}

    def world(self, seed: int, task: str) -> World:
        """The world in which a demonstration of this recording takes place."""
        world = sample_world(seed, task)
        return varied(world) if self.varied else world

    def episodes(self) -> list[PlannedEpisode]:
        """The episodes, all of F1 first; deterministic by seed and counts."""
        rng = stream(self.seed, "plan")
        planned = []
        for index in range(self.episodes_f1 + self.episodes_f2):
            layout: Literal["F1", "F2"] = "F1" if index < self.episodes_f1 else "F2"
            day_s = EPOCH_S + 86_400 * (self.seed % 3650)
            start_s = round(day_s + _EPISODE_SPACING_S * index + float(rng.uniform(0, 30)), 6)
            task = DEFAULT_TASK if layout == "F1" else self.task
            planned.append(PlannedEpisode(index, layout, task, int(rng.integers(1 << 62)), start_s))
        return planned
