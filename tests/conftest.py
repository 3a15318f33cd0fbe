"""Shared by all tests: a runs folder of the test's own, and small notebooks written on the spot."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process a core: threads would only wait for each other
# a background job of a shell ignores it, and so would every process that a test interrupts
signal.signal(signal.SIGINT, signal.default_int_handler)

# files of minutes, the longest first: none is left for the end
LONG = (
    "test_flow.py",
    "test_browser.py",
    "test_browser_many.py",
    "test_cancelling.py",
    "test_slurm.py",
    "test_interruption.py",
    "test_sweeps.py",
    "test_types.py",
    "test_driving.py",
    "test_headless.py",
    "test_loop.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of minutes before files of seconds."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int | None:
    """One worker more than cores: a third of the tests' time is waiting, for a kernel, a page or a job to end."""
    asked = os.environ.get("PYTEST_XDIST_AUTO_NUM_WORKERS")
    return int(asked) if asked else len(os.sched_getaffinity(0)) + 1


@pytest.fixture(autouse=True)
def runs_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run folders of a test go to its own temporary folder, never to the project's `runs/`."""
    folder = tmp_path / "runs"
    monkeypatch.setenv("VLA_RUNS", str(folder))
    monkeypatch.delenv("VLA_RUN_DIR", raising=False)
    monkeypatch.setenv("WANDB_MODE", "offline")
    return folder


@pytest.fixture
def write_notebook(tmp_path: Path) -> Callable[..., Path]:
    """Write a notebook from code cells; the first one is its parameters cell."""

    import nbformat
    from nbformat import v4

    def write(*sources: str, name: str = "small") -> Path:
        path = tmp_path / f"{name}.ipynb"
        begin = f"from vla_lib.workbench import notebook\nrun = notebook.begin({str(path)!r}, globals())"
        cells = [v4.new_code_cell(sources[0], metadata={"tags": ["parameters"]}), v4.new_code_cell(begin)]
        cells += [v4.new_code_cell(source) for source in sources[1:]]
        kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(v4.new_notebook(cells=cells, metadata={"kernelspec": kernelspec}), path)
        return path

    return write
