"""The arm: follows a commanded tip pose with its lag and speed limits at 650 Hz; its joints by inverse kinematics.

The command runs linearly to its new place within the control interval, never faster than the limits (clamped by norm,
so a direction is kept); the arm follows as a first-order lag. Orientation is carried as a rotation vector (base frame),
which is smooth for the rig's small tilts; poses are written with Mecademic Euler angles, intrinsic XYZ: R = Rx(a) Ry(b)
Rz(r), degrees.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial.transform import Rotation

from needle_rig.world import LAG_S

TICK_HZ = 650.0  # one tick of the arm is one sample of the sensor
POSE_REFRESH_HZ = 60.0  # the controller renews the pose that it reports
SPEED_LIMIT_MM_S = 15.0
TURN_LIMIT_DEG_S = 45.0

# Meca500 link lengths, mm (Mecademic's manual): base to shoulder, upper arm, forearm's offset and length, wrist to
# flange; then our tool.
_BASE, _UPPER, _OFFSET, _FOREARM, _FLANGE, _TOOL = 135.0, 135.0, 38.0, 120.0, 70.0, 40.0


@dataclass(frozen=True)
class Motion:
    """Ticks of motion: t_s (n,), position_mm (n, 3), rotvec_deg (n, 3). The last row is the state afterwards."""

    t_s: np.ndarray
    position_mm: np.ndarray
    rotvec_deg: np.ndarray


class Arm:
    """Holds the command and the lagging pose; `move_by` and `move_to` move both."""

    def __init__(self, position_mm: ArrayLike, rotvec_deg: ArrayLike, lag_s: float = LAG_S):
        self.tick, self.lag_s = 0, lag_s
        self.pose = np.hstack([position_mm, rotvec_deg]).astype(float)  # (6,) mm, rotation vector deg
        self.command = self.pose.copy()

    @property
    def t_s(self) -> float:
        """Seconds since the arm was made."""
        return self.tick / TICK_HZ

    def move_by(self, action: ArrayLike, ticks: int) -> Motion:
        """Shift the command by an action (>= 6: mm, rotation vector deg, base frame) and run `ticks`."""
        action = np.asarray(action, float)
        turned = Rotation.from_rotvec(action[3:6], degrees=True) * Rotation.from_rotvec(self.command[3:], degrees=True)
        return self.move_to(np.concatenate([self.command[:3] + action[:3], turned.as_rotvec(degrees=True)]), ticks)

    def move_to(self, command: ArrayLike, ticks: int) -> Motion:
        """Run `ticks` towards a commanded (6,) pose: mm, rotation vector deg."""
        seconds = ticks / TICK_HZ
        step = np.asarray(command, float) - self.command
        step[:3] *= min(1.0, SPEED_LIMIT_MM_S * seconds / max(float(np.linalg.norm(step[:3])), 1e-12))
        step[3:] *= min(1.0, TURN_LIMIT_DEG_S * seconds / max(float(np.linalg.norm(step[3:])), 1e-12))
        rate = step / seconds
        t = np.arange(1, ticks + 1)[:, None] / TICK_HZ
        # first-order lag driven by a ramp: the command minus what lags, plus the decaying rest of the old difference
        lag_s = self.lag_s
        pose = self.command + rate * (t - lag_s) + (self.pose - self.command + rate * lag_s) * np.exp(-t / lag_s)
        motion = Motion((self.tick + np.arange(1, ticks + 1)) / TICK_HZ, pose[:, :3], pose[:, 3:])
        self.tick += ticks
        self.command = self.command + step
        self.pose = pose[-1]
        return motion


def euler_poses(position_mm: np.ndarray, rotvec_deg: np.ndarray) -> np.ndarray:
    """(n, 6) poses as the controller reports them: mm, then intrinsic XYZ Euler angles in degrees."""
    angles = Rotation.from_rotvec(rotvec_deg, degrees=True).as_euler("XYZ", degrees=True)
    return np.concatenate([position_mm, angles], axis=1)


def joints(position_mm: np.ndarray, rotvec_deg: np.ndarray) -> np.ndarray:
    """(n, 6) joint angles in degrees: closed-form inverse kinematics of a spherical-wrist arm with Meca500's lengths.

    The tool frame's z axis points from the tip to the flange. One branch (elbow up, no wrist flip) throughout: a
    function of the pose alone, so joints carry no information beyond it. Poses out of reach are stretched to the
    nearest reachable elbow.
    """
    turn = Rotation.from_rotvec(rotvec_deg, degrees=True).as_matrix()  # (n, 3, 3)
    wrist = position_mm + turn[:, :, 2] * (_FLANGE + _TOOL)
    q1 = np.arctan2(wrist[:, 1], wrist[:, 0])
    r, s = np.hypot(wrist[:, 0], wrist[:, 1]), wrist[:, 2] - _BASE
    forearm = np.hypot(_OFFSET, _FOREARM)
    reach = np.hypot(r, s)
    elbow = np.arccos(np.clip((reach**2 - _UPPER**2 - forearm**2) / (2 * _UPPER * forearm), -1, 1))
    # from the vertical, forwards
    q2 = np.arctan2(r, s) - np.arctan2(forearm * np.sin(elbow), _UPPER + forearm * np.cos(elbow))
    q3 = elbow - np.pi / 2 + np.arctan2(_OFFSET, _FOREARM)  # zero: forearm at a right angle to the upper arm
    # wrist: Rz(q1) Ry(q2 + q3) maps the forearm's x axis along it; the flange points along -z of the tool
    before = Rotation.from_euler("ZY", np.stack([q1, q2 + q3], axis=1))
    flange = Rotation.from_matrix(turn) * Rotation.from_euler("Y", np.pi / 2)  # its x axis: along the needle to the tip
    wrist_angles = (before.inv() * flange).as_euler("XYX")
    q = np.concatenate([np.stack([q1, q2, q3], axis=1), wrist_angles], axis=1)
    flip = q[:, 4] < 0
    q[flip, 3] += np.pi
    q[flip, 4] *= -1
    q[flip, 5] += np.pi
    return np.degrees((q + np.pi) % (2 * np.pi) - np.pi)


def states(position_mm: np.ndarray, rotvec_deg: np.ndarray) -> np.ndarray:
    """(n, 12) float64: joints 1..6 (deg), then the Euler pose (mm, deg)."""
    return np.concatenate([joints(position_mm, rotvec_deg), euler_poses(position_mm, rotvec_deg)], axis=1)
