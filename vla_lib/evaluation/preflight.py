"""Before a real arm moves: what a program can check of a rig against a checkpoint, each with its evidence.

    seen = look(robot, seconds=5)
    checks = rig_checks(robot, seen, pilot) + dry_checks(log, pilot)

The rest is a person's, `PERSON`: each is ticked with a name.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.episodes.poses import rotation_angle_deg
from vla_lib.episodes.prepared import load_used
from vla_lib.evaluation.judged import read_judged
from vla_lib.evaluation.rehearsal import Pilot
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.meca500 import Meca500
from vla_lib.runtime import safety
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import RunLog
from vla_lib.runtime.safety import SafetyLimits

PERSON = {
    "emergency stop": "The arm's own emergency stop stops it, also with this computer switched off.",
    "controller": "Torque limits, work zone and tool sphere in the controller are as strict as these limits.",
    "retreat": "Drawn back along the tool's z axis, the needle leaves the tissue and meets nothing.",
    "pictures": "The live pictures show the same scene, from the same places, as those of the training data.",
    "space": "Nobody and nothing that may be hurt is within the arm's reach.",
}
SPREADS = 5.0  # of the training data, which the state must lie within: the policy clamps there
SAME_MM, SAME_DEG = 1.0, 0.5  # between the reported pose and the arm's own kinematics
DRIFT_MS = 20.0  # how far a clock's offset may wander while one looks; a guess
BINS = 6  # of each colour in a histogram
SAMPLES = 12  # training pictures that a view's are compared with


@dataclass(frozen=True)
class Check:
    """One line of the preflight. `passed`: None where it cannot be told here; then a person looks."""

    what: str
    passed: bool | None
    evidence: str


@dataclass
class Seen:
    """What was seen while nothing moved: the newest observation, forces (n,) mN, streams' rows over time."""

    newest: Observation
    force_mN: np.ndarray
    streams: list[list[dict[str, Any]]] = field(default_factory=list)

    def last(self) -> dict[str, dict[str, Any]]:
        """Stream -> its newest row."""
        return {row["stream"]: row for row in self.streams[-1]}


def look(
    robot: LabRobot, seconds: float, show: Callable[[Observation, list[dict[str, Any]]], None] | None = None
) -> Seen:
    """Read the rig for as long; nothing moves. `show` is given each observation and the streams' table. Raises
    UserError where a stream does not come."""
    robot.wait_ready()
    forces, rows, until = [], [], time.monotonic() + seconds
    while True:
        observation = robot.read_observation()
        forces.append(np.asarray(observation.sensor)[:, 0])
        rows.append(robot.streams())
        if show:
            show(observation, rows[-1])
        if time.monotonic() >= until:
            return Seen(observation, np.concatenate(forces), rows)
        time.sleep(0.1)


def rig_checks(robot: LabRobot, seen: Seen, pilot: Pilot, limits: SafetyLimits) -> list[Check]:
    """All that the streams, the controller and the checkpoint tell."""
    return [
        *_views(robot, seen, pilot, limits),
        *_colours(seen, pilot),
        _state(seen, pilot),
        *_arm(robot, seen),
        *_place(seen, limits),
        *_force(seen, limits),
        *_clocks(seen),
        _judged(pilot.checkpoint),
    ]


def dry_checks(log: RunLog, pilot: Pilot) -> list[Check]:
    """What a dry run of the loop tells: deadlines, holds, the VLM's time and the features' ages."""
    summary = log.summary()
    youngest, oldest = pilot.expert.vl_ages_s
    late, ages, vlm = (
        summary[name] or {"p99": np.nan, "max": np.nan} for name in ("lateness_ms", "vl_age_s", "vlm_ms")
    )
    missed, held = summary["missed_deadlines"] + summary["skipped_ticks"], summary["modes"].get("hold", 0)
    whole = summary["ended"] in ("time limit", safety.OPERATOR)
    reasons = ", ".join(f"{name} {count}" for name, count in summary["reasons"].items()) or "none"
    return [
        Check(
            "no missed deadline",
            whole and not missed,
            f"{summary['ticks']} ticks, {missed} missed, p99 {late['p99']:.1f} ms late, ended by {summary['ended']}",
        ),
        Check("no hold in the dry run", whole and not held, f"{held} held; reasons: {reasons}"),
        Check(
            "ages of VL features within training",
            bool(ages["max"] <= oldest + 1e-9),
            f"up to {ages['max']:.1f} s here (VLM p99 {vlm['p99']:.0f} ms); {youngest:.1f} to {oldest:.1f} s in "
            "training. Beyond it: train with a greater --vlm-latency-max-ms",
        ),
    ]


