"""A rehearsal: one rollout on the simulated rig in real time, with the VLM in a process of its own.

    found = rehearse(RolloutSettings(checkpoint), seed=1, watch=lambda tick, observation: ...)

A real arm is driven by the same `Pilot`; only the robot (anything that implements `RobotIO`) and its limits are others:

    with Pilot(RolloutSettings(checkpoint)) as pilot:
        pilot.warm_up(arm.read_observation())
        log = pilot.run(arm, SafetyLimits(workspace_mm=...), max_s=30)

`watch` runs in the control loop between two ticks: it must be quick (store, do not draw). Who wants to draw, block or
die starts a `RehearsalProcess`, whose control loop shares its interpreter with nobody.
"""

import contextlib
import gc
import multiprocessing
import threading
import time
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vla_lib.core.errors import UserError
from vla_lib.core.pool import OneProcess
from vla_lib.evaluation.rollout import Moment, expert_of, judged, rig_of
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.evaluation.sim_robot import SimRobot, make_rig, prepare_gl, sim_limits
from vla_lib.features.extractor import FeatureExtractor
from vla_lib.runtime.clock import RealClock, real_time
from vla_lib.runtime.robot_io import DryRunIO, Observation, RobotIO
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.runtime.runner import Runner, Watch
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.vlm_worker import Compute, Features, vlm_process
from vla_lib.training.checkpoint import load_policy, read_checkpoint

KEY_S = 0.3  # a hold-to-run key counts as held for this long after it was last said to be
PICTURES_EVERY = 3  # ticks: five views at every one would keep the watcher's pipe full


class Pilot(contextlib.AbstractContextManager["Pilot"]):
    """A checkpoint that drives robots in real time, its VLM in a process of its own; injected latencies are left out.

    Raises UserError where the checkpoint or its VLM is missing. Leaving the `with` block ends the VLM's process.
    """

    def __init__(self, settings: RolloutSettings):
        self.checkpoint = settings.checkpoint
        policy, self.info = load_policy(settings.checkpoint, settings.device)
        self.expert, self.settings = expert_of(settings, policy, self.info)
        try:
            self._vlm = vlm_process(partial(make_extractor, settings.checkpoint, settings.device))
        except RuntimeError as error:
            raise UserError(f"The VLM of {settings.checkpoint} cannot run live: {error}") from error

    def __exit__(self, *_: object) -> None:
        self._vlm.close()

    def warm_up(self, observation: Observation, times: int = 3) -> None:
        """Run VLM and policy on one observation: first calls allocate, compile and load. Nothing moves."""
        for _ in range(times):
            tokens, mask = self._vlm.compute(observation.pictures, observation.instruction)
            window = np.zeros((self.expert.sensor_window, 1026), np.float32) if self.expert.sensor_window else None
            self.expert(Features(tokens, mask, 0, 0.0, observation.state), 0.0, observation.state, window)

    def run(
        self,
        io: RobotIO,
        limits: SafetyLimits,
        max_s: float,
        watch: Watch | None = None,
        started: Callable[[Runner], None] = lambda runner: None,
        until: Callable[[], str] | None = None,
        clock: RealClock | None = None,
        held: Callable[[], bool] | None = None,
    ) -> RunLog:
        """Drive `io` for `max_s` seconds, until `until()` gives a reason, or until safety ends it; see Runner.

        `started(runner)` is called before the first tick, so that a Stop button can call `runner.request_stop()`.
        """
        runner = Runner(io, self.expert, self._vlm, clock or RealClock(), self.settings, limits, watch)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # the expert is small; the other cores are the VLM's
        gc.collect()
        gc.freeze()  # the collector shall not walk through models in the middle of a tick
        try:
            started(runner)
            with real_time() as runner.log.real_time:
                return runner.run(max_s, until, held)
        finally:
            gc.unfreeze()
            torch.set_num_threads(threads)


def rehearse(
    settings: RolloutSettings,
    seed: int,
    watch: Watch | None = None,
    started: Callable[[Runner], None] = lambda runner: None,
    dry_run: Path | None = None,
    go_on: bool = False,
) -> dict[str, Any]:
    """One rollout in real time; the record of `evaluation.rollout.judged`, plus `log` (RunLog) and `path` at 650 Hz.

    `dry_run`: a JSON-lines file that gets the actions instead of the robot. `go_on`: run for `max_time_s` even after
    the rollout is decided. Raises UserError where the checkpoint, its VLM or EGL is missing.
    """
    with Pilot(settings) as pilot, contextlib.closing(make_rig(**rig_of(settings, pilot.settings))) as rig:
        clock = RealClock()
        pilot.warm_up(SimRobot(rig, clock, seed, instruction=settings.instruction).read_observation())
        rig.step(np.zeros(6))  # draws, for the first time
        robot = SimRobot(rig, clock, seed, go_on, settings.instruction)
        io: RobotIO = DryRunIO(robot, dry_run) if dry_run else robot

        def begin(runner: Runner) -> None:
            started(runner)
            robot.begin()

        until = None if go_on else robot.over
        log = pilot.run(io, SafetyLimits(**sim_limits()), settings.max_time_s, watch, begin, until, clock)
        return judged(robot, log) | {"log": log, "path": rig.path()}


