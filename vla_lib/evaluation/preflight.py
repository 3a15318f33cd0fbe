"""Before a real arm moves: what a program can check of a rig against a checkpoint, each with its evidence.

    seen = look(robot, seconds=5)
    checks = rig_checks(robot, seen, pilot) + dry_checks(log, pilot)

The rest is a person's, `PERSON`: each is ticked with a name.
"""

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from scipy.spatial.transform import Rotation

from vla_lib.core.errors import UserError
from vla_lib.episodes.poses import pose_to_matrix
from vla_lib.episodes.prepared import PreparedEpisode, load_used
from vla_lib.evaluation.closed_loop import read_judged
from vla_lib.evaluation.rehearsal import Pilot
from vla_lib.robots.arm import Meca500
from vla_lib.robots.lab_robot import LabRobot
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
SPREADS = 5.0  # of the training data, which state and sensor must lie within: the policy clamps the state there
ALLOWED = "a line `USER - rtprio 2` in /etc/security/limits.conf gives it"
SAME_MM, SAME_DEG = 1.0, 0.5  # between the reported pose and the arm's own kinematics
DRIFT_MS = 20.0  # how far a clock's offset may wander while one looks; a guess
BINS = 6  # of each colour in a histogram
SAMPLES = 12  # training episodes that live pictures and samples are compared with
STATES = 500  # training episodes whose states are looked at
SCAN_STRIDE = 13  # samples from one kept A-scan to the next: 50 a second
SCAN_TOLERANCE = 0.1  # of the training level, which an A-scan's may be off beside its spreads; a guess
SHAPE = 0.1  # of an A-scan's spread: profiles that differ by less have no shape to tell their order from; a guess


@dataclass(frozen=True)
class Check:
    """One line of the preflight. `passed`: None where it cannot be told here; then a person looks."""

    what: str
    passed: bool | None
    evidence: str


@dataclass
class Seen:
    """What was seen at rest: newest observation, forces (n,) mN, some A-scans (n, 1025), streams' rows over time."""

    newest: Observation
    force_mN: np.ndarray
    scans: np.ndarray
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
    samples, rows, until = [], [], time.monotonic() + seconds
    while True:
        observation = robot.read_observation()
        sensor = np.asarray(observation.sensor)
        samples.append((sensor[:, 0], sensor[::SCAN_STRIDE, 1:]))
        rows.append(robot.streams())
        if show:
            show(observation, rows[-1])
        if time.monotonic() >= until:
            force_mN, scans = map(np.concatenate, zip(*samples, strict=True))
            return Seen(observation, force_mN, scans, rows)
        time.sleep(0.1)