def _views(robot: LabRobot, seen: Seen, pilot: Pilot, limits: SafetyLimits) -> list[Check]:
    wanted, there = pilot.settings.views, robot.settings.cameras
    missing = [view for view in wanted if view not in there]
    told = f"the policy sees {', '.join(wanted)}; robot.yaml has {', '.join(there)}"
    rates = {view: seen.last()[view]["rate_hz"] for view in wanted if view in there}
    slow = [view for view, hz in rates.items() if hz < 1 / limits.picture_age_s]
    shapes = {view: seen.newest.pictures[view].shape[:2] for view in rates}
    shown = ", ".join(f"{view} {rates[view]:g} Hz {w}x{h}" for view, (h, w) in shapes.items())
    return [
        Check("views are those of the policy", not missing, told),
        Check("rates of the views", not slow and not missing, shown),
    ]


def _colours(seen: Seen, pilot: Pilot) -> list[Check]:
    """Whether the channels are in the order of the training pictures: by colour histograms, as they are and swapped."""
    checks = []
    trained = training_pictures(pilot)
    for view in pilot.settings.views:
        if view not in seen.newest.pictures:
            continue
        if not trained.get(view):
            why = "the training pictures are not on this machine; look whether red is red"
            checks.append(Check(f"channel order of {view}", None, why))
            continue
        known = np.mean([histogram(picture) for picture in trained[view]], axis=0)
        live = np.asarray(seen.newest.pictures[view])
        right, swapped = (float(np.abs(histogram(one) - known).sum()) for one in (live, live[..., ::-1]))
        colourless = abs(right - swapped) < 0.02
        words = f"distance to the training colours {right:.2f}, with red and blue exchanged {swapped:.2f}"
        words += "; the scene has too little colour to tell" if colourless else ""
        checks.append(Check(f"channel order of {view}", None if colourless else right < swapped, words))
    return checks


def histogram(picture: np.ndarray) -> np.ndarray:
    """(BINS^3,) share of each colour."""
    small = np.asarray(picture)[::4, ::4].reshape(-1, 3).astype(int) * BINS // 256
    counts = np.bincount((small[:, 0] * BINS + small[:, 1]) * BINS + small[:, 2], minlength=BINS**3)
    share: np.ndarray = counts / max(1, counts.sum())
    return share


