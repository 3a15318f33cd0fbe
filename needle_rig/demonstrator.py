"""The scripted demonstrator: moves the tip smoothly, at human speeds (2 to 6 mm/s), by what a policy could measure.

It acts on the state, the target's place and yaw (from the cameras) and the OCT distance (from the sensor), and on
nothing older, so a policy without memory can imitate it. Injected pushes lead it off its path and it recovers: states
off the path are in the recordings.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.spatial.transform import Rotation

from needle_rig.arm import TICK_HZ, Arm, Motion
from needle_rig.environment import NeedleInsertion
from needle_rig.judge import Judge
from needle_rig.tissue import RANGE_MM, Tissue
from needle_rig.world import ASKED_DEPTH_MM, LAYER_THICKNESS_MM, World, stream

SPEED_MM_S = 5.0
TURN_DEG_S = 12.0
HOVER_MM = 4.0  # waits at this height over the surface until it is above the target
# and this much higher for every mm beside it: low enough that height does not tell whether the target is below
HOVER_SLOPE = 0.4
DONE_DEPTH_MM = 0.08
HOLD_S = 1.6  # longer than the rest that the judgement asks for
CONTROL_TICKS = 10  # the hand acts at 65 Hz
SMOOTHING_S = 0.12  # a hand's command does not jump
START_IDLE_S = 0.3
TIME_LIMIT_S = 40.0


@dataclass(frozen=True)
class Measured:
    """What the demonstrator sees: its own pose, the target, and the remaining way by OCT (None out of its range)."""

    position_mm: np.ndarray  # (3,) of the tip
    rotvec_deg: np.ndarray  # (3,)
    target_xy_mm: tuple[float, float]
    target_yaw_deg: float
    surface_z_mm: float
    remaining_mm: float | None


def measure(world: World, position_mm: np.ndarray, rotvec_deg: np.ndarray, punctured: bool) -> Measured:
    """What can be seen of a world. The remaining way comes from the membrane's echo, after the puncture the layer's."""
    distance = float(position_mm[2]) - world.membrane_z_mm
    remaining: float | None = None
    if punctured:  # the layer's nominal thickness is what it knows
        remaining = (distance + world.layer_mm) - (LAYER_THICKNESS_MM - ASKED_DEPTH_MM)
    elif distance < RANGE_MM:
        remaining = max(distance, 0.0) + ASKED_DEPTH_MM
    return Measured(position_mm, rotvec_deg, world.target_xy_mm, world.target_yaw_deg, world.surface_z_mm, remaining)


def velocity(seen: Measured) -> np.ndarray:
    """(6,) wished velocity: mm/s, then deg/s as a rotation vector, base frame."""
    offset = np.asarray(seen.position_mm[:2]) - seen.target_xy_mm
    lateral = float(np.hypot(*offset))
    height = float(seen.position_mm[2]) - seen.surface_z_mm
    speed = np.zeros(6)
    speed[:2] = -SPEED_MM_S * offset / np.hypot(lateral, SPEED_MM_S / 1.5)
    if height < 0:
        speed[:2] *= 0.3  # the gel holds the needle
    hover = -1.2 * (height - HOVER_MM - HOVER_SLOPE * max(0.0, lateral - 0.8))
    hover = SPEED_MM_S * np.tanh(hover / SPEED_MM_S)
    insert = -4.0 if seen.remaining_mm is None else -4.0 * np.tanh(1.8 * seen.remaining_mm / 4.0)
    above = _smooth((1.4 - lateral) / 0.7)  # 1 within 0.7 mm of the target's axis, 0 beyond 1.4 mm
    inside = _smooth((0.5 - height) / 0.5)
    weight = max(above, inside)
    speed[2] = weight * insert + (1 - weight) * hover
    goal = Rotation.from_euler("Z", seen.target_yaw_deg, degrees=True)
    turn = (goal * Rotation.from_rotvec(seen.rotvec_deg, degrees=True).inv()).as_rotvec(degrees=True)
    speed[3:] = TURN_DEG_S * turn / np.hypot(np.linalg.norm(turn), TURN_DEG_S / 1.2)
    return speed


def finished(seen: Measured, punctured: bool) -> bool:
    """Whether the tip rests at the asked depth, so that the hold begins."""
    return punctured and seen.remaining_mm is not None and abs(seen.remaining_mm) < DONE_DEPTH_MM


def _smooth(x: float) -> float:
    x = min(max(x, 0.0), 1.0)
    return x * x * (3 - 2 * x)


class Pushes:
    """Disturbances of one demonstration: smooth velocity pulses at random moments.

    One to three come just before the insertion, one after the puncture in half of the demonstrations. They are short:
    what they do cannot be learnt, how they are corrected can.
    """

    def __init__(self, rng: np.random.Generator, rate_hz: float = 0.15):
        self._rng, self._rate_hz = rng, rate_hz
        self._pulse: tuple[float, float, np.ndarray] | None = None  # start s, duration s, shift (6,) mm and deg
        self._next_s = rng.exponential(1 / rate_hz) if rate_hz else np.inf
        self._near = int(rng.integers(1, 4)) if rate_hz else 0  # still to come just before the insertion
        self._behind = rate_hz > 0 and rng.uniform() < 0.5
        self._wander = np.zeros(3)

    def velocity(self, t_s: float, dt_s: float, seen: Measured, resting: bool) -> np.ndarray:
        """(6,) added velocity at time t; also a slow wander of 0.15 mm/s, as of a hand."""
        height = seen.position_mm[2] - seen.surface_z_mm
        if self._pulse is None:
            self._begin_pulse(t_s, height, seen, resting)
        self._wander += dt_s / 0.5 * -self._wander
        if self._rate_hz:
            self._wander += 0.15 * np.sqrt(2 * dt_s / 0.5) * self._rng.standard_normal(3)
        added = np.concatenate([self._wander, np.zeros(3)])
        if height < 0.5 or resting:
            added *= 0.3
        if self._pulse is not None:
            start, seconds, shift = self._pulse
            phase = (t_s - start) / seconds
            if phase >= 1:
                self._pulse = None
            else:
                added += shift / seconds * (1 - np.cos(2 * np.pi * phase))  # integrates to the shift
        return added

    def _begin_pulse(self, t_s: float, height: float, seen: Measured, resting: bool) -> None:
        rng = self._rng
        lateral = np.hypot(*(seen.position_mm[:2] - np.asarray(seen.target_xy_mm)))
        if height > 1.0 and self._near and height < HOVER_MM + 1 and lateral < 1.5:
            self._near -= 1
            seconds, lateral_mm, up_mm, turn_deg = 0.35, rng.uniform(1.0, 5.0), rng.uniform(-0.5, 1.0), 4.0
        elif height > 2.0 and t_s >= self._next_s:
            self._next_s = t_s + 1.0 + rng.exponential(1 / self._rate_hz)
            seconds, lateral_mm, up_mm, turn_deg = 0.4, rng.uniform(2.0, 6.0), rng.uniform(-1.0, 2.0), 6.0
        elif resting and self._behind:
            self._behind = False
            seconds, lateral_mm, up_mm, turn_deg = 0.4, 0.1, rng.choice([-1.2, 0.8]) * rng.uniform(0.25, 1.0), 1.0
        else:
            return
        angle = rng.uniform(0, 2 * np.pi)
        place = [lateral_mm * np.cos(angle), lateral_mm * np.sin(angle), up_mm]
        self._pulse = t_s, seconds, np.hstack([place, rng.uniform(-1, 1, 3) * turn_deg * np.array([0.3, 0.3, 1.0])])

    @property
    def active(self) -> bool:
        """Whether a pulse is running."""
        return self._pulse is not None


@dataclass(frozen=True)
class Demonstration:
    """All ticks of a demonstration; `verdict` is the judge's, with the motion's `seconds`."""

    world: World
    tissue: Tissue
    verdict: dict[str, Any]
    position_mm: np.ndarray  # (n, 3)
    rotvec_deg: np.ndarray  # (n, 3)
    force_mN: np.ndarray  # (n,) true
    punctured: np.ndarray  # (n,) bool
    pushed: np.ndarray  # (n,) bool

    @property
    def seconds(self) -> float:
        """Duration of the motion, the hold at its end and the tail included."""
        return len(self.force_mN) / TICK_HZ

    def at(self, t_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position (m, 3) and rotation vector (m, 3) at times since the start, between ticks by interpolation.

        Before the first tick and after the last one the arm is at rest.
        """
        ticks = np.clip(np.asarray(t_s, float) * TICK_HZ, 0, len(self.force_mN) - 1)
        low = np.minimum(ticks.astype(int), len(self.force_mN) - 2)
        part = (ticks - low)[:, None]
        position, rotvec = ((1 - part) * x[low] + part * x[low + 1] for x in (self.position_mm, self.rotvec_deg))
        return position, rotvec


