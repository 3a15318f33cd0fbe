"""Rows of the episodes' table and viewer, as a person at JupyterLab waits for them: measured in Chromium.

JupyterLab runs as `vla lab` starts it; times are taken in the page, from the start of the cell or the key press to the
frame after the last change.
"""

import contextlib
import os
import shutil
import socket
import statistics
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
from matplotlib.figure import Figure

from benchmarks.episodes import write_raw
from benchmarks.rows import BenchRow, seconds
from vla_lib import preprocess
from vla_lib.core.files import write_json
from vla_lib.episodes import Episode, find_episodes, load_prepared
from vla_lib.episodes.findings import VERDICTS_NAME, read_verdicts
from vla_lib.workbench.commands import lab_command, lab_environment
from vla_lib.workbench.plots.style import drawn
from vla_lib.workbench.viewer import payload

TOKEN = "benchmark"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
CELLS = ["from pathlib import Path\nfrom vla_lib.workbench.viewer import EpisodeBrowser", "EpisodeBrowser(Path({!r}))"]
READY = """document.querySelector('.jp-Notebook .jp-Cell') &&
  window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel?.status === 'idle'"""
RUN = """async count => {
  const frame = () => new Promise(requestAnimationFrame), begun = performance.now();
  const done = window.jupyterapp.commands.execute('notebook:run-cell-and-select-next');
  while (document.querySelector('.vla-count')?.textContent !== `${count} of ${count} episodes`) await frame();
  await frame(); await frame();
  const took = performance.now() - begun;
  await done;
  return took;
}"""
WATCH = """element => {
  window.taken = [];
  element.addEventListener('keydown', () => { window.pressed = performance.now(); }, true);
  new MutationObserver(() => window.taken.push(performance.now() - window.pressed))
    .observe(element, {attributeFilter: ['data-drawn']});
}"""


def rows(fast: bool = False) -> list[BenchRow]:
    """The table of many episodes, a step by key, a jump by key; none where there is no Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        return []
    with tempfile.TemporaryDirectory() as name:
        folder, count = Path(name), 40 if fast else 1000
        for number in range(4):
            write_raw(folder / f"few/part1/recv_all_20251020_00000{number}", 10.0 + number, windows=False)
        preprocess.main(preprocess.Settings(folder / "few", quiet=True))
        linked_root(folder / "few", folder / "many", count)
        with lab_page(folder, chromium, [CELLS[0], CELLS[1].format(str(folder / "many"))]) as page:
            table_s, step_s, jump_s = measured(page, count, 10 if fast else 60)
        opened = seconds(lambda: [load_prepared(files.path) for files in find_episodes(folder / "many")])[0]
        shown = payload(Episode.open(find_episodes(folder / "few")[0]), 10.0)["traces"]
        by_matplotlib = statistics.median(seconds(lambda: drawn(_traces(shown)), 5, warm=1))
    note = f"{count} episodes; baseline: opening each data.pkl, without a table"
    same = "five views of 640x360; baseline: the traces alone, drawn by matplotlib"
    return [
        BenchRow("workbench.table", table_s, opened, "s", "at most 2", note, less=True),
        BenchRow(
            "workbench.step", step_s, by_matplotlib, "s", "below 0.15", f"median of a key press, {same}", less=True
        ),
        BenchRow("workbench.jump", jump_s, by_matplotlib, "s", "below 0.15", f"Shift and key, {same}", less=True),
    ]


def linked_root(source: Path, root: Path, count: int) -> None:
    """A root of `count` episodes that are links to those of `source` in turn, judged as those were."""
    verdicts, rows = read_verdicts(source), {}
    for number in range(count):
        key = sorted(verdicts)[number % len(verdicts)]
        folder = root / Path(key).parent / f"recv_all_20250101_{number:06d}"
        folder.mkdir(parents=True)
        for part in (source / key).iterdir():
            (folder / part.name).symlink_to(part)
        rows[folder.relative_to(root).as_posix()] = verdicts[key]
    write_json(root / VERDICTS_NAME, rows)


@contextlib.contextmanager
def lab_page(folder: Path, chromium: str, cells: list[str]) -> Iterator[Any]:
    """A page with JupyterLab, in which a notebook of these cells is open."""
    from playwright.sync_api import sync_playwright

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    (folder / "lab").mkdir()
    nbformat.write(notebook, folder / "lab" / "bench.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {f"JUPYTER_{kind}_DIR": str(folder / kind.lower()) for kind in ("CONFIG", "RUNTIME", "DATA")}
    own |= {"JUPYTERLAB_WORKSPACES_DIR": str(folder / "workspaces"), "PYTHONPATH": os.getcwd()}
    words = [*lab_command(folder / "lab", port, browser=False), f"--IdentityProvider.token={TOKEN}"]
    with open(folder / "lab.log", "w") as log:
        words.append("--expose-app-in-browser")
        server = subprocess.Popen(words, env={**lab_environment(), **own}, stdout=log, stderr=log)
    try:
        while True:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token={TOKEN}", timeout=2)
                break
            time.sleep(0.2)
        with sync_playwright() as driver:
            page = driver.chromium.launch(executable_path=chromium, args=FLAGS).new_page(
                viewport={"width": 1300, "height": 1000}
            )
            page.goto(f"http://127.0.0.1:{port}/lab/tree/bench.ipynb?token={TOKEN}&reset")
            page.wait_for_function(READY, timeout=120_000)
            yield page
    finally:
        server.terminate()
        server.wait()


def measured(page: Any, count: int, times: int) -> tuple[float, float, float]:
    """Seconds until the table stands, and medians of a step and of a jump."""
    page.set_default_timeout(120_000)
    page.evaluate("window.jupyterapp.commands.execute('notebook:run-cell-and-select-next')")
    table_ms = page.evaluate(RUN, count)
    place = page.locator(".vla-browser")
    page.wait_for_selector(".vla-browser[data-drawn]")
    place.evaluate(WATCH)
    place.focus()
    found = []
    for forth, back in (("ArrowRight", "ArrowLeft"), ("Shift+ArrowRight", "Shift+ArrowLeft")):
        page.wait_for_timeout(500)
        page.evaluate("window.taken.length = 0")
        for number in range(times):
            place.press(forth if number // 8 % 2 else back)
            page.wait_for_function("before => window.taken.length > before", arg=number)
        found.append(statistics.median(page.evaluate("window.taken")))
    return table_ms / 1e3, found[0] / 1e3, found[1] / 1e3


def _traces(traces: list[dict[str, Any]]) -> Figure:
    figure = Figure((11, 8), layout="constrained")
    for panel, trace in zip(figure.subplots(4, 2).flat, traces, strict=False):
        for values in trace["values"]:
            panel.plot(trace["t"], values)
    return figure
