"""Poses (mm, degrees) as rotation matrices, base-frame actions, and poses between the rows of a log.

Convention of the rig (Mecademic Euler angles, mobile XYZ): `R = Rx(alpha) @ Ry(beta) @ Rz(gamma)`, intrinsic, degrees.
An action is the motion from one pose to the next, seen in the base frame: displacement in mm and a rotation vector in
degrees (`R_after = exp(rotvec) @ R_before`), then the gripper. Euler angles are never subtracted to make a rotation.
"""

import warnings

import numpy as np
from scipy.spatial.transform import Rotation

GRIPPER_CLOSED = 1.0  # the needle tool has no gripper: the seventh number of every action is this constant
SAME_ROTATION_DEG = 0.005


def rotation(angles_deg: np.ndarray) -> Rotation:
    """Rotations of Euler angles (..., 3) in degrees, flattened to (M,)."""
    return Rotation.from_euler("XYZ", np.asarray(angles_deg, float).reshape(-1, 3), degrees=True)


def euler_deg(turned: Rotation) -> np.ndarray:
    """Angles (M, 3) in degrees, beta in [-90, 90]; at beta = +-90 gamma is set to 0 (the pair is not unique there)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # scipy's gimbal-lock warning; the rotation itself is exact
        return np.asarray(turned.as_euler("XYZ", degrees=True)).reshape(-1, 3)


def wrap_deg(angle_deg: np.ndarray) -> np.ndarray:
    """Angles brought into [-180, 180) degrees."""
    return (np.asarray(angle_deg, float) + 180.0) % 360.0 - 180.0


def pose_to_matrix(pose: np.ndarray) -> np.ndarray:
    """(..., 6) pose in mm and degrees -> (..., 4, 4) homogeneous matrix, translation in mm."""
    pose = np.asarray(pose, float)
    matrix = np.zeros((*pose.shape[:-1], 4, 4))
    matrix[..., :3, :3] = rotation(pose[..., 3:]).as_matrix().reshape(*pose.shape[:-1], 3, 3)
    matrix[..., :3, 3] = pose[..., :3]
    matrix[..., 3, 3] = 1.0
    return matrix


def delta_action(pose_a: np.ndarray, pose_b: np.ndarray, euler: bool = False) -> np.ndarray:
    """The action (..., 7) from pose_a (..., 6) to pose_b (..., 6): mm, rotation vector in degrees, gripper.

    `euler`: wrap-corrected differences of the angles in place of the vector, for comparison with older systems only.
    """
    pose_a, pose_b = np.broadcast_arrays(np.asarray(pose_a, float), np.asarray(pose_b, float))
    turn = wrap_deg(pose_b[..., 3:] - pose_a[..., 3:])
    if not euler:
        turn = (rotation(pose_b[..., 3:]) * rotation(pose_a[..., 3:]).inv()).as_rotvec(degrees=True)
    gripper = np.full((*pose_a.shape[:-1], 1), GRIPPER_CLOSED)
    return np.concatenate([pose_b[..., :3] - pose_a[..., :3], turn.reshape(*pose_a.shape[:-1], 3), gripper], axis=-1)


def apply_action(pose: np.ndarray, action: np.ndarray) -> np.ndarray:
    """Inverse of `delta_action`: pose (..., 6) moved by action (..., 6 or 7) -> pose (..., 6), beta in [-90, 90]."""
    pose, action = np.asarray(pose, float), np.asarray(action, float)
    lead = np.broadcast_shapes(pose.shape[:-1], action.shape[:-1])
    pose, action = np.broadcast_to(pose, (*lead, 6)), np.broadcast_to(action, (*lead, action.shape[-1]))
    turn = Rotation.from_rotvec(action[..., 3:6].reshape(-1, 3), degrees=True)
    angles = euler_deg(turn * rotation(pose[..., 3:])).reshape(*lead, 3)
    return np.concatenate([pose[..., :3] + action[..., :3], angles], axis=-1)


def rotation_angle_deg(pose_a: np.ndarray, pose_b: np.ndarray) -> np.ndarray:
    """The angle (...,) in degrees between the orientations of two poses (..., 6)."""
    return np.linalg.norm(delta_action(pose_a, pose_b)[..., 3:6], axis=-1)


def interpolate(t_s: np.ndarray, pose: np.ndarray, at_s: np.ndarray) -> tuple[np.ndarray, Rotation]:
    """Poses at times `at_s` (M,): positions linearly, orientations by slerp, between the rows around each time.

    t_s (T,) strictly increasing, pose (T, 6). Times outside take the first or last row.
    Returns poses (M, 6) and the exact rotations (M,). The angles of the poses stay on the log's own branch of Euler
    angles wherever that describes the same rotation, so that a state never jumps where the log does not.
    """
    t_s, pose, at_s = np.asarray(t_s, float), np.asarray(pose, float), np.asarray(at_s, float)
    after = np.clip(np.searchsorted(t_s, at_s, side="right"), min(1, len(t_s) - 1), len(t_s) - 1)
    before = np.maximum(after - 1, 0)
    span = np.where(after > before, t_s[after] - t_s[before], 1.0)
    part = np.clip((at_s - t_s[before]) / span, 0.0, 1.0)[:, None]
    first = rotation(pose[before, 3:])
    turn = (rotation(pose[after, 3:]) * first.inv()).as_rotvec()
    turned = Rotation.from_rotvec(turn * part) * first  # scipy's Slerp would be built over all rows of the log
    place = pose[before, :3] + part * (pose[after, :3] - pose[before, :3])
    linear = wrap_deg(pose[before, 3:] + part * wrap_deg(pose[after, 3:] - pose[before, 3:]))
    away = np.linalg.norm((rotation(linear) * turned.inv()).as_rotvec(degrees=True), axis=-1)
    angles = np.where((away < SAME_ROTATION_DEG)[:, None], linear, euler_deg(turned))
    return np.concatenate([place, angles], axis=1), turned