def demonstrate(world: World, pushes: bool = True, tail_s: float = 0.0) -> Demonstration:
    """Run the demonstrator in a world, with its injected pushes or without; deterministic by the world's seed.

    `tail_s` seconds of rest are appended for streams that go on; they belong to no verdict.
    """
    rng = stream(world.seed, "demonstrator")
    pace = rng.uniform(0.92, 1.08)
    push = Pushes(rng, rate_hz=0.15 if pushes else 0.0)
    arm, tissue, judge = Arm(world.start_mm, world.start_rotvec_deg), Tissue(world), Judge(world)
    parts: list[tuple[np.ndarray, ...]] = []

    def keep(motion: Motion, pushed: bool) -> None:
        force, punctured = tissue.sense(motion)
        parts.append((motion.position_mm, motion.rotvec_deg, force, punctured, np.full(len(force), pushed)))

    dt = CONTROL_TICKS / TICK_HZ
    speed, resting_s = np.zeros(6), 0.0
    while arm.t_s < TIME_LIMIT_S and not judge.reason and resting_s < HOLD_S:
        seen = measure(world, arm.pose[:3], arm.pose[3:], tissue.punctured)
        resting = finished(seen, tissue.punctured)
        begun = arm.t_s >= START_IDLE_S
        wished = pace * velocity(seen) if begun else np.zeros(6)
        added = push.velocity(arm.t_s, dt, seen, resting) if begun else np.zeros(6)
        speed += (1 - np.exp(-dt / SMOOTHING_S)) * (wished - speed)
        motion = arm.move_by((speed + added) * dt, CONTROL_TICKS)
        keep(motion, push.active)
        judge.watch(motion, tissue)
        resting_s = resting_s + dt if resting and not push.active else 0.0
    judge.time_out()
    verdict = judge.to_dict() | {"seconds": arm.t_s}
    if n := round(tail_s * TICK_HZ):
        rest = np.repeat(arm.pose[None], n, axis=0)
        keep(Motion(arm.t_s + np.arange(1, n + 1) / TICK_HZ, rest[:, :3], rest[:, 3:]), False)
    return Demonstration(world, tissue, verdict, *(np.concatenate(part) for part in zip(*parts, strict=True)))


def demonstrator_action(rig: NeedleInsertion) -> np.ndarray:
    """(7,) action of the demonstrator, without pushes, for the rig as it is now: a reference that reads its truth."""
    seen = measure(rig.world, rig.arm.pose[:3], rig.arm.pose[3:], rig.tissue.punctured)
    return np.concatenate([velocity(seen) / rig.action_hz, [1.0]])
