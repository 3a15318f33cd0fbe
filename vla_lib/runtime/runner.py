"""The dual-rate loop: it drives a robot with a fast expert and a slow VLM, within limits, and logs every tick.

Each action period (10 Hz): read the robot, fill the sensor ring, hand pictures to the VLM when its turn has come (every
`vlm_reuse_count` periods, or as soon as it is free again), take its newest finished features, check the robot's
condition, ask the expert where the chunk plan needs it, limit the action, send it. Before the first features and the
first full sensor window nothing moves. The simulated clock runs the very same lines; there, work takes the time that
the clock draws for it.
"""

import math
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Annotated

import numpy as np
from annotated_types import Ge, Gt

from vla_lib.core.errors import UserError
from vla_lib.core.settings import Settings, settings
from vla_lib.episodes.poses import GRIPPER_CLOSED, apply_action, rotation_angle_deg
from vla_lib.runtime import safety
from vla_lib.runtime.clock import Clock, Watchdog
from vla_lib.runtime.expert import ChunkPlan, Expert
from vla_lib.runtime.robot_io import Observation, RobotIO
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.runtime.safety import HoldBudget, SafetyLimits
from vla_lib.runtime.streams import Streams
from vla_lib.runtime.vlm_worker import Features, VlmWorker

Watch = Callable[[Tick, Observation], None]
BUFFER_SAMPLES = 1300  # two seconds of the sensor
STILL = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, GRIPPER_CLOSED)


@settings
class RunnerSettings(Settings):
    """Rates and the way of executing chunks; take rates from the checkpoint's settings."""

    action_hz: Annotated[float, Gt(0)] = 10.0
    vlm_reuse_count: Annotated[int, Ge(1)] = 3  # action periods from one VLM tick to the next
    steps_per_chunk: Annotated[int, Ge(1)] = 1  # actions of a chunk that are executed before the expert is asked again
    views: tuple[str, ...] = ()
    """What the VLM is shown; nothing moves without a fresh picture of each. Default: the views that the robot has."""

    @property
    def period_s(self) -> float:
        """Seconds of one action; also the time within which an action is sent after its tick is due, or not at all."""
        return 1.0 / self.action_hz


