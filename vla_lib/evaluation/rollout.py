"""One closed-loop rollout: a checkpoint tries the phantom of a seed on the simulated rig, and is judged.

The rig, the clock and the latencies are deterministic by the seed: the same settings and seed give the same rollout.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.evaluation.sim_robot import (
    DEFAULT_TASK,
    MANIFEST,
    VIEWS,
    NeedleInsertion,
    SimRobot,
    instruction_of,
    make_rig,
    sim_limits,
)
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.features.vlm import open_checkpoint
from vla_lib.policy.config import PolicyConfig
from vla_lib.policy.policy import Policy
from vla_lib.runtime.clock import Latency, SimulatedClock
from vla_lib.runtime.expert import Expert, PolicyExpert
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.runtime.runner import Runner, RunnerSettings, Watch
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import Compute, SimulatedVlm
from vla_lib.training.checkpoint import load_policy, read_checkpoint

PATH_STRIDE = 65  # paths are kept at 10 Hz, with the greatest force of each period
SENSOR_STRIDE = 13  # moments keep the sensor at 50 Hz


@dataclass(frozen=True)
class Moment:
    """One tick as a watcher sees it."""

    tick: Tick  # its log entry
    period_s: float  # of an action
    sensor: np.ndarray  # (n, 1026) at 50 Hz, the newest sample last
    sensor_t_s: np.ndarray  # (n,) s of the run, below 0 in the rest before the start
    pictures: dict[str, np.ndarray]  # the newest (H, W, 3) of each view, empty where they are not kept

    @property
    def newest_sample(self) -> np.ndarray:
        """(1026,) force (mN), then the A-scan; NaN where the tick brought no sample."""
        return self.sensor[-1] if len(self.sensor) else np.full(1026, np.nan, np.float32)

    @classmethod
    def of(cls, tick: Tick, seen: Observation, period_s: float, pictures: bool = True) -> "Moment":
        """The moment of a tick; to be called by the runner's `watch`."""
        newest_last = slice((len(seen.sensor) - 1) % SENSOR_STRIDE, None, SENSOR_STRIDE)
        t_s = tick.t_s + seen.sensor_timestamps[newest_last] - seen.timestamp
        return cls(tick, period_s, seen.sensor[newest_last].copy(), t_s, dict(seen.pictures) if pictures else {})


def rollout(settings: RolloutSettings, seed: int, frames: int = 0) -> dict[str, Any]:
    """Try the checkpoint on the phantom of `seed`. Returns the record of `judged`, with `path`.

    Asked for frames, it adds as many Moments evenly over the rollout's time, the last one included, as `frames`, and
    the sensor at 50 Hz over all of it: `sensor` (n, 1026), `sensor_t_s` (n,). Raises UserError where the checkpoint,
    its VLM or EGL is missing or another one.
    """
    policy, compute, info = _load(settings.checkpoint, settings.checkpoint.stat().st_mtime_ns, settings.device)
    expert, runner = expert_of(settings, policy, info, seed)
    vlm_ms = info["settings"]["vlm_latency_ms"] if settings.vlm_latency_ms is None else settings.vlm_latency_ms
    latencies = {
        "vlm": Latency(vlm_ms, settings.vlm_jitter_ms),
        "expert": Latency(settings.expert_latency_ms, settings.expert_jitter_ms, settings.hiccup_ms),
    }
    limits = rig_limits(policy.config, vlm_ms, settings.vlm_jitter_ms)
    moments: list[Moment] = []

    def watch(tick: Tick, seen: Observation) -> None:
        moments.append(Moment.of(tick, seen, runner.period_s))

    given = _rig(settings, runner), expert, compute, seed, runner, limits, latencies, watch if frames else None
    record = run_on_rig(*given, settings.instruction, settings.disturbance)
    if frames:
        chosen = np.unique(np.linspace(0, len(moments) - 1, min(frames, len(moments))).round().astype(int))
        record |= {name: np.concatenate([getattr(one, name) for one in moments]) for name in ("sensor", "sensor_t_s")}
        record["frames"] = [moments[k] for k in chosen]
    return record


def oldest_features_s(vlm_ms: float, jitter_ms: float) -> float:
    """The oldest VL features that a run with such a VLM acts on: two delays of one that does one moment at a time, the
    jitter seldom above three times its mean."""
    return max(1.0, 3 * (vlm_ms + 3 * jitter_ms) / 1000.0)


