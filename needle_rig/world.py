"""One episode's hidden truth: a seed and a task give a `World` of places, depths, tissue and looks.

The cameras show the target, the needle and the phantom's surface; the membrane lies under an opaque gel layer whose
thickness is drawn independently of everything that is visible. The A-scan shows the membrane's distance and nothing of
the lateral place.

What disturbs a rig is a change of its world: `dataclasses.replace(world, ...)` moves a camera, dims the light or
thickens the gel, and `NeedleInsertion.reset(options={"world": changed})` runs it. The streams of `stream` are
independent, so a new purpose leaves what older seeds draw as it is.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T", float, np.ndarray)


class RigError(RuntimeError):
    """Bad input, or something missing on this machine: one sentence with its remedy."""


# Workspace of the rig in the arm's base frame, mm. The phantom's nominal surface is the plane z = SURFACE_Z_MM.
CENTRE_XY_MM = (175.0, 0.0)
SURFACE_Z_MM = 135.0
WORKSPACE_MM = ((150.0, 200.0), (-25.0, 25.0), (126.0, 170.0))  # (low, high) of x, y, z for the tip

TARGET_RANGE_MM = 10.0  # target centre within +- this of the workspace centre, in x and in y
TARGET_YAW_RANGE_DEG = 25.0
START_HEIGHT_MM = (6.0, 25.0)  # tip above the nominal surface
START_RADIUS_MM = 12.0  # tip's lateral start around the workspace centre
START_TILT_DEG = 3.0  # alpha, beta at the start; the demonstrator brings both to zero
START_YAW_DEG = 12.0
SURFACE_JITTER_MM = 0.5  # visible height of the surface
GEL_THICKNESS_MM = (1.5, 5.5)  # surface to membrane: hidden
LAYER_THICKNESS_MM = 3.0  # membrane to the deeper layer: the same in every phantom (+- LAYER_JITTER_MM)
LAYER_JITTER_MM = 0.05

LAG_S = 0.08  # of the arm behind its command

# The task, and how it is judged (see judge.py).
ASKED_DEPTH_MM = 1.0
LATERAL_TOLERANCE_MM = 1.5
DEPTH_TOLERANCE_MM = 0.3
FORCE_LIMIT_MN = 150.0

# The views, by the keys that prepared episodes use: four ZED cameras around the phantom, one OAK at the hand.
VIEWS = ("View1_left", "View2_left", "View3_left", "View4_left", "View5")

# Ranges of what is randomised in the pictures, about the values in scene.py.
CAMERA_PLACE_JITTER_MM = 0.3
CAMERA_TURN_JITTER_DEG = 0.15
LIGHT_PLACE_MM = ((-80.0, 80.0), (-80.0, 80.0), (180.0, 260.0))  # (low, high) of x, y, z about the workspace centre
LIGHT_LEVEL = (0.85, 1.1)
LIGHT_RGB = (0.92, 1.0)
AMBIENT_LEVEL = (0.32, 0.42)
TABLE_LEVEL = (0.8, 1.1)
SILICONE_LEVEL = (0.95, 1.03)
PHANTOM_JITTER_MM = 2.0
PHANTOM_YAW_DEG = 6.0


@dataclass(frozen=True)
class Task:
    """A family of phantoms: dataset folders below the root, and its look (silicone rgb, hues of its ring)."""

    folders: tuple[str, ...]
    silicone_rgb: tuple[float, float, float]
    ring_hue: tuple[float, float]


DEFAULT_TASK = "White_silicone_white_circle"
TASKS = {
    DEFAULT_TASK: Task((DEFAULT_TASK,), (0.86, 0.85, 0.82), (-0.03, 0.02)),
    "Silicone_block": Task(("New_dataset", "Silicone_block"), (0.76, 0.82, 0.86), (-0.05, 0.03)),
}


def task_of(name: str) -> Task:
    """The task of this name; any other looks like Silicone_block. Raises RigError where it cannot name a folder."""
    if name in TASKS:
        return TASKS[name]
    if not all(part.isalnum() for part in name.split("_")):
        raise RigError(
            f"The task name {name!r} cannot name a folder; use words joined by underscores, such as Silicone_block."
        )
    return replace(TASKS["Silicone_block"], folders=("New_dataset", name))


@dataclass(frozen=True)
class Looks:
    """Colours, light and camera offsets: what the pictures show and nothing else reads."""

    silicone_rgb: np.ndarray  # (3,) 0 to 1
    ring_hue: float
    table_level: float
    light_mm: np.ndarray  # (3,) about the workspace centre
    light_level: float
    light_rgb: np.ndarray  # (3,)
    ambient_level: float
    phantom_xy_mm: np.ndarray  # (2,)
    phantom_yaw_deg: float
    camera_place_mm: np.ndarray  # (5, 3)
    camera_turn_deg: np.ndarray  # (5, 3) rotation vectors
    hub_rgb: tuple[float, float, float] = (0.10, 0.85, 0.35)  # of the needle's hub
    target_scale: float = 1.0  # of the target's printed size
    covered: tuple[str, ...] = ()  # views whose lens is covered: black pictures


@dataclass(frozen=True)
class World:
    """What one seed fixes. Never part of an observation nor of a recording."""

    seed: int
    task: str
    target_xy_mm: tuple[float, float]
    target_yaw_deg: float
    surface_z_mm: float
    gel_mm: float
    layer_mm: float
    start_mm: tuple[float, float, float]
    start_rotvec_deg: tuple[float, float, float]
    puncture_indent_mm: float
    stiffness_mN_per_mm: float
    friction_mN: float
    friction_mN_per_mm: float
    force_bias_mN: float
    looks: Looks
    force_drift_mN_s: float = 0.0  # of the sensor's offset
    oct_contrast: float = 1.0  # of the A-scan over its floor
    arm_lag_s: float = LAG_S

    @property
    def membrane_z_mm(self) -> float:
        """Height of the resting membrane, base frame."""
        return self.surface_z_mm - self.gel_mm

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of the truth without the looks."""
        truth = asdict(self)
        for name in ("looks", "force_drift_mN_s", "oct_contrast", "arm_lag_s"):
            del truth[name]
        return truth | {"membrane_z_mm": self.membrane_z_mm, "asked_depth_mm": ASKED_DEPTH_MM}


