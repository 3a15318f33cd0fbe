"""Text from files is text: every view of the workbench, offline and as a widget, with names that are HTML, in a
browser."""

import asyncio
import re
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import ipywidgets
import nbformat
import pandas as pd
import pytest
from chromium import CHROMIUM, FLAGS
from matplotlib.figure import Figure
from nbformat import v4

from vla_lib.core.files import append_jsonl, write_json
from vla_lib.core.run_folder import RunFolder, read_record, runs_root
from vla_lib.runtime.run_log import Tick
from vla_lib.workbench import comparison, live, pages, rollout_views, runs, tables
from vla_lib.workbench.jobs import Job
from vla_lib.workbench.pages import Section, export_html, static_outputs, write_report
from vla_lib.workbench.viewer import EpisodeBrowser

PROJECT = Path(__file__).resolve().parents[2]
BAIT = "window.caught=(window.caught||0)+1"
HOSTILE = (
    f"<img src=x onerror={BAIT}>",
    f"<script>{BAIT}</script>",
    f"x' onerror='{BAIT}' onload='{BAIT}' oninput='{BAIT}' y='",
    f'x" onerror="{BAIT}" onload="{BAIT}" y="|z',
    f"</title></pre></style><svg onload={BAIT}>",
    "100 $ and $\\frac{",
)
MADE = "vla_lib/workbench/markup.py"


def html_of(widget: ipywidgets.Widget) -> list[str]:
    """What a page's HTML views of a widget are set to, whatever it holds."""
    own = [widget.value] if isinstance(widget, ipywidgets.HTML) else []
    return own + [html for child in getattr(widget, "children", ()) for html in html_of(child)]


def episode_views(folder: Path, name: str) -> list[str]:
    """The episode browser on a dataset with a broken episode of that name, and a slider with it as its label."""
    (folder / "data" / "part1" / f"recv_all_20250101_000000{name.replace('/', '∕')}").mkdir(parents=True)
    (log,) = (folder / "data" / "part1").iterdir()
    (log / "robot_log.csv").write_text("no,log\n")
    browser = EpisodeBrowser(folder / "data")
    figure = Figure((1, 1))
    figure.suptitle(name)
    return [browser.page(1).data, rollout_views.offline_slider([figure, figure], [name, f"{name}2"]).data]


def job_views(folder: Path, name: str) -> list[str]:
    """The view of a job whose log and reason say it."""
    job = Job(["true"], folder)
    status = {"command": ["true"], "log": "train.log", "log_from": 0, "supervisor_pid": 1, "state": "ended"}
    write_json(folder / "job.json", {**status, "returncode": 1, "reason": name})
    append_jsonl(folder / "metrics.jsonl", {"step": 1, "train/loss_step": 0.5, "train/lr": 1e-4, name: 1.0})
    view = live.TrainingView(job)
    view.tick([name, f"{name} 3/9 {name}", f"wandb: View run {name} at: https://wandb.ai/{name}"])
    view.close()
    return [one.value for one in vars(view).values() if isinstance(one, ipywidgets.HTML)]


