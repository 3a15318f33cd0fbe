"""VLM workers: they turn pictures into VL features beside the control loop, on simulated time or on an executor.

A worker does one moment at a time, and hands over the newest features that it has finished. `compute` is anything like
FeatureExtractor.extract: (pictures, instruction) -> (tokens (T, D), mask (T,)).
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from multiprocessing.shared_memory import SharedMemory
from typing import Any, Protocol

import numpy as np
import torch

from vla_lib.core.pool import OneProcess
from vla_lib.runtime.clock import SimulatedClock

Compute = Callable[[Mapping[str, Any], str], tuple[Any, Any]]


@dataclass(frozen=True)
class Features:
    """VL features of the pictures of one step: tokens (T, D), mask (T,) bool; `took_s` from asking to having; `state`
    (12,) of the robot at that step, which the runner adds."""

    tokens: Any
    mask: Any
    step: int
    took_s: float
    state: Any = None


class VlmWorker(Protocol):
    """What the runner asks of a worker; every call returns at once on the real clock."""

    failure: str  # why the worker will give no more features; "" while it works

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None:
        """Begin with these pictures."""

    def busy(self, now_s: float) -> bool:
        """Whether features are still being made."""

    def newest(self, now_s: float) -> Features | None:
        """The newest finished features."""


class SimulatedVlm:
    """Computes when asked, and hands over when the clock's "vlm" latency has passed."""

    def __init__(self, compute: Compute, clock: SimulatedClock):
        self.failure = ""
        self._compute, self._clock = compute, clock
        self._done: Features | None = None
        self._pending: tuple[float, Features] | None = None

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None:
        took_s = self._clock.draw_s("vlm")
        try:
            tokens, mask = self._compute(pictures, instruction)
        except Exception as error:
            self.failure = _words(error)
            return
        self._pending = (now_s + took_s, Features(tokens, mask, step, took_s))

    def busy(self, now_s: float) -> bool:
        self.newest(now_s)
        return self._pending is not None

    def newest(self, now_s: float) -> Features | None:
        if self._pending is not None and self._pending[0] <= now_s + 1e-9:
            self._done, self._pending = self._pending[1], None
        return self._done


class LiveVlm:
    """Computes on an executor of one worker, beside the control loop. `close` ends it, whatever it does."""

    def __init__(self, compute: Compute, executor: Executor, shared: "SharedPictures | None" = None):
        self.failure = ""
        self._compute, self.executor, self._shared = compute, executor, shared
        self._done: Features | None = None
        self._busy = False

    def compute(self, pictures: Mapping[str, Any], instruction: str) -> tuple[Any, Any]:
        """Features of these pictures, waited for."""
        return self._submit(pictures, instruction).result()

    def _submit(self, pictures: Mapping[str, Any], instruction: str) -> Future[tuple[Any, Any]]:
        given = pictures if self._shared is None else self._shared.put(pictures)
        return self.executor.submit(self._compute, given, instruction)

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None:
        begun_s = time.perf_counter()

        def finished(job: Future[tuple[Any, Any]]) -> None:  # called by the executor's thread
            if job.cancelled():
                return
            if error := job.exception():
                self.failure = _words(error)
            else:
                self._done = Features(*job.result(), step, time.perf_counter() - begun_s)
                self._busy = False  # after the features: who sees a worker at rest finds its newest ones

        self._busy = True
        try:
            self._submit(pictures, instruction).add_done_callback(finished)
        except BrokenExecutor as error:  # it died since the last job
            self.failure = _words(error)

    def busy(self, now_s: float) -> bool:
        return self._busy

    def newest(self, now_s: float) -> Features | None:
        return self._done

    def close(self) -> None:
        self.executor.shutdown(wait=False)
        if self._shared is not None:
            self._shared.close()


class SharedPictures:
    """One moment's pictures in memory that both processes see: pickling five of 1280x720 held the loop for 40 ms."""

    def __init__(self) -> None:
        self._memory: SharedMemory | None = None

    def put(self, pictures: Mapping[str, Any]) -> dict[str, tuple[str, int, tuple[int, ...], str]]:
        """Copy them in; view -> (name of the memory, offset, shape, dtype). Those put in before are gone."""
        arrays = {view: np.asarray(picture) for view, picture in pictures.items()}
        size = sum(array.nbytes for array in arrays.values())
        if self._memory is None or self._memory.size < size:
            self.close()
            self._memory = SharedMemory(create=True, size=max(1, size))
        placed, offset = {}, 0
        for view, array in arrays.items():
            np.ndarray(array.shape, array.dtype, self._memory.buf, offset)[...] = array
            placed[view] = (self._memory.name, offset, array.shape, array.dtype.str)
            offset += array.nbytes
        return placed

    def close(self) -> None:
        if self._memory is not None:
            self._memory.close()
            self._memory.unlink()
            self._memory = None


def _shared_picture(name: str, offset: int, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    memory = SharedMemory(name)
    try:
        return np.ndarray(shape, dtype, memory.buf, offset).copy()
    finally:
        memory.close()


def vlm_process(make: Callable[[], Compute], start_timeout_s: float = 120.0) -> LiveVlm:
    """A worker in a process of its own, in which `make()` builds compute: this interpreter is the control loop's alone.

    `make` must be a function of a module, or a partial of one. Raises RuntimeError where the process does not start.
    """
    process = OneProcess()
    ready = process.submit(_make, make)
    try:
        if not wait([ready], start_timeout_s).done:
            raise RuntimeError(f"the VLM process was not ready within {start_timeout_s:g} s")
        if error := ready.exception():
            raise RuntimeError(_words(error)) from error
    except BaseException:
        process.shutdown(wait=False)
        raise
    return LiveVlm(_extract, process, SharedPictures())


def _words(error: BaseException) -> str:
    if isinstance(error, BrokenExecutor):
        return "RuntimeError: the VLM process ended (out of memory?)"
    return f"{type(error).__name__}: {error}".rstrip(": ")


_compute: Compute  # in the worker process


def _make(make: Callable[[], Compute]) -> None:
    global _compute
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is the control loop's
    _compute = make()


def _extract(placed: Mapping[str, Any], instruction: str) -> tuple[Any, Any]:
    """As arrays: a tensor would travel through shared memory, which is gone when its process dies."""
    tokens, mask = _compute({view: _shared_picture(*place) for view, place in placed.items()}, instruction)
    if tokens.dtype == torch.bfloat16:  # numpy has none; float32 holds it exactly
        tokens = tokens.float()
    return tokens.numpy(), mask.numpy()