def stream(seed: int, purpose: str) -> np.random.Generator:
    """An independent random stream of an episode seed and one purpose ("world", "sensor", ...)."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, *purpose.encode()])))


def latest(t_s: T, rate_hz: float, phase_s: float) -> T:
    """When a source that fires every 1 / rate_hz, once at phase_s, last fired at or before each time t_s."""
    return np.floor((t_s - phase_s) * rate_hz) / rate_hz + phase_s


def sample_world(seed: int, task: str = DEFAULT_TASK) -> World:
    """Draw a world; the same seed and task give the same world. Raises RigError where the task cannot be a folder."""
    rng = stream(seed, "world")

    def around(centre: float, half: float) -> float:
        return float(centre + rng.uniform(-half, half))

    # the order of the draws is part of what a seed means
    angle, radius = rng.uniform(0, 2 * np.pi), START_RADIUS_MM * np.sqrt(rng.uniform())
    return World(
        seed=seed,
        task=task,
        target_xy_mm=(around(CENTRE_XY_MM[0], TARGET_RANGE_MM), around(CENTRE_XY_MM[1], TARGET_RANGE_MM)),
        target_yaw_deg=around(0, TARGET_YAW_RANGE_DEG),
        surface_z_mm=around(SURFACE_Z_MM, SURFACE_JITTER_MM),
        gel_mm=float(rng.uniform(*GEL_THICKNESS_MM)),
        layer_mm=around(LAYER_THICKNESS_MM, LAYER_JITTER_MM),
        start_mm=(
            float(CENTRE_XY_MM[0] + radius * np.cos(angle)),
            float(CENTRE_XY_MM[1] + radius * np.sin(angle)),
            float(SURFACE_Z_MM + rng.uniform(*START_HEIGHT_MM)),
        ),
        start_rotvec_deg=(around(0, START_TILT_DEG), around(0, START_TILT_DEG), around(0, START_YAW_DEG)),
        puncture_indent_mm=float(rng.uniform(0.30, 0.45)),
        stiffness_mN_per_mm=float(rng.uniform(120, 180)),
        friction_mN=float(rng.uniform(5, 8)),
        friction_mN_per_mm=float(rng.uniform(2.5, 3.5)),
        force_bias_mN=float(rng.uniform(-1.5, 1.5)),
        looks=_sample_looks(stream(seed, "looks"), task_of(task)),
    )


def _sample_looks(rng: np.random.Generator, task: Task) -> Looks:
    light_low, light_high = zip(*LIGHT_PLACE_MM, strict=True)
    return Looks(
        silicone_rgb=np.clip(np.asarray(task.silicone_rgb) * rng.uniform(*SILICONE_LEVEL, 3), 0, 1),
        ring_hue=float(rng.uniform(*task.ring_hue) % 1.0),
        table_level=float(rng.uniform(*TABLE_LEVEL)),
        light_mm=rng.uniform(np.array(light_low), np.array(light_high)),
        light_level=float(rng.uniform(*LIGHT_LEVEL)),
        light_rgb=rng.uniform(*LIGHT_RGB, 3),
        ambient_level=float(rng.uniform(*AMBIENT_LEVEL)),
        phantom_xy_mm=rng.uniform(-PHANTOM_JITTER_MM, PHANTOM_JITTER_MM, 2),
        phantom_yaw_deg=float(rng.uniform(-PHANTOM_YAW_DEG, PHANTOM_YAW_DEG)),
        camera_place_mm=rng.uniform(-CAMERA_PLACE_JITTER_MM, CAMERA_PLACE_JITTER_MM, (5, 3)),
        camera_turn_deg=rng.uniform(-CAMERA_TURN_JITTER_DEG, CAMERA_TURN_JITTER_DEG, (5, 3)),
    )
