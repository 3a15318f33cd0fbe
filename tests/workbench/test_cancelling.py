"""A training with torchrun, two ranks and loader workers below a notebook, or ranks that stand in for it. Whatever is
ended: no process stays behind, the checkpoint is whole, the record true."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
from jupyter_client.manager import KernelManager

from tests.training.synthetic import write_dataset
from tests.workbench import rank_stub
from vla_lib.core.run_folder import PROJECT, read_record
from vla_lib.training.checkpoint import read_checkpoint

TRAINING = """
from vla_lib import train_async
from vla_lib.workbench.jobs import Job
small = {{"batch_size": 2, "grad_accum_steps": 1, "num_workers": 1, "width": 16, "layers": 1, "heads": 2}}
endless = {{"val_fraction": 0.0, "max_steps": 100_000, "checkpoint_every_steps": 5}}
settings = train_async.Settings(dataset_root={root!r}, **small, **endless)
await Job.torchrun("vla_lib.train_async", settings, run.path, 2).watch(every_s=0.1)
"""
STAND_IN = """
from tests.workbench import rank_stub
from vla_lib.workbench.jobs import Job
await Job.torchrun("tests.workbench.rank_stub", rank_stub.Settings(), run.path, 2).watch(every_s=0.1)
"""
TORCHRUN, SUPERVISOR, KERNEL = "torch.distributed.run", "vla_lib.workbench.supervisor", "ipykernel"


class Training(NamedTuple):
    """The cell that trains, which would go on for hours; words of its ranks' commands; its checkpoint, and how the
    step in it is read."""

    cell: str
    rank: str
    checkpoint: str
    read_step: Callable[[Path], int]


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Training:
    root = tmp_path_factory.mktemp("cancelling")
    write_dataset(root, {"New_dataset/Task": 2}, steps=400, stride=3)
    cell, read = TRAINING.format(root=str(root)), lambda path: read_checkpoint(path)["step"]
    return Training(cell, "vla_lib.train_async --dataset-root", "qwen_vla_async.pt", read)


@pytest.fixture
def stand_in(monkeypatch) -> Training:
    """Half of a training's time is what torch's import takes in each rank."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    return Training(STAND_IN, "tests.workbench.rank_stub --run-dir", rank_stub.CHECKPOINT, rank_stub.read_step)


def find(family: list[psutil.Process], words: str, without: str = "\0") -> list[psutil.Process]:
    lines = {process: " ".join(process.cmdline()) for process in family if process.is_running()}
    return [process for process, line in lines.items() if words in line and without not in line]


def wait_for_training(training: Training, root: psutil.Process, runs: Path) -> tuple[Path, list[psutil.Process]]:
    """Until a second checkpoint is written; the run folder and every process below `root`."""
    while True:
        assert root.is_running() and root.status() != psutil.STATUS_ZOMBIE, "the training did not start"
        for latest in runs.glob(f"*/checkpoints/{training.checkpoint}"):
            if (latest.parents[1] / "metrics.jsonl").exists() and training.read_step(latest) >= 5:
                family = root.children(recursive=True)
                ranks = find(family, training.rank, TORCHRUN)
                assert len(ranks) >= 4  # two ranks and a forked loader worker each
                return latest.parents[1], family
        time.sleep(0.1)


def check(training: Training, run: Path, family: list[psutil.Process], state: str, since: float) -> None:
    """`since`: when the end was asked for. How long it took is printed, not asserted: it should be below 5 s, on a busy
    machine it is not."""
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    print(f"no process left after {time.monotonic() - since:.1f} s")
    assert training.read_step(run / "checkpoints" / training.checkpoint) >= 5
    assert read_record(run)["state"] == state


def driver(family: list[psutil.Process], process: subprocess.Popen, number: int) -> None:
    process.send_signal(number)


def kernel(family: list[psutil.Process], process: subprocess.Popen, number: int) -> None:
    find(family, KERNEL)[0].send_signal(number)


def supervisor(family: list[psutil.Process], process: subprocess.Popen, number: int) -> None:
    find(family, SUPERVISOR)[0].send_signal(number)


def supervisor_and_torchrun(family: list[psutil.Process], process: subprocess.Popen, number: int) -> None:
    for ended in find(family, SUPERVISOR) + find(family, TORCHRUN, SUPERVISOR):
        ended.send_signal(number)


VLA_RUN, PAPERMILL = ["vla_lib.cli", "run"], ["papermill", "--kernel", "python3"]


@pytest.mark.parametrize(
    "kind, program, who, number, state, status",
    (
        ("real", VLA_RUN, driver, signal.SIGINT, "cancelled", 130),
        ("real", VLA_RUN, kernel, signal.SIGKILL, "lost", 1),
        ("real", VLA_RUN, supervisor_and_torchrun, signal.SIGKILL, "failed", 1),
        ("stand_in", VLA_RUN, driver, signal.SIGTERM, "cancelled", 130),
        ("stand_in", VLA_RUN, kernel, signal.SIGINT, "cancelled", 130),
        ("stand_in", VLA_RUN, supervisor, signal.SIGKILL, "failed", 1),
        ("stand_in", PAPERMILL, driver, signal.SIGINT, "cancelled", 1),
        ("stand_in", PAPERMILL, driver, signal.SIGTERM, "lost", -signal.SIGTERM),
        ("stand_in", PAPERMILL, driver, signal.SIGKILL, "lost", -signal.SIGKILL),
    ),
    ids=lambda value: getattr(value, "name", getattr(value, "__name__", None)),
)
def test_an_ended_training_leaves_no_process_and_a_true_record(
    request,
    kind: str,
    write_notebook,
    runs_folder: Path,
    tmp_path: Path,
    program: list[str],
    who: Callable[..., None],
    number: int,
    state: str,
    status: int,
):
    training: Training = request.getfixturevalue(kind)
    command = [sys.executable, "-m", *program, str(write_notebook("n: int = 1", training.cell))]
    command += [str(tmp_path / "out.ipynb")] if program is PAPERMILL else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run, family = wait_for_training(training, psutil.Process(process.pid), runs_folder)
    asked = time.monotonic()
    who(family, process, number)
    assert process.wait() == status
    check(training, run, family, state, asked)


@pytest.mark.parametrize(
    "now, state", ((False, "cancelled"), (True, "lost")), ids=("asked as JupyterLab does", "killed")
)
def test_a_restarted_kernel_leaves_no_process_and_a_true_record(
    now: bool, state: str, stand_in: Training, runs_folder: Path, write_notebook
):
    path = write_notebook("n: int = 1", stand_in.cell)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(path.parent))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        cells = [
            "n = 1",
            f"from vla_lib.workbench import notebook\nrun = notebook.begin({str(path)!r}, globals())",
            stand_in.cell,
        ]
        for cell in cells:
            client.execute(cell)
        run, family = wait_for_training(stand_in, psutil.Process(os.getpid()), runs_folder)
        jobs = find(family, stand_in.rank) + find(family, SUPERVISOR)
        asked = time.monotonic()
        manager.restart_kernel(now=now)
        check(stand_in, run, jobs, state, asked)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
