"""What a policy is made of: plain numbers in, one validated record out that rebuilds the very same modules (no torch)."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from vla_lib.core.errors import UserError

HEADS = ("regression", "diffusion")
FUSIONS = ("concat", "cross_attention", "gated", "none")

STATE_DIM = 12  # joints 1..6 (deg), pose (mm, deg)
ACTION_DIM = 7  # dx dy dz (mm), rotation vector (deg), gripper
SENSOR_CHANNELS = 1026  # force first, then 1025 depth bins of the A-scan


@dataclass(frozen=True)
class PolicyConfig:
    """Everything that fixes the shapes of a policy. Raises UserError for values that cannot be built.

    The three `token_*` tuples have one entry a VL token (T entries): its view's number in `views`, its row and its column in that
    view's grid; a text token has -1 in all three.
    """

    head: str
    views: tuple[str, ...]
    token_dim: int
    token_view: tuple[int, ...]
    token_row: tuple[int, ...]
    token_col: tuple[int, ...]
    vl_enabled: bool = True
    sensor_enabled: bool = True
    sensor_window_size: int = 65
    fusion: str = "concat"
    horizon: int = 8
    action_hz: float = 10.0
    width: int = 128
    layers: int = 3
    heads: int = 4
    dropout: float = 0.0
    view_dropout: float = 0.0
    diffusion_timesteps: int = 100
    ddim_steps: int = 10

    def __post_init__(self) -> None:
        for field in ("views", "token_view", "token_row", "token_col"):
            object.__setattr__(self, field, tuple(getattr(self, field)))
        if self.head not in HEADS:
            raise UserError(f"A policy's head cannot be '{self.head}'; give one of {', '.join(HEADS)}.")
        if self.fusion not in FUSIONS:
            raise UserError(f"--fusion cannot be '{self.fusion}'; give one of {', '.join(FUSIONS)}.")
        if not len(self.token_view) == len(self.token_row) == len(self.token_col) > 0:
            raise UserError(
                "The VL token layout is empty or its view, row and column lists differ in length; rebuild the VL cache."
            )
        if self.width % self.heads:
            raise UserError(
                f"--width {self.width} is no multiple of --heads {self.heads}; give --width {max(1, self.width // self.heads) * self.heads}."
            )
        for name in ("horizon", "layers", "sensor_window_size", "diffusion_timesteps"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give 1 or more.")
        if not 1 <= self.ddim_steps <= self.diffusion_timesteps:
            raise UserError(
                f"--ddim-steps {self.ddim_steps} must lie between 1 and --diffusion-timesteps {self.diffusion_timesteps}; change one of them."
            )

    @property
    def uses_sensor(self) -> bool:
        """True where a sensor window reaches the actions."""
        return self.sensor_enabled and self.fusion != "none"

    @property
    def tokens(self) -> int:
        """T, the number of VL tokens."""
        return len(self.token_view)

    def to_dict(self) -> dict[str, Any]:
        """Plain Python, for a checkpoint."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "PolicyConfig":
        """The record that `to_dict` wrote. Raises UserError where keys are unknown or missing."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(
                f"The checkpoint's policy has settings that this version does not know: {', '.join(unknown)}; use the version that wrote it."
            )
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(
                f"The checkpoint's policy settings are incomplete ({error}); take another checkpoint of the same run."
            ) from error