def make_extractor(checkpoint: Path, device: str) -> Compute:
    """The compute function of a VLM process: the VLM that this checkpoint's policy was trained with."""
    content = read_checkpoint(checkpoint)
    return FeatureExtractor.from_binding(content["binding"], device, content.get("adapter")).extract


@dataclass(frozen=True)
class Hooks:
    """What a control loop in a process of its own is given: `watch` sends each tick to the watcher, `started(runner)`
    lets it stop the run, `held()` tells whether it holds the hold-to-run key."""

    watch: Watch
    started: Callable[[Runner], None]
    held: Callable[[], bool]


class LoopProcess:
    """A control loop in a process of its own, which dies with its watcher. Starts at once.

    `work(hooks, *args)`, a function of a module, runs there. `poll` returns the moments since the last call; when
    `running` is False, `result` gives what `work` returned.
    """

    def __init__(self, work: Callable[..., dict[str, Any]], *args: Any):
        self.running = True
        self._pipe, theirs = multiprocessing.Pipe()
        self._process = OneProcess(_keep, theirs)
        self._record = self._process.submit(_work, work, args)
        theirs.close()  # so that a dead process ends the pipe

    @property
    def pid(self) -> int:
        """The process that holds the control loop."""
        return self._process.pid

    def poll(self) -> list[Moment]:
        """New moments, oldest first; none before the models are loaded."""
        over = self._record.done()  # asked first: all moments are sent before the record
        moments: list[Moment] = []
        with contextlib.suppress(EOFError, OSError):  # it died; `result` says so
            while self._pipe.poll():
                moments.append(self._pipe.recv())
        self.running = not over
        return moments

    def stop(self) -> None:
        """Stop the robot now; the record still comes."""
        self._say("stop")

    def hold(self) -> None:
        """The hold-to-run key is held at this moment; to be said again at least every `KEY_S`."""
        self._say("hold")

    def _say(self, word: str) -> None:
        with contextlib.suppress(OSError):  # a process that is dead drives no robot
            self._pipe.send(word)

    def result(self) -> dict[str, Any]:
        """What `work` returned. Raises what that raised, and RuntimeError where its process died or still runs."""
        if self.running:
            raise RuntimeError("The rehearsal still runs; poll until it does not.")
        try:
            return self._record.result()
        except BrokenExecutor:
            raise RuntimeError("The rehearsal's process ended before its record came (out of memory?).") from None

    def close(self) -> None:
        """End the process, whatever it does."""
        self._process.shutdown()
        self._pipe.close()


class RehearsalProcess(LoopProcess):
    """A rehearsal in a process of its own; `result` gives the record of `rehearse`."""

    def __init__(self, settings: RolloutSettings, seed: int, dry_run: Path | None = None, go_on: bool = False):
        super().__init__(_rehearse, settings, seed, dry_run, go_on)


def _rehearse(hooks: Hooks, settings: RolloutSettings, seed: int, dry_run: Path | None, go_on: bool) -> dict[str, Any]:
    prepare_gl()
    return rehearse(settings, seed, hooks.watch, hooks.started, dry_run, go_on)


_pipe: Connection  # in the loop's process
_held_s = -KEY_S  # when the watcher last said that the key is held


def _keep(pipe: Connection) -> None:
    global _pipe
    _pipe = pipe


def _work(work: Callable[..., dict[str, Any]], args: tuple[Any, ...]) -> dict[str, Any]:
    period_s = 0.0
    with ThreadPoolExecutor(1) as sender:  # the control loop only hands over; this thread waits for the pipe

        def started(runner: Runner) -> None:
            nonlocal period_s
            period_s = runner.settings.period_s
            threading.Thread(target=_listen, args=(runner,), daemon=True).start()

        def watch(tick: Tick, seen: Observation) -> None:
            sender.submit(_pipe.send, Moment.of(tick, seen, period_s, tick.step % PICTURES_EVERY == 0))

        return work(Hooks(watch, started, lambda: time.monotonic() - _held_s < KEY_S), *args)


def _listen(runner: Runner) -> None:
    global _held_s
    with contextlib.suppress(EOFError, OSError):  # the watcher is gone, or the run is over
        while _pipe.recv() == "hold":
            _held_s = time.monotonic()
    runner.request_stop()
