"""One scripted demonstration: a world in, its whole motion, forces and puncture at 650 Hz out (no pictures, no A-scans yet)."""

from dataclasses import dataclass

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
    """All ticks of a demonstration: position_mm (n, 3), rotvec_deg (n, 3), force_mN (n,) true, punctured (n,), pushed (n,) bool."""

    world: World
    tissue: Tissue
    position_mm: np.ndarray
    rotvec_deg: np.ndarray
    force_mN: np.ndarray
    punctured: np.ndarray
    pushed: np.ndarray
    verdict: dict

    @property
    def seconds(self) -> float:
        """Duration of the motion, the hold at its end included."""
        return len(self.force_mN) / TICK_HZ

    def at(self, t_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Position (m, 3) and rotation vector (m, 3) at times since the start, between ticks by interpolation; the ends are held."""
        ticks = np.clip(np.asarray(t_s, float) * TICK_HZ, 0, len(self.force_mN) - 1)
        low = np.minimum(ticks.astype(int), len(self.force_mN) - 2)
        part = (ticks - low)[:, None]
        return tuple((1 - part) * x[low] + part * x[low + 1] for x in (self.position_mm, self.rotvec_deg))


def demonstrate(world: World, pushes: bool = True, tail_s: float = 0.0) -> Demonstration:
    """Run the demonstrator in a world, with its injected pushes unless `pushes` is False; deterministic by the world's seed.

    `tail_s` seconds of rest are appended for streams that go on; they belong to no verdict.
    """
    rng = stream(world.seed, "demonstrator")
    pace = rng.uniform(0.92, 1.08)
    disturb = Pushes(rng, rate_hz=0.15 if pushes else 0.0)
    arm, tissue, judge = Arm(world.start_mm, world.start_rotvec_deg), Tissue(world), Judge(world)
    motions, forces, punctures, pushed = [], [], [], []
    dt = CONTROL_TICKS / TICK_HZ
    speed, resting_s = np.zeros(6), 0.0
    while arm.t_s < TIME_LIMIT_S and not judge.reason:
        seen = measure(world, arm.pose[:3], arm.pose[3:], tissue.punctured)
        wished = pace * velocity(seen) if arm.t_s >= START_IDLE_S else np.zeros(6)
        resting = finished(seen, tissue.punctured)
        added = disturb.velocity(arm.t_s, dt, seen, resting) if arm.t_s >= START_IDLE_S else np.zeros(6)
        speed += (1 - np.exp(-dt / SMOOTHING_S)) * (wished - speed)
        motion = arm.move_by((speed + added) * dt, CONTROL_TICKS)
        force, punctured = tissue.sense(motion)
        judge.watch(motion, tissue)
        motions.append(motion)
        forces.append(force)
        punctures.append(punctured)
        pushed.append(np.full(CONTROL_TICKS, disturb.active))
        resting_s = resting_s + dt if resting and not disturb.active else 0.0
        if resting_s >= HOLD_S:
            break
    judge.time_out()
    verdict = judge.to_dict() | {"seconds": arm.t_s}
    n = round(tail_s * TICK_HZ)
    if n:
        rest = Motion(
            arm.t_s + np.arange(1, n + 1) / TICK_HZ,
            np.repeat(arm.pose[None, :3], n, 0),
            np.repeat(arm.pose[None, 3:], n, 0),
        )
        force, punctured = tissue.sense(rest)
        motions.append(rest)
        forces.append(force)
        punctures.append(punctured)
        pushed.append(np.zeros(n, bool))
    return Demonstration(
        world,
        tissue,
        np.concatenate([m.position_mm for m in motions]),
        np.concatenate([m.rotvec_deg for m in motions]),
        np.concatenate(forces),
        np.concatenate(punctures),
        np.concatenate(pushed),
        verdict,
    )
