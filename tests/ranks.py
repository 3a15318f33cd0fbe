"""Processes as forks of the test's own, which has imported torch: a start takes no five seconds of a core.

Programs, torchrun and the front doors below it are started as such where they are the point."""

import multiprocessing
import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import closing, redirect_stderr, redirect_stdout
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from vla_lib.core.errors import UserError


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork(*works: Callable[[], object]) -> tuple[list[int | None], str]:
    """Call each function in a process of its own: their exit statuses, and what they printed. A UserError is one line
    and status 2. Where one fails, the others get 30 s to learn of it."""
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{number}.log" for number in range(len(works))]
        context = multiprocessing.get_context("fork")
        forks = [context.Process(target=_run, args=given) for given in zip(works, logs, strict=True)]
        for one in forks:
            one.start()
        running = {one.sentinel: one for one in forks}
        while running:
            failed = any(one.exitcode for one in forks)
            ended = wait(running, timeout=30 if failed else 240)
            for one in [] if ended else running.values():
                one.kill()
            for sentinel in ended:
                running.pop(sentinel).join()
        return [one.exitcode for one in forks], "".join(log.read_text() for log in logs)


def two_ranks(work: Callable[[], object]) -> tuple[list[int | None], str]:
    """`fork` with the environment of the two ranks of a job, as torchrun gives it."""
    port = free_port()
    return fork(*(partial(_as_rank, rank, port, work) for rank in range(2)))


def _as_rank(rank: int, port: int, work: Callable[[], object]) -> None:
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items()}, MASTER_ADDR="127.0.0.1")
    work()


def _run(work: Callable[[], object], log: Path) -> None:
    with open(log, "w", buffering=1) as said, redirect_stdout(said), redirect_stderr(said):
        try:
            work()
        except UserError as error:
            print(f"error: {error}")
            raise SystemExit(2) from None
        except Exception:
            traceback.print_exc()
            raise SystemExit(1) from None
