"""Batches from loader processes: the wait can be stopped, a long silence is told, and what is lost ends it.

torch's DataLoader waits for ever where a worker is stopped, or has lost a batch on its way (no open file or no shared
memory left for it). torchrun and a terminal signal a rank's whole process group, Slurm every process of a job: a worker
that died of that would take the rank along before it has saved, so workers leave the group and block these signals.
"""

import contextlib
import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from typing import Any

import psutil
import torch
from torch.utils.data import DataLoader

from vla_lib.core.errors import UserError, first_line
from vla_lib.core.processes import die_with_parent

POLL_S = 1.0  # the stop flag is looked at so often
STOP_S = 10.0  # that a batch may still take once the process was asked to stop; torchrun kills after 30
TOLD_S = 60.0  # of silence, before it is told, and told again
STOPS = {signal.SIGTERM, signal.SIGINT}
SHARED_MEMORY = "/dev/shm"
LOST = ("DataLoader worker (pid", "Too many open files", "Pin memory thread", "ancdata", "shared memory")


def load(
    dataset: Any, workers: int, pin_memory: bool = False, stop: Callable[[], Any] = lambda: False, **options: Any
) -> Iterator[Any]:
    """The items of `dataset` in order, read by `workers` processes (0: by this one; never more than there are items),
    which end with the last item.

    options: of torch's DataLoader. An item that is a UserError is raised. Raises UserError where a worker or an item
    is lost, and KeyboardInterrupt where `stop` is true and no item has come for a while.
    """
    before, workers = multiprocessing.active_children(), min(workers, len(options.get("sampler", dataset)))
    options |= {"batch_size": None, "num_workers": workers, "pin_memory": pin_memory, "worker_init_fn": _begin}
    with _telling_losses(), _stops_blocked():
        items = iter(DataLoader(dataset, timeout=POLL_S if workers else 0, persistent_workers=False, **options))
    return _patiently(items, [child for child in multiprocessing.active_children() if child not in before], stop)


def _patiently(items: Iterator[Any], workers: list[BaseProcess], stop: Callable[[], Any]) -> Iterator[Any]:
    came = told = time.monotonic()  # when the last item came, when its absence was last told
    asked: float | None = None  # when `stop` was first seen
    try:
        while True:
            try:
                with _telling_losses() if workers else contextlib.nullcontext():
                    item = next(items)
            except StopIteration:
                return
            except RuntimeError as error:
                if "timed out after" not in str(error):
                    raise
                now = time.monotonic()
                asked = (asked or now) if stop() else None
                if asked and now - asked >= STOP_S:
                    raise KeyboardInterrupt(f"stopped after {now - came:.0f} s without a batch") from None
                if now - max(came, told) >= TOLD_S:
                    told = now
                    print(f"waiting for a batch for {now - came:.0f} s; {_states(workers)}", flush=True)
                continue
            if isinstance(item, UserError):
                raise item
            yield item
            came, asked = time.monotonic(), None
    finally:
        for worker in workers:  # a stopped one would never end, and so neither would this process
            if worker.is_alive() and worker.pid:
                os.kill(worker.pid, signal.SIGCONT)
        del items  # ends the workers now, though an error's traceback may hold this frame
        for worker in workers:
            worker.kill()  # torch's own last word is SIGTERM


def _states(workers: list[BaseProcess]) -> str:
    """What the workers do, for the log."""
    states = []
    for worker in workers:
        with contextlib.suppress(psutil.Error):
            states.append(f"worker {worker.pid} is {psutil.Process(worker.pid).status()}")
    remedy = "a stopped one goes on with `kill -CONT`; one in disk-sleep waits for its disk"
    return f"{', '.join(states)} ({remedy})"


@contextlib.contextmanager
def _telling_losses() -> Iterator[None]:
    """Inside, a lost worker or batch becomes a UserError with the limits that it may have met."""
    try:
        yield
    except (RuntimeError, OSError, EOFError) as error:
        # a worker hands over its batch itself, so one that just dies is a connection that breaks; what `dataset` raised
        # in a worker says "Caught"
        full = isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENOSPC)
        broken = isinstance(error, ConnectionError | FileNotFoundError | EOFError) and "Caught" not in str(error)
        if not full and not broken and not any(words in str(error) for words in LOST):
            raise
        if broken:  # torch raises once more when the worker is gone: here, not somewhere later
            with contextlib.suppress(RuntimeError):
                time.sleep(POLL_S)
        lost = f"A loader worker or its batch is lost ({first_line(error)}). {limits()} If the log above names "
        lost += "neither, memory was short. Raise what was, or pass a smaller --num-workers, and go on with --resume."
        # without its frames: they would keep torch's iterator, and that raises for each dead worker
        raise UserError(lost) from error.with_traceback(None)


def limits() -> str:
    """What loader workers live from on this machine, with what raises it."""
    files = f"This process may open {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files (`ulimit -n 65536` before it)"
    if not os.path.isdir(SHARED_MEMORY):
        return f"{files}."
    room = shutil.disk_usage(SHARED_MEMORY)
    return f"{files}; {SHARED_MEMORY} has {room.free >> 20} of {room.total >> 20} MiB free (docker run --shm-size=8g)."


@contextlib.contextmanager
def _stops_blocked() -> Iterator[None]:
    """Workers are forked inside: stop signals wait, here to the block's end, in a worker for ever."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _begin(_: int) -> None:
    """First call of a worker: it leaves its parent's group, and dies with its parent."""
    os.setpgid(0, 0)
    parent = multiprocessing.parent_process()
    die_with_parent(parent=parent.pid if parent else None)
    # a private hook, as there is no public one: the thread that sends a batch drops it where it fails, and the parent
    # would wait for ever; tests/core/test_loader.py watches it
    Queue._on_queue_feeder_error = staticmethod(_lose)  # type: ignore[attr-defined]
    torch.set_num_threads(1)


def _lose(error: Exception, _: Any) -> None:
    try:
        print(f"error: a loader worker cannot hand over its batch: {error}", file=sys.stderr, flush=True)
    finally:  # also where the log's disk is full
        os._exit(1)  # the parent notices a worker that is gone
