"""A training with torchrun, two ranks and loader workers below a notebook. Whatever is ended: no process stays behind,
the checkpoint is whole, the record true."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from jupyter_client.manager import KernelManager

from tests.training.synthetic import write_dataset
from vla_lib.core.run_folder import read_record
from vla_lib.training.checkpoint import read_checkpoint

TRAINING = """
from vla_lib import train_async
from vla_lib.workbench.jobs import Job
small = {{"batch_size": 2, "grad_accum_steps": 1, "num_workers": 1, "width": 16, "layers": 1, "heads": 2}}
endless = {{"val_fraction": 0.0, "max_steps": 100_000, "checkpoint_every_steps": 5}}
settings = train_async.Settings(dataset_root={root!r}, **small, **endless)
await Job.torchrun("vla_lib.train_async", settings, run.path, 2).watch(every_s=0.1)
"""
RANK, TORCHRUN, SUPERVISOR, KERNEL = (
    "vla_lib.train_async --dataset-root",
    "torch.distributed.run",
    "vla_lib.workbench.supervisor",
    "ipykernel",
)


@pytest.fixture(scope="module")
def training(tmp_path_factory) -> str:
    """The cell that trains: it would go on for hours."""
    root = tmp_path_factory.mktemp("cancelling")
    write_dataset(root, {"New_dataset/Task": 2}, steps=400, stride=3)
    return TRAINING.format(root=str(root))


def find(family: list[psutil.Process], words: str, without: str = "\0") -> list[psutil.Process]:
    lines = {process: " ".join(process.cmdline()) for process in family if process.is_running()}
    return [process for process, line in lines.items() if words in line and without not in line]


def wait_for_training(root: psutil.Process, runs: Path) -> tuple[Path, list[psutil.Process]]:
    """Until a second checkpoint is written; the run folder and every process below `root`."""
    while True:
        assert root.is_running() and root.status() != psutil.STATUS_ZOMBIE, "the training did not start"
        for latest in runs.glob("*/checkpoints/qwen_vla_async.pt"):
            if (latest.parents[1] / "metrics.jsonl").exists() and read_checkpoint(latest)["step"] >= 5:
                family = root.children(recursive=True)
                ranks = find(family, RANK, TORCHRUN)
                assert len(ranks) >= 4  # two ranks and a forked loader worker each
                return latest.parents[1], family
        time.sleep(0.1)


def check(run: Path, family: list[psutil.Process], state: str, since: float) -> None:
    """`since`: when the end was asked for. How long it took is printed, not asserted: it should be below 5 s, on a busy
    machine it is not."""
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    print(f"no process left after {time.monotonic() - since:.1f} s")
    assert read_checkpoint(run / "checkpoints" / "qwen_vla_async.pt")["step"] >= 5
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
    "program, who, number, state, status",
    (
        pytest.param(VLA_RUN, driver, signal.SIGINT, "cancelled", 130, id="vla run interrupted"),
        pytest.param(VLA_RUN, driver, signal.SIGTERM, "cancelled", 130, id="vla run terminated"),
        pytest.param(VLA_RUN, kernel, signal.SIGINT, "cancelled", 130, id="kernel interrupted"),
        pytest.param(VLA_RUN, kernel, signal.SIGKILL, "lost", 1, id="kernel killed"),
        pytest.param(VLA_RUN, supervisor, signal.SIGKILL, "failed", 1, id="supervisor killed"),
        pytest.param(
            VLA_RUN, supervisor_and_torchrun, signal.SIGKILL, "failed", 1, id="supervisor and torchrun killed"
        ),
        pytest.param(PAPERMILL, driver, signal.SIGINT, "cancelled", 1, id="papermill interrupted"),
        pytest.param(PAPERMILL, driver, signal.SIGTERM, "lost", -signal.SIGTERM, id="papermill terminated"),
        pytest.param(PAPERMILL, driver, signal.SIGKILL, "lost", -signal.SIGKILL, id="papermill killed"),
    ),
)
def test_an_ended_training_leaves_no_process_and_a_true_record(
    training: str,
    write_notebook,
    runs_folder: Path,
    tmp_path: Path,
    program: list[str],
    who: Callable[..., None],
    number: int,
    state: str,
    status: int,
):
    command = [sys.executable, "-m", *program, str(write_notebook("n: int = 1", training))]
    command += [str(tmp_path / "out.ipynb")] if program is PAPERMILL else []
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    run, family = wait_for_training(psutil.Process(process.pid), runs_folder)
    asked = time.monotonic()
    who(family, process, number)
    assert process.wait() == status
    check(run, family, state, asked)


@pytest.mark.parametrize(
    "now, state", ((False, "cancelled"), (True, "lost")), ids=("asked as JupyterLab does", "killed")
)
def test_a_restarted_kernel_leaves_no_process_and_a_true_record(
    now: bool, state: str, training: str, runs_folder: Path, write_notebook
):
    path = write_notebook("n: int = 1", training)
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(path.parent))
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        cells = [
            "n = 1",
            f"from vla_lib.workbench import notebook\nrun = notebook.begin({str(path)!r}, globals())",
            training,
        ]
        for cell in cells:
            client.execute(cell)
        run, family = wait_for_training(psutil.Process(os.getpid()), runs_folder)
        jobs = find(family, RANK) + find(family, SUPERVISOR)
        asked = time.monotonic()
        manager.restart_kernel(now=now)
        check(run, jobs, state, asked)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
