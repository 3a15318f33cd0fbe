"""The one pool of worker processes: jobs are worked off in parallel, and their results come as they finish.

Workers are fresh interpreters (spawn): neither a GL context nor another thread's lock survives a fork. They end with
their parent, however it ends, and leave Ctrl-C to it.
"""

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import BrokenExecutor, Future, ProcessPoolExecutor, as_completed
from typing import Any, TypeVar

import psutil
from pebble import ProcessExpired, ProcessPool

from vla_lib.core.processes import follow_parent

J = TypeVar("J")


class WorkerDied(Exception):
    """The process that worked on a job ended in the middle of it; the message says how."""


def run_jobs(
    work: Callable[[J], Any], jobs: Iterable[J], workers: int, begin: Callable[[], None] | None = None
) -> Generator[tuple[J, Any], None, None]:
    """Yield (job, result) as results come; a result is an exception object where `work` raised it or its worker died.

    `work` and `begin`, which each worker calls first, must be functions of a module; jobs and results must pickle, and
    a script needs its `__main__` guard. Leaving the loop early (or closing the generator) ends all workers.
    """
    context = multiprocessing.get_context("spawn")
    pool = ProcessPool(max_workers=workers, initializer=_begin, initargs=(begin,), context=context)
    try:
        futures: dict[Future[Any], J] = {pool.schedule(work, (job,)): job for job in jobs}
        for future in as_completed(futures):
            error = future.exception()
            if isinstance(error, ProcessExpired):
                error = WorkerDied(f"its worker process ended with status {error.exitcode} (out of memory?)")
            elif isinstance(error, BrokenExecutor):
                error = WorkerDied(f"no worker process could be started ({error}); the errors above say why")
            yield futures[future], future.result() if error is None else error
    finally:
        pool.stop()
        pool.join()


def _begin(begin: Callable[..., None] | None, *given: Any) -> None:
    follow_parent()
    if begin is not None:
        begin(*given)


class OneProcess(ProcessPoolExecutor):
    """A process of its own for jobs one after the other, started at once; `shutdown` ends it in the middle of a job."""

    def __init__(self, begin: Callable[..., None] | None = None, *given: Any):
        super().__init__(1, multiprocessing.get_context("spawn"), _begin, (begin, *given))
        self._first = self.submit(os.getpid)

    @property
    def pid(self) -> int:
        """Its process. Raises BrokenExecutor where it has died before it began."""
        return self._first.result()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Kill the process, and wait until it is gone: it is not asked to finish anything."""
        with contextlib.suppress(BrokenExecutor, psutil.NoSuchProcess):
            psutil.Process(self.pid).kill()
        super().shutdown(cancel_futures=cancel_futures)