def rollout_views_of(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A rehearsal whose tick gives it as its reason."""
    tick = SimpleNamespace(**dict.fromkeys([field.name for field in fields(Tick)]))
    tick.t_s, tick.mode, tick.reason, tick.lateness_ms, tick.vl_age_s, tick.force_mN = 1.0, name, name, 0.1, None, None
    monkeypatch.setattr(rollout_views.RehearsalView, "draw", lambda self, moments: b"")
    view = rollout_views.RehearsalView(SimpleNamespace())
    asyncio.run(view.tick([SimpleNamespace(tick=tick)]))
    middle = view._state.value
    view.close([SimpleNamespace(tick=tick)])
    return [middle, view._state.value]


def table_views(folder: Path, name: str) -> list[str]:
    frame = pd.DataFrame([{name: name, "reasons": name, "n": 1.0}])
    return [tables.fit(frame).data, tables.sentence(name).data]


def report_views(folder: Path, name: str) -> list[str]:
    """Reports and exported notebooks of a run whose record, outputs and widgets hold it."""
    run = RunFolder.create("01_inspect_episodes", {"note": name}, path=folder / f"run {name.replace('/', '∕')}")
    control = {"state": {"_model_name": "TextModel", "description": name, "value": name}}
    data = {"text/plain": name, pages.WIDGET: {"model_id": "m"}}
    outputs = [
        v4.new_output("stream", text=name),
        v4.new_output("display_data", data=data),
        v4.new_output("error", ename=name, evalue=name, traceback=[name]),
        v4.new_output("display_data", data={"image/png": name}),
    ]
    cell = v4.new_code_cell("1", outputs=outputs, metadata={"tags": ["report"]})
    notebook = v4.new_notebook(cells=[cell], metadata={"widgets": {pages.STATES: {"state": {"m": control}}}})
    nbformat.write(notebook, run.path / "notebook.ipynb")
    run.finish("failed", name)
    record = read_record(run.path)
    write_json(run.path / "run.json", {**record, "name": name})
    write_report(folder / "report.html", name, [pd.DataFrame({name: [name]})] * 2, [Section(run.path, name)], [name])
    export_html(run.path / "notebook.ipynb", folder / "notebook.html")
    shown = [output["data"]["text/html"] for output in static_outputs("m", {"m": control})]
    return [*shown, (folder / "report.html").read_text(), (folder / "notebook.html").read_text()]


def run_views(folder: Path, name: str) -> list[str]:
    """The table of runs with it as a name, a note, a parameter and a result; the question before a removal."""
    run = RunFolder.create("04_train_async", {name: name, "n": 1}, path=runs_root() / f"20260101-0000-{folder.name}")
    write_json(run.path / "results.json", {"val_mae_mm": name})
    run.finish("done")
    runs.annotate(run.path, label=name, note=name)
    other = RunFolder.create("04_train_async", {}, path=run.path.with_name(f"{run.path.name}-other"))
    browser = comparison.RunBrowser(words=folder.name, compare=[str(run.path)])
    shown = [browser._head.value, *(row.children[1].value for row in browser._rows.children[-1:])]
    both = comparison.parameters([run.path, other.path])
    return [*shown, *(tables.fit(one).data for one in (both, comparison.overview(), runs.diff(run.path, other.path)))]


def test_no_name_runs_in_any_view(tmp_path, monkeypatch):
    from playwright.sync_api import sync_playwright

    found = {}
    for number, name in enumerate(HOSTILE):
        for make in (episode_views, job_views, table_views, report_views, run_views):
            folder = tmp_path / f"{make.__name__}{number}"
            folder.mkdir()
            found[make.__name__, number] = make(folder, name)
        found["rollouts", number] = rollout_views_of(tmp_path, name, monkeypatch)
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()

        def caught() -> bool:
            page.wait_for_timeout(30)
            return bool(page.evaluate("window.caught"))

        page.set_content("<p></p>")
        page.evaluate("html => { document.body.innerHTML = html }", HOSTILE[0])
        assert caught()  # the trap works
        for (kind, number), views in found.items():
            assert views
            for html in views:
                page.evaluate("window.caught = 0")
                if "<html" in html:
                    page.set_content(html)
                else:
                    page.set_content("<p></p>")
                    page.evaluate("html => { document.body.innerHTML = html }", html)
                    page.evaluate(
                        "document.querySelectorAll('input').forEach(e => e.dispatchEvent(new Event('input')))"
                    )
                assert not caught(), (kind, HOSTILE[number])
            seen = " ".join(views) if kind == "report_views" else page.inner_text("body")
            assert "onerror" in seen or "onload" in seen or "caught" in seen or "100 $" in seen, (kind, number)
        page.set_content("<p></p>")
        slider = found["episode_views", 3][-1]  # its labels still follow the slider
        page.evaluate("html => { document.body.innerHTML = html }", slider)
        page.evaluate(
            "() => { const e = document.querySelector('input'); e.value = 1; e.dispatchEvent(new Event('input')) }"
        )
        assert page.inner_text("span") == f"{HOSTILE[3]}2"
        browser.close()


def test_html_is_made_of_text_in_one_place_only():
    making = re.compile(r"ipywidgets\.HTML\b|\bHTML\(|html\.escape|import html\b|\bMarkdown\(|import .*\bescape\b")
    rooms = [*(PROJECT / "vla_lib").rglob("*.py"), *(PROJECT / "notebooks").glob("*.ipynb")]
    others = [file for file in rooms if file.relative_to(PROJECT).as_posix() != MADE]
    assert [file.name for file in others if making.search(file.read_text())] == []
    # Markup of anything but words of our own would be a way around it
    loose = re.compile(r"Markup\((?!\"|\n|$)([^)]*)")
    found = {(file.name, text) for file in others for text in loose.findall(file.read_text())}
    allowed = {
        ("pages.py", 'state.get("value", ""'),
        ("pages.py", 'table.to_html(index=False, border=0, na_rep="", classes="words"'),
    }
    allowed |= {
        ("pages.py", 'data["text/html"]'),
        ("pages.py", "STYLE"),
        ("comparison.py", "made.data"),
        ("rollout_views.py", "image"),
        ("viewer.py", "style("),
        ("viewer.py", "told"),
        ("viewer.py", "code"),
    }
    assert found <= allowed
