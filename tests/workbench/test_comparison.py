"""Notebook 09's parts: the table of runs, what is side by side, a sweep's plots, and what a person says of a run."""

from pathlib import Path

import lab_book
import pytest
from matplotlib import pyplot

from vla_lib.core.errors import UserError
from vla_lib.workbench import comparison, runs
from vla_lib.workbench.comparison import RunBrowser
from vla_lib.workbench.plots import comparison as plots


@pytest.fixture
def two(runs_folder: Path) -> tuple[Path, Path]:
    runs_folder.mkdir()
    first = lab_book.write_training(runs_folder / "20260101-000000-04_train_async", 1e-4, 0.5)
    second = lab_book.write_training(runs_folder / "20260102-000000-04_train_async", 5e-5, 0.2)
    lab_book.write_evaluation(
        runs_folder / "20260103-000000-06_evaluate",
        {first: [True, False, False, True], second: [True, True, True, True]},
    )
    return first, second


def test_what_differs_stands_side_by_side(two):
    assert comparison.parameters(two).to_dict("records") == [
        {"parameter": "lr", two[0].name: "0.0001", two[1].name: "5e-05"}
    ]
    table = comparison.results(two).set_index("run")
    assert table.loc[two[0].name, ["val_mae_mm", "closed loop", "95 % interval"]].tolist() == [
        1.0, "2 of 4", "20 to 90 %"
    ]  # fmt: skip
    (pair,) = comparison.pairs(two).to_dict("records")
    assert (pair["phantoms"], pair["both"], pair["only one"], pair["only other"], pair["p value"]) == (4, 2, 0, 2, 0.5)
    assert [Path(path).name for path in comparison.checkpoints(two)["checkpoint"]] == ["qwen_vla_async_best.pt"] * 2


def test_both_curves_are_drawn_over_steps_and_over_time(two):
    for by, end in (("step", 40), ("time", 2.0)):
        loss, held_out = plots.learning_curves(comparison.curves(two), by).axes
        assert [line.get_label() for line in loss.lines] == [path.name for path in two]
        assert all(line.get_xdata()[-1] == pytest.approx(end) for panel in (loss, held_out) for line in panel.lines)
        assert held_out.lines[0].get_ydata()[-1] > held_out.lines[1].get_ydata()[-1]
    assert "no run that trains" in plots.learning_curves({}).axes[0].texts[0].get_text()


def test_the_table_is_filtered_sorted_and_ticked(two, monkeypatch):
    monkeypatch.setattr(comparison, "interactive", lambda: True)
    browser = RunBrowser(notebook="04_train_async", compare=[two[1].name])
    drawn: list[list[Path]] = []
    browser.view(lambda chosen: drawn.append(chosen) or plots.learning_curves(comparison.curves(chosen)))
    assert drawn == [[two[1]]]
    browser._ticks[two[0].name].value = True
    assert drawn[-1] == [two[1], two[0]]  # newest first
    browser.sort.value = "val_action_loss"
    assert list(browser._ticks) == [two[1].name, two[0].name]
    browser.down.value = True
    assert list(browser._ticks) == [two[0].name, two[1].name] and browser.chosen == [two[0], two[1]]
    browser.filter.value = "lr=5e-05"
    assert list(browser._ticks) == [two[1].name]
    browser.filter.value = "no such word"
    assert browser.message.value == "No run fits the filter." and browser.chosen  # ticks stay
    with pytest.raises(UserError, match="no column lrr"):
        RunBrowser(sort="lrr")


def test_a_run_is_named_starred_noted_and_removed_with_a_question(two, monkeypatch):
    monkeypatch.setattr(comparison, "interactive", lambda: True)
    browser = RunBrowser(notebook="04_train_async", compare=[two[0].name, two[1].name])
    browser.label.value = "wide <b>"
    browser.save.click()
    assert browser.message.value == "Tick the one run that you mean." and runs.about(two[1])["label"] == ""
    browser._ticks[two[0].name].value = False
    browser.label.value, browser.note.value = "wide <b>", "the good one"
    browser.save.click()
    browser.star.click()
    assert runs.about(two[1]) == {"label": "wide <b>", "star": True, "note": "the good one"}
    assert browser.frame.loc[two[1].name, ["run", "star", "note"]].tolist() == ["wide <b>", "★", "the good one"]
    shown = "".join(row.children[1].value for row in browser._rows.children)
    assert "wide &lt;b&gt;" in shown and "<b>" not in shown
    assert list(comparison.curves([two[1]])) == ["wide <b>"]
    browser.delete.click()
    assert "named by" not in browser.message.value and "checkpoints included?" in browser.message.value
    assert two[1].exists()  # asked only
    browser.really.click()
    assert not two[1].exists() and two[0].exists() and list(browser.frame.index) == [two[0].name]
    (two[0] / "about.json").write_text("[")
    assert runs.about(two[0])["label"] == ""


def test_a_sweep_is_shown_with_its_spread_over_seeds_and_optunas_plots(write_notebook, runs_folder):
    sweep = lab_book.write_sweep(write_notebook("lr: float = 1.0\nseed: int = 0")).name
    table = comparison.overview(sweep)
    assert len(table) == 6 and set(table["setting"]) == {"001", "002", "003"} and table["objective"].notna().all()
    settings = comparison.settings(sweep)
    assert (settings["count"] == 2).all() and settings["mean"].is_monotonic_increasing
    assert (settings["max"] - settings["min"]).tolist() == pytest.approx([0.01] * 3)
    (panel,) = plots.seed_spread(comparison.sweep_rows(sweep), settings, comparison.objective(sweep)).axes
    assert [label.get_text() for label in panel.get_yticklabels()] == settings["setting"].tolist()
    dots = panel.lines[0]
    assert sorted(dots.get_xdata()) == sorted(table["objective"]) and sorted(dots.get_ydata()) == [0, 0, 1, 1, 2, 2]
    assert table["objective"].is_monotonic_increasing
    before = pyplot.get_fignums(), dict(pyplot.rcParams)
    for what in ("history", "importances", "parallel", "slice"):
        figure = plots.of_study(comparison.study_of(sweep), what, "val_action_loss")
        assert any(axes.has_data() for axes in figure.axes), what
    assert (pyplot.get_fignums(), dict(pyplot.rcParams)) == before  # neither drawn twice nor the look changed
    with pytest.raises(UserError, match="holds no study.journal"):
        comparison.study_of(table.index[0])
