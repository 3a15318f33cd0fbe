"""Disturbances: each changes what its name says, by the stated amount, and nothing else; measured on what the rig
gives."""

from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from needle_rig import NeedleInsertion
from needle_rig.disturbances import CHANGES, disturbed, varied
from needle_rig.settings import RecordSettings
from needle_rig.world import VIEWS, RigError, sample_world

STILL = np.zeros(7)


@pytest.fixture(scope="module")
def rig():
    made = NeedleInsertion()
    yield made
    made.close()


@pytest.fixture(scope="module")
def blind():
    return NeedleInsertion(views=())


def pictures(rig, name, seed=5):
    return rig.reset(seed=seed, options={"disturbance": name})[0]["pictures"]


def coloured(pictures, channel) -> float:
    """Pixels of all pictures in which one channel is far above the others."""
    found = 0
    for picture in pictures.values():
        others = np.delete(picture.astype(int), channel, axis=2).max(2)
        found += int((picture[..., channel].astype(int) > others + 50).sum())
    return float(found)


def changed(rig, name) -> list[str]:
    before = pictures(rig, "")
    after = pictures(rig, name)
    return [view for view in VIEWS if np.abs(before[view].astype(int) - after[view].astype(int)).max() > 12]


def test_pictures_change_as_the_name_says(rig):
    plain = pictures(rig, "")
    assert all(np.array_equal(plain[view], pictures(rig, "")[view]) for view in VIEWS)
    level = np.mean([picture.mean() for picture in plain.values()])
    for name, low, high in (("light halved", 0.35, 0.65), ("light doubled", 1.3, 2.2)):
        lit = np.mean([picture.mean() for picture in pictures(rig, name).values()])
        assert low < lit / level < high
    red, green = coloured(plain, 0), coloured(plain, 1)
    for name, scale in (("larger target", 1.25), ("smaller target", 0.8)):
        assert coloured(pictures(rig, name), 0) / red == pytest.approx(scale**2, rel=0.1)
        assert coloured(pictures(rig, name), 1) == pytest.approx(green, rel=0.02)  # the needle's hub
    assert green > 300 and coloured(pictures(rig, "needle of another colour"), 1) < 0.05 * green
    covered = pictures(rig, "one camera covered")
    dark = [view for view in VIEWS if not covered[view].any()]
    assert len(dark) == 1 and changed(rig, "one camera covered") == dark
    assert changed(rig, "cameras moved") == list(VIEWS)
    assert changed(rig, "force drifts") == changed(rig, "OCT contrast halved") == []


def test_every_camera_moves_by_two_millimetres_and_one_degree_in_directions_of_its_own():
    before, after = sample_world(5).looks, disturbed(sample_world(5), "cameras moved").looks
    moved = after.camera_place_mm - before.camera_place_mm
    assert np.linalg.norm(moved, axis=1) == pytest.approx(np.full(5, 2.0))
    turns = Rotation.from_rotvec(after.camera_turn_deg, degrees=True)
    turned = np.degrees((turns * Rotation.from_rotvec(before.camera_turn_deg, degrees=True).inv()).magnitude())
    assert turned == pytest.approx(np.ones(5), abs=0.01)
    others = [disturbed(sample_world(seed), "cameras moved").looks.camera_place_mm for seed in (5, 6)]
    assert np.array_equal(others[0], after.camera_place_mm) and not np.allclose(others[0], others[1], atol=0.5)


def test_the_sensor_drifts_and_pales_as_the_name_says(blind):
    world = sample_world(5)
    near = replace(world, start_mm=(*world.start_mm[:2], world.membrane_z_mm + 4.0))  # its echo is in range

    def resting(name):
        observation = blind.reset(seed=5, options={"world": near, "disturbance": name})[0]
        for _ in range(20):
            observation = blind.step(STILL)[0]
        return observation["sensor"][:, 0].mean(), observation["sensor"][:, 1:]

    (force, scans), (drifted, same), (still, pale) = (resting(n) for n in ("", "force drifts", "OCT contrast halved"))
    assert abs(drifted - force) == pytest.approx(2.5, abs=0.01)  # the mean of the second after two seconds
    assert np.array_equal(scans, same) and still == force
    bright = scans.mean(0) > 40
    assert bright.sum() > 5 and ((pale.mean(0) - 20) / (scans.mean(0) - 20))[bright] == pytest.approx(0.5, abs=0.02)


def test_the_arm_lags_twice_as_much(blind):
    def behind_s(name):
        blind.reset(seed=5, options={"disturbance": name})
        for _ in range(20):
            blind.step(np.array([0.5, 0, 0, 0, 0, 0, 1]))
        return (blind.arm.command[0] - blind.arm.pose[0]) / 5.0  # mm behind a ramp of 5 mm/s

    assert behind_s("arm lags twice as much") == pytest.approx(2 * behind_s(""), rel=0.02)


def test_the_truth_that_is_judged_stays_and_unknown_names_are_refused(blind):
    for name in CHANGES:
        assert blind.reset(seed=5, options={"disturbance": name})[1]["truth"] == sample_world(5).to_dict()
    with pytest.raises(RigError, match="no disturbance 'fog'; it has cameras moved, one camera covered"):
        blind.reset(seed=5, options={"disturbance": "fog"})


def test_varied_recordings_are_spread_wider_than_each_disturbance():
    """Over many seeds: every look beyond what a disturbance makes of it, in both directions, around the same places."""
    seeds = range(200)
    plain, wide = [sample_world(seed) for seed in seeds], [varied(sample_world(seed)) for seed in seeds]
    light = np.array([b.looks.light_level / a.looks.light_level for a, b in zip(plain, wide, strict=True)])
    assert light.min() < 0.5 and light.max() > 2.0 and 0.8 < np.median(light) < 1.25
    moved = np.array(
        [
            np.linalg.norm(b.looks.camera_place_mm - a.looks.camera_place_mm, axis=1)
            for a, b in zip(plain, wide, strict=True)
        ]
    )
    assert moved.shape == (200, 5) and moved.max() > 2.0 and moved.min() < 0.1
    scale = np.array([world.looks.target_scale for world in wide])
    assert scale.min() < 0.8 and scale.max() > 1.25
    drift = np.array([world.force_drift_mN_s for world in wide])
    assert drift.min() < -1.0 and drift.max() > 1.0 and abs(drift.mean()) < 0.2
    assert min(world.oct_contrast for world in wide) < 0.5
    same = ("target_xy_mm", "gel_mm", "start_mm", "arm_lag_s")
    assert all(getattr(a, name) == getattr(b, name) for a, b in zip(plain, wide, strict=True) for name in same)


def test_a_varied_recording_is_another_one_and_a_plain_one_is_as_it_was(tmp_path):
    plain, wide = (RecordSettings(tmp_path, varied=given) for given in (False, True))
    assert "varied" not in plain.plan() and wide.plan() == plain.plan() | {"varied": True}
    world = wide.world(3, "Silicone_block")
    assert world.looks.light_level != sample_world(3, "Silicone_block").looks.light_level