class Runner:
    """One run: make a new one for the next. `watch(tick, observation)` is called after every tick, for live views."""

    def __init__(
        self,
        io: RobotIO,
        expert: Expert,
        vlm: VlmWorker,
        clock: Clock,
        settings: RunnerSettings,
        limits: SafetyLimits,
        watch: Watch | None = None,
    ):
        self.io, self.expert, self.vlm, self.clock = io, expert, vlm, clock
        self.settings, self.limits, self._watch = settings, limits, watch
        self.log = RunLog(period_s=settings.period_s)
        self.streams = Streams(limits, max(BUFFER_SAMPLES, expert.sensor_window), settings.views)
        self._plan, self._held = ChunkPlan(settings.steps_per_chunk), HoldBudget(limits.hold_s)
        self._lock = threading.Lock()  # guards the reason of the stop
        self._stop_reason, self._stop_taken = "", False
        self._features: Features | None = None
        self._asked_step: int | None = None
        self._trained_age_s = getattr(expert, "vl_ages_s", (0.0, 0.0))[1] or math.inf
        self._states: dict[int, np.ndarray] = {}  # at the steps whose pictures the VLM has not answered yet
        self._start = np.zeros(6)  # the last pose before the first action
        self._commanded: np.ndarray | None = None
        self._started = False
        self._gone_on_without: set[str] = set()  # faults of views, each told once
        self._retreat_left = 0
        self._force_tail = np.empty(0, np.float32)
        self._begin_s = 0.0
        self._key: Callable[[], bool] | None = None
        if hasattr(expert, "usual_step"):  # an expert that learnt from demonstrations knows their speed
            for warning in safety.slow_limits(limits, settings.period_s, *expert.usual_step()):
                self.log.event(0.0, "warning", warning)

    def request_stop(self, reason: str = safety.OPERATOR) -> bool:
        """Stop the robot now, from any thread; the run ends at its next tick. Returns whether the robot took it."""
        with self._lock:
            first = not self._stop_reason
            self._stop_reason = self._stop_reason or reason
        if first or not self._stop_taken:
            self._stop_robot()  # not under the lock: it must get through while a send hangs
        return self._stop_taken

    def _stop_robot(self) -> None:
        """A robot that does not take the stop gets it again at the end of the run, and from the watchdog until then."""
        try:
            self.io.stop(self._stop_reason)
            self._stop_taken = True
        except Exception as error:
            self.log.event(self.clock.now() - self._begin_s, "stop failed", f"{type(error).__name__}: {error}")

    def run(
        self, max_s: float, until: Callable[[], str] | None = None, held: Callable[[], bool] | None = None
    ) -> RunLog:
        """Run for `max_s` seconds, until `until()` gives a reason or safety ends it; the robot is stopped in any case.

        `held()`: whether a person holds the hold-to-run key; without it the robot does not start, and is held.

        Raises what `watch` or a wrong setting (UserError) raises; failures of robot, policy and VLM end the run with a
        named reason.
        """
        begin_s, period_s, step = self.clock.now(), self.settings.period_s, 0
        self._begin_s, self._key = begin_s, held
        patience_s = max(self.limits.watchdog_s, 3 * period_s)
        watchdog = None if self.clock.simulated else Watchdog(patience_s, lambda: self.request_stop(safety.WATCHDOG))
        try:
            with watchdog or nullcontext():
                while True:
                    due_s = begin_s + step * period_s
                    self.clock.sleep_until(due_s)
                    if watchdog:
                        watchdog.beat()
                    now_s = self.clock.now()
                    tick = Tick(step, now_s - begin_s, 1000.0 * max(0.0, now_s - due_s))
                    if self.log.ticks and self.log.ticks[-1].mode == "hold":
                        self._held.held(self.log.ticks[-1].step * period_s, step * period_s)
                    observation = self._read(tick)
                    over = until() if until and observation else ""
                    if over or (tick.t_s >= max_s - 1e-9 and not self._retreats(tick)):
                        self.log.ended = over or "time limit"
                        break
                    if observation:
                        self._tick(tick, observation, due_s)
                    self._note(tick)
                    if self._watch and observation:
                        self._watch(tick, observation)
                    if tick.mode == "stop":
                        self.log.ended, self.log.stopped = tick.reason, True
                        break
                    step = max(step + 1, int((self.clock.now() - begin_s) / period_s + 1e-9))
        finally:
            if not self.request_stop(self.log.ended or "error"):
                self._stop_robot()
        self.log.event(tick.t_s, "end", self.log.ended)
        return self.log

    # ---------------------------------------------------------------- one tick

    def _read(self, tick: Tick) -> Observation | None:
        try:
            observation = self.io.read_observation()
            self.streams.take(observation, tick.t_s, self.clock.now() - self._begin_s)
            tick.pose = tuple(float(value) for value in observation.state[6:12])
        except Exception as error:
            self._stop(tick, f"{safety.ROBOT_FAILED}: {type(error).__name__}: {error}")
            return None
        force = np.asarray(observation.sensor)[:, 0]  # by arrival: no stamp hides a push
        tick.force_mN = safety.greatest_force(self._force_tail, force) if len(force) else None
        self._force_tail = np.concatenate([self._force_tail, force])[-64:]
        tick.sensor_age_s = self.streams.sensor_age_s
        return observation

    def _tick(self, tick: Tick, observation: Observation, due_s: float) -> None:
        unseen = self._unseen(tick)
        if not self._started:
            self._start = np.array(tick.pose)
        # None where it is not full; one sample stands for the stream where the expert reads none
        window = self.streams.sensor.window(self.expert.sensor_window or 1, self.streams.now)
        self._look(tick, observation, unseen)
        if self._stop_reason:
            self._stop(tick, self._stop_reason)
        elif self._retreats(tick):  # before every other end of the run: no needle shall stay pressed in
            self._retreat(tick)
        elif self.vlm.failure:
            self._stop(tick, f"{safety.VLM_DIED}: {self.vlm.failure}")
        elif not self._started and self._retreat_blocked(tick):
            self._stop(tick, safety.RETREAT_BLOCKED)
        elif not self._started and (missing := unseen or self._missing(window) or self._released()):
            if tick.t_s > self.limits.start_s:
                self._stop(tick, f"{safety.NOT_READY}: {missing}")
            else:
                tick.mode, tick.reason = "wait", missing
        elif reason := self._released() or self._condition(tick, observation, window) or unseen or self._stale(tick):
            self._plan.clear()
            self._hold(tick, reason)
        else:
            self._started = True
            self._act(tick, observation.state, window if self.expert.sensor_window else None, due_s)

    def _look(self, tick: Tick, observation: Observation, unseen: str) -> None:
        """Hand pictures to the VLM when it is its turn, and take what it has finished."""
        now_s = self.clock.now()
        turn = self._asked_step is None or tick.step - self._asked_step >= self.settings.vlm_reuse_count
        if turn and not unseen and not self.vlm.failure and not self.vlm.busy(now_s):
            views = [view for view in self.streams.views(observation) if view not in self.streams.picture_faults]
            pictures = {view: observation.pictures[view] for view in views}
            self.vlm.submit(pictures, observation.instruction, tick.step, now_s)
            self._asked_step = tick.step
            self._states[tick.step] = np.array(observation.state)
        newest = self.vlm.newest(now_s)
        if newest is not None and newest.step in self._states:
            self._features = replace(newest, state=self._states.pop(newest.step))
            self.log.vlm_ms.append(1000.0 * newest.took_s)
        if self._features is not None:  # in whole periods, as in training
            tick.vl_age_s = (tick.step - self._features.step) * self.settings.period_s
            if tick.vl_age_s > self._trained_age_s + 1e-9:
                trained = f"the policy was trained with ages up to {self._trained_age_s:.1f} s"
                remedy = "train with a greater --vlm-latency-max-ms, or take a faster VLM"
                self.log.event(tick.t_s, "warning", f"VL features are {tick.vl_age_s:.1f} s old; {trained}: {remedy}")
                self._trained_age_s = math.inf  # told once

    def _unseen(self, tick: Tick) -> str:
        """Why the pictures do not suffice: it goes on without views that it can spare, late ones are waited for."""
        faults = self.streams.picture_faults
        late = not self._started and any(fault.startswith(safety.MISSING_VIEW) for fault in faults.values())
        if late or len(faults) > self.limits.spare_views:
            return next(iter(faults.values()))
        for fault in set(faults.values()) - self._gone_on_without:
            self.log.event(tick.t_s, "warning", f"{fault}: the run goes on without this view")
        self._gone_on_without |= set(faults.values())
        return ""

    def _retreat_blocked(self, tick: Tick) -> bool:
        """Whether from here the needle could not be drawn back; without a sensor nothing draws it back."""
        known = self.limits.sensor_required and bool(np.isfinite(tick.pose).all())
        return known and safety.retreat_leaves(np.array(tick.pose), self.limits)

    def _missing(self, window: np.ndarray | None) -> str:
        """What else must be there before the first motion; "" where nothing is missing."""
        if self._features is None:
            return "no VL features yet"
        if not self.limits.sensor_required or window is not None:
            return ""
        fault = self.streams.sensor_fault
        return fault if fault not in ("", safety.STALE_SENSOR) else "no full sensor window yet"

    def _condition(self, tick: Tick, observation: Observation, window: np.ndarray | None) -> str:
        """Why clock, sensor and arm are in no state to move now; "" where they are."""
        limits, streams = self.limits, self.streams
        if streams.clock_fault:
            return streams.clock_fault
        if tick.force_mN is not None and not np.isfinite(tick.force_mN):
            return safety.NON_FINITE_SENSOR
        if limits.sensor_required and streams.sensor_fault:
            return streams.sensor_fault
        if limits.sensor_required and self.expert.sensor_window and window is None:
            return safety.BROKEN_WINDOW
        if not np.isfinite(observation.state).all():
            return safety.NON_FINITE_STATE
        pose, place = np.array(tick.pose), self._place(tick)
        off_mm, off_deg = np.linalg.norm((pose - place)[:3]), rotation_angle_deg(pose, place)
        follows = off_mm <= limits.follow_mm and off_deg <= limits.follow_deg
        return streams.state_fault or ("" if follows else safety.NOT_FOLLOWING)

    def _released(self) -> str:
        return safety.KEY_RELEASED if self._key is not None and not self._key() else ""

    def _stale(self, tick: Tick) -> str:
        return safety.STALE_VL if tick.vl_age_s is None or tick.vl_age_s > self.limits.vl_age_s + 1e-9 else ""

    def _act(self, tick: Tick, state: np.ndarray, window: np.ndarray | None, due_s: float) -> None:
        """Send the action of this step. There are features and their age: `_missing` and `_stale` have looked."""
        assert self._features is not None and tick.vl_age_s is not None
        if self._plan.wants_chunk(tick.step):
            begun_s = self.clock.now()
            tick.vl_busy = self.vlm.busy(begun_s)
            try:
                chunk = self.expert(self._features, tick.vl_age_s, state, window)
            except UserError:
                raise
            except Exception as error:
                return self._stop(tick, f"{safety.EXPERT_FAILED}: {type(error).__name__}: {error}")
            self.clock.spend("expert")
            tick.expert_ms = 1000.0 * (self.clock.now() - begun_s)
            self._plan.add(tick.step, chunk)
        if self.clock.now() > due_s + self.settings.period_s + 1e-9:
            return self._hold(tick, safety.MISSED_DEADLINE, send=False)  # too late to send anything for this period
        action = self._plan.action(tick.step)
        if action is None or action.shape != (7,) or not np.isfinite(action).all():
            self._plan.clear()
            return self._hold(tick, safety.NON_FINITE_ACTION)
        limited = self._limit(tick, action)
        for edge, part in ((safety.OUTSIDE, slice(0, 3)), (safety.ROTATION_RANGE, slice(3, 6))):
            if edge in tick.limited and np.linalg.norm(limited[part]) < 1e-3 * np.linalg.norm(action[part]):
                self._plan.clear()
                return self._hold(tick, edge)
        refuses = getattr(self.io, "refuses", None)
        if refuses is not None and (reason := refuses(limited)):
            self._plan.clear()
            return self._hold(tick, reason)
        self._send(tick, limited)

    def _limit(self, tick: Tick, action: np.ndarray) -> np.ndarray:
        period_s, place = self.settings.period_s, self._place(tick)
        limited, touched = safety.limit_action(action, self.limits, period_s, place, self._start)
        tick.limited = tuple(touched)
        return limited

    def _place(self, tick: Tick) -> np.ndarray:
        """(6,) pose from which the next action goes: the commanded one (an arm lags), the measured if none moves."""
        moves = getattr(self.io, "moves", True)
        return self._commanded if moves and self._commanded is not None else np.array(tick.pose)

    def _hold(self, tick: Tick, reason: str, send: bool = True) -> None:
        """Stand still for this period; stop where the robot has been held for too long."""
        if self._held.spent(tick.step * self.settings.period_s):
            return self._stop(tick, reason)
        tick.mode, tick.reason = "hold", reason
        if send:
            self._send(tick, np.array(STILL), moves=False)

    def _retreats(self, tick: Tick) -> bool:
        """Whether the needle is being drawn back, or must be from this tick on."""
        return self._retreat_left > 0 or (tick.force_mN is not None and tick.force_mN > self.limits.force_mN)

    def _retreat(self, tick: Tick) -> None:
        """Draw the needle back along its axis, then stop."""
        per_tick_mm = self.limits.retreat_speed_mm_s * self.settings.period_s
        if not self._retreat_left:
            self._retreat_left = 1 + int(np.ceil(self.limits.retreat_mm / per_tick_mm - 1e-9))
            self._plan.clear()
        self._retreat_left -= 1
        if not self._retreat_left or not np.isfinite(tick.pose).all():
            if self.vlm.failure:
                self.log.event(tick.t_s, "warning", f"{safety.VLM_DIED}: {self.vlm.failure}")
            return self._stop(tick, safety.FORCE_LIMIT)
        tick.mode, tick.reason = "retreat", safety.FORCE_LIMIT
        action = safety.retreat_action(np.array(tick.pose), self.limits, self.settings.period_s)
        self._send(tick, self._limit(tick, action))

    def _send(self, tick: Tick, action: np.ndarray, moves: bool = True) -> None:
        if self._stop_reason:
            return self._stop(tick, self._stop_reason)
        try:
            self.io.send_action(action)
        except Exception as error:
            return self._stop(tick, f"{safety.ROBOT_FAILED}: {type(error).__name__}: {error}")
        tick.action = tuple(action.tolist())
        if self._stop_reason:  # the stop came in between: it is the last word
            self._stop_robot()
            return self._stop(tick, self._stop_reason)
        if moves:
            self._commanded = apply_action(self._place(tick), action)
        if self._commanded is not None:
            tick.commanded = tuple(self._commanded.tolist())

    def _stop(self, tick: Tick, reason: str) -> None:
        tick.mode, tick.reason = "stop", reason
        self.request_stop(reason)

    # ---------------------------------------------------------------- the log

    def _note(self, tick: Tick) -> None:
        before = self.log.ticks[-1] if self.log.ticks else None
        self.log.ticks.append(tick)
        if before is None or (tick.mode, tick.reason) != (before.mode, before.reason):
            kind = "resume" if tick.mode == "act" and before is not None and before.mode == "hold" else tick.mode
            self.log.event(tick.t_s, kind, tick.reason)
