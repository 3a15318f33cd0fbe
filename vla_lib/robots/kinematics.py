"""The Meca500's geometry: flange poses, Jacobians, and whether a motion runs into a joint limit or a singularity.

In velocity mode the controller stops there in silence. Lengths and limits: Mecademic, Meca500 user manual.
"""

from dataclasses import dataclass

import numpy as np
from scipy.spatial.transform import Rotation

from vla_lib.episodes.poses import pose_to_matrix
from vla_lib.runtime.safety import JOINT_LIMIT, SINGULARITY

BASE_MM, UPPER_MM, OFFSET_MM, FOREARM_MM, WRIST_MM = 135.0, 135.0, 38.0, 120.0, 70.0
REACH_MM = UPPER_MM + float(np.hypot(OFFSET_MM, FOREARM_MM)) + WRIST_MM  # of the flange, from the shoulder
SHOULDER_MM = np.array([0.0, 0.0, BASE_MM])
LIMITS_DEG = np.array([(-175, 175), (-70, 90), (-135, 70), (-170, 170), (-115, 115), (-36000, 36000)], float)
STRETCHED_DEG = -float(np.degrees(np.arctan2(FOREARM_MM, OFFSET_MM)))  # joint 3 where the arm is straight


def axes(joints: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of joints (6,) in degrees, base frame: axes (6, 3), a point on each (6, 3) in mm, the flange's pose (4, 4)."""
    turn, place = Rotation.identity(), np.zeros(3)
    # axis of the joint, then the way from there to the next one, both in the frame before it
    links = (
        ("z", (0.0, 0.0, BASE_MM)),
        ("y", (0.0, 0.0, UPPER_MM)),
        ("y", (FOREARM_MM, 0.0, OFFSET_MM)),
        ("x", (0.0, 0.0, 0.0)),
        ("y", (WRIST_MM, 0.0, 0.0)),
        ("x", (0.0, 0.0, 0.0)),
    )
    along, points = [], []
    for (axis, way), angle in zip(links, np.asarray(joints, float), strict=True):
        points.append(place)
        along.append(turn.apply(np.eye(3)["xyz".index(axis)]))
        turn = turn * Rotation.from_euler(axis, angle, degrees=True)
        place = place + turn.apply(way)
    flange = np.eye(4)
    flange[:3, :3], flange[:3, 3] = (turn * Rotation.from_euler("y", 90, degrees=True)).as_matrix(), place
    return np.array(along), np.array(points), flange


@dataclass(frozen=True)
class Reach:
    """Where the arm can go. wrf, trf: (6,) mm, degrees, as in the controller; margins as in `ArmSettings`."""

    wrf: tuple[float, ...] = (0.0,) * 6
    trf: tuple[float, ...] = (0.0,) * 6
    joint_margin_deg: float = 2.0
    singularity_deg: float = 3.0
    shoulder_mm: float = 10.0

    def tip(self, joints: np.ndarray) -> np.ndarray:
        """(4, 4) pose of the tool in the WRF, mm."""
        flange = axes(joints)[2]
        inverse: np.ndarray = np.linalg.inv(pose_to_matrix(np.array(self.wrf)))
        return inverse @ flange @ pose_to_matrix(np.array(self.trf))

    def jacobian(self, joints: np.ndarray) -> np.ndarray:
        """(6, 6): mm and degrees of the tool, in the WRF's axes, a degree of each joint."""
        along, points, flange = axes(joints)
        tip = (flange @ pose_to_matrix(np.array(self.trf)))[:3, 3]
        base = pose_to_matrix(np.array(self.wrf))[:3, :3].T
        linear = np.cross(along, tip - points) * np.pi / 180
        return np.concatenate([base @ linear.T, base @ along.T])

    def distances(self, joints: np.ndarray) -> dict[str, float]:
        """How far the nearest trouble is: degrees to each joint's limit (below 0: beyond) and to the wrist's and the
        elbow's singularity, mm to the shoulder's, each less the margin."""
        joints = np.asarray(joints, float)
        within = np.minimum(joints - LIMITS_DEG[:, 0], LIMITS_DEG[:, 1] - joints) - self.joint_margin_deg
        found = {f"{JOINT_LIMIT} {number}": float(left) for number, left in enumerate(within, 1)}
        found[f"{SINGULARITY} of the wrist"] = abs(float(joints[4])) - self.singularity_deg
        found[f"{SINGULARITY} of the elbow"] = abs(float(joints[2]) - STRETCHED_DEG) - self.singularity_deg
        wrist = axes(joints)[1][4]
        found[f"{SINGULARITY} of the shoulder"] = float(np.hypot(*wrist[:2])) - self.shoulder_mm
        return found

    def refuses(self, joints: np.ndarray, action: np.ndarray) -> str:
        """Why an action (7,) must not be sent with the arm at `joints` (6,): it would end within a margin, nearer than
        now. "" where nothing is in the way; the way out is always free."""
        step = np.linalg.lstsq(self.jacobian(joints), np.asarray(action, float)[:6], rcond=1e-6)[0]
        before, after = self.distances(joints), self.distances(np.asarray(joints, float) + step)
        return next((name for name, left in after.items() if left < 0 and left < before[name] - 1e-9), "")
