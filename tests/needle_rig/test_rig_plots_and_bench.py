"""Figures of rollouts and the benchmark rows."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks import __main__ as bench_front_door
from benchmarks import needle_rig as bench
from needle_rig import NeedleInsertion
from needle_rig.demonstrator import demonstrator_action
from needle_rig.world import VIEWS
from vla_lib.core.files import read_json
from vla_lib.workbench.plots import rollouts as plots


@pytest.fixture(scope="module")
def rollout():
    rig = NeedleInsertion(views=())
    observation, info = rig.reset(seed=5)
    samples, times, done = [observation["sensor"]], [observation["sensor_timestamps"]], False
    while not done:
        observation, _, terminated, truncated, info = rig.step(demonstrator_action(rig))
        samples.append(observation["sensor"][-65:])
        times.append(observation["sensor_timestamps"][-65:])
        done = terminated or truncated
    return rig.path(), info["truth"], np.concatenate(samples), np.concatenate(times)


def labels(figure) -> str:
    return " ".join(f"{a.get_xlabel()} {a.get_ylabel()} {a.get_title()}" for a in figure.axes)


def test_the_path_holds_every_tick_since_the_reset(rollout):
    path, truth, samples, times = rollout
    assert len(path["t_s"]) == len(samples) == len(path["position_mm"]) == len(path["force_mN"])
    assert np.diff(path["t_s"]) == pytest.approx(1 / 650)
    # the last samples' force is the true one with noise and bias
    assert np.abs(samples[-100:, 0] - path["force_mN"][-100:]).mean() < 4


def test_figures_show_data_with_units(rollout):
    path, truth, samples, times = rollout
    row = {"path": path, "truth": truth}
    figure = plots.rollout(row, "seed 5")
    text = labels(figure)
    assert all(unit in text for unit in ("x (mm)", "y (mm)", "time (s)", "force (mN)", "membrane (mm)"))
    above = next(axis for axis in figure.axes if axis.get_title() == "from above")
    assert above.lines[0].get_xdata()[-1] == pytest.approx(path["position_mm"][-1, 0])
    many = plots.from_above([row | {"success": True}, row | {"success": False}])
    assert "1 of 2 succeeded" in labels(many)
    m_mode = plots.sensor(samples, times - times[0])
    assert "distance from tip (mm)" in labels(m_mode)
    assert m_mode.axes[0].images[0].get_array().shape == (1025, 1500)
    pictures = {"View1_left": np.zeros((18, 32, 3), np.uint8), "View5": np.full((18, 32, 3), 200, np.uint8)}
    assert len(plots.montage([pictures, pictures], ["start", "end"]).axes) == 4


@pytest.fixture
def ticking(monkeypatch):
    """The benchmark's clock goes on by 10 ms with every look at it."""
    looks = itertools.count()
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: next(looks) / 100))


def test_pictures_are_counted_and_timed(ticking, monkeypatch):
    drawn = []
    picture = SimpleNamespace(show=lambda world: None, picture=lambda view, *_: drawn.append(view), close=lambda: None)
    monkeypatch.setattr(bench, "open_scene", lambda *_: picture)
    row = bench.pictures_row(0.205)
    assert drawn == [*VIEWS, *VIEWS * 4]  # all once before the clock starts, then for 20 looks at it
    assert (row.ours, row.ratio, row.unit) == (pytest.approx(20 / 0.22), pytest.approx(20 / 0.22 / 25), "pictures/s")


def test_a_recording_is_timed_with_its_tails(ticking, monkeypatch):
    def record(settings, show):
        assert (settings.episodes_f1, settings.episodes_f2, settings.workers) == (6, 2, 2)
        return {"episodes": [{"seconds": 10.0}] * 8}

    monkeypatch.setattr(bench, "record", record)
    assert bench.recording_row(8, workers=2).ratio == pytest.approx(8 * 13 / 0.01)


def test_the_rigs_own_time_is_compared_with_the_clocks(ticking):
    rig, done = NeedleInsertion(views=()), False
    rig.reset(seed=0)
    while not done:
        *_, terminated, truncated, info = rig.step(demonstrator_action(rig))
        done = terminated or truncated
    row = bench.rig_row()
    assert (row.name, row.ours) == ("needle_rig.step", pytest.approx(info["time_s"] / 0.01))


def test_the_bench_prints_and_writes_its_rows(tmp_path, capsys):
    found = bench_front_door.main(
        bench_front_door.BenchmarkSettings(rooms=("needle_rig",), fast=True, output=tmp_path / "rows.json")
    )
    assert read_json(tmp_path / "rows.json") == found and found["rows"] and found["machine"]["cores"]
    printed = capsys.readouterr().out
    assert all(row["name"] in printed and row["ratio"] > 0 for row in found["rows"])
