"""JupyterLab in Chromium on three hundred episodes: the table and the viewer of notebook 01, a training that is
stopped, interrupted and killed, and a checkpoint that is picked."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from chromium import CHROMIUM
from episode_page import EpisodePage
from training_cell import FEW, shows_curves, step, stop

from benchmarks.episode_browser import linked_root
from vla_lib import build_vl_cache, preprocess, train_async
from vla_lib.core.files import read_json
from vla_lib.core.run_folder import read_record

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)"),
]
BROKEN = [f"A_broken/recv_all_20200101_00000{number}" for number in range(3)]
RAW = "New_dataset/Silicone_block/recv_all_20250101_000000"  # not prepared
STEP_S = 0.1
LITTLE = {"image_resize_height": 28, "image_resize_width": 28}


@pytest.fixture(scope="module")
def many(root, tmp_path_factory) -> Path:
    """300 episodes, links of those of `root`, one of them not prepared; three broken ones sort first."""
    folder = tmp_path_factory.mktemp("many") / "data"
    preprocess.main(preprocess.Settings(root, workers=1, quiet=True))
    linked_root(root, folder, 8)
    build_vl_cache.main(build_vl_cache.Settings(folder, vl_model="tiny", vl_pooling="grid:2x3", **LITTLE))
    for dataset in {key.split("/")[0] for key in read_json(folder / "verdicts.json")}:
        shutil.rmtree(folder / dataset)
    linked_root(root, folder, 300)  # the rest are copies, which no training takes
    for key in BROKEN:
        (folder / key).mkdir(parents=True)
        (folder / key / "robot_state.csv").write_text("")
    preprocess.main(preprocess.Settings(folder, dataset_dirs=("A_broken",), workers=1, quiet=True))
    for name in ("data.pkl", "sensor.npy"):
        (folder / RAW / name).unlink()
    return folder


@pytest.fixture
def unmarked(many) -> Path:
    """The same without the marks that other tests made."""
    (many / "marks.yaml").unlink(missing_ok=True)
    return many


@pytest.fixture(scope="module")
def inspecting(desk, many):
    """Notebook 01 run on them."""
    desk.open(desk.copy("01_inspect_episodes", "triage", dataset_root=str(many)))
    desk.run_all()
    assert desk.errors() == []
    return EpisodePage(desk)


@pytest.fixture
def triage(inspecting):
    """Its table, unfiltered."""
    inspecting.filter("")
    return inspecting


def test_verdicts_of_all_are_listed_filtered_and_sorted(triage):
    """The broken ones too, which end nothing though they sort first."""
    assert triage.count() == "303 of 303 episodes"
    assert triage.rows.count() < 150  # those far down are made when they are scrolled to
    first = triage.rows.first
    assert first.get_attribute("data-key") == BROKEN[0] and "✗ rejected" in first.inner_text()
    assert "holds no robot log" in first.inner_text() and triage.current() not in ("", *BROKEN)
    triage.filter("rejected")
    assert triage.keys() == BROKEN
    triage.filter("New_dataset")
    for key in (RAW, RAW[:-1] + "4"):
        triage.desk.until(lambda key=key: triage.row(key).locator("svg").count() == 2)  # force and way
        assert triage.row(key).locator("img").count() == 3
    triage.desk.picture("triage-filtered", cell="all-episodes")
    triage.filter("")
    for way in (1, -1):
        triage.place.locator("th.vla-seconds").click()
        assert len(triage.keys()) == 303
        seconds = [float(text or -1) for text in triage.place.locator("td.vla-seconds").all_inner_texts()]
        assert len(seconds) == 303 and seconds == sorted(seconds, reverse=way < 0)
    triage.place.locator("th.vla-episode").click()


def test_the_next_one_comes_by_button_and_by_key(triage):
    start = triage.current()
    for forth, back in (("next ▶", "◀ previous"), ("n", "p")):
        triage.act(forth)
        following = triage.opened(start)
        triage.act(back)
        assert triage.opened(following) == start
    for act in ("next rejected", "r"):
        before = triage.current()
        triage.act(act)
        assert triage.opened(before) in BROKEN
        triage.desk.until(lambda: "no robot log" in triage.said())
        assert triage.place.locator(".vla-chart, .vla-pictures img").count() == 0  # never an old one under an error
    triage.desk.picture("triage-rejected", cell="all-episodes")


def test_a_decision_is_in_the_page_and_in_marks_yaml(triage, many):
    key, row = triage.open_good(7), triage.place.locator("tr.vla-current")
    said = lambda: yaml.safe_load((many / "marks.yaml").read_text()).get(key)  # noqa: E731
    triage.act("x")
    triage.desk.until(lambda: "excluded" in row.inner_text() and "vla-out" in (row.get_attribute("class") or ""))
    assert said() == {"exclude": True}
    triage.place.get_by_placeholder("note").fill("바늘이 휘었다 <b>")
    triage.place.get_by_placeholder("note").press("Enter")
    triage.place.locator("select").filter(has_text="no label").select_option("failure")
    triage.desk.until(lambda: "failure, 바늘이 휘었다 <b>" in row.inner_text())
    triage.act("include")
    for key_pressed in ("Home", *["ArrowRight"] * 3):
        triage.step(key_pressed)
    triage.act("[")
    triage.desk.until(lambda: "0.3 s to the end" in row.inner_text())
    assert said() == {"exclude": False, "note": "바늘이 휘었다 <b>", "label": "failure", "start_s": 0.3}
    triage.desk.picture("triage-marked", 1330, "all-episodes")
    triage.filter("바늘이")
    assert triage.count() == "1 of 303 episodes"
    triage.filter("")
    triage.act("p")
    before = triage.opened(key)
    triage.act("u")
    assert triage.opened(before) != key  # the next one has a mark


def test_one_cursor_goes_through_all_panels(triage):
    """Hover, click, zoom and keys; a key that is held skips no state."""
    triage.open_good(11)
    chart = triage.place.locator(".vla-chart .u-over").nth(1)
    chart.scroll_into_view_if_needed()
    wide = chart.bounding_box()["width"]
    place = lambda part: {"x": part * wide, "y": 40}  # noqa: E731
    triage.place.press("Home")  # it opens at its middle
    triage.desk.until(lambda: triage.time() == 0)
    chart.hover(position=place(0.5))
    assert re.search(r"\d s, sample \d+", triage.place.locator(".vla-chart .u-legend").nth(1).inner_text())
    chart.click(position=place(0.75))
    triage.desk.until(lambda: triage.time() > 3)
    whole = triage.time() / 0.75
    chart.drag_to(chart, source_position=place(0.2), target_position=place(0.4))
    chart.click(position=place(0.5))
    triage.desk.until(lambda: abs(triage.time() - 0.3 * whole) < 2 * STEP_S)
    ages = triage.place.locator("figcaption").all_inner_texts()
    assert len(ages) == 5 and all("ms old" in text for text in ages)
    lines = triage.place.locator(".vla-now").evaluate_all("all => all.map(one => one.style.left)")
    assert len(lines) >= 6 and len(set(lines)) == 1
    triage.desk.picture("triage-zoomed", 1330, "all-episodes")
    chart.dblclick(position=place(0.5))
    chart.click(position=place(0.75))
    triage.desk.until(lambda: abs(triage.time() - 0.75 * whole) < 2 * STEP_S)
    triage.place.press("Home")
    triage.desk.until(lambda: triage.time() == 0)
    triage.place.locator("output").evaluate(
        "clock => { window.seen = []; const note = () => window.seen.push(parseFloat(clock.textContent));"
        " new MutationObserver(note).observe(clock, {childList: true}) }"
    )
    while len(seen := triage.desk.page.evaluate("window.seen")) < 8:
        triage.desk.page.keyboard.down("ArrowRight")
    triage.desk.page.keyboard.up("ArrowRight")
    assert seen == pytest.approx([STEP_S * (1 + number) for number in range(len(seen))])
    triage.act("Space")
    triage.desk.until(lambda: triage.time() > seen[-1] + 1)
    triage.act("Space")
    assert "▶ play" in triage.place.inner_text()


def test_two_episodes_stand_side_by_side(triage):
    triage.open_good(0)
    triage.act("compare")
    triage.row(triage.good()[2]).click()
    titles = triage.place.locator(".vla-title")
    triage.desk.until(lambda: titles.count() == 2, 60)
    assert len(set(titles.all_inner_texts())) == 2
    ages = triage.place.locator("figcaption")
    for way in ("aligned by contact", "aligned by time"):
        triage.place.locator("select").filter(has_text="aligned").select_option(way)
        triage.step("ArrowRight")
        assert ages.count() == 10 and all("old" in text for text in ages.all_inner_texts())
        triage.desk.picture(f"triage-{way.replace(' ', '-')}", 1330, "all-episodes")


def test_instants_that_follow_each_other_fast_damage_no_picture(triage):
    """A picture whose place another one takes while it is decoded is not a damaged one."""
    triage.open_good(5)
    fast = (
        "slider => { for (const part of [0.1, 0.9, 0.3, 0.7, 0.2, 0.8]) {"
        " slider.value = Math.round(part * slider.max); slider.dispatchEvent(new Event('input')) } }"
    )
    ages = triage.place.locator("figcaption")
    for _ in range(10):
        before = int(triage.place.get_attribute("data-drawn"))
        triage.place.locator("input[type=range]").evaluate(fast)
        triage.desk.until(lambda before=before: int(triage.place.get_attribute("data-drawn")) >= before + 6)
        shown = ages.all_inner_texts()
        assert all("ms old" in text for text in shown)
        for key in ("ArrowRight", "ArrowLeft"):
            triage.step(key)
        assert ages.all_inner_texts() == shown  # of the last instant, and of no earlier one that came late


def test_what_was_picked_is_kept(triage):
    """Over "Run All", in run.json."""
    picked = triage.open_good(4)
    record = lambda: read_record(max(triage.desk.runs()))["parameters"]["episode"]  # noqa: E731
    triage.desk.until(lambda: record() == picked)
    first = max(triage.desk.runs())
    triage.desk.run_all()
    again = EpisodePage(triage.desk)
    assert triage.desk.errors() == [] and max(triage.desk.runs()) != first
    assert again.current() == picked == record()


def test_stop_interrupt_and_failure_are_sentences_and_one_run_goes_on(desk, unmarked):
    """A training on 300 episodes, stopped, resumed and interrupted, resumed and killed: one line in the lab book."""
    before = set(desk.runs())
    given = {"dataset_root": str(unmarked), "max_steps": 1_000_000, "num_workers": 1} | LITTLE

    def train(**more: Any) -> Any:
        desk.open(desk.copy("04_train_async", "night", **FEW | given | more))
        desk.start_all()
        cell = desk.show("run-training")
        desk.until(lambda: shows_curves(desk, cell))
        return cell

    def ended(state: str) -> str:
        desk.until(desk.finished)
        assert len(desk.runs()) == len(before) + 1 and len(desk.errors()) == 1
        assert read_record(found)["state"] == state
        shown = desk.show("run-training").inner_text()
        assert "Traceback" not in shown
        return shown

    cell = train()
    (found,) = set(desk.runs()) - before
    desk.picture("training")
    stop(desk, cell, found, step(found))
    assert f'go on with resume_run = "{found.name}"' in ended("cancelled")
    desk.run_cell("sampled-chunks")
    desk.until(lambda: "This cell needs found, which a cell above makes" in desk.show("sampled-chunks").inner_text())
    desk.picture("stopped-on-300", cell="run-training")

    cell, at = train(resume_run=found.name), step(found)
    desk.until(lambda: step(found) > at)
    desk.command("notebook:interrupt-kernel")
    assert "the cell was interrupted; the job stopped" in ended("cancelled")

    cell, at = train(resume_run=found.name), step(found)
    desk.until(lambda: step(found) > at)
    rank = "vla_lib.train_async --dataset-root", str(found)
    words = {one: " ".join(one.info["cmdline"] or ()) for one in psutil.process_iter(["cmdline", "create_time"])}
    ranks = [one for one, said in words.items() if all(word in said for word in rank) and "torch.dist" not in said]
    min(ranks, key=lambda one: one.info["create_time"]).kill()  # the others are its loaders
    assert "failed: rank 0 was killed by SIGKILL" in ended("failed")
    desk.picture("killed-on-300", cell="run-training")


def test_a_checkpoint_that_was_picked_is_the_runs(desk, unmarked):
    """In notebooks 06 and 07: in run.json, kept over "Run All", run again by `vla rerun`."""
    trained = desk.folder.parent / "runs" / "20260101-000000-picks"
    common = {"max_steps": 2, "num_workers": 0, "val_fraction": 0.3, "batch_size": 8, "grad_accum_steps": 1}
    train_async.main(train_async.Settings(unmarked, run_dir=trained, **LITTLE, **common))
    files = [trained / "checkpoints" / f"qwen_vla_async{name}.pt" for name in ("_best", "_final")]
    again = None
    for name in ("06_evaluate", "07_rehearse"):
        given = {"checkpoint": str(files[0]), "closed_loop_seeds": 0, "max_time_s": 2.0, "workers": 1}
        desk.open(desk.copy(name, f"picks-{name}", dataset_root=str(unmarked), **given))
        for cell in ("parameters", "begin"):
            desk.run_cell(cell)
        listed = desk.show("begin").locator("select").first
        listed.wait_for(timeout=60_000)
        listed.select_option(next(one for one in listed.locator("option").all_inner_texts() if str(files[1]) in one))
        picked = lambda: read_record(max(desk.runs()))["parameters"]["checkpoint"]  # noqa: E731
        desk.until(lambda picked=picked: picked().endswith(f"={files[1]}"))
        first = max(desk.runs())
        desk.run_all()
        assert desk.errors() == [] and max(desk.runs()) != first and picked().endswith(f"={files[1]}")
        desk.picture(f"picked-{name}", cell="begin")
        again = again or max(desk.runs())
    environment = os.environ | {"VLA_RUNS": str(again.parent)}
    subprocess.run([Path(sys.executable).with_name("vla"), "rerun", again.name], check=True, env=environment)
    assert max(desk.runs()) != again and picked().endswith(f"={files[1]}")