def rig_checks(robot: LabRobot, seen: Seen, pilot: Pilot, limits: SafetyLimits) -> list[Check]:
    """All that the streams, the controller and the checkpoint tell."""
    episodes = training_episodes(pilot)
    return [
        *_views(robot, seen, pilot, limits),
        *_colours(seen, pilot, episodes),
        _state(seen, pilot, episodes),
        *_arm(robot, seen),
        *_place(seen, limits),
        *_force(seen, limits),
        *(_sensor(seen, episodes) if pilot.expert.policy.config.sensor_enabled else []),
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
            f"{summary['ticks']} ticks, {missed} missed, p99 {late['p99']:.1f} ms late, ended by {summary['ended']}; "
            f"real-time priority {'given' if log.real_time else 'refused: ' + ALLOWED}",
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


def _colours(seen: Seen, pilot: Pilot, episodes: Sequence[PreparedEpisode]) -> list[Check]:
    """Whether the channels are in the order of the training pictures: by colour histograms, as they are and swapped."""
    checks = []
    trained = training_pictures(pilot.settings.views, episodes)
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


def training_episodes(pilot: Pilot) -> Sequence[PreparedEpisode]:
    """Episodes of the dataset that the policy was trained on, at most `STATES`; none where it is not at hand."""
    root = Path(str(pilot.info["settings"]["dataset_root"]))
    try:
        episodes = list(load_used(root).values()) if root.is_dir() else []
    except (UserError, OSError):
        return []
    return spread(episodes, STATES)


def spread(episodes: Sequence[PreparedEpisode], most: int) -> Sequence[PreparedEpisode]:
    """At most as many, evenly over all."""
    return episodes[:: max(1, -(-len(episodes) // most))]


def training_pictures(views: Sequence[str], episodes: Sequence[PreparedEpisode]) -> dict[str, list[np.ndarray]]:
    """A picture of each view from the middle of some episodes."""
    found: dict[str, list[np.ndarray]] = {view: [] for view in views}
    with contextlib.suppress(OSError):
        for episode in spread(episodes, SAMPLES):
            for view in found:
                path = episode.picture_path(view, len(episode) // 2) if view in episode.image_index else None
                if path is not None:
                    with Image.open(path) as opened:
                        found[view].append(np.asarray(opened.convert("RGB")))
    return found


def training_starts(episodes: Sequence[PreparedEpisode]) -> list[np.ndarray]:
    """(n, 1026) samples of the first half second of some episodes: the needle is in air still."""
    found = []
    with contextlib.suppress(UserError, OSError):
        for episode in spread([one for one in episodes if one.has_sensor and len(one)], SAMPLES):
            end = int(episode.sensor_index[min(len(episode) - 1, int(episode.action_hz / 2))])
            found.append(np.asarray(episode.sensor[max(0, end - int(episode.sensor_hz / 2)) : end]))
    return [start for start in found if len(start)]


def _state(seen: Seen, pilot: Pilot, episodes: Sequence[PreparedEpisode]) -> Check:
    """Whether each part of the state lies within some spreads of training, or where those episodes were: one that moves
    at the start alone has a small spread. Without them, it is a person's within twice as many."""
    statistics = pilot.expert.policy.normaliser.state_dict()
    mean, std = (statistics[f"state_{name}"].cpu().numpy() for name in ("mean", "std"))
    names = [*(f"joint {number} (deg)" for number in range(1, 7)), "x (mm)", "y (mm)", "z (mm)", "a", "b", "r (deg)"]
    state = np.asarray(seen.newest.state, float)
    low, high = mean - SPREADS * std, mean + SPREADS * std
    for episode in episodes:
        low, high = np.minimum(low, episode.state.min(0) - std), np.maximum(high, episode.state.max(0) + std)
    spreads = np.abs(state - mean) / std
    far = [
        f"{name} is {state[k]:.1f}, in training {mean[k]:.1f} +- {std[k]:.1f}"
        for k, name in enumerate(names)
        if not low[k] <= state[k] <= high[k]
    ]
    known = f"all as in training, the farthest {spreads.max():.1f} spreads from its mean"
    unsure = bool(far) and not episodes and bool((spreads <= 2 * SPREADS).all())
    return Check("units, frame and start as in training", None if unsure else not far, "; ".join(far) or known)


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
    pose = pose_to_matrix(state[6:])
    off_mm = float(np.linalg.norm(tip[:3, 3] - pose[:3, 3]))
    off_deg = float(np.degrees(Rotation.from_matrix(tip[:3, :3].T @ pose[:3, :3]).magnitude()))
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


def _sensor(seen: Seen, episodes: Sequence[PreparedEpisode]) -> list[Check]:
    """Force and A-scans at rest beside those at the starts of training episodes: an offset, other units or bins."""
    names = ("force at rest as in training", "A-scan as in training", "depth order of the A-scan")
    starts = training_starts(episodes)
    if not starts:
        why = "the training data are not on this machine; compare with the start of an episode in notebook 01"
        return [Check(name, None, why) for name in names]
    if not len(seen.scans):
        return [Check(name, False, "no sample came") for name in names]
    known = np.concatenate([start[:: max(1, len(start) // 50), 1:] for start in starts])
    return [_rest_force(names[0], seen.force_mN, starts), *_scans(names[1:], seen.scans, known)]


def _rest_force(name: str, live_mN: np.ndarray, starts: Sequence[np.ndarray]) -> Check:
    means, spreads = (np.array([how(start[:, 0]) for start in starts]) for how in (np.mean, np.std))
    spread = max(means.std(), spreads.mean())
    told = f"{live_mN.mean():.1f} mN; {means.mean():.1f} +- {spread:.1f} mN at the starts of {len(starts)} episodes"
    near = abs(live_mN.mean() - means.mean()) <= SPREADS * spread
    return Check(name, bool(near), told if near else f"{told}: take the offset off the sensor")


def _scans(names: Sequence[str], live: np.ndarray, known: np.ndarray) -> list[Check]:
    """Level and depth order of A-scans (n, 1025) beside those of training."""
    off, told = False, []
    for word, of in (("mean", np.mean), ("spread", np.std)):
        was, now = of(known, axis=1), of(live, axis=1)
        off |= abs(now.mean() - was.mean()) > max(SPREADS * was.std(), SCAN_TOLERANCE * abs(was.mean()))
        told.append(f"its bins' {word} {now.mean():.3g}, in training {was.mean():.3g}")
    right, turned = (float(np.abs(one - known.mean(0)).mean()) for one in (live.mean(0), live.mean(0)[::-1]))
    shapeless = abs(right - turned) < SHAPE * known.std(1).mean()
    words = f"distance to the training profile {right:.2g}, turned round {turned:.2g}"
    words += "; it has too little shape to tell" if shapeless else ""
    return [
        Check(names[0], not off, "; ".join(told)),
        Check(names[1], None if shapeless else right < turned, words),
    ]


def _clocks(seen: Seen) -> list[Check]:
    rows = pd.DataFrame([row for rows in seen.streams for row in rows])
    told, drifts = [], [0.0]
    for name, offsets in rows.dropna(subset=["clock_offset_ms"]).groupby("stream", sort=False)["clock_offset_ms"]:
        drifts.append(float(np.ptp(offsets[len(offsets) // 2 :])))
        told.append(f"{name} {offsets.iloc[-1]:g} ms (+-{drifts[-1]:.1f})")
    troubles = {name: row["fault"] or row["refused"] for name, row in seen.last().items()}
    faults = [f"{name}: {words}" for name, words in troubles.items() if words]
    still = max(drifts) <= DRIFT_MS
    return [
        Check("clocks stand still against ours", still, ", ".join(told) or "no host but this"),
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
