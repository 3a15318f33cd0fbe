"""JupyterLab in Chromium, shared by the browser tests of one file: one server, one page, one runs folder."""

import json
import os
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from chromium import CHROMIUM, FLAGS

from needle_rig.recorder import record
from needle_rig.settings import RecordSettings
from vla_lib.core.files import write_json
from vla_lib.core.run_folder import PROJECT
from vla_lib.workbench.commands import lab_command, lab_environment
from vla_lib.workbench.parameters import read_parameters

TOKEN = "a-token-of-the-test"
KERNEL = (
    "(async () => { const panel = window.jupyterapp.shell.currentWidget;"
    " if (!panel || !panel.sessionContext) return ''; await panel.sessionContext.ready;"
    " const session = panel.sessionContext.session;"
    " return session && session.kernel ? session.kernel.status : ''; })()"
)
NOTEBOOK = "window.jupyterapp.shell.currentWidget.content.model.toJSON()"
CELLS = "[...window.jupyterapp.shell.currentWidget.content.model.cells]"
CODE = f"{CELLS}.filter(cell => cell.type === 'code')"
RAN = f"{CODE}.every(cell => cell.executionCount !== null)"
ERRORS = (
    f"{CODE}.flatMap(cell => Array.from({{length: cell.outputs.length}}, (_, number) => cell.outputs.get(number)))"
    ".filter(output => output.type === 'error').map(output => output.toJSON())"
    ".map(error => `${error.ename}: ${error.evalue}`)"
)
PANEL = "document.querySelector('.jp-MainAreaWidget:not(.lm-mod-hidden) .jp-WindowedPanel-outer')"
SECONDS = 240  # for one notebook, on a machine that does other things too


