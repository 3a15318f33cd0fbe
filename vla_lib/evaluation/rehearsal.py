"""A rehearsal: a checkpoint and a seed in; one attempt on the simulated rig in real time, with the VLM in a process of its own, out.

    found = rehearse(AttemptSettings(checkpoint), seed=1, watch=lambda tick, observation: ...)

The loop, the deadlines and the safety are those of a real arm; only the robot is simulated. `watch` runs in the control loop between two
ticks: it must be quick (store, do not draw).
"""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.evaluation.attempt import AttemptSettings, judged
from vla_lib.evaluation.sim_robot import SimRobot, sim_limits
from vla_lib.runtime.clock import RealClock
from vla_lib.runtime.execution import ExecutionSettings
from vla_lib.runtime.robot_io import DryRunIO, RobotIO
from vla_lib.runtime.runner import Runner, RunnerSettings, Watch
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import Compute, ExtractorProcess, ThreadedVlm
from vla_lib.sim.rig import SimRig


def rehearse(
    settings: AttemptSettings,
    seed: int,
    watch: Watch | None = None,
    started: Callable[[Runner], None] | None = None,
    dry_run: bool = False,
    go_on: bool = False,
) -> dict[str, Any]:
    """One attempt in real time; returns the record of `evaluation.attempt.judged`, plus `log` (RunLog) and `path` at 650 Hz.

    `started(runner)` gets the runner before the first tick, so that a Stop button can call `runner.request_stop()`. `dry_run`: actions are logged
    and not sent. `go_on`: run for `max_time_s` even after the attempt is decided. Injected latencies of `settings` are left out: time is real.
    Raises UserError where the checkpoint, its VLM or EGL is missing.
    """
    import torch

    from vla_lib.runtime.expert import PolicyExpert
    from vla_lib.training.checkpoint import load_policy

    policy, info = load_policy(settings.checkpoint, settings.device)
    binding, hz = info["binding"], float(policy.config.action_hz)
    try:
        process = ExtractorProcess(partial(make_extractor, binding, settings.device))
    except RuntimeError as error:
        raise UserError(f"The VLM of {settings.checkpoint} cannot run live: {error}") from error
    size = {"picture_width": settings.picture_width, "picture_height": settings.picture_height, "camera_hz": settings.camera_hz}
    rig = SimRig(task=settings.task, action_hz=hz, views=tuple(binding["views"]), max_time_s=settings.max_time_s, **size)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the expert is small; the other cores are the VLM's
    vlm = ThreadedVlm(process)
    try:
        expert = PolicyExpert(policy, settings.without, settings.ddim_steps or None)
        warm_up(expert, process, rig, seed)
        clock = RealClock()
        robot = SimRobot(rig, clock, seed, go_on)
        io: RobotIO = DryRunIO(robot) if dry_run else robot
        run = RunnerSettings(hz, info["settings"]["vlm_reuse_count"], ExecutionSettings(settings.execution, settings.chunk_steps))
        runner = Runner(io, expert, vlm, clock, run, SafetyLimits(**sim_limits()), watch)
        if started:
            started(runner)
        gc.collect()
        gc.freeze()  # the collector shall not walk through models in the middle of a tick
        robot.begin()
        log = runner.run(settings.max_time_s, None if go_on else robot.over)
        return judged(robot, log) | {"log": log, "path": rig.path()}
    finally:
        gc.unfreeze()
        vlm.close()
        rig.close()
        torch.set_num_threads(threads)


def make_extractor(binding: dict[str, Any], device: str) -> Compute:
    """The compute function of a VLM process."""
    from vla_lib.features.extractor import FeatureExtractor

    return FeatureExtractor.from_binding(binding, device).extract


def warm_up(expert: Any, compute: Compute, rig: SimRig, seed: int) -> None:
    """Run everything a few times: first calls allocate, compile and load, and would be late."""
    import numpy as np

    from vla_lib.runtime.vlm_worker import Features

    observation, _ = rig.reset(seed=seed)
    for _ in range(3):
        tokens, mask = compute(observation["pictures"], observation["instruction"])
        window = np.zeros((expert.sensor_window, 1026), np.float32) if expert.sensor_window else None
        expert(Features(tokens, mask, 0, 0.0), 0.0, observation["state"], window)
        rig.step(np.zeros(6))
