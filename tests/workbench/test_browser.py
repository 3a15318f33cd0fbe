"""JupyterLab in Chromium: notebook 01 runs all its cells, its slider redraws the figure, nothing prints a widget's repr."""

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from vla_lib import simulate
from vla_lib.core.run_folder import PROJECT

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")]
TOKEN = "a-token-of-the-test"
IDLE = (
    "(async () => { const panel = window.jupyterapp.shell.currentWidget; if (!panel || !panel.sessionContext) return false;"
    " await panel.sessionContext.ready; const kernel = panel.sessionContext.session && panel.sessionContext.session.kernel;"
    " return !!kernel && kernel.status === 'idle'; })()"
)
CELLS = "(() => window.jupyterapp.shell.currentWidget.content.model.toJSON().cells)()"


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """JupyterLab on a copy of the notebooks, with folders of its own; its address."""
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for path in (PROJECT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, notebooks)
    settings = tmp_path / "lab-settings" / "@jupyterlab" / "apputils-extension"
    settings.mkdir(parents=True)
    (settings / "notification.jupyterlab-settings").write_text('{"fetchNews": "false"}')
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {f"JUPYTER_{kind}_DIR": str(tmp_path / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    command = [sys.executable, "-m", "jupyterlab", str(notebooks), "--no-browser", f"--port={port}", f"--IdentityProvider.token={TOKEN}"]
    command += ["--expose-app-in-browser", f"--LabApp.user_settings_dir={tmp_path / 'lab-settings'}", "--ServerApp.port_retries=0"]
    command += ["--allow-root"] if os.geteuid() == 0 else []
    environment = {**os.environ, **folders, "JUPYTERLAB_WORKSPACES_DIR": str(tmp_path / "workspaces")}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/api?token={TOKEN}", timeout=2)
                break
            except OSError:
                assert server.poll() is None, "JupyterLab did not start"
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def wait_until(page, expression: str, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not page.evaluate(expression):
        assert time.monotonic() < deadline, f"still false after {seconds} s: {expression}"
        page.wait_for_timeout(200)


def test_notebook_01_lives_in_jupyterlab(lab, tmp_path):
    from playwright.sync_api import sync_playwright

    root = tmp_path / "data"
    simulate.main(simulate.Settings(dataset_root=root, episodes_f1=1, episodes_f2=0, picture_width=160, picture_height=90, idle_tail_s=1.0))
    notebook = tmp_path / "notebooks" / "01_inspect_episodes.ipynb"
    text = notebook.read_text()
    assert "runs/demo-data" in text
    notebook.write_text(text.replace("runs/demo-data", str(root)))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
        page = browser.new_page(viewport={"width": 1500, "height": 1000})
        page.goto(f"{lab}/lab/tree/{notebook.name}?token={TOKEN}")
        page.wait_for_selector(".jp-Notebook", timeout=60_000)
        wait_until(page, IDLE, 60)
        page.evaluate("window.jupyterapp.commands.execute('notebook:run-all-cells')")
        wait_until(page, f"({CELLS}).filter(c => c.cell_type === 'code').every(c => c.execution_count !== null)", 120)
        wait_until(page, IDLE, 60)
        outputs = [output for cell in page.evaluate(CELLS) for output in cell.get("outputs", [])]
        assert [output for output in outputs if output["output_type"] == "error"] == []
        assert any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)

        slider = page.locator(".noUi-handle").first
        slider.scroll_into_view_if_needed()
        picture = page.locator(".jupyter-widgets.widget-image").first
        before = picture.get_attribute("src")
        assert before
        for _ in range(5):
            slider.press("ArrowRight")
        wait_until(page, f"document.querySelector('.jupyter-widgets.widget-image').src !== {before!r}", 20)
        wait_until(page, IDLE, 20)
        artefacts = Path(os.environ.get("VLA_ARTEFACTS", tmp_path))
        artefacts.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=artefacts / "jupyterlab-01.png")
        browser.close()
