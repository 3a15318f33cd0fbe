"""Safety, always on: limits of every action, and the named reasons to hold, to retreat and to stop."""

from collections import deque
from dataclasses import dataclass

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.episodes.poses import apply_action, pose_to_matrix, rotation_angle_deg

# Reasons, as they stand in the log.
STALE_VL, STALE_SENSOR = "stale VL features", "stale sensor"
STALE_STATE, STALE_PICTURES = "stale state", "stale pictures"
MISSING_VIEW, NOT_FOLLOWING = "missing view", "robot does not follow"
MISSED_DEADLINE, NON_FINITE_ACTION, NON_FINITE_SENSOR = "missed deadline", "non-finite action", "non-finite sensor"
BROKEN_WINDOW, NON_FINITE_STATE, OUTSIDE = "broken sensor window", "non-finite state", "workspace box"
FORCE_LIMIT, VLM_DIED, NOT_READY = "force limit", "VLM worker died", "not ready"
STATE_AHEAD, SENSOR_AHEAD, VIEW_AHEAD = "state stamped ahead", "sensor stamped ahead", "view stamped ahead"
STATE_ORDER, SENSOR_ORDER, VIEW_ORDER = "state out of order", "sensor out of order", "view out of order"
FROZEN_SENSOR, FROZEN_VIEW, CLOCK_STEP = "frozen sensor", "frozen view", "clock step"
BLANK_VIEW = "blank view"
ROTATION_RANGE, RETREAT_BLOCKED, KEY_RELEASED = "rotation range", "retreat leaves the box", "hold-to-run key released"
JOINT_LIMIT, SINGULARITY = "joint limit", "singularity"  # that a robot's `refuses` gives, with which one
WATCHDOG, OPERATOR, ROBOT_FAILED, EXPERT_FAILED = "watchdog", "operator", "robot failed", "policy failed"


@dataclass(frozen=True)
class SafetyLimits:
    """Limits of one robot and task; the defaults are the simulated rig's. A real arm's controller must be as strict."""

    workspace_mm: tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
    """(low, high) of x, y, z of the tip, base frame."""
    speed_mm_s: float = 15.0  # greatest speed: the norm of the translation, so that the direction is kept
    turn_deg_s: float = 45.0  # greatest turning speed: the norm of the rotation vector
    turn_deg: float = 45.0  # greatest rotation away from the orientation at the start, about any axis; below 90
    force_mN: float = 150.0
    """Measured force (mean of 13 samples, 20 ms) above which the needle is drawn back and the run ends. In both
    directions: the sign of a push depends on how the sensor is mounted."""
    retreat_mm: float = 5.0  # way of the retreat, along the tool's z axis (from the tip to the flange)
    retreat_speed_mm_s: float = 5.0
    vl_age_s: float = 1.0  # oldest VL features to act on
    picture_age_s: float = 1.0  # oldest picture of any of the policy's views to act on, and to show to the VLM
    sensor_age_s: float = 0.1  # oldest newest sample to act on
    state_age_s: float = 0.2  # oldest state to act on
    ahead_s: float = 0.05  # how far the stamp of anything may lie in the future
    sensor_frozen_s: float = 0.25
    """A force or an A-line that stays the very same for this long is a dead one: live ones have noise. A guess."""
    picture_frozen_mm: float = 3.0
    """A picture that stays the very same, with new stamps, while the tip moves this far is a dead one. A guess."""
    spare_views: int = 0
    """As many of the views may be blank or fail during a run, and it goes on without them. Only for a policy that was
    trained with views hidden (--view-dropout)."""
    follow_mm: float = 5.0
    """Greatest distance of the measured tip from the commanded one; the default allows a lag of 0.3 s at full speed."""
    follow_deg: float = 15.0  # the same of the orientation
    sensor_required: bool = True  # False: a robot without a sensor; its force cannot be limited here
    hold_s: float = 0.5  # A run that was held for this long, in one piece or in twice this time, is stopped
    start_s: float = 15.0  # longest wait for the first features and the first full sensor window
    watchdog_s: float = 0.5
    """Real clock: the robot is stopped when no tick came for this long and for three action periods."""

    def __post_init__(self) -> None:
        if len(self.workspace_mm) != 3 or any(not low < high for low, high in self.workspace_mm):
            raise UserError(f"The workspace box {self.workspace_mm} needs (low, high) mm for x, y, z, low below high.")
        for name, value in vars(self).items():
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and not (value >= 0 if name == "spare_views" else value > 0):
                raise UserError(f"The safety limit {name} is {value}; it must be above 0 (spare_views: 0 or more).")
        if self.turn_deg >= 90:  # beyond, a turn may come back into the range from its other side
            raise UserError(f"The safety limit turn_deg is {self.turn_deg}; it must be below 90 degrees.")


