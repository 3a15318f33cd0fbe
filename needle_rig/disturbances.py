"""What may change on a rig after the recordings: named changes of a `World`, each alone.

    rig.reset(seed=7, options={"world": disturbed(sample_world(7), "light halved")})

What is random in a change follows from the world's seed. Sizes are guesses of what a laboratory meets, not measured.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from needle_rig.world import VIEWS, RigError, World, stream

MOVED_MM, MOVED_DEG = 2.0, 1.0  # of every camera, each in a direction of its own
BRIGHTER, DARKER = 2.0, 0.5
HUB_RGB = (0.90, 0.55, 0.10)  # an orange hub; the recordings' is green
TARGET_SCALE = 1.25
DRIFT_MN_S = 1.0  # of the force's offset, up or down
OCT_CONTRAST = 0.5
LAG_TIMES = 2.0
FURTHER = 1.2  # how much wider than these `varied` draws


def _camera_moved(world: World) -> World:
    rng = stream(world.seed, "camera moved")
    place, turn = (_unit(rng.standard_normal((len(VIEWS), 3))) for _ in range(2))
    looks = world.looks
    return _look(
        world,
        camera_place_mm=looks.camera_place_mm + MOVED_MM * place,
        camera_turn_deg=looks.camera_turn_deg + MOVED_DEG * turn,
    )


def _covered(world: World) -> World:
    return _look(world, covered=(VIEWS[int(stream(world.seed, "camera covered").integers(len(VIEWS)))],))


def _light(times: float) -> Callable[[World], World]:
    return lambda world: _look(
        world, light_level=times * world.looks.light_level, ambient_level=times * world.looks.ambient_level
    )


def _drift(world: World) -> World:
    return replace(world, force_drift_mN_s=DRIFT_MN_S * float(stream(world.seed, "force drift").choice([-1, 1])))


CHANGES: dict[str, Callable[[World], World]] = {
    "cameras moved": _camera_moved,
    "one camera covered": _covered,
    "light halved": _light(DARKER),
    "light doubled": _light(BRIGHTER),
    "needle of another colour": lambda world: _look(world, hub_rgb=HUB_RGB),
    "larger target": lambda world: _look(world, target_scale=TARGET_SCALE),
    "smaller target": lambda world: _look(world, target_scale=1 / TARGET_SCALE),
    "force drifts": _drift,
    "OCT contrast halved": lambda world: replace(world, oct_contrast=OCT_CONTRAST),
    "arm lags twice as much": lambda world: replace(world, arm_lag_s=LAG_TIMES * world.arm_lag_s),
}


def disturbed(world: World, name: str) -> World:
    """The world with the change of this name ("": as it is). Raises RigError for a name that is not known."""
    if not name:
        return world
    if name not in CHANGES:
        raise RigError(f"The rig has no disturbance {name!r}; it has {', '.join(CHANGES)}.")
    return CHANGES[name](world)


def varied(world: World) -> World:
    """The world with everything that a laboratory can vary between recordings drawn widely, by its seed.

    Light, camera places, the needle's colour, the target's size, the drift of the force and the contrast of the A-scan:
    wider than each of CHANGES, all at once. The lag of the arm stays."""
    rng = stream(world.seed, "varied")
    how_far = rng.uniform(0, FURTHER, (2, len(VIEWS), 1))
    place, turn = how_far * [_unit(rng.standard_normal((len(VIEWS), 3))) for _ in range(2)]
    world = _light(_between(rng, DARKER / FURTHER, BRIGHTER * FURTHER))(world)
    world = _look(
        world,
        camera_place_mm=world.looks.camera_place_mm + MOVED_MM * place,
        camera_turn_deg=world.looks.camera_turn_deg + MOVED_DEG * turn,
        hub_rgb=tuple(rng.uniform(0.05, 0.95, 3)),
        target_scale=_between(rng, 1 / (TARGET_SCALE * FURTHER), TARGET_SCALE * FURTHER),
    )
    drift = DRIFT_MN_S * FURTHER * float(rng.uniform(-1, 1))
    return replace(world, force_drift_mN_s=drift, oct_contrast=float(rng.uniform(OCT_CONTRAST / FURTHER, 1.0)))


def _between(rng: np.random.Generator, low: float, high: float) -> float:
    """Drawn evenly over the logarithms."""
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _look(world: World, **changes: Any) -> World:
    return replace(world, looks=replace(world.looks, **changes))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
