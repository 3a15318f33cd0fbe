"""What a policy is made of: plain numbers that rebuild the very same modules (no torch); a checkpoint holds them."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from annotated_types import Ge, Lt

from vla_lib.core.errors import UserError
from vla_lib.core.settings import Settings, settings

HeadName = Literal["regression", "diffusion"]
HEADS: tuple[HeadName, ...] = get_args(HeadName)

STATE_DIM = 12  # joints 1..6 (deg), pose (mm, deg)
ACTION_DIM = 7  # dx dy dz (mm), rotation vector (deg), gripper
SENSOR_CHANNELS = 1026  # force first, then 1025 depth bins of the A-scan

Positive = Annotated[int, Ge(1)]
Share = Annotated[float, Ge(0), Lt(1)]


@settings
class PolicySettings(Settings):
    """What the policy reads and how large it is: flags of both trainings."""

    # use the VL features; --no-vl-enabled hides every view and the text for good: what a policy can do without seeing
    vl_enabled: bool = True
    sensor_enabled: bool = True  # use the force and OCT sensor; --no-sensor-enabled removes the encoder altogether
    sensor_window_size: Positive = 65  # sensor samples that end at the step's time (650 Hz: 65 = 100 ms)
    horizon: Positive = 8  # actions in a chunk
    width: Positive = 128  # width of the trunk
    layers: Positive = 3  # blocks of the trunk
    heads: Positive = 4  # attention heads
    dropout: Share = 0.0  # dropout in the trunk
    # chance that a view is hidden from a training sample: against learning scenes by heart, and for a camera that fails
    view_dropout: Share = 0.0
    token_noise: Annotated[float, Ge(0)] = 0.0  # added to VL tokens in training, in their spreads; also against that


@settings
class PolicyInputs(Settings):
    """What the data decide: the three `token_*` tuples have one entry a VL token (T entries), its view's number in
    `views`, its row and its column in that view's grid; a text token has -1 in all three."""

    head: HeadName
    views: tuple[str, ...]
    token_dim: Positive
    token_view: tuple[int, ...]
    token_row: tuple[int, ...]
    token_col: tuple[int, ...]


@settings
class PolicyConfig(PolicySettings, PolicyInputs):
    """Everything that fixes the shapes of a policy. Raises UserError for values that cannot be built."""

    action_hz: float = 10.0
    vl_ages_s: tuple[float, float] = (0.0, 0.0)  # least and greatest age of VL features in training; 0, 0: not known
    diffusion_timesteps: Positive = 100
    ddim_steps: Positive = 10

    def __post_init__(self) -> None:
        if not len(self.token_view) == len(self.token_row) == len(self.token_col) > 0:
            raise UserError("The VL token layout is empty or its lists differ in length; rebuild the VL cache.")
        if self.width % self.heads:
            fitting = max(1, self.width // self.heads) * self.heads
            raise UserError(f"--width {self.width} is no multiple of --heads {self.heads}; give --width {fitting}.")
        if self.ddim_steps > self.diffusion_timesteps:
            raise UserError(
                f"--ddim-steps {self.ddim_steps} is above --diffusion-timesteps {self.diffusion_timesteps}; change one."
            )

    @property
    def tokens(self) -> int:
        """T, the number of VL tokens."""
        return len(self.token_view)

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """The config of a checkpoint's record. Raises UserError where this version cannot build it."""
        values = dict(record)
        if "vl_ages_s" not in values:
            raise UserError(
                "The checkpoint's policy was trained by an earlier version, whose trunk read the VL tokens; this one "
                "reads a goal off them. Use the version that wrote it, or train anew."
            )
        try:
            return cls(**values)
        except UserError as error:
            raise UserError(
                f"The checkpoint's policy cannot be built by this version ({str(error).rstrip('.')}); "
                "use the version that wrote it, or take another checkpoint."
            ) from error
