"""JupyterLab in Chromium: every notebook runs all its cells on a recording of seconds, its sliders redraw, Stop
stops."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lab_book
import nbformat
import pytest
from chromium import CHROMIUM
from nbformat import v4
from training_cell import FEW, shows_curves, step, stop

from benchmarks.fake_arm import FakeArm
from benchmarks.robots import CAMERAS
from benchmarks.runtime import untrained
from needle_rig.world import VIEWS
from tests.robots import fake_rig
from vla_lib.core.files import read_json
from vla_lib.core.run_folder import PROJECT, RunFolder, read_record
from vla_lib.evaluation.preflight import PERSON
from vla_lib.training.settings import AsyncSettings
from vla_lib.workbench import run_all, runs

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]
NOTEBOOKS = sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))
SMALL = {"image_resize_height": 84, "image_resize_width": 140}  # what the VL model sees
GIVEN = {
    "02_detect_hz": {"workers": 1},
    "03_cache_vl_features": {"vl_pooling": "grid:2x3", **SMALL},
    "04_train_async": FEW | SMALL,
    "05_train_diffusion": FEW | SMALL,
    "06_evaluate": {"closed_loop_seeds": 2, "masked": False, "max_time_s": 2.0, "films": 2, "workers": 1},
    "07_rehearse": {"max_time_s": 2.0},
}
LEAVES = ("05_train_diffusion", "08_deploy")  # nothing builds on them
KERNELSPEC = {
    "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
}  # else JupyterLab asks for one
WIDGET = "application/vnd.jupyter.widget-view+json"
RANGE = "input[type=range]"  # of pictures that need no kernel
SLIDERS = dict.fromkeys(NOTEBOOKS, ()) | {
    "06_evaluate": (("paths-in-space", RANGE), ("film-strips", RANGE), ("sensor-over-time", RANGE)),
    "07_rehearse": (("moments", RANGE),),
}


@pytest.fixture
def rig(tmp_path) -> Iterator[Path]:
    """The robot.yaml of a rig of loopback doubles that runs meanwhile, which keeps a core busy."""
    with FakeArm((0, 0, 0, 0, 60, 0)) as arm:
        content = fake_rig.mapping(arm, cameras={view: {"source": "zmq"} for view in VIEWS})
        content["limits"] |= {"vl_age_s": 5, "hold_s": 2, "sensor_age_s": 1, "picture_age_s": 2}  # a busy machine
        cameras = fake_rig.CameraHost(content["zmq_port"], cameras=CAMERAS)
        with cameras, fake_rig.SensorHost(content["sensor"]["port"]):
            yield fake_rig.write(tmp_path / "robot.yaml", content)


def run(desk, name: str, root: Path, **given: Any) -> None:
    """Run a notebook after those that it builds on; each once."""
    for earlier in NOTEBOOKS[: NOTEBOOKS.index(name) + 1]:
        if earlier not in desk.ran and (earlier == name or earlier not in LEAVES):
            asked = GIVEN.get(earlier, {}) | (given if earlier == name else {})
            desk.open(desk.copy(earlier, dataset_root=str(root), **asked))
            desk.run_all()
            assert desk.errors() == []
            desk.keep()
            desk.ran.add(earlier)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_lives_in_jupyterlab(name, desk, root, request):
    desk.ran.discard(name)
    run(desk, name, root, **({"robot": str(request.getfixturevalue("rig"))} if name == "08_deploy" else {}))
    desk.whole_picture(f"jupyterlab-{name}")
    if name == NOTEBOOKS[0]:
        desk.picture("jupyterlab", 1330, "all-episodes")  # as the README shows it
    for output in desk.outputs():
        data = output.get("data", {})
        if WIDGET not in data and not {"text/html", "image/png"} & set(data):
            text = "".join(data.get("text/plain", "")) + "".join(output.get("text", ""))
            assert not any(word in text for word in ("<Figure", "Box(children", "Slider(", "object at 0x")), text
    pages = {
        cell["id"]: str([output.get("data", {}).get("text/html") for output in cell.get("outputs", [])])
        for cell in desk.cells()
    }
    assert [cell for cell, text in pages.items() if "<input type=" in text] == [
        cell for cell, kind in SLIDERS[name] if kind == RANGE
    ]
    for cell, kind in SLIDERS[name]:
        area = desk.show(cell)
        slider, shown = area.locator(kind), area.locator("img:visible")
        assert (slider.count(), shown.count()) == (1, 1), cell
        before = shown.get_attribute("src")
        slider.fill(slider.get_attribute("max"))
        desk.until(lambda shown=shown, before=before: shown.get_attribute("src") != before)
        desk.picture(f"slider-{name}-{cell}")


def test_the_report_as_the_readme_shows_it(desk, root):
    """The picture `report`; a report asks nothing of the network."""
    run(desk, "06_evaluate", root)
    newest = {read_record(path)["name"]: path for path in sorted(desk.runs()) if (path / "notebook.ipynb").exists()}
    steps = [
        run_all.Step(
            name, "ran", "no finished run on this dataset", read_record(newest[name])["duration_s"], newest[name]
        )
        for name in run_all.FlowPlan(root).notebooks
    ]
    made = run_all.Flow(run_all.FlowPlan(root), RunFolder.create("run-all", {}), steps)
    asked: list[str] = []
    desk.close_tab()
    desk.page.on("request", lambda request: asked.append(request.url.partition(":")[0]))
    desk.page.goto(made.report("VLA workbench: a recording").as_uri())
    desk.picture("report", 1240)
    assert set(asked) <= {"file", "data"} and desk.page.locator("img").count() >= 8


def start_training(desk, root: Path, name: str) -> tuple[Path, Any]:
    """Start a training that would go on for long; its run folder and its cell, once a curve is drawn."""
    run(desk, "03_cache_vl_features", root)
    before = set(desk.runs())
    desk.open(
        desk.copy(
            "04_train_async", name, dataset_root=str(root), **FEW | SMALL | {"max_steps": 1_000_000, "num_workers": 1}
        )
    )
    desk.start_all()
    cell = desk.show("run-training")
    desk.until(lambda: shows_curves(desk, cell))
    (found,) = set(desk.runs()) - before
    return found, cell


def test_a_training_goes_on_without_its_browser_tab_and_is_shown_again(desk, root):
    """In the same notebook opened again, and from any other one."""
    found, cell = start_training(desk, root, "left")
    desk.until(lambda: "run-training" in desk.saved("left"))
    desk.close_tab()
    left_at = step(found)
    desk.until(lambda: step(found) > left_at + 3)
    desk.open(desk.folder / "left.ipynb")
    same = desk.show("run-training")
    desk.until(lambda: shows_curves(desk, same))
    desk.picture("training-opened-again")
    said = same.inner_text()
    desk.until(lambda: same.inner_text() != said)
    cell = v4.new_code_cell(f"from vla_lib.workbench import live\nawait live.follow({str(found)!r})", id="follow")
    nbformat.write(v4.new_notebook(cells=[cell], metadata=KERNELSPEC), desk.folder / "again.ipynb")
    desk.open(desk.folder / "again.ipynb")
    desk.start_all()
    again = desk.show("follow")
    desk.until(lambda: shows_curves(desk, again))
    desk.picture("training-followed")
    desk.open(desk.folder / "left.ipynb")
    stop(desk, desk.show("run-training"), found, step(found))


def test_stop_stops_the_robot_of_a_rehearsal(desk, root):
    run(desk, "04_train_async", root)
    before = set(desk.runs())
    desk.open(desk.copy("07_rehearse", "rehearsal", dataset_root=str(root), max_time_s=600.0))
    desk.start_all()
    cell = desk.show("rehearse")
    desk.until(lambda: "ms late" in cell.inner_text())
    cell.locator("button.jupyter-button", has_text="Stop").click()
    desk.until(desk.finished)
    assert desk.errors() == []
    (found,) = set(desk.runs()) - before
    assert read_json(found / "results.json")["runner"]["ended"] == "operator"


def test_the_arm_moves_only_while_a_key_or_a_button_is_held_and_stop_stops_it(desk, rig, tmp_path):
    """Cells of notebook 08 as they are, but the stages before the task count as passed."""
    policy = untrained(tmp_path / "policy.pt", AsyncSettings())
    given = {"robot": str(rig), "checkpoint": str(policy), "operator": "Kim", "ticked": list(PERSON), "until": "task"}
    given |= {"hold_to_run": True, "max_time_s": 600.0, "rollouts_root": str(tmp_path / "rollouts")}
    path = desk.copy("08_deploy", "held", **given)
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [
        one for one in notebook.cells if one.id in ("parameters", "begin", "session", "ticks", "task-live")
    ]
    notebook.cells[2].source += "\nsession.passed = ['look', 'preflight', 'dry run', 'first motion']"
    nbformat.write(notebook, path)
    desk.open(path)

    def begin() -> tuple[Any, Any]:
        desk.start_all()
        cell = desk.show("task-live")
        desk.until(lambda: "wait, hold-to-run key released" in cell.inner_text())
        return cell, cell.locator(".vla-hold")

    def ended() -> str:
        desk.until(desk.finished)
        assert desk.errors() == []
        return read_json(max((tmp_path / "rollouts").glob("*/*/rollout.json")))["ended"]

    cell, field = begin()
    field.click()
    desk.page.keyboard.down(" ")
    desk.until(lambda: "act;" in cell.inner_text() and cell.locator("img:visible").count())
    desk.picture("deploy-held", cell="task-live")
    desk.page.keyboard.up(" ")
    desk.until(lambda: "over" in cell.inner_text())
    assert ended() == "hold-to-run key released"

    cell, field = begin()
    press = "navigator.getGamepads = () => [null, {index: 1, buttons: [{pressed: false}, {pressed: %s}]}]; 0"
    desk.page.evaluate(press % "true")  # jammed
    desk.page.wait_for_timeout(500)
    assert field.get_attribute("data-held") == "false" and "act;" not in cell.inner_text()
    for pressed in ("false", "true"):
        desk.page.evaluate(press % pressed)
        desk.page.wait_for_timeout(300)
    desk.until(lambda: "act;" in cell.inner_text())
    cell.locator("button.jupyter-button", has_text="Stop").click()
    desk.until(lambda: "over" in cell.inner_text())
    assert ended() == "operator"


def test_runs_are_compared_by_ticking_them(desk):
    """Tick a second run: both curves are drawn. Sort. Name one."""
    folder = desk.folder.parent / "runs"
    first = lab_book.write_training(folder / "20260101-000000-04_train_async", 1e-4, 0.5)
    second = lab_book.write_training(folder / "20260102-000000-04_train_async", 5e-5, 0.2)
    given = {"notebook": "04_train_async", "compare": [first.name], "words": "202601"}
    desk.open(desk.copy("09_compare_runs", "compare", **given))
    desk.run_all()
    assert desk.errors() == []
    curves = desk.show("curves").locator("img:visible")
    table = desk.show("run-table")
    lines = table.locator("div[style*='grid-template-columns']")
    assert lines.count() == 3 and second.name in lines.nth(1).inner_text()  # a head, newest first
    clipped = "all => all.filter(one => one.scrollWidth > one.clientWidth).map(one => one.textContent)"
    assert lines.nth(0).locator("span").evaluate_all(clipped) == []
    before = curves.get_attribute("src")
    table.locator("input[type=checkbox]").nth(0).check()
    desk.until(lambda: curves.get_attribute("src") != before)
    desk.picture("compare", cell="run-table")
    table.locator("select").select_option("val_action_loss")
    table.get_by_role("button", name="descending").click()
    desk.until(lambda: first.name in table.locator("div[style*='grid-template-columns']").nth(1).inner_text())
    table.locator("input[type=checkbox]").nth(0).uncheck()
    table.locator("input[type=text]").nth(1).fill("the wide one")
    table.get_by_role("button", name="Save").click()
    desk.until(lambda: "the wide one" in table.inner_text())
    desk.until(lambda: runs.about(second)["label"] == "the wide one")
    desk.picture("compare-named", cell="run-table")