def training_pictures(pilot: Pilot) -> dict[str, list[np.ndarray]]:
    """Some pictures of each view of the dataset that the policy was trained on; none where it is not at hand."""
    root = Path(str(pilot.info["settings"]["dataset_root"]))
    found: dict[str, list[np.ndarray]] = {view: [] for view in pilot.settings.views}
    with contextlib.suppress(UserError, OSError):
        episodes = list(load_used(root).values())[:SAMPLES] if root.is_dir() else []
        for episode in episodes:
            for view in found:
                path = episode.picture_path(view, len(episode) // 2) if view in episode.image_index else None
                if path is not None:
                    with Image.open(path) as opened:
                        found[view].append(np.asarray(opened.convert("RGB")))
    return found


def _state(seen: Seen, pilot: Pilot) -> Check:
    statistics = pilot.expert.policy.normaliser.state_dict()
    mean, std = (statistics[f"state_{name}"].cpu().numpy() for name in ("mean", "std"))
    names = [*(f"joint {number} (deg)" for number in range(1, 7)), "x (mm)", "y (mm)", "z (mm)", "a", "b", "r (deg)"]
    off = (np.asarray(seen.newest.state, float) - mean) / std
    far = [
        f"{name} is {seen.newest.state[k]:.1f}, in training {mean[k]:.1f} +- {std[k]:.1f}"
        for k, name in enumerate(names)
        if not abs(off[k]) <= SPREADS
    ]
    told = (
        "; ".join(far) or f"all within {SPREADS:g} spreads of the training data, the farthest {np.abs(off).max():.1f}"
    )
    return Check("units, frame and start as in training", not far, told)


def _arm(robot: LabRobot, seen: Seen) -> list[Check]:
    if not isinstance(robot.arm, Meca500):
        return [Check("the arm can be driven from here", False, "another host owns it (arm.source: state stream)")]
    arm, state = robot.arm, np.asarray(seen.newest.state, float)
    checks = []
    for name, told, holds in arm.frames():
        same = None if holds is None else bool(np.abs(np.subtract(told, holds)).max() <= 0.01)
        words = "the firmware does not tell" if holds is None else f"controller {holds}"
        checks.append(Check(f"{name} as in robot.yaml", same, f"{words}; robot.yaml {list(told)}"))
    tip = arm.reach.tip(state[:6])
    off_mm = float(np.linalg.norm(tip[:3, 3] - state[6:9]))
    angles = np.concatenate([np.zeros(3), _euler(tip[:3, :3])])
    off_deg = float(rotation_angle_deg(angles, np.concatenate([np.zeros(3), state[9:]])))
    words = f"{off_mm:.2f} mm and {off_deg:.2f} deg apart"
    checks.append(Check("pose is the joints' own, mm and degrees", off_mm <= SAME_MM and off_deg <= SAME_DEG, words))
    near = min(arm.reach.distances(state[:6]).items(), key=lambda one: one[1])
    checks.append(
        Check("clear of joint limits and singularities", near[1] > 0, f"nearest: {near[0]}, {near[1]:.1f} left")
    )
    facts = arm.controller_facts()
    known = all("not told" not in value for name, value in facts.items() if name.startswith("torque"))
    words = "; ".join(f"{name}: {value}" for name, value in facts.items())
    checks.append(Check("controller's limits read back", True if known else None, words))
    return checks


def _euler(turn: np.ndarray) -> np.ndarray:
    from scipy.spatial.transform import Rotation

    from vla_lib.episodes.poses import euler_deg

    return np.asarray(euler_deg(Rotation.from_matrix(turn))[0])


def _place(seen: Seen, limits: SafetyLimits) -> list[Check]:
    pose = np.asarray(seen.newest.state, float)[6:]
    inside = all(low <= value <= high for value, (low, high) in zip(pose[:3], limits.workspace_mm, strict=True))
    told = ", ".join(
        f"{value:.1f} in {low:g}..{high:g}" for value, (low, high) in zip(pose, limits.workspace_mm, strict=False)
    )
    leaves = safety.retreat_leaves(pose, limits)
    words = f"{limits.retreat_mm:g} mm along the tool's z axis {'leave' if leaves else 'stay in'} the box"
    return [Check("tip within the workspace", inside, told), Check("retreat within the workspace", not leaves, words)]


def _force(seen: Seen, limits: SafetyLimits) -> list[Check]:
    if not limits.sensor_required:
        return [Check("force", None, "this rig has no sensor: no limit of the force holds here")]
    if not len(seen.force_mN):
        return [Check("force at rest", False, "no sample came")]
    mean, spread = float(seen.force_mN.mean()), float(seen.force_mN.std())
    most = float(np.abs(seen.force_mN).max())
    told = f"{mean:.1f} mN, spread {spread:.2f}, at most {most:.1f}; the limit is {limits.force_mN:g} mN"
    return [Check("force at rest", bool(abs(mean) < 0.3 * limits.force_mN and spread > 0), told)]


def _clocks(seen: Seen) -> list[Check]:
    names = list(seen.last())
    offsets = {
        name: [r["clock_offset_ms"] for rows in seen.streams for r in rows if r["stream"] == name] for name in names
    }
    known = {name: [one for one in values if one is not None] for name, values in offsets.items()}
    half = {name: values[len(values) // 2 :] for name, values in known.items() if values}
    drifts = {name: float(np.ptp(values)) for name, values in half.items()}
    faults = [
        f"{name}: {row['fault'] or row['refused']}"
        for name, row in seen.last().items()
        if row["fault"] or row["refused"]
    ]
    told = ", ".join(f"{name} {half[name][-1]:g} ms (+-{drift:.1f})" for name, drift in drifts.items())
    return [
        Check(
            "clocks stand still against ours", max(drifts.values(), default=0.0) <= DRIFT_MS, told or "no host but this"
        ),
        Check("every message understood", not faults, "; ".join(faults) or "no stream refused anything"),
    ]


def _judged(checkpoint: Path) -> Check:
    judged = read_judged(checkpoint)
    if not judged:
        return Check("judged in closed loop", None, "no evaluation of this file is beside it; see notebook 06")
    low, high = (100 * value for value in judged["interval_95"])
    words = f"{judged['successes']} of {judged['rollouts']} on the simulated rig ({low:.0f} to {high:.0f} %)"
    return Check(
        "judged in closed loop", True, f"{words}; {judged['execution']}, VLM delay {judged['vlm_latency_ms']:g} ms"
    )


def as_record(checks: list[Check], ticked: Mapping[str, str]) -> dict[str, Any]:
    """For rollout.json: each check, and who ticked what."""
    return {"checks": [vars(check) for check in checks], "ticked": dict(ticked)}
