"""The episodes' table and viewer: what Python answers, what a saved page holds, and marks that reach the file."""

import json
import re
from pathlib import Path

import pytest

from needle_rig.recorder import record
from needle_rig.settings import RecordSettings
from vla_lib import preprocess
from vla_lib.core.errors import UserError
from vla_lib.episodes.datasets import Marks
from vla_lib.workbench import tables, viewer
from vla_lib.workbench.viewer import EpisodeBrowser

BROKEN = "A_first/recv_all_20200101_000000"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two small recorded episodes, and a broken one that sorts first; judged."""
    folder = tmp_path_factory.mktemp("widgets") / "data"
    record(
        RecordSettings(
            dataset_root=folder, episodes_f1=1, episodes_f2=1, picture_width=160, picture_height=90, idle_tail_s=0.5
        )
    )
    (folder / BROKEN).mkdir(parents=True)
    (folder / BROKEN / "robot_state.csv").write_text("")
    preprocess.main(preprocess.Settings(folder, workers=1, quiet=True))
    return folder


@pytest.fixture
def browser(root, monkeypatch):
    """A browser, and what it sends."""
    made = EpisodeBrowser(root)
    made.sent = []
    monkeypatch.setattr(made, "send", lambda content, buffers=None: made.sent.append((content, buffers)))
    return made


def ask(browser, **asked):
    browser.sent.clear()
    browser._asked(browser, asked, [])
    return browser.sent[-1]


def test_a_broken_episode_that_sorts_first_is_a_row_with_its_reason_and_another_is_shown(browser):
    row = browser.rows[0]
    assert (row["key"], row["verdict"]) == (BROKEN, "rejected") and "holds no robot log" in row["reasons"]
    assert browser.key == browser.rows[1]["key"] and len(browser.first.broken) == 1
    answer, _ = ask(browser, open=BROKEN, place=0)
    assert "no robot log" in answer["error"] and answer["key"] == BROKEN and 0 not in browser._opened


def test_pictures_come_as_the_files_they_are(browser, root):
    answer, _ = ask(browser, ready=True)
    view = answer["episode"]["views"][0]
    told, buffers = ask(browser, pictures=[[0, view["name"], 3], [0, view["name"], 10**6]])
    assert told["pictures"] == [[0, view["name"], 3, "image/jpeg"], [0, view["name"], 10**6, ""]]
    episode = browser._opened[0]
    assert buffers[0] == (root / episode.path / episode.pictures[view["name"]].paths[3]).read_bytes()


def test_an_episode_is_sent_with_traces_of_its_own_samples(browser):
    drawn = ask(browser, ready=True)[0]["episode"]
    episode = browser._opened[0]
    position = next(trace for trace in drawn["traces"] if trace["title"] == "position from the start")
    row = 7 * position["every"]
    assert position["t"][7] == pytest.approx(episode.robot.t_s[row] - episode.start_s, abs=1e-3)
    assert position["values"][2][7] == pytest.approx(episode.robot.pose[row, 2] - episode.robot.pose[0, 2], abs=1e-3)
    force = next(trace for trace in drawn["traces"] if trace["title"] == "force")
    assert max(force["values"][-1]) == pytest.approx(float(episode.sensor.force.max()), rel=1e-3)  # no peak is lost
    assert json.loads(json.dumps(drawn, allow_nan=False)) == drawn


def test_a_mark_is_in_the_file_and_in_the_row_at_once(browser, root):
    key = browser.key
    ask(browser, mark=key, changes={"exclude": True, "note": "x"})
    assert Marks.load(root).of(key).said == {"exclude": True, "note": "x"}
    row = next(row for row in browser.rows if row["key"] == key)
    assert (row["excluded"], row["marks"], row["note"]) == (True, "excluded, x", "x")
    ask(browser, mark=key, changes={"exclude": None, "note": None, "end_s": 2.0})
    assert browser.sent[-1][0]["trimmed"][0][0] == 2.0 if 0 in browser._opened else True
    assert "refused" in ask(browser, mark=key, changes={"end_s": -1})[0]["error"]
    ask(browser, mark=key, changes={"end_s": None})


def test_a_glance_shows_pictures_force_and_way(browser):
    found = ask(browser, glance=[row["key"] for row in browser.rows])[0]["glance"]
    assert found[BROKEN] == {"pictures": [], "force": [], "way": []}
    good = found[browser.key]
    assert 2 <= len(good["pictures"]) <= 3 and len(good["way"]) > 10 and max(good["force"]) > min(good["force"])


def test_the_saved_page_needs_neither_kernel_nor_network(browser):
    page = browser.page(3).data
    assert page.count("data:image/jpeg;base64") >= 3 and "data:image/png;base64" in page and len(page) < 2.5e6
    assert not re.search(r"""(?:src|href)=['"]http|import\(|fetch\(|@import""", page)


def test_no_episode_fits_is_told_with_what_there_is(root):
    with pytest.raises(UserError, match="the datasets there are A_first, New_dataset, White_silicone_white_circle"):
        EpisodeBrowser(root, dataset="part1")


def test_where_every_episode_is_rejected_that_is_told():
    reports = [{"verdict": "rejected", "summary": {"valid": 0}}, {"verdict": "good", "summary": {"valid": 9}}]
    assert tables.best_report(reports) is reports[1]
    with pytest.raises(UserError, match="Every episode is rejected"):
        tables.best_report(reports[:1])


def test_the_script_is_one_module_that_anywidget_takes():
    assert viewer.script().count("export default") == 1 and "uPlot" in viewer.script()[:400]
