"""Pictures: what they show, what they hide, and what happens where nothing can draw."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from needle_rig import NeedleInsertion, render
from needle_rig import world as looks
from needle_rig.demonstrator import demonstrate, demonstrator_action
from needle_rig.render import open_scene, through_jpeg
from needle_rig.world import VIEWS, RigError, sample_world


@pytest.fixture(scope="module")
def scene():
    render.check_gl()
    made = open_scene(320, 180)
    yield made
    made.close()


def pictures_of(scene, position_mm, rotvec_deg) -> dict[str, np.ndarray]:
    return {view: scene.picture(view, position_mm, rotvec_deg) for view in VIEWS}


def project(scene, view: str, point_mm, width: int, height: int) -> tuple[float, float, float]:
    """Pixel (column, row) and distance in mm along the view's axis of a point of the base frame."""
    camera = scene.model.camera(view).id
    x, y, z = scene.data.cam_xmat[camera].reshape(3, 3).T @ (np.asarray(point_mm) - scene.data.cam_xpos[camera])
    focal = 0.5 * height / np.tan(np.radians(scene.model.cam_fovy[camera]) / 2)
    return width / 2 - focal * x / z, height / 2 + focal * y / z, -z


def red(picture: np.ndarray) -> np.ndarray:
    """Pixels of the target's ring."""
    r, g, b = (picture[..., k].astype(int) for k in range(3))
    return (r > g + 60) & (r > b + 60)


@pytest.mark.parametrize("seed", range(3))
def test_the_target_is_seen_from_three_sides_or_more_throughout(scene, seed):
    world = sample_world(seed)
    shown = demonstrate(world)
    scene.show(world)
    for k in np.linspace(0, len(shown.force_mN) - 1, 6).astype(int):
        pictures = pictures_of(scene, shown.position_mm[k], shown.rotvec_deg[k])
        assert sum(red(picture).sum() > 60 for picture in pictures.values()) >= 3


def test_the_ring_is_drawn_where_the_target_is_and_the_tip_where_the_pose_is(scene):
    world = sample_world(4)
    scene.show(world)
    tip = np.array([world.target_xy_mm[0] - 12, world.target_xy_mm[1] + 2, world.surface_z_mm + 14])
    for view in VIEWS:
        picture = scene.picture(view, tip, np.zeros(3))
        rows, columns = np.nonzero(red(picture))
        column, row, distance = project(scene, view, (*world.target_xy_mm, world.surface_z_mm), 320, 180)
        assert (columns.mean(), rows.mean()) == (pytest.approx(column, abs=4), pytest.approx(row, abs=4))
        assert 20 < distance < 200
    # the needle is the only thing that changes in a fixed view, and it ends at the tip
    here, away = (scene.picture("View1_left", place, np.zeros(3)).astype(int) for place in (tip, tip + (0, 0, 60)))
    moved = np.abs(here - away).max(axis=2) > 40
    scene.place_tool(tip, np.zeros(3))
    column, row, _ = project(scene, "View1_left", tip, 320, 180)
    lowest = np.nonzero(moved.any(axis=1))[0].max()
    assert lowest == pytest.approx(row, abs=3)
    assert np.nonzero(moved[lowest - 2])[0].mean() == pytest.approx(column, abs=3)


def test_pictures_are_the_same_for_every_membrane(scene):
    world = sample_world(6)
    other = replace(world, gel_mm=world.gel_mm + 2.0, layer_mm=2.9, stiffness_mN_per_mm=90.0)
    tip, turn = np.array([*world.target_xy_mm, world.surface_z_mm - 1.0]), np.zeros(3)
    drawn = []
    for shown in (world, other):
        scene.show(shown)
        drawn.append(pictures_of(scene, tip, turn))
    assert all(np.array_equal(drawn[0][view], drawn[1][view]) for view in VIEWS)


def test_light_and_colours_differ_between_worlds_and_pictures_are_not_blank(scene):
    means = []
    for seed in range(4):
        scene.show(sample_world(seed))
        picture = scene.picture("View2_left", np.array([175.0, 0, 155]), np.zeros(3))
        assert picture.shape == (180, 320, 3) and picture.dtype == np.uint8 and picture.std() > 20
        means.append(picture.mean())
    assert np.std(means) > 1


