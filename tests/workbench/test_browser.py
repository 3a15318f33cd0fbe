"""JupyterLab in Chromium: every notebook runs all its cells on a recording of seconds, its sliders redraw, Stop stops."""

from pathlib import Path

import pytest
from conftest import CHROMIUM

from vla_lib import simulate
from vla_lib.core.files import read_json, read_jsonl
from vla_lib.core.run_folder import PROJECT, read_record
from vla_lib.training.checkpoint import read_checkpoint

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")]
NOTEBOOKS = sorted(path.stem for path in (PROJECT / "notebooks").glob("*.ipynb"))
FEW = {"batch_size": 8, "grad_accum_steps": 1, "max_steps": 4, "val_fraction": 0.3, "num_workers": 0, "ddim_steps": 2}
SMALL = {"image_resize_height": 84, "image_resize_width": 140}  # what the VL model sees
TOLD = {
    "03_cache_vl_features": {"vl_pooling": "grid:2x3", **SMALL},
    "04_train_async": FEW | SMALL,
    "05_train_diffusion": FEW | SMALL,
    "06_evaluate": {"closed_loop_seeds": 1, "masked": False, "max_time_s": 3.0, "films": 1},
    "07_rehearse": {"max_time_s": 2.0},
}
WIDGET = "application/vnd.jupyter.widget-view+json"
SRC = "element => element.src"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A recording of three episodes."""
    folder = tmp_path_factory.mktemp("browser") / "data"
    simulate.main(
        simulate.Settings(dataset_root=folder, episodes_f1=3, episodes_f2=1, picture_width=160, picture_height=90, idle_tail_s=0.2)
    )
    return folder


def run(desk, name: str, root: Path) -> None:
    """Run a notebook after those that it builds on; each once."""
    for earlier in NOTEBOOKS[: NOTEBOOKS.index(name) + 1]:
        if earlier not in desk.ran and (earlier == name or earlier != "05_train_diffusion"):
            desk.open(desk.copy(earlier, dataset_root=str(root), **TOLD.get(earlier, {})))
            desk.run_all()
            assert desk.errors() == []
            desk.ran.add(earlier)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_lives_in_jupyterlab(name, desk, root):
    desk.ran.discard(name)
    run(desk, name, root)
    desk.picture(f"jupyterlab-{name}")
    for output in desk.outputs():
        data = output.get("data", {})
        if WIDGET not in data and not {"text/html", "image/png"} & set(data):
            text = "".join(data.get("text/plain", "")) + "".join(output.get("text", ""))
            assert not any(word in text for word in ("<Figure", "Box(children", "Slider(", "object at 0x")), text
    page = desk.page
    for slider in page.locator(".jp-OutputArea input[type=range]").all():  # pictures without a kernel
        slider.scroll_into_view_if_needed()
        shown = slider.locator("xpath=..").locator("img:visible")
        before = shown.evaluate(SRC)
        slider.fill(slider.get_attribute("max"))
        assert slider.get_attribute("max") == "0" or shown.evaluate(SRC) != before
    for slider in page.locator(".noUi-handle").all():
        slider.scroll_into_view_if_needed()
        picture = page.locator(".jupyter-widgets.widget-image").first
        before = picture.evaluate(SRC)
        for _ in range(5):
            slider.press("ArrowRight")
        desk.until(lambda picture=picture, before=before: picture.evaluate(SRC) != before)


def test_a_training_shows_its_progress_and_stop_stops_it(desk, root):
    run(desk, "03_cache_vl_features", root)
    before = set(desk.runs())
    path = desk.copy("04_train_async", "training", dataset_root=str(root), **FEW | SMALL | {"max_steps": 1_000_000, "num_workers": 1})
    desk.open(path)
    desk.start_all()
    page, text = desk.page, lambda: desk.page.locator(".jp-Notebook").inner_text()
    desk.show("run-training")
    desk.until(lambda: "ETA" in text())
    desk.until(lambda: page.locator("img.jupyter-widgets.widget-image").is_visible())
    desk.picture("training", whole=False)
    (found,) = set(desk.runs()) - before
    steps = max(row["step"] for row in read_jsonl(found / "metrics.jsonl") if "step" in row)
    page.locator("button.jupyter-button", has_text="Stop").click()
    desk.until(lambda: read_record(found)["state"] != "running")
    assert read_record(found)["state"] == "cancelled" and read_json(found / "job.json")["state"] == "ended"
    assert read_checkpoint(found / "checkpoints" / "qwen_vla_async.pt")["step"] >= steps
    desk.until(lambda: "stopped by SIGTERM" in text())
    desk.picture("training-stopped", whole=False)
