"""Jobs in; their results out as they finish, computed by worker processes of our own.

A worker is fed with pickled jobs through a pipe. In a plain program it is a fork (no start-up time); where other threads run, as in a
notebook, forking is not safe and it is a fresh interpreter that runs `main` below. Either way a caller's script is never imported
again in a worker, a worker that dies tells exactly which job killed it, and workers end when their parent does.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO


class WorkerDied(Exception):
    """The process that worked on a job ended in the middle of it; the message says how."""


def run_all(work: Callable[[Any], Any], jobs: Sequence[Any], count: int) -> Iterator[tuple[Any, Any]]:
    """Yield (job, result) as results come; a result is an exception object where `work` raised it or its worker died.

    `work` must be a function of a module; jobs and results must pickle. Leaving the loop early ends all workers.
    """
    todo: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    done: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
    stop = threading.Event()
    live: list[Worker] = []
    if _may_fork():
        for _ in range(min(count, len(jobs))):
            live.append(_Fork(live))
    ready = list(live)

    def serve() -> None:
        worker: Worker | None = ready.pop() if ready else None
        while not stop.is_set():
            try:
                job = todo.get_nowait()
            except queue.Empty:
                break
            try:
                if worker is None:
                    worker = _start()
                    live.append(worker)
                done.put((job, _ask(worker, work, job)))
            except (WorkerDied, OSError) as error:
                worker = None
                done.put((job, error))
        if worker is not None:
            _end(worker)

    threads = [threading.Thread(target=serve, daemon=True) for _ in range(min(count, len(jobs)))]
    for thread in threads:
        thread.start()
    try:
        for _ in jobs:
            yield done.get()
    finally:
        stop.set()
        if not all(not thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(timeout=1.0)
        for worker in live:
            if worker.poll() is None:
                worker.kill()
                worker.wait()


def _may_fork() -> bool:
    """Whether this is the only thread (tqdm's sleeping monitor aside): a lock held by another would stay held in the child."""
    return all(
        thread is threading.main_thread() or type(thread).__name__ == "TMonitor" for thread in threading.enumerate()
    )


class _Fork:
    """A forked worker, with as much of Popen's face as is needed here."""

    def __init__(self, older: "Sequence[Worker]"):
        requests, self_to = os.pipe()
        self_from, answers = os.pipe()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if not self.pid:
            with contextlib.suppress(BaseException):
                for worker in older:  # else an older worker would not see its parent's end
                    os.close(worker.stdin.fileno())
                    os.close(worker.stdout.fileno())
                os.close(self_to)
                os.close(self_from)
                sys.stdout = sys.stderr
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                _serve(os.fdopen(requests, "rb"), os.fdopen(answers, "wb"))
            os._exit(0)
        os.close(requests)
        os.close(answers)
        self.stdin: Any = os.fdopen(self_to, "wb")
        self.stdout: Any = os.fdopen(self_from, "rb")
        self.status: int | None = None

    def poll(self) -> int | None:
        return self.status

    def wait(self) -> int:
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)


Worker = subprocess.Popen[bytes] | _Fork


def _start() -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-c", f"from {__name__} import main; main()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )


def _ask(worker: Worker, work: Callable[[Any], Any], job: Any) -> Any:
    assert worker.stdin and worker.stdout
    try:
        pickle.dump((work, job), worker.stdin)
        worker.stdin.flush()
        return pickle.load(worker.stdout)  # our own process's answer, not a file of anybody's
    except (EOFError, BrokenPipeError, pickle.UnpicklingError) as error:
        worker.kill()
        status = worker.wait()
        raise WorkerDied(f"its worker process ended with status {status} (out of memory?)") from error


def _end(worker: Worker) -> None:
    with contextlib.suppress(OSError):
        if worker.stdin:
            worker.stdin.close()
    worker.wait()
    if worker.stdout:
        worker.stdout.close()


def _serve(requests: BinaryIO, answers: BinaryIO) -> None:
    while True:
        try:
            work, job = pickle.load(requests)
        except EOFError:
            return
        try:
            result = work(job)
        except Exception as error:
            result = error
        pickle.dump(result, answers)
        answers.flush()


def main() -> None:
    """Answer jobs from standard input until it closes."""
    pipe = sys.stdout.buffer
    sys.stdout = sys.stderr  # a print must not end up between the answers
    with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
        _serve(sys.stdin.buffer, pipe)