def rig_limits(config: PolicyConfig, vlm_ms: float, jitter_ms: float) -> SafetyLimits:
    """The rig's limits for a policy and a VLM's delay: one that was trained with views hidden can spare one."""
    spare = 1 if config.view_dropout > 0 else 0
    return SafetyLimits(**sim_limits(), vl_age_s=oldest_features_s(vlm_ms, jitter_ms), spare_views=spare)


def trained_ages_s(config: Mapping[str, Any], trained: Mapping[str, Any]) -> tuple[float, float]:
    """(youngest, oldest) age (s, whole periods) of VL features in training, by a checkpoint's config and settings."""
    youngest_s, oldest_s = config.get("vl_ages_s", (0.0, 0.0))
    if not oldest_s:  # not in every checkpoint: then by its delay and its rate
        hz = float(config["action_hz"])
        youngest_s = math.ceil(trained["vlm_latency_ms"] / 1000.0 * hz - 1e-9) / hz
        oldest_s = youngest_s + (trained["vlm_reuse_count"] - 1) / hz
    return youngest_s, oldest_s


def expert_of(
    settings: RolloutSettings, policy: Policy, info: Mapping[str, Any], seed: int = 0
) -> tuple[PolicyExpert, RunnerSettings]:
    """A loaded policy as an expert, and the runner's settings for it: the same on both clocks and on every robot."""
    expert = PolicyExpert(policy, settings.without, settings.ddim_steps or None, seed)
    expert.vl_ages_s = trained_ages_s(policy.config.record(), info["settings"])
    reuse_count, views = info["settings"]["vlm_reuse_count"], tuple(info["binding"]["views"])
    return expert, RunnerSettings(float(policy.config.action_hz), reuse_count, settings.steps_per_chunk, views)


def rig_of(settings: RolloutSettings, runner: RunnerSettings) -> dict[str, Any]:
    """What the rig is made with for these settings and a policy of this rate and these views."""
    names = ("task", "max_time_s", "picture_width", "picture_height", "camera_hz")
    how = {name: getattr(settings, name) for name in names}
    return how | {"action_hz": runner.action_hz, "views": runner.views}


def run_on_rig(
    rig: NeedleInsertion,
    expert: Expert,
    compute: Compute,
    seed: int,
    settings: RunnerSettings,
    limits: SafetyLimits,
    latencies: Mapping[str, Latency] | None = None,
    watch: Watch | None = None,
    instruction: str = "",
    disturbance: str = "",
) -> dict[str, Any]:
    """One rollout of any expert and any VLM on the rig, on the simulated clock; the record of `judged`, with `path`."""
    clock = SimulatedClock(latencies, seed)
    robot = SimRobot(rig, clock, seed, instruction=instruction, disturbance=disturbance)
    runner = Runner(robot, expert, SimulatedVlm(compute, clock), clock, settings, limits, watch)
    log = runner.run(rig.max_time_s + 1.0, robot.over)
    path = rig.path()
    force = np.maximum.reduceat(path["force_mN"], np.arange(0, len(path["force_mN"]), PATH_STRIDE))  # no peak is lost
    kept = {"t_s": path["t_s"][::PATH_STRIDE], "position_mm": path["position_mm"][::PATH_STRIDE], "force_mN": force}
    return judged(robot, log) | {"path": {name: values.round(3).tolist() for name, values in kept.items()}}


def judged(robot: SimRobot, log: RunLog) -> dict[str, Any]:
    """What came of a rollout, JSON-able: success, the reason of a failure, mm, mN, s, and the log's summary and events.

    Where safety ended a rollout that was not decided yet the reason begins with "stopped: ".
    """
    info = robot.info
    undecided = f"stopped: {log.ended}" if log.stopped else log.ended
    reason = "" if info["success"] else info["reason"] or undecided
    names = ("seed", "success", "lateral_mm", "depth_error_mm", "punctured", "peak_force_mN", "time_s", "truth")
    return {name: info[name] for name in names} | {"reason": reason, "runner": log.summary(), "events": log.events}


# ---------------------------------------------------------------- which rig a checkpoint needs


