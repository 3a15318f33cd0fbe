"""Benchmark rows of the workbench: what the shared queue takes an entry, and training threads on a busy machine."""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from unittest.mock import patch

from benchmarks import episode_browser
from benchmarks.rows import BenchRow
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench.queue import Queue
from vla_lib.workbench.sweeps import plan_sweep

STEPS = """
import sys, time, torch
layer = torch.nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
model, x = torch.nn.TransformerEncoder(layer, 3), torch.randn(8, 150, 128)
optimizer = torch.optim.AdamW(model.parameters())
def step():
    optimizer.zero_grad(); model(x).square().mean().backward(); optimizer.step()
step()
begun, steps = time.perf_counter(), 0
while (took := time.perf_counter() - begun) < float(sys.argv[1]):
    step(); steps += 1
print(steps / took)
"""


def rows(fast: bool = False) -> list[BenchRow]:
    """Work through a queue without running anything; train a small transformer beside a process that computes; look at
    episodes in JupyterLab."""
    return [queue_row(20 if fast else 500), threads_row(0.5 if fast else 10.0), *episode_browser.rows(fast)]


def queue_row(entries: int) -> BenchRow:
    """Seconds from the claim of an entry to its end in the study, against the start of Python and its torch."""
    with tempfile.TemporaryDirectory() as folder, patch.dict(os.environ, VLA_RUNS=folder):
        seeds = ",".join(map(str, range(entries)))
        queue = Queue.open(plan_sweep("04_train_async", [f"seed={seeds}"], {}))
        start = time.perf_counter()
        while claim := queue.claim():
            queue.tell(claim, "done")
        took = time.perf_counter() - start
        queue.worker.release()
        if isinstance(queue.record, RunFolder):
            queue.record.finish("done")
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    baseline = time.perf_counter() - start
    note = f"{entries} entries, one worker; baseline: `import torch` in a new process"
    return BenchRow("workbench.queue", took / entries, baseline, "s/entry", "a few ms", note, less=True)


def threads_row(least_s: float) -> BenchRow:
    """Training steps a second with two threads that sleep while they wait, against OpenMP's default, which spin."""
    with _busy():
        rates = [_rate(least_s, policy) for policy in ("PASSIVE", "", "PASSIVE", "")]
    ours, baseline = (sum(rates[first::2]) / 2 for first in (0, 1))
    note = "two OpenMP threads beside a process that computes, mean of two; baseline: OMP_WAIT_POLICY not set"
    return BenchRow("workbench.threads", ours, baseline, "steps/s", "> 1 on two cores", note)


@contextlib.contextmanager
def _busy() -> Iterator[None]:
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()


def _rate(least_s: float, policy: str) -> float:
    own = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    own |= {"OMP_NUM_THREADS": "2", **({"OMP_WAIT_POLICY": policy} if policy else {})}
    words = [sys.executable, "-c", STEPS, str(least_s)]
    return float(subprocess.run(words, env=own, capture_output=True, text=True, check=True).stdout)
