"""A notebook's record in JupyterLab: what a person does between its first and its last cell."""

from types import SimpleNamespace

import nbformat
import pytest
from jupyter_client.manager import start_new_kernel

from vla_lib.core.run_folder import read_record, runs_root
from vla_lib.workbench import notebook


@pytest.fixture(autouse=True)
def kernel(monkeypatch):
    """This process as a kernel."""
    none = lambda *_: None  # noqa: E731
    events = SimpleNamespace(register=none, unregister=none)
    monkeypatch.setattr(
        notebook, "_shell", lambda: SimpleNamespace(events=events, run_line_magic=none, set_custom_exc=none)
    )
    monkeypatch.setattr(notebook, "_current", None)
    monkeypatch.setattr(notebook, "atexit", SimpleNamespace(register=lambda *_: None, unregister=lambda *_: None))


def ended(error: BaseException | None) -> SimpleNamespace:
    return SimpleNamespace(error_before_exec=None, error_in_exec=error)


def test_a_failing_scratch_cell_does_not_outlast_the_notebooks_end(write_notebook):
    run = notebook.begin(str(write_notebook("n: int = 1")), {"n": 1})
    run._cell_ended(ended(NameError("name 'm' is not defined")))
    record = read_record(run.path)
    assert (record["state"], record["error"]) == ("failed", "NameError: name 'm' is not defined")
    run._cell_ended(ended(None))
    run.finish()
    record = read_record(run.path)
    assert (record["state"], record["error"]) == ("done", None)


def test_a_notebook_run_again_from_its_top_closes_its_former_run(write_notebook):
    path = str(write_notebook("n: int = 1"))
    first = notebook.begin(path, {"n": 1})
    second = notebook.begin(path, {"n": 2})
    record = read_record(first.path)
    assert (record["state"], record["error"]) == ("cancelled", "the notebook was run again from its top")
    second.finish()
    third = notebook.begin(path, {"n": 3})
    assert read_record(second.path)["state"] == "done"
    third.leave()
    assert read_record(third.path)["error"] == "the kernel was shut down before the last cell"


def test_an_interrupt_and_a_cell_that_comes_too_early_read_as_sentences(write_notebook):
    """In a kernel of its own."""
    cells = nbformat.read(
        write_notebook("n: int = 1", "made = n", "import time\nprint('asleep')\ntime.sleep(300)", "print(made)"), 4
    ).cells
    manager, client = start_new_kernel()
    said: list[str] = []

    def hook(message):
        if message["msg_type"] == "error":
            said.append("\n".join(message["content"]["traceback"]))
        if message["content"].get("text") == "asleep\n":
            manager.interrupt_kernel()

    def run(source):
        return client.execute_interactive(source, output_hook=hook, timeout=240)["content"]

    try:
        for cell in cells[:2]:
            assert run(cell.source)["status"] == "ok"
        assert run(cells[3].source)["ename"] == "KeyboardInterrupt"
        assert said.pop() == "Interrupted. What is on disk stays; run this cell again to go on."
        assert run(cells[4].source)["status"] == "error"
        assert said.pop() == "This cell needs made, which a cell above makes; run the cells above first."
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    (record,) = map(read_record, runs_root().iterdir())
    assert record["state"] == "cancelled"
