"""One closed-loop rollout: a checkpoint and a seed in; the judgement, the runner's log, the path and, where asked for, film frames out.

The rig, the clock and the latencies are deterministic by the seed: the same settings and seed give the same rollout.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.evaluation.sim_robot import DEFAULT_TASK, NeedleInsertion, SimRobot, make_rig, sim_limits
from vla_lib.runtime.clock import Latency, SimulatedClock
from vla_lib.runtime.execution import Execution, ExecutionSettings
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.runtime.runner import Runner, RunnerSettings, Watch
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import Compute, SimulatedVlm

_PATH_STRIDE = 65  # paths are kept at 10 Hz, with the greatest force of each period
_FILM_STRIDE = 13  # films keep the sensor at 50 Hz


@dataclass(frozen=True)
class RolloutSettings:
    """How a checkpoint is tried. The pictures are as the recorder makes them; rates, views and sensor window come from the checkpoint."""

    checkpoint: Path
    without: Literal["nothing", "vl", "sensor"] = "nothing"
    """Input that is masked."""
    execution: Execution = "first action"
    chunk_steps: int = 4
    """Actions of a chunk that `chunk of n` follows."""
    vlm_latency_ms: float | None = None
    """Delay of the VL features; None: the one that the policy was trained with. 300 ms and more lower the VLM's rate: it does one at a time."""
    vlm_jitter_ms: float = 0.0
    """Mean of the exponentially distributed rest of that delay."""
    expert_latency_ms: float = 0.0
    expert_jitter_ms: float = 0.0
    task: str = DEFAULT_TASK
    """Whose phantoms."""
    instruction: str = ""
    """The task in the words of the training data; default: those of the built-in table."""
    max_time_s: float = 30.0
    picture_width: int = 320
    picture_height: int = 180
    camera_hz: float = 5.0
    ddim_steps: int = 0
    """Denoising steps of a diffusion policy; 0: the policy's own."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        object.__setattr__(self, "checkpoint", Path(self.checkpoint))
        if not self.checkpoint.is_file():
            raise UserError(
                f"There is no checkpoint {self.checkpoint}; train one first, or give the path of its .pt file."
            )
        if self.without not in ("nothing", "vl", "sensor"):
            raise UserError(f"A rollout can be made without nothing, vl or sensor, not without {self.without!r}.")
        if not self.max_time_s > 0:
            raise UserError(f"A rollout of {self.max_time_s:g} s cannot be; max_time_s must be above 0.")
        ExecutionSettings(self.execution, self.chunk_steps)
        Latency(self.vlm_latency_ms or 0.0, self.vlm_jitter_ms)
        Latency(self.expert_latency_ms, self.expert_jitter_ms)


def rollout(settings: RolloutSettings, seed: int, watch: Watch | None = None) -> dict[str, Any]:
    """Try the checkpoint on the phantom of `seed`. Returns the record of `judged`, with `path`.

    Raises UserError where the checkpoint, its VLM or EGL is missing or another one.
    """
    policy, compute, info = _load(settings.checkpoint, settings.device)
    trained = info["settings"]
    from vla_lib.runtime.expert import PolicyExpert

    expert = PolicyExpert(policy, settings.without, settings.ddim_steps or None, seed)
    rig = _rig(settings, float(policy.config.action_hz), tuple(info["binding"]["views"]))
    vlm_ms = trained["vlm_latency_ms"] if settings.vlm_latency_ms is None else settings.vlm_latency_ms
    latencies = {
        "vlm": Latency(vlm_ms, settings.vlm_jitter_ms),
        "expert": Latency(settings.expert_latency_ms, settings.expert_jitter_ms),
    }
    chunks = ExecutionSettings(settings.execution, settings.chunk_steps)
    run = RunnerSettings(policy.config.action_hz, trained["vlm_reuse_count"], chunks, tuple(info["binding"]["views"]))
    longest_s = max(
        1.0, 3 * (vlm_ms + 3 * settings.vlm_jitter_ms) / 1000.0
    )  # two delays, the jitter seldom above three times its mean
    limits = SafetyLimits(**sim_limits(), vl_age_s=longest_s)
    return fly(rig, expert, compute, seed, run, limits, latencies, watch, settings.instruction)


def rig_of(settings: RolloutSettings, action_hz: float, views: tuple[str, ...]) -> dict[str, Any]:
    """What the rig is made with for these settings and a policy of this rate and these views."""
    names = ("task", "max_time_s", "picture_width", "picture_height", "camera_hz")
    return {name: getattr(settings, name) for name in names} | {"action_hz": action_hz, "views": views}


def fly(
    rig: NeedleInsertion,
    expert: Any,
    compute: Compute,
    seed: int,
    settings: RunnerSettings,
    limits: SafetyLimits,
    latencies: dict[str, Latency] | None = None,
    watch: Watch | None = None,
    instruction: str = "",
) -> dict[str, Any]:
    """One rollout of any expert and any VLM on the rig, on the simulated clock. Returns the record of `judged`, with `path`."""
    clock = SimulatedClock(latencies, seed)
    robot = SimRobot(rig, clock, seed, instruction=instruction)
    runner = Runner(robot, expert, SimulatedVlm(compute, clock), clock, settings, limits, watch)
    log = runner.run(rig.max_time_s + 1.0, robot.over)
    path = rig.path()
    force = np.maximum.reduceat(path["force_mN"], np.arange(0, len(path["force_mN"]), _PATH_STRIDE))  # no peak is lost
    kept = {"t_s": path["t_s"][::_PATH_STRIDE], "position_mm": path["position_mm"][::_PATH_STRIDE], "force_mN": force}
    return judged(robot, log) | {"path": {name: values.round(3).tolist() for name, values in kept.items()}}


def judged(robot: SimRobot, log: RunLog) -> dict[str, Any]:
    """What came of a rollout, JSON-able: success, reason of failure ("" at success), errors in mm, forces in mN, times in s, the runner's summary.

    Where safety ended a rollout that was not decided yet the reason begins with "stopped: ".
    """
    info = robot.info
    undecided = f"stopped: {log.ended}" if log.stopped else log.ended
    reason = "" if info["success"] else info["reason"] or undecided
    names = ("seed", "success", "lateral_mm", "depth_error_mm", "punctured", "peak_force_mN", "time_s", "truth")
    return {name: info[name] for name in names} | {"reason": reason, "runner": log.summary(), "events": log.events}


def film(settings: RolloutSettings, seed: int, frames: int = 12) -> dict[str, Any]:
    """The rollout of `seed` once more, with film: the record of `rollout` plus `frames`, evenly over its time, the last included, and the sensor at
    50 Hz: `sensor` (n, 1026), `sensor_t_s` (n,), below 0 in the rest before the start.

    A frame: t_s, pictures {view: (H, W, 3) uint8}, a_scan (1025,) float32, force_mN, action (7,), mode, reason.
    """
    reel: list[dict[str, Any]] = []
    sensor: list[np.ndarray] = []
    sensor_t_s: list[np.ndarray] = []

    def watch(tick: Tick, observation: Observation) -> None:
        sensor.append(observation.sensor[::_FILM_STRIDE])
        sensor_t_s.append(tick.t_s + observation.sensor_timestamps[::_FILM_STRIDE] - observation.timestamp)
        newest = observation.sensor[-1] if len(observation.sensor) else np.full(1026, np.nan, np.float32)
        reel.append(
            {
                "t_s": tick.t_s,
                "pictures": dict(observation.pictures),
                "a_scan": newest[1:].copy(),
                "force_mN": float(newest[0]),
                "action": tick.action,
                "mode": tick.mode,
                "reason": tick.reason,
            }
        )

    record = rollout(settings, seed, watch)
    keep = np.unique(np.linspace(0, len(reel) - 1, min(frames, len(reel))).round().astype(int)) if reel else []
    scans = {"sensor": np.concatenate(sensor), "sensor_t_s": np.concatenate(sensor_t_s)} if sensor else {}
    return record | {"frames": [reel[k] for k in keep]} | scans


def _load(checkpoint: Path, device: str) -> tuple[Any, Compute, dict[str, Any]]:
    return _load_once(checkpoint, checkpoint.stat().st_mtime_ns, device)


@lru_cache(maxsize=4)
def _load_once(checkpoint: Path, written_ns: int, device: str) -> tuple[Any, Compute, dict[str, Any]]:
    from vla_lib.training.checkpoint import load_policy

    policy, info = load_policy(checkpoint, device)
    binding = json.dumps(info["binding"], sort_keys=True)
    vlm = _extractor(binding, device, *((checkpoint, written_ns) if info["adapter"] else (None, 0)))
    return policy, vlm.extract, info


@lru_cache(maxsize=2)
def _extractor(binding: str, device: str, adapted_in: Path | None, written_ns: int) -> Any:
    from vla_lib.features.extractor import FeatureExtractor
    from vla_lib.training.checkpoint import read_checkpoint

    adapter = read_checkpoint(adapted_in)["adapter"] if adapted_in else None
    return FeatureExtractor.from_binding(json.loads(binding), device, adapter)


_kept_rig: tuple[Any, NeedleInsertion] | None = None


def _rig(settings: RolloutSettings, action_hz: float, views: tuple[str, ...]) -> NeedleInsertion:
    """The rig of these settings; a drawing context is dear, so one rig is kept for the next rollout."""
    global _kept_rig
    how = rig_of(settings, action_hz, views)
    if _kept_rig is None or _kept_rig[0] != how:
        if _kept_rig is not None:
            _kept_rig[1].close()
        _kept_rig = how, make_rig(**how)
    return _kept_rig[1]
