"""The judgement of a rollout: success, or the named reason of failure.

A rollout is judged once, where the needle comes to rest behind the membrane (its depth within `REST_DEPTH_MM` and its
place within `REST_LATERAL_MM` for `REST_S`), or at the time limit. Success: it rests within LATERAL_TOLERANCE_MM of the
target's axis and within DEPTH_TOLERANCE_MM of the asked depth behind the resting membrane, and the force never passed
FORCE_LIMIT_MN. So a needle that creeps through the right depth without stopping there has not succeeded, nor has one
that stops elsewhere first.
"""

from typing import Any

import numpy as np

from needle_rig.arm import TICK_HZ, Motion
from needle_rig.tissue import Tissue
from needle_rig.world import (
    ASKED_DEPTH_MM,
    DEPTH_TOLERANCE_MM,
    FORCE_LIMIT_MN,
    LATERAL_TOLERANCE_MM,
    WORKSPACE_MM,
    World,
)

REST_S = 1.5
REST_DEPTH_MM = 0.2
REST_LATERAL_MM = 0.4


class Judge:
    """Watches one rollout. `reason` is "" while undecided or at success."""

    def __init__(self, world: World):
        self.world = world
        self.success = False
        self.reason = ""
        self.peak_force_mN = 0.0
        self.punctured = False
        self._tail = np.asarray(world.start_mm, float)[None]  # (n, 3) the last REST_S of places
        self._behind = 0  # ticks since the puncture

    @property
    def done(self) -> bool:
        """Whether the rollout is decided."""
        return self.success or bool(self.reason)

    def watch(self, motion: Motion, tissue: Tissue) -> None:
        """Take a stretch of motion, after the tissue sensed it."""
        if self.done:
            return
        window = round(REST_S * TICK_HZ)
        self._tail = np.concatenate([self._tail, motion.position_mm])[-window:]
        self.peak_force_mN, self.punctured = tissue.peak_force_mN, tissue.punctured
        if tissue.puncture_t_s is not None:
            self._behind = round((motion.t_s[-1] - tissue.puncture_t_s) * TICK_HZ)
        if self.peak_force_mN > FORCE_LIMIT_MN:
            self.reason = "force over the limit"
        elif any(not low <= x <= high for x, (low, high) in zip(self._tail[-1], WORKSPACE_MM, strict=True)):
            self.reason = "left the workspace"
        elif self._behind >= window:
            span = np.ptp(self._tail, axis=0)
            if span[2] < REST_DEPTH_MM and np.hypot(*span[:2]) < REST_LATERAL_MM:
                self.reason = self._misplaced(self._tail[-1])
                self.success = not self.reason

    def time_out(self) -> None:
        """Judge an undecided rollout: success where it has stayed in place for `REST_S`, else what is missing."""
        if self.done:
            return
        self.reason = self._misplaced(self._tail[-1]) if self.punctured else "no puncture"
        left = self._behind < len(self._tail) or any(self._misplaced(place) for place in self._tail[::10])
        if not self.reason and left:
            self.reason = "did not rest"
        self.success = not self.reason

    def _misplaced(self, place_mm: np.ndarray) -> str:
        """What is wrong with resting at a place behind the membrane; "" where nothing is."""
        lateral, depth_error = self._errors(place_mm)
        if lateral > LATERAL_TOLERANCE_MM:
            return "beside the target"
        if abs(depth_error) > DEPTH_TOLERANCE_MM:
            return "too deep" if depth_error > 0 else "too shallow"
        return ""

    def _errors(self, place_mm: np.ndarray) -> tuple[float, float]:
        """Distance from the target's axis, and depth behind the resting membrane beyond the asked one; both mm."""
        lateral = np.hypot(*(place_mm[:2] - self.world.target_xy_mm))
        return float(lateral), float(self.world.membrane_z_mm - place_mm[2]) - ASKED_DEPTH_MM

    def to_dict(self) -> dict[str, Any]:
        """The judgement so far, JSON-able."""
        lateral, depth_error = self._errors(self._tail[-1])
        return {
            "success": self.success,
            "reason": self.reason,
            "lateral_mm": lateral,
            "depth_mm": float(self.world.membrane_z_mm - self._tail[-1, 2]),
            "depth_error_mm": depth_error,
            "punctured": self.punctured,
            "peak_force_mN": self.peak_force_mN,
        }
