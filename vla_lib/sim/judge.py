"""The judgement of an attempt: stretches of motion in; success, or the named reason of failure, out.

Success: the tip stopped (for `STILL_S`, slower than `STILL_MM_S`) within LATERAL_TOLERANCE_MM of the target's axis and within
DEPTH_TOLERANCE_MM of the asked depth behind the resting membrane, and the force never passed FORCE_LIMIT_MN.
"""

import numpy as np

from vla_lib.sim.arm import TICK_HZ, Motion
from vla_lib.sim.tissue import Tissue
from vla_lib.sim.world import ASKED_DEPTH_MM, DEPTH_TOLERANCE_MM, FORCE_LIMIT_MN, LATERAL_TOLERANCE_MM, WORKSPACE_MM, World

STILL_S = 0.8
STILL_MM_S = 0.6  # distance over the last 0.1 s, per second


class Judge:
    """Watches one attempt. `reason` is "" while undecided or at success."""

    def __init__(self, world: World):
        self.world = world
        self.success = False
        self.reason = ""
        self.peak_force_mN = 0.0
        self._good_s = 0.0
        self._tail = np.empty((0, 3))
        self._tip = np.asarray(world.start_mm)
        self._punctured = False

    @property
    def done(self) -> bool:
        """Whether the attempt is decided: success, force over the limit, or out of the workspace."""
        return self.success or bool(self.reason)

    def lateral_mm(self) -> float:
        """Distance of the tip from the target's axis."""
        return float(np.hypot(*(self._tip[:2] - self.world.target_xy_mm)))

    def depth_mm(self) -> float:
        """Depth of the tip behind the resting membrane; negative before it."""
        return float(self.world.membrane_z_mm - self._tip[2])

    def watch(self, motion: Motion, tissue: Tissue) -> None:
        """Take a stretch of motion, after the tissue sensed it."""
        self.peak_force_mN, self._punctured = tissue.peak_force_mN, tissue.punctured
        span = int(0.1 * TICK_HZ)
        path = np.concatenate([self._tail, motion.position_mm])
        self._tail, self._tip = path[-span:], motion.position_mm[-1]
        if self.done:
            return
        if self.peak_force_mN > FORCE_LIMIT_MN:
            self.reason = "force over the limit"
            return
        if any(not low <= x <= high for x, (low, high) in zip(self._tip, WORKSPACE_MM, strict=True)):
            self.reason = "left the workspace"
            return
        still = len(path) > span and np.linalg.norm(path[-1] - path[-1 - span]) / (span / TICK_HZ) < STILL_MM_S
        in_place = self.lateral_mm() <= LATERAL_TOLERANCE_MM and abs(self.depth_mm() - ASKED_DEPTH_MM) <= DEPTH_TOLERANCE_MM
        self._good_s = self._good_s + len(motion.t_s) / TICK_HZ if still and in_place and self._punctured else 0.0
        self.success = self._good_s >= STILL_S - 1e-9

    def time_out(self) -> None:
        """End an undecided attempt and name what was missing."""
        if self.done:
            return
        if not self._punctured:
            self.reason = "no puncture"
        elif self.lateral_mm() > LATERAL_TOLERANCE_MM:
            self.reason = "beside the target"
        elif self.depth_mm() < ASKED_DEPTH_MM - DEPTH_TOLERANCE_MM:
            self.reason = "too shallow"
        elif self.depth_mm() > ASKED_DEPTH_MM + DEPTH_TOLERANCE_MM:
            self.reason = "too deep"
        else:
            self.reason = "did not rest"

    def to_dict(self) -> dict:
        """The judgement so far, JSON-able."""
        return {
            "success": self.success,
            "reason": self.reason,
            "lateral_mm": self.lateral_mm(),
            "depth_mm": self.depth_mm(),
            "depth_error_mm": self.depth_mm() - ASKED_DEPTH_MM,
            "punctured": self._punctured,
            "peak_force_mN": self.peak_force_mN,
        }
