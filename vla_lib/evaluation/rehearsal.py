"""A rehearsal: a checkpoint and a seed in; one rollout on the simulated rig in real time, with the VLM in a process of its own, out.

    found = rehearse(RolloutSettings(checkpoint), seed=1, watch=lambda tick, observation: ...)

A real arm is driven by the same `Pilot`; only the robot (anything that implements `RobotIO`) and its limits are others:

    with Pilot(RolloutSettings(checkpoint)) as pilot:
        pilot.warm_up(arm.read_observation())
        log = pilot.run(arm, SafetyLimits(workspace_mm=...), max_s=30)

`watch` runs in the control loop between two ticks: it must be quick (store, do not draw).
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.evaluation.rollout import RolloutSettings, judged, rig_of
from vla_lib.evaluation.sim_robot import SimRobot, make_rig, sim_limits
from vla_lib.runtime.clock import RealClock
from vla_lib.runtime.execution import ExecutionSettings
from vla_lib.runtime.robot_io import DryRunIO, Observation, RobotIO
from vla_lib.runtime.run_log import RunLog
from vla_lib.runtime.runner import Runner, RunnerSettings, Watch
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import Compute, ExtractorProcess, Features, ThreadedVlm

Started = Callable[[Runner], None]


class Pilot:
    """A checkpoint that can drive robots in real time: the policy here, its VLM in a process of its own. Injected latencies are left out.

    Raises UserError where the checkpoint or its VLM is missing. `close` (or `with`) ends the VLM's process.
    """

    def __init__(self, settings: RolloutSettings):
        from vla_lib.runtime.expert import PolicyExpert
        from vla_lib.training.checkpoint import load_policy

        policy, info = load_policy(settings.checkpoint, settings.device)
        binding = info["binding"]
        self.action_hz, self.views = float(policy.config.action_hz), tuple(binding["views"])
        chunks = ExecutionSettings(settings.execution, settings.chunk_steps)
        self.settings = RunnerSettings(self.action_hz, info["settings"]["vlm_reuse_count"], chunks, self.views)
        self.expert = PolicyExpert(policy, settings.without, settings.ddim_steps or None)
        try:
            self._compute = ExtractorProcess(partial(make_extractor, settings.checkpoint, settings.device))
        except RuntimeError as error:
            raise UserError(f"The VLM of {settings.checkpoint} cannot run live: {error}") from error
        self._vlm = ThreadedVlm(self._compute)

    def warm_up(self, observation: Observation, times: int = 3) -> None:
        """Run VLM and policy a few times on one observation: first calls allocate, compile and load, and would be late. Nothing moves."""
        for _ in range(times):
            tokens, mask = self._compute(observation.pictures, observation.instruction)
            window = np.zeros((self.expert.sensor_window, 1026), np.float32) if self.expert.sensor_window else None
            self.expert(Features(tokens, mask, 0, 0.0), 0.0, observation.state, window)

    def run(
        self,
        io: RobotIO,
        limits: SafetyLimits,
        max_s: float,
        watch: Watch | None = None,
        started: Started | None = None,
        until: Callable[[], str] | None = None,
        clock: RealClock | None = None,
    ) -> RunLog:
        """Drive `io` for `max_s` seconds, until `until()` gives a reason, or until safety ends it; see Runner.

        `started(runner)` is called before the first tick, so that a Stop button can call `runner.request_stop()`.
        """
        import torch

        runner = Runner(io, self.expert, self._vlm, clock or RealClock(), self.settings, limits, watch)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the expert is small; the other cores are the VLM's
        gc.collect()
        gc.freeze()  # the collector shall not walk through models in the middle of a tick
        try:
            if started:
                started(runner)
            return runner.run(max_s, until)
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)

    def close(self) -> None:
        """End the VLM's process."""
        self._vlm.close()

    def __enter__(self) -> "Pilot":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def rehearse(
    settings: RolloutSettings,
    seed: int,
    watch: Watch | None = None,
    started: Started | None = None,
    dry_run: Path | None = None,
    go_on: bool = False,
) -> dict[str, Any]:
    """One rollout in real time; returns the record of `evaluation.rollout.judged`, plus `log` (RunLog) and `path` at 650 Hz.

    `dry_run`: a JSON-lines file that gets the actions instead of the robot. `go_on`: run for `max_time_s` even after the rollout is decided.
    Raises UserError where the checkpoint, its VLM or EGL is missing.
    """
    with Pilot(settings) as pilot:
        rig = make_rig(**rig_of(settings, pilot.action_hz, pilot.views))
        try:
            clock = RealClock()
            first = SimRobot(rig, clock, seed, instruction=settings.instruction)
            pilot.warm_up(first.read_observation())
            rig.step(np.zeros(6))  # draws, for the first time
            robot = SimRobot(rig, clock, seed, go_on, settings.instruction)
            io: RobotIO = DryRunIO(robot, dry_run) if dry_run else robot
            until = None if go_on else robot.over

            def begin(runner: Runner) -> None:
                if started:
                    started(runner)
                robot.begin()

            log = pilot.run(io, SafetyLimits(**sim_limits()), settings.max_time_s, watch, begin, until, clock)
            return judged(robot, log) | {"log": log, "path": rig.path()}
        finally:
            rig.close()


def make_extractor(checkpoint: Path, device: str) -> Compute:
    """The compute function of a VLM process: the VLM that this checkpoint's policy was trained with."""
    from vla_lib.features.extractor import FeatureExtractor
    from vla_lib.training.checkpoint import read_checkpoint

    content = read_checkpoint(checkpoint)
    return FeatureExtractor.from_binding(content["binding"], device, content.get("adapter")).extract
