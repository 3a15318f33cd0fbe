"""Loader processes that are stopped, die, or lose a batch: the wait ends, and says what to raise."""

import os
import resource
import signal
import threading
import time

import psutil
import pytest
import torch

from vla_lib.core import loader
from vla_lib.core.errors import UserError


class Items:
    """Items of `megabytes`; a worker does `act` before it gives the item number 3."""

    def __init__(self, act=lambda: None, megabytes=0):
        self.act, self.megabytes = act, megabytes

    def __len__(self):
        return 6

    def __getitem__(self, number):
        if number == 3:
            self.act()
        return {"number": number, "values": torch.zeros(self.megabytes << 18)}


def stop_self():
    os.kill(os.getpid(), signal.SIGSTOP)


def workers():
    return [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize("count", [0, 2])
def test_all_items_come_in_order(count):
    assert [item["number"] for item in loader.load(Items(), count)] == list(range(6))


def test_an_error_given_as_an_item_is_its_sentence():
    class Damaged(Items):
        def __getitem__(self, number):
            return UserError("the file a is damaged")

    with pytest.raises(UserError, match="^the file a is damaged$"):
        list(loader.load(Damaged(), 1))


def test_a_stopped_worker_is_told_and_the_wait_ends_when_asked(monkeypatch, capsys):
    monkeypatch.setattr(loader, "POLL_S", 0.05)
    monkeypatch.setattr(loader, "TOLD_S", 0.2)
    monkeypatch.setattr(loader, "STOP_S", 0.3)
    asked = threading.Event()
    threading.Timer(1.5, asked.set).start()
    before, began = workers(), time.monotonic()
    with pytest.raises(KeyboardInterrupt, match="without a batch"):
        list(loader.load(Items(stop_self), 1, stop=asked.is_set))
    assert time.monotonic() - began < 20
    said = capsys.readouterr().out
    assert said.count("waiting for a batch") >= 3 and "is stopped" in said and "kill -CONT" in said
    psutil.wait_procs([worker for worker in workers() if worker not in before], timeout=10)
    assert [worker for worker in workers() if worker not in before] == []


@pytest.mark.parametrize("number", sorted(loader.STOPS))
def test_a_stop_signal_that_every_process_gets_leaves_the_workers_at_work(number):
    before = workers()
    assert len(list(loader.load(Items(lambda: os.kill(os.getpid(), number)), 2))) == 6
    assert workers() == before


def test_a_worker_that_does_not_end_is_killed(monkeypatch):
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)  # torch's patience
    before, items = workers(), loader.load(Items(lambda: time.sleep(3600)), 1)
    assert [next(items)["number"] for _ in range(3)] == [0, 1, 2]
    items.close()
    psutil.wait_procs([worker for worker in workers() if worker not in before], timeout=10)
    assert workers() == before


def test_a_killed_worker_names_both_limits():
    with pytest.raises(UserError, match=r"is lost .*ulimit -n.*--shm-size"):
        list(loader.load(Items(lambda: os.kill(os.getpid(), signal.SIGKILL)), 1))


def limited(number, most):
    """A worker's own limit, as the machine's would be; Python ignores the signal of too large a file."""
    return lambda: resource.setrlimit(number, (most, most))


@pytest.mark.parametrize(
    ("limit", "most", "cause"),
    [
        (resource.RLIMIT_NOFILE, 5, "Too many open files"),
        (resource.RLIMIT_FSIZE, 1 << 16, "File too large"),
        (resource.RLIMIT_FSIZE, 1, ""),
    ],
    ids=["no open file left", "no shared memory left", "no room for the log either"],
)
def test_a_batch_that_cannot_be_handed_over_is_an_error(limit, most, cause, capfd):
    """torch drops it with a traceback, and would wait for ever."""
    with pytest.raises(UserError, match="ulimit -n"):
        list(loader.load(Items(limited(limit, most), megabytes=1), 1))
    assert cause in capfd.readouterr().err
