"""Force and A-scans: where the echoes lie, what the force does, and what the sensor cannot know."""

from dataclasses import replace

import numpy as np
import pytest

from needle_rig.arm import TICK_HZ, Motion
from needle_rig.tissue import BIN_MM, BINS, RANGE_MM, Tissue
from needle_rig.world import sample_world


def straight_down(world, start_mm: float, end_mm: float, speed_mm_s: float = 2.0, xy=(175.0, 0.0)) -> Motion:
    """Tip heights over the membrane from `start_mm` to `end_mm` at constant speed."""
    n = max(2, int(abs(start_mm - end_mm) / speed_mm_s * TICK_HZ))
    z = world.membrane_z_mm + np.linspace(start_mm, end_mm, n)
    return Motion(
        np.arange(1, n + 1) / TICK_HZ, np.column_stack([np.full(n, xy[0]), np.full(n, xy[1]), z]), np.zeros((n, 3))
    )


def look(world, heights_mm, punctured: bool) -> np.ndarray:
    """Mean A-scan (BINS,) of 65 samples at each height over the membrane."""
    tissue = Tissue(world)
    z = np.repeat(world.membrane_z_mm + np.atleast_1d(heights_mm), 65)
    samples = tissue.measure(z, np.zeros(len(z)), np.full(len(z), punctured))
    return samples[:, 1:].reshape(-1, 65, BINS).mean(axis=1)


def peak_mm(scan: np.ndarray) -> float:
    """Place of the brightest echo, speckle smoothed."""
    return float(np.argmax(np.convolve(scan, np.ones(9) / 9, mode="same")) * BIN_MM)


@pytest.mark.parametrize("seed", range(4))
def test_the_membranes_echo_lies_at_the_true_distance(seed):
    world = sample_world(seed)
    for height in (0.5, 1.0, 2.0, 3.5, 5.0, 6.5):
        (scan,) = look(world, height, punctured=False)
        assert peak_mm(scan) == pytest.approx(height, abs=0.06)
        assert scan.max() > 40


def test_beyond_its_range_the_sensor_sees_no_membrane():
    (scan,) = look(sample_world(1), RANGE_MM + 2.0, punctured=False)
    assert scan.max() < 32


def test_after_the_puncture_the_deeper_layer_tells_the_depth():
    world = sample_world(2)
    for depth in (0.5, 1.0, 1.5):
        (scan,) = look(world, -depth, punctured=True)
        assert peak_mm(scan) == pytest.approx(world.layer_mm - depth, abs=0.2)
        assert scan[:20].max() < 40  # the membrane lies behind the tip


def test_force_rises_to_the_puncture_drops_to_friction_and_rises_at_the_deeper_layer():
    world = sample_world(3)
    tissue = Tissue(world)
    motion = straight_down(world, 6.0, -world.layer_mm - 0.2)
    force, punctured = tissue.sense(motion)
    depth = world.membrane_z_mm - motion.position_mm[:, 2]
    in_air = motion.position_mm[:, 2] > world.surface_z_mm
    at = int(np.argmax(punctured))
    assert force[in_air].max() == 0
    assert depth[at] == pytest.approx(world.puncture_indent_mm, abs=0.01)
    assert force[at - 1] > 3 * force[at] > 0
    assert force[depth > world.layer_mm + 0.1].min() > 2 * force[at]
    assert tissue.punctured and tissue.puncture_t_s == pytest.approx(motion.t_s[at])
    back, still = tissue.sense(straight_down(world, -1.0, 1.0))
    assert still.all() and back.max() < force[at - 1]  # no second membrane on the way out


def test_before_the_puncture_the_membrane_stays_at_the_tip():
    world = sample_world(4)
    (pressed,) = look(world, -0.2, punctured=False)
    assert pressed[:6].mean() > 60


def test_the_sensor_knows_nothing_of_the_lateral_place():
    world = sample_world(5)
    elsewhere = replace(world, target_xy_mm=(166.0, 9.0), target_yaw_deg=-20.0)
    results = []
    for shown, xy in ((world, (175.0, 0.0)), (elsewhere, (184.0, -7.0))):
        tissue = Tissue(shown)
        motion = straight_down(shown, 3.0, -1.0, xy=xy)
        results.append(tissue.measure(motion.position_mm[:, 2], *tissue.sense(motion)))
    assert np.array_equal(*results)