def rig_settings(checkpoint: Path, dataset_root: Path | None = None, judge: bool = True) -> RolloutSettings:
    """RolloutSettings of a checkpoint: pictures, task and instruction as its dataset's recording on the rig has them
    (of several tasks the one with the most episodes), VL features as late as in training.

    Without `judge`, a policy of other recordings is taken too: its pictures are then as large as its VLM asks for, so
    that a rehearsal's timing is true, though what it does means nothing. Raises UserError where the rig cannot serve.
    """
    content = read_checkpoint(checkpoint)
    trained, binding = content["settings"], content["binding"]
    root = Path(trained["dataset_root"]) if dataset_root is None else dataset_root
    if unknown := [view for view in binding["views"] if view not in VIEWS]:
        raise UserError(
            f"{checkpoint} sees the view {unknown[0]}, which the simulated rig does not have ({', '.join(VIEWS)}): "
            "it cannot run there."
        )
    recorded = (root / MANIFEST).is_file()
    if judge and not recorded:
        raise UserError(
            f"{root} was not recorded on the simulated rig (it has no {MANIFEST}): the rig's phantoms say nothing "
            f"about {checkpoint}; evaluate it without closed-loop seeds, "
            "or train on a recording of `python -m needle_rig`."
        )
    try:
        open_checkpoint(binding["source"])
    except UserError as error:
        raise UserError(f"The VLM of {checkpoint} is not at hand, so it cannot look at the rig: {error}") from None
    if recorded:
        manifest = read_json(root / MANIFEST)
        how = {name: manifest["plan"][name] for name in ("picture_width", "picture_height", "camera_hz")}
        tasks = Counter(entry["task"] for entry in manifest["episodes"]).most_common(1)
        how["task"] = tasks[0][0] if tasks else DEFAULT_TASK
        how["instruction"] = instruction_of(how["task"], root)
    else:
        how = {f"picture_{side}": binding[f"image_resize_{side}"] for side in ("width", "height")}
    return RolloutSettings(checkpoint, vlm_latency_ms=trained["vlm_latency_ms"], **how)


def rig_refusal(checkpoint: Path, dataset_root: Path | None = None) -> str:
    """Why the simulated rig cannot judge this checkpoint, one sentence; "" where it can."""
    root = dataset_of(checkpoint, dataset_root)
    try:
        rig_settings(checkpoint, root)
    except UserError as error:
        return str(error)
    return ""


def dataset_of(checkpoint: Path, dataset_root: Path | None = None) -> Path:
    """`dataset_root`, or the folder that the checkpoint says it was trained on. Raises UserError where that is gone."""
    root = dataset_root or Path(read_checkpoint(checkpoint)["settings"]["dataset_root"])
    if not root.is_dir():
        raise UserError(
            f"{checkpoint} was trained on {root}, which is not there; "
            "give the folder of its dataset with --dataset-root."
        )
    return root


# ---------------------------------------------------------------- kept from one rollout to the next in a process


@lru_cache(maxsize=4)
def _load(checkpoint: Path, written_ns: int, device: str) -> tuple[Policy, Compute, dict[str, Any]]:
    policy, info = load_policy(checkpoint, device)
    adapted = (checkpoint, written_ns) if info["adapter"] else (None, 0)
    vlm = _extractor(json.dumps(info["binding"], sort_keys=True), device, *adapted)
    return policy, vlm.extract, info


@lru_cache(maxsize=2)
def _extractor(binding: str, device: str, adapted_in: Path | None, written_ns: int) -> FeatureExtractor:
    """By the binding and not by the checkpoint: policies that were trained on one cache share one VLM in memory."""
    adapter = read_checkpoint(adapted_in)["adapter"] if adapted_in else None
    return FeatureExtractor.from_binding(json.loads(binding), device, adapter)


_kept_rig: tuple[dict[str, Any], NeedleInsertion] | None = None


def _rig(settings: RolloutSettings, runner: RunnerSettings) -> NeedleInsertion:
    """The rig of these settings; a drawing context is dear, so one rig is kept for the next rollout."""
    global _kept_rig
    how = rig_of(settings, runner)
    if _kept_rig is None or _kept_rig[0] != how:
        if _kept_rig is not None:
            _kept_rig[1].close()
        _kept_rig = how, make_rig(**how)
    return _kept_rig[1]