class Desk:
    """A person at JupyterLab: opens notebooks, runs all cells, looks."""

    def __init__(self, address: str, folder: Path, page: Any, pictures: Path):
        self.address, self.folder, self.page, self.pictures = address, folder, page, pictures
        self.ran: set[str] = set()

    def runs(self) -> list[Path]:
        """The run folders of this desk's kernels."""
        return [path.parent for path in (self.folder.parent / "runs").glob("*/run.json")]

    def copy(self, name: str, as_name: str = "", **parameters: Any) -> Path:
        """A copy of a notebook with other defaults in its parameters cell (those that it has)."""
        source = PROJECT / "notebooks" / f"{name}.ipynb"
        notebook = nbformat.read(source, as_version=4)
        (cell,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
        known = read_parameters(source).values()
        lines = [f"{one.name}: {one.kind} = {parameters.get(one.name, one.default)!r}" for one in known]
        cell.source = "\n".join(lines)
        path = self.folder / f"{as_name or name}.ipynb"
        nbformat.write(notebook, path)
        return path

    def open(self, path: Path) -> None:
        """Open a notebook in a fresh tab of the browser."""
        self.page.goto(f"{self.address}/lab/tree/{path.name}?token={TOKEN}&reset")
        self.page.wait_for_selector(".jp-Notebook", timeout=60_000)
        self.command("application:toggle-left-area")
        self.until(lambda: self.page.evaluate(KERNEL) != "")

    def run_all(self) -> None:
        """Run every cell to the end, or to the first error."""
        self.start_all()
        self.until(self.finished)

    def start_all(self) -> None:
        """Start running every cell."""
        self.until(lambda: self.page.evaluate(KERNEL) == "idle")
        self.page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells'); 0")

    def run_cell(self, cell: str) -> None:
        """Run one cell alone."""
        number = self.ids().index(cell)
        self.page.evaluate(f"window.jupyterapp.shell.currentWidget.content.activeCellIndex = {number}; 0")
        self.command("notebook:run-cell")

    def finished(self) -> bool:
        """Whether the kernel is idle with every cell run, or one failed."""
        return bool(self.page.evaluate(RAN) or self.errors()) and self.page.evaluate(KERNEL) == "idle"

    def cells(self) -> list[dict[str, Any]]:
        """The open notebook's cells, with all their pictures: nothing to ask for again and again."""
        return self.page.evaluate(NOTEBOOK)["cells"]

    def ids(self) -> list[str]:
        """The names of the open notebook's cells."""
        return self.page.evaluate(f"{CELLS}.map(cell => cell.id)")

    def keep(self) -> None:
        """Put the executed notebook into its run folder, as a headless run has it."""
        notebook = self.page.evaluate(NOTEBOOK)
        for cell in notebook["cells"]:
            if cell.get("attachments") is None:  # JupyterLab's null, which nbformat does not take
                cell.pop("attachments", None)
        write_json(max(self.runs()) / "notebook.ipynb", notebook)

    def saved(self, name: str) -> list[str]:
        """The ids of the cells that have outputs in the notebook's file (JupyterLab saves it now and then)."""
        return [
            cell["id"]
            for cell in nbformat.read(self.folder / f"{name}.ipynb", as_version=4).cells
            if cell.get("outputs")
        ]

    def outputs(self) -> list[dict[str, Any]]:
        """The outputs of all cells."""
        return [output for cell in self.cells() for output in cell.get("outputs", [])]

    def errors(self) -> list[str]:
        """What cells raised."""
        return self.page.evaluate(ERRORS)

    def command(self, name: str) -> None:
        """Call a command of JupyterLab's."""
        self.page.evaluate(f"window.jupyterapp.commands.execute({json.dumps(name)})")

    def until(self, true: Any, seconds: float = SECONDS) -> None:
        """Wait until `true()`."""
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"still waiting after {seconds} s"
            self.page.wait_for_timeout(200)

    def close_tab(self) -> None:
        """Close the browser's tab, and have a fresh one."""
        context = self.page.context
        self.page.close()
        self.page = context.new_page()

    def show(self, cell: str) -> Any:
        """Scroll to a cell (JupyterLab draws only what is near) and return its place on the page."""
        number = self.ids().index(cell)
        content = "window.jupyterapp.shell.currentWidget.content"
        for _ in range(2):  # heights are known only once cells are drawn
            self.page.evaluate(f"{content}.scrollToItem({number}, 'start')")
            self.page.wait_for_timeout(500)
        self.page.evaluate(f"{content}.widgets[{number}].node.setAttribute('data-shown', {cell!r})")
        return self.page.locator(f"[data-shown='{cell}']")

    def picture(self, name: str, height: int = 1000, cell: str = "") -> None:
        """A screenshot of what is seen, `height` pixels of it, from `cell` on, in $VLA_SCREENSHOTS or below pytest's
        folder."""
        self.page.set_viewport_size({"width": 1300, "height": height})
        self.page.wait_for_timeout(500)
        if cell:
            self.show(cell)
        self.page.screenshot(path=self.pictures / f"{name}.png")
        self.page.set_viewport_size({"width": 1300, "height": 1000})

    def whole_picture(self, name: str) -> None:
        """A screenshot of the whole notebook: heights are known only once cells are drawn."""
        self.page.set_viewport_size({"width": 1300, "height": 14_000})
        first, *others = self.ids()
        self.show(first)
        count, bottoms = (
            1 + len(others),
            f"[...{PANEL}.querySelectorAll('.jp-Cell')].map(cell => cell.getBoundingClientRect().bottom)",
        )
        heights: list[float] = []

        def settled() -> bool:
            found = self.page.evaluate(bottoms)
            heights.append(max(found) if len(found) == count else 0.0)
            return len(heights) > 3 and 0 < heights[-1] == heights[-3]

        self.until(settled, 30)
        self.picture(name, min(int(heights[-1]) + 60, 14_000), first)


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Desk]:
    """JupyterLab as `vla lab` starts it, in a Chromium page, with folders of its own."""
    from playwright.sync_api import sync_playwright

    home = tmp_path_factory.mktemp("lab")
    folder, pictures = home / "notebooks", Path(os.environ.get("VLA_SCREENSHOTS") or home / "screenshots")
    folder.mkdir()
    pictures.mkdir(parents=True, exist_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(home / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"), "JUPYTERLAB_SETTINGS_DIR": str(home / "settings")}
    own |= {"VLA_RUNS": str(home / "runs"), "WANDB_MODE": "disabled"}
    words = [f"--IdentityProvider.token={TOKEN}", "--expose-app-in-browser"]
    with open(home / "lab.log", "w") as log:
        command = lab_command(folder, port, browser=False) + words
        server = subprocess.Popen(command, env={**lab_environment(), **own}, stdout=log, stderr=log)
    try:
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=2)
                break
            except OSError:
                assert server.poll() is None, (home / "lab.log").read_text()
                time.sleep(0.2)
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
            page = browser.new_context(viewport={"width": 1300, "height": 1000}).new_page()
            yield Desk(f"http://127.0.0.1:{port}", folder, page, pictures)
            browser.close()
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A recording of three episodes."""
    folder = tmp_path_factory.mktemp("browser") / "data"
    record(
        RecordSettings(
            dataset_root=folder, episodes_f1=3, episodes_f2=1, picture_width=160, picture_height=90, idle_tail_s=0.2
        )
    )
    return folder
