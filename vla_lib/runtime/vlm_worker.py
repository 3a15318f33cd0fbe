"""VLM workers: they turn pictures into VL features beside the control loop, on simulated time or on an executor.

A worker does one moment at a time, and hands over the newest features that it has finished. `compute` is anything like
FeatureExtractor.extract: (pictures, instruction) -> (tokens (T, D), mask (T,)).
"""

import time
from collections.abc import Callable, Mapping
from concurrent.futures import BrokenExecutor, Executor, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from vla_lib.core.pool import OneProcess
from vla_lib.runtime.clock import SimulatedClock

Compute = Callable[[Mapping[str, Any], str], tuple[Any, Any]]


@dataclass(frozen=True)
class Features:
    """VL features of the pictures of one step: tokens (T, D), mask (T,) bool; `took_s` from asking to having."""

    tokens: Any
    mask: Any
    step: int
    took_s: float


class VlmWorker(Protocol):
    """What the runner asks of a worker; every call returns at once on the real clock."""

    failure: str  # why the worker will give no more features; "" while it works

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None: ...

    def busy(self, now_s: float) -> bool: ...

    def newest(self, now_s: float) -> Features | None: ...


class SimulatedVlm:
    """Computes when asked, and hands over when the clock's "vlm" latency has passed."""

    def __init__(self, compute: Compute, clock: SimulatedClock):
        self.failure = ""
        self._compute, self._clock = compute, clock
        self._done: Features | None = None
        self._pending: tuple[float, Features] | None = None

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None:
        """Begin with these pictures."""
        took_s = self._clock.draw_s("vlm")
        try:
            tokens, mask = self._compute(pictures, instruction)
        except Exception as error:
            self.failure = _words(error)
            return
        self._pending = (now_s + took_s, Features(tokens, mask, step, took_s))

    def busy(self, now_s: float) -> bool:
        """Whether features are still being made."""
        self.newest(now_s)
        return self._pending is not None

    def newest(self, now_s: float) -> Features | None:
        """The newest finished features."""
        if self._pending is not None and self._pending[0] <= now_s + 1e-9:
            self._done, self._pending = self._pending[1], None
        return self._done


class LiveVlm:
    """Computes on an executor of one worker, beside the control loop. `close` ends it, whatever it does."""

    def __init__(self, compute: Compute, executor: Executor):
        self.failure = ""
        self._compute, self.executor = compute, executor
        self._done: Features | None = None
        self._busy = False

    def compute(self, pictures: Mapping[str, Any], instruction: str) -> tuple[Any, Any]:
        """Features of these pictures, waited for."""
        return self.executor.submit(self._compute, pictures, instruction).result()

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None:
        """Begin with these pictures."""
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
            self.executor.submit(self._compute, pictures, instruction).add_done_callback(finished)
        except BrokenExecutor as error:  # it died since the last job
            self.failure = _words(error)

    def busy(self, now_s: float) -> bool:
        """Whether features are still being made."""
        return self._busy

    def newest(self, now_s: float) -> Features | None:
        """The newest finished features."""
        return self._done

    def close(self) -> None:
        """End the worker."""
        self.executor.shutdown(wait=False)


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
    return LiveVlm(_extract, process)


def _words(error: BaseException) -> str:
    if isinstance(error, BrokenExecutor):
        return "RuntimeError: the VLM process ended (out of memory?)"
    return f"{type(error).__name__}: {error}".rstrip(": ")


_compute: Compute  # in the worker process


def _make(make: Callable[[], Compute]) -> None:
    global _compute
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is the control loop's
    _compute = make()


def _extract(pictures: Mapping[str, Any], instruction: str) -> tuple[Any, Any]:
    """As arrays: a tensor would travel through shared memory, which is gone when its process dies."""
    tokens, mask = _compute(pictures, instruction)
    if tokens.dtype == torch.bfloat16:  # numpy has none; float32 holds it exactly
        tokens = tokens.float()
    return tokens.numpy(), mask.numpy()