def slow_limits(limits: SafetyLimits, period_s: float, usual_mm: float, usual_deg: float) -> list[str]:
    """Sentences about limits below the demonstrated step of `usual_mm` and `usual_deg`: they cut the policy short."""
    pairs = (
        ("speed", "mm", usual_mm, limits.speed_mm_s * period_s),
        ("rotation", "deg", usual_deg, limits.turn_deg_s * period_s),
    )
    return [
        f"the {name} limit of {most:.2f} {unit} a step is below the demonstrated {shown:.2f} {unit} a step"
        for name, unit, shown, most in pairs
        if shown > most
    ]


def limit_norm(vector: np.ndarray, most: float) -> np.ndarray:
    """`vector` shortened to the norm `most`; its direction stays."""
    norm = float(np.linalg.norm(vector))
    return vector * (most / norm) if norm > most else vector


def limit_action(
    action: np.ndarray, limits: SafetyLimits, period_s: float, commanded: np.ndarray, start: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """The (7,) finite action within speed, rotation and workspace, and the names of the limits that changed it.

    `commanded` (6,): the pose that is commanded now; `start` (6,): the one whose orientation is the middle of the
    range. A motion that would leave the box is shortened to end at its wall, along its own direction; outside of the
    box only motions that leave no axis further behind are let through. The same holds of a turn and its range.
    """
    limited = np.array(action, float)
    limited[:3] = limit_norm(limited[:3], limits.speed_mm_s * period_s)
    limited[3:6] = limit_norm(limited[3:6], limits.turn_deg_s * period_s)
    touched = [
        name
        for name, part in (("speed", slice(0, 3)), ("rotation", slice(3, 6)))
        if not np.array_equal(limited[part], action[part])
    ]
    part = 1.0
    for place, step, (low, high) in zip(commanded[:3], limited[:3], limits.workspace_mm, strict=True):
        if step > 0 and place + step > high:
            part = min(part, max(high - place, 0.0) / step)
        elif step < 0 and place + step < low:
            part = min(part, max(place - low, 0.0) / -step)
    if part < 1.0:
        limited[:3] *= part
        touched.append(OUTSIDE)
    turn = limited[3:6].copy()
    most_deg = max(limits.turn_deg, float(rotation_angle_deg(start, commanded)))

    def leaves(part: float) -> bool:
        limited[3:6] = part * turn
        return bool(rotation_angle_deg(start, apply_action(commanded, limited)) > most_deg + 1e-6)

    if leaves(1.0):
        inside, outside = 0.0, 1.0
        for _ in range(20):  # halving: the way to the edge has no simple formula
            middle = (inside + outside) / 2
            inside, outside = (inside, middle) if leaves(middle) else (middle, outside)
        limited[3:6] = inside * turn
        touched.append(ROTATION_RANGE)
    return limited, touched


def retreat_leaves(pose: np.ndarray, limits: SafetyLimits) -> bool:
    """Whether a retreat from pose (6,) would be cut short by the wall of the box."""
    end_mm = pose[:3] + pose_to_matrix(pose)[:3, 2] * limits.retreat_mm
    return any(not low <= place <= high for place, (low, high) in zip(end_mm, limits.workspace_mm, strict=True))


def retreat_action(pose: np.ndarray, limits: SafetyLimits, period_s: float) -> np.ndarray:
    """(7,) one period of drawing the needle back along its own axis; pose (6,) mm, Euler degrees."""
    axis = pose_to_matrix(np.asarray(pose, float))[:3, 2]
    return np.concatenate([axis * limits.retreat_speed_mm_s * period_s, np.zeros(3), [1.0]])


def greatest_force(before: np.ndarray, force_mN: np.ndarray, window: int = 13) -> float:
    """The greatest mean of `window` consecutive samples, push or pull, that ends within `force_mN` (n,).

    `before`: up to window - 1 samples ahead of it. NaN where one of them is not finite; -inf where there is no sample.
    """
    if not len(force_mN):
        return -np.inf
    joined = np.concatenate([before[-(window - 1) :], force_mN]).astype(float)
    if not np.isfinite(joined).all():
        return float("nan")
    width = min(window, len(joined))
    return float(np.abs(np.convolve(joined, np.full(width, 1.0 / width), "valid")[-len(force_mN) :]).max())


class HoldBudget:
    """How long the robot was held. Pieces within twice the budget add up: a flickering fault ends the run, too."""

    def __init__(self, limit_s: float):
        self.limit_s = limit_s
        self._pieces: deque[tuple[float, float]] = deque()  # (begin, end)

    def held(self, begin_s: float, end_s: float) -> None:
        """A piece of time in which the robot was held."""
        self._pieces.append((begin_s, end_s))

    def spent(self, now_s: float) -> bool:
        """Whether the run must stop now."""
        since = now_s - 2 * self.limit_s
        while self._pieces and self._pieces[0][1] <= since:
            self._pieces.popleft()
        return sum(end - max(begin, since) for begin, end in self._pieces) >= self.limit_s - 1e-9
