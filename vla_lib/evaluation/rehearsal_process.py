"""A rehearsal in a process of its own: what each tick saw comes out while it runs, a stop goes in, the record comes out at its end.

The control loop shares its interpreter with nobody: whoever watches may draw, block or die. A watcher that dies takes the rehearsal along.
"""

import contextlib
import multiprocessing
import queue
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.core.processes import follow_parent
from vla_lib.evaluation.rehearsal import rehearse
from vla_lib.evaluation.rollout import RolloutSettings
from vla_lib.evaluation.sim_robot import prepare_gl
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import Tick
from vla_lib.runtime.runner import Runner

SENSOR_STRIDE = 13  # the watcher sees the sensor at 50 Hz
PICTURES_EVERY = 3  # ticks


@dataclass(frozen=True)
class Moment:
    """One tick for the watcher: its log entry, the action period, the sensor at 50 Hz ((n, 1026) with times (n,) in s of the run), and
    now and then the pictures."""

    tick: Tick
    period_s: float
    sensor: np.ndarray
    sensor_t_s: np.ndarray
    pictures: dict[str, np.ndarray]


class RehearsalProcess:
    """Starts at once. `poll` returns the moments since the last call; when `running` is False, `result` gives the record of `rehearse`."""

    def __init__(self, settings: RolloutSettings, seed: int, dry_run: Path | None = None, go_on: bool = False):
        context = multiprocessing.get_context("spawn")  # neither a GL context nor torch's threads survive a fork
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, settings, seed, dry_run, go_on), name="rehearsal")
        self._process.start()
        theirs.close()
        self._end: Any = None

    @property
    def running(self) -> bool:
        """Whether more moments may come."""
        return self._end is None

    def poll(self) -> list[Moment]:
        """New moments, oldest first; none before the models are loaded."""
        moments: list[Moment] = []
        while self._end is None:
            try:
                if not self._pipe.poll():
                    break
                came = self._pipe.recv()
            except (EOFError, OSError):
                self._process.join(timeout=5.0)
                self._end = RuntimeError(f"The rehearsal's process ended with status {self._process.exitcode}.")
                break
            if isinstance(came, Moment):
                moments.append(came)
            else:
                self._end = came
        return moments

    def stop(self) -> None:
        """Stop the robot now; the record still comes."""
        if self._end is None:
            with contextlib.suppress(OSError):  # a process that is dead drives no robot; poll tells how it ended
                self._pipe.send("stop")

    def result(self) -> dict[str, Any]:
        """The record of `rehearse`. Raises UserError where it refused its input, RuntimeError where its process broke or still runs."""
        if self._end is None:
            raise RuntimeError("The rehearsal still runs; poll until it does not.")
        if isinstance(self._end, Exception):
            raise self._end
        return self._end

    def close(self) -> None:
        """End the process, whatever it does."""
        if self._process.is_alive():
            self._process.join(timeout=5.0 if self._end is not None else 0.0)
            self._process.kill()
        self._process.join(timeout=5.0)
        self._pipe.close()


def _serve(pipe: Any, settings: RolloutSettings, seed: int, dry_run: Path | None, go_on: bool) -> None:
    follow_parent()
    prepare_gl()
    outbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # the loop only puts; a thread sends
    sender = threading.Thread(target=_send, args=(pipe, outbox), daemon=True)
    sender.start()

    def watch(tick: Tick, seen: Observation) -> None:
        t_s = tick.t_s + seen.sensor_timestamps[::SENSOR_STRIDE] - seen.timestamp
        pictures = dict(seen.pictures) if tick.step % PICTURES_EVERY == 0 else {}
        outbox.put(Moment(tick, runners[0].settings.period_s, seen.sensor[::SENSOR_STRIDE].copy(), t_s, pictures))

    runners: list[Runner] = []

    def started(runner: Runner) -> None:
        runners.append(runner)
        threading.Thread(target=_listen, args=(pipe, runner), daemon=True).start()

    try:
        outbox.put(rehearse(settings, seed, watch, started, dry_run, go_on))
    except UserError as error:
        outbox.put(error)
    except Exception as error:
        outbox.put(RuntimeError(f"{type(error).__name__}: {error}"))
    outbox.put(None)
    sender.join()


def _send(pipe: Any, outbox: "queue.SimpleQueue[Any]") -> None:
    while (thing := outbox.get()) is not None:
        pipe.send(thing)


def _listen(pipe: Any, runner: Runner) -> None:
    try:
        while pipe.recv() != "stop":
            pass
        runner.request_stop()
    except (EOFError, OSError):
        return  # the watcher is gone, or the run is over
