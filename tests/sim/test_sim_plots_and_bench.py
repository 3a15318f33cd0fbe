"""Figures of attempts and the benchmark rows."""

import numpy as np
import pytest

from vla_lib.benchmarks import sim as bench
from vla_lib.sim.demonstrator import demonstrator_action
from vla_lib.sim.rig import SimRig
from vla_lib.workbench.plots import sim as plots


@pytest.fixture(scope="module")
def attempt():
    rig = SimRig(pictures=False, seed=5)
    observation, info = rig.reset()
    samples, times, done = [observation["sensor"]], [observation["sensor_timestamps"]], False
    while not done:
        observation, _, terminated, truncated, info = rig.step(demonstrator_action(rig))
        samples.append(observation["sensor"])
        times.append(observation["sensor_timestamps"])
        done = terminated or truncated
    return rig.path(), info["truth"], np.concatenate(samples), np.concatenate(times)


def labels(figure) -> str:
    return " ".join(f"{a.get_xlabel()} {a.get_ylabel()} {a.get_title()}" for a in figure.axes)


def test_the_path_holds_every_tick_since_the_reset(attempt):
    path, truth, samples, times = attempt
    assert len(path["t_s"]) == len(samples) == len(path["position_mm"]) == len(path["force_mN"])
    assert np.diff(path["t_s"]) == pytest.approx(1 / 650)
    # the last samples' force is the true one with noise and bias
    assert np.abs(samples[-100:, 0] - path["force_mN"][-100:]).mean() < 4


def test_figures_show_data_with_units(attempt):
    path, truth, samples, times = attempt
    figure = plots.attempt(path, truth, "seed 5")
    text = labels(figure)
    assert all(unit in text for unit in ("x (mm)", "y (mm)", "time (s)", "force (mN)", "membrane (mm)"))
    above = next(axis for axis in figure.axes if axis.get_title() == "from above")
    assert above.lines[0].get_xdata()[-1] == pytest.approx(path["position_mm"][-1, 0])
    many = plots.attempts_from_above([path["position_mm"]] * 2, [truth] * 2, [True, False])
    assert "1 of 2 succeeded" in labels(many)
    m_mode = plots.sensor_m_mode(samples, times - times[0])
    assert "distance from tip (mm)" in labels(m_mode)
    assert m_mode.axes[0].images[0].get_array().shape == (1025, 1500)
    pictures = {"View1_left": np.zeros((18, 32, 3), np.uint8), "View5": np.full((18, 32, 3), 200, np.uint8)}
    assert len(plots.montage([pictures, pictures], ["start", "end"]).axes) == 4


def test_benchmark_rows_are_measured():
    row = bench.pictures_row(seconds=0.2)
    assert row.ours > 10 and row.ratio == pytest.approx(row.ours / row.baseline) and row.unit == "pictures/s"
    step = bench.rig_row()
    assert step.ours > 0.2 and step.name == "sim.step"
