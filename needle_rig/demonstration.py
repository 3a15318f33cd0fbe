"""One scripted demonstration: its whole motion, forces and puncture at 650 Hz (no pictures, no A-scans yet)."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from needle_rig.arm import TICK_HZ, Arm, Motion
from needle_rig.demonstrator import HOLD_S, Pushes, finished, measure, velocity
from needle_rig.judge import Judge
from needle_rig.tissue import Tissue
from needle_rig.world import World, stream

CONTROL_TICKS = 10  # the hand acts at 65 Hz
SMOOTHING_S = 0.12  # a hand's command does not jump
START_IDLE_S = 0.3
TIME_LIMIT_S = 40.0


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