def test_cameras_light_and_colours_are_drawn_within_their_stated_ranges_and_fill_them(scene):
    from needle_rig.scene import camera_poses

    scene.show(sample_world(0))
    model, found = scene.model, {}
    for seed in range(150):
        world = sample_world(seed)
        scene.show(world)
        for view, (place, turn) in zip(VIEWS, camera_poses(), strict=True):
            camera = model.camera(view)
            turned = (turn.inv() * Rotation.from_quat(np.roll(camera.quat, -1))).as_rotvec(degrees=True)
            found.setdefault(f"place of {view}", []).append(camera.pos - place)
            found.setdefault(f"turn of {view}", []).append(turned)
        lamp, light = model.light("lamp"), np.array(world.looks.light_mm)
        assert lamp.dir == pytest.approx(-light / np.linalg.norm(light))
        for k, axis in enumerate("xyz"):
            found.setdefault(f"light {axis}", []).append(light[k])
        found.setdefault("light", []).append(lamp.diffuse / 0.7)
        found.setdefault("ambient", []).append(model.vis.headlight.ambient[0])
        found.setdefault("table", []).append(model.material("bench").rgba[0] / 0.40)
        found.setdefault("phantom", []).append(world.looks.phantom_xy_mm)
        found.setdefault("phantom yaw", []).append(world.looks.phantom_yaw_deg)
    stated = {f"place of {view}": (-looks.CAMERA_PLACE_JITTER_MM, looks.CAMERA_PLACE_JITTER_MM) for view in VIEWS}
    stated |= {f"turn of {view}": (-looks.CAMERA_TURN_JITTER_DEG, looks.CAMERA_TURN_JITTER_DEG) for view in VIEWS}
    stated |= {f"light {axis}": bounds for axis, bounds in zip("xyz", looks.LIGHT_PLACE_MM, strict=True)}
    stated["light"] = (looks.LIGHT_LEVEL[0] * looks.LIGHT_RGB[0], looks.LIGHT_LEVEL[1] * looks.LIGHT_RGB[1])
    stated |= {"ambient": looks.AMBIENT_LEVEL, "table": looks.TABLE_LEVEL}
    stated["phantom"] = (-looks.PHANTOM_JITTER_MM, looks.PHANTOM_JITTER_MM)
    stated["phantom yaw"] = (-looks.PHANTOM_YAW_DEG, looks.PHANTOM_YAW_DEG)
    assert found.keys() == stated.keys()
    for name, (low, high) in stated.items():
        least, most = np.min(found[name]), np.max(found[name])
        assert low - 1e-6 <= least and most <= high + 1e-6, name
        assert most - least > 0.85 * (high - low), name


def test_the_rig_takes_pictures_at_the_cameras_rate_and_codes_them_as_recorded():
    rig = NeedleInsertion(views=("View1_left", "View5"), camera_hz=5.0)
    observation, _ = rig.reset(seed=2)
    stamps = [float(observation["picture_timestamps"]["View5"])]
    for _ in range(8):
        observation, *_ = rig.step(demonstrator_action(rig))
        for stamp in observation["picture_timestamps"].values():
            assert 0 <= observation["timestamp"] - stamp < 0.2 + 1e-6  # never from the future
        stamps.append(float(observation["picture_timestamps"]["View5"]))
    assert len(set(stamps)) in (4, 5, 6) and set(observation["pictures"]) == {"View1_left", "View5"}
    again = NeedleInsertion(views=("View1_left", "View5"), camera_hz=5.0)
    again.reset(seed=2)
    for _ in range(8):
        same, *_ = again.step(demonstrator_action(again))
    assert np.array_equal(same["pictures"]["View5"], observation["pictures"]["View5"])
    raw = rig._scene.picture("View5", rig.arm.pose[:3], rig.arm.pose[3:])
    assert 0 < np.abs(through_jpeg(raw).astype(int) - raw).mean() < 4
    rig.close()
    again.close()


def test_an_unknown_view_is_refused():
    with pytest.raises(RigError, match="no view 'View9'"):
        NeedleInsertion(views=("View9",))


def test_without_egl_the_front_door_says_so_in_one_sentence(tmp_path):
    env = os.environ | {"MUJOCO_GL": "egl", "__EGL_VENDOR_LIBRARY_FILENAMES": "/nonexistent"}
    command = [sys.executable, "-m", "needle_rig", "--dataset-root", str(tmp_path / "data"), "--episodes-f1", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "MUJOCO_GL=egl" in done.stderr and "libegl1" in done.stderr
    assert not (tmp_path / "data").exists()


def test_a_driver_that_aborts_is_told_apart_from_a_working_one(monkeypatch):
    monkeypatch.setattr(render, "_checked", set())
    monkeypatch.setattr(render, "_PROBE", "import os; os.abort()")
    with pytest.raises(RigError, match="cannot draw"):
        render.check_gl()
