"""Pictures in, the newest finished VL features out, later: a simulated worker, a thread, and a process that a thread feeds.

A worker does one moment at a time. `compute` is anything like FeatureExtractor.extract: (pictures, instruction) -> (tokens (T, D), mask (T,)).
"""

import multiprocessing
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

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

    failure: str
    """Why the worker will give no more features; "" while it works."""

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None: ...

    def busy(self, now_s: float) -> bool: ...

    def newest(self, now_s: float) -> Features | None: ...

    def close(self) -> None: ...


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
            self.failure = f"{type(error).__name__}: {error}"
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

    def close(self) -> None:
        """Nothing to free."""


class ThreadedVlm:
    """A thread that computes; with an `ExtractorProcess` as `compute`, all work is done beside the control loop's interpreter."""

    def __init__(self, compute: Compute):
        self.failure = ""
        self._compute = compute
        self._wake = threading.Condition()
        self._job: tuple[Mapping[str, Any], str, int] | None = None
        self._done: Features | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._serve, name="vlm-worker", daemon=True)
        self._thread.start()

    def submit(self, pictures: Mapping[str, Any], instruction: str, step: int, now_s: float) -> None:
        """Begin with these pictures."""
        with self._wake:
            self._job = (pictures, instruction, step)
            self._wake.notify()

    def busy(self, now_s: float) -> bool:
        """Whether features are still being made."""
        return self._job is not None

    def newest(self, now_s: float) -> Features | None:
        """The newest finished features."""
        return self._done

    def close(self) -> None:
        """End the thread, and the process behind it where there is one."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if hasattr(self._compute, "close"):
            self._compute.close()
        self._thread.join(timeout=2.0)

    def _serve(self) -> None:
        while True:
            with self._wake:
                self._wake.wait_for(lambda: self._job is not None or self._closed)
                if self._closed:
                    return
                pictures, instruction, step = self._job  # type: ignore[misc]
            begun = time.perf_counter()
            try:
                tokens, mask = self._compute(pictures, instruction)
            except Exception as error:
                if not self._closed:
                    self.failure = f"{type(error).__name__}: {error}".rstrip(": ")
                return
            with self._wake:
                self._done = Features(tokens, mask, step, time.perf_counter() - begun)
                self._job = None


class ExtractorProcess:
    """A process of its own in which `make()` builds the compute function; calling it sends pictures there and waits for the features.

    `make` must be a function of a module, or a functools.partial of one. Raises RuntimeError where the process could not start or ends.
    """

    def __init__(self, make: Callable[[], Compute], start_timeout_s: float = 120.0):
        context = multiprocessing.get_context("spawn")  # neither a GL context nor torch's threads survive a fork
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve_process, args=(make, theirs), name="vlm", daemon=True)
        self.process.start()
        theirs.close()
        if not self._pipe.poll(start_timeout_s):
            self.close()
            raise RuntimeError(f"the VLM process was not ready within {start_timeout_s:g} s")
        self._answer()

    def __call__(self, pictures: Mapping[str, Any], instruction: str) -> tuple[Any, Any]:
        """Features of these pictures."""
        try:
            self._pipe.send((dict(pictures), instruction))
        except OSError:
            raise RuntimeError("the VLM process ended") from None
        tokens, mask = self._answer()
        import torch

        return torch.from_numpy(tokens), torch.from_numpy(mask)

    def _answer(self) -> Any:
        try:
            answer = self._pipe.recv()
        except (EOFError, OSError):
            self.process.join(timeout=1.0)
            raise RuntimeError(f"the VLM process ended with status {self.process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def close(self) -> None:
        """End the process."""
        if self.process.is_alive():
            self.process.kill()
        self.process.join(timeout=2.0)


def _serve_process(make: Callable[[], Compute], pipe: Any) -> None:
    import signal

    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(max(1, torch.get_num_threads() - 1))  # one core is the control loop's
    try:
        compute = make()
        pipe.send(None)
        while True:
            pictures, instruction = pipe.recv()
            tokens, mask = compute(pictures, instruction)
            tokens = (
                tokens.float() if tokens.dtype == torch.bfloat16 else tokens
            )  # numpy has no bfloat16; float32 holds it exactly
            pipe.send((tokens.numpy(), mask.numpy()))
    except EOFError:
        return  # the control loop is gone
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")
