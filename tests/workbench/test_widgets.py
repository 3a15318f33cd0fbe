from pathlib import Path

import pytest

from needle_rig.recorder import record
from needle_rig.settings import RecordSettings
from vla_lib.core.errors import UserError
from vla_lib.workbench import triage, widgets


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Two small recorded episodes."""
    folder = tmp_path_factory.mktemp("widgets") / "data"
    record(
        RecordSettings(
            dataset_root=folder, episodes_f1=1, episodes_f2=1, picture_width=160, picture_height=90, idle_tail_s=0.5
        )
    )
    return folder


def test_the_browser_opens_the_first_episode_and_redraws_on_the_slider(root):
    browser = widgets.EpisodeBrowser(root)
    assert browser.chosen.index == 0
    first = bytes(browser.picture.value)
    assert first.startswith(b"\x89PNG")
    browser.time.value += 20
    assert bytes(browser.picture.value) != first


def test_the_browser_filters_by_dataset_and_text(root):
    browser = widgets.EpisodeBrowser(root)
    assert len(browser.chosen.options) == 2
    browser.dataset.value = "New_dataset"
    assert [label.split()[0][:8] for label, _ in browser.chosen.options] == ["episode_"]
    browser.filter.value = "no such name"
    assert browser.chosen.options == ()
    assert browser.message.value == "No episode fits the filter."
    browser.filter.value = ""
    assert browser.chosen.index == 0 and browser.message.value == ""


def test_the_static_twin_needs_neither_kernel_nor_network(root):
    page = widgets.EpisodeView(triage.open_first(root)[0]).slider(3).data
    assert page.count("data:image/jpeg;base64") == 3
    assert "http" not in page


def test_a_missing_episode_is_told_with_what_there_is(root):
    with pytest.raises(UserError, match="the datasets there are New_dataset, White_silicone_white_circle"):
        triage.open_first(root, "part1")


def test_where_every_episode_is_rejected_that_is_told():
    reports = [{"verdict": "rejected", "summary": {"valid": 0}}, {"verdict": "good", "summary": {"valid": 9}}]
    assert widgets.best_report(reports) is reports[1]
    with pytest.raises(UserError, match="Every episode is rejected"):
        widgets.best_report(reports[:1])


def test_another_root_lists_its_own_episodes(root, tmp_path):
    browser = widgets.EpisodeBrowser(tmp_path)
    assert browser.message.value == f"There is no recorded episode below {tmp_path}."
    browser.root.value = str(root)
    assert len(browser.chosen.options) == 2 and browser.message.value == ""
    assert bytes(browser.picture.value).startswith(b"\x89PNG")
