"""Every figure of notebooks 01 and 02 is drawn from good and from broken episodes, with units on its axes."""

import io

import matplotlib
import numpy as np
import pytest
from preparing import prepare_all
from raw_episodes import JPEG, Raw

from vla_lib.episodes import Episode, find_prepared, load_prepared, recheck
from vla_lib.workbench.plots import rates

matplotlib.use("Agg")
T = np.arange(0, 2, 0.01)
CASES = {
    "whole": Raw("F1", seconds=2.0, right=True),
    "windows": Raw("F2", seconds=2.5, sensor_ahead=1.5, force_column=np.sin(np.arange(250) / 9)),
    "no_sensor": Raw("F0", seconds=2.0),
    "gaps": Raw("F3", seconds=2.0, views=(1, 3), row_times=T[(T < 0.7) | (T > 1.0)], first_picture={3: 0.9}),
}


@pytest.fixture(params=CASES)
def episode(request, tmp_path):
    path = CASES[request.param].write(tmp_path / "d")
    if request.param == "gaps":
        sorted((path / "View1").glob("*.jpg"))[0].write_bytes(
            JPEG[:10] + b"x" * 400 + b"\xff\xd9"
        )  # whole by its end, damaged inside
    return Episode.open(path)


def axes_with_lines(figure):
    figure.savefig(io.BytesIO(), format="png", dpi=30)
    return [axis for axis in figure.axes if axis.lines or axis.patches or axis.images]


def test_figures_of_rates(episode):
    assert axes_with_lines(rates.intervals(episode))
    timeline = rates.timeline(episode)
    assert {label.get_text() for label in timeline.axes[0].get_yticklabels()} >= {"robot", *episode.pictures}
    assert axes_with_lines(rates.offset_evidence(episode))


def test_figures_of_verdicts_and_of_the_check(tmp_path):
    path = CASES["whole"].write(tmp_path / "root" / "part1")
    (tmp_path / "root" / "part1" / "recv_all_20250101_000001").mkdir()
    reports = prepare_all(tmp_path / "root")
    bars = [bar.get_height() for bar in rates.verdicts([r.summary for r in reports]).axes[0].patches]
    assert bars == [1, 0, 1]
    assert axes_with_lines(rates.verdicts([]))
    table = recheck(load_prepared(find_prepared(tmp_path / "root")[0]), Episode.open(path), 5)
    assert "5 of 5" in rates.recheck(table).axes[2].get_title()
