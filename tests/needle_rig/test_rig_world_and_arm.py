"""Worlds, the arm, its kinematics and its conventions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from needle_rig import arm as arms
from needle_rig.arm import LAG_S, SPEED_LIMIT_MM_S, TICK_HZ, TURN_LIMIT_DEG_S, Arm, euler_poses, joints, states
from needle_rig.world import (
    CENTRE_XY_MM,
    GEL_THICKNESS_MM,
    SURFACE_Z_MM,
    TARGET_RANGE_MM,
    WORKSPACE_MM,
    RigError,
    sample_world,
)


def test_a_world_is_fixed_by_its_seed_and_lies_within_the_stated_ranges():
    worlds = [sample_world(seed) for seed in range(200)]
    assert sample_world(7).to_dict() == worlds[7].to_dict() != worlds[8].to_dict()
    for world in worlds:
        assert max(abs(t - c) for t, c in zip(world.target_xy_mm, CENTRE_XY_MM, strict=True)) <= TARGET_RANGE_MM
        assert GEL_THICKNESS_MM[0] <= world.gel_mm <= GEL_THICKNESS_MM[1]
        assert all(low < x < high for x, (low, high) in zip(world.start_mm, WORKSPACE_MM, strict=True))
        assert 5 <= world.start_mm[2] - SURFACE_Z_MM <= 26


def test_nothing_visible_tells_the_membranes_depth():
    worlds = [sample_world(seed) for seed in range(400)]
    gel = np.array([world.gel_mm for world in worlds])
    visible = np.array(
        [[*w.target_xy_mm, w.target_yaw_deg, w.surface_z_mm, *w.start_mm, w.looks.light_level] for w in worlds]
    )
    correlations = [np.corrcoef(gel, column)[0, 1] for column in visible.T]
    assert np.abs(correlations).max() < 0.2
    assert gel.std() > 1.0  # a guess at the mean is within 0.3 mm for a small part of the phantoms only
    assert np.mean(np.abs(gel - np.median(gel)) < 0.3) < 0.2


def test_a_task_that_cannot_be_a_folder_is_refused():
    assert sample_world(0, "Eye_trocar").task == "Eye_trocar"
    with pytest.raises(RigError, match="cannot name a folder"):
        sample_world(0, "../elsewhere")


def test_the_arm_lags_by_its_time_constant_and_arrives():
    arm = Arm((175, 0, 150), (0, 0, 0))
    moving = arm.move_to([180, 0, 150, 0, 0, 0], 650)  # 5 mm in one second
    behind = (180 - moving.position_mm[-1, 0]) / 5.0
    assert behind == pytest.approx(LAG_S, rel=1e-3)  # seconds behind the ramp
    rest = arm.move_to(arm.command, 650)
    assert rest.position_mm[-1] == pytest.approx([180, 0, 150], abs=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-40, 40), min_size=6, max_size=6))
def test_trap_35_limits_clamp_the_norm_and_keep_the_direction(step):
    arm = Arm((0, 0, 0), (0, 0, 0))
    motion = arm.move_by(step, 65)
    for part, limit in ((slice(0, 3), SPEED_LIMIT_MM_S), (slice(3, 6), TURN_LIMIT_DEG_S)):
        asked, got = np.asarray(step)[part], arm.command[part]
        assert np.linalg.norm(got) <= limit * 0.1 + 1e-9
        assert np.linalg.norm(np.cross(asked, got)) <= 1e-6 * max(1.0, np.linalg.norm(asked))
        assert got == pytest.approx(asked, abs=1e-9) or np.linalg.norm(asked) > limit * 0.1
    fastest = np.linalg.norm(np.diff(motion.position_mm, axis=0), axis=1).max() * TICK_HZ
    assert fastest <= SPEED_LIMIT_MM_S + 1e-6


def test_trap_34_actions_turn_in_the_base_frame_and_poses_are_intrinsic_xyz_degrees():
    from vla_lib.episodes.poses import apply_action

    start = np.array([3.0, -2.0, 20.0])
    arm = Arm((175, 0, 150), start)
    before = euler_poses(arm.pose[None, :3], arm.pose[None, 3:])[0]
    action = np.array([0.3, -0.2, -0.4, 1.5, -0.8, 2.0, 1.0])
    for ticks in (65, 650):
        arm.move_by(action if ticks == 65 else np.zeros(7), ticks)
    after = euler_poses(arm.pose[None, :3], arm.pose[None, 3:])[0]
    assert after == pytest.approx(apply_action(before, action), abs=2e-3)
    r = Rotation.from_rotvec(start, degrees=True).as_matrix()
    a, b, g = np.radians(before[3:])
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(g), -np.sin(g), 0], [np.sin(g), np.cos(g), 0], [0, 0, 1]])
    assert rx @ ry @ rz == pytest.approx(r, abs=1e-12)


def _forward(q_deg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tip place (3,) and tool rotation (3, 3) of joint angles, link by link."""
    q = np.radians(q_deg)
    y, x = (lambda a: Rotation.from_euler("Y", a)), (lambda a: Rotation.from_euler("X", a))
    turn = Rotation.from_euler("Z", q[0])
    place = np.array([0, 0, arms._BASE])
    turn = turn * y(q[1])
    place = place + turn.apply([0, 0, arms._UPPER])
    turn = turn * y(q[2])
    place = place + turn.apply([arms._FOREARM, 0, arms._OFFSET])
    turn = turn * x(q[3]) * y(q[4]) * x(q[5])
    place = place + turn.apply([arms._FLANGE + arms._TOOL, 0, 0])
    return place, (turn * y(-np.pi / 2)).as_matrix()


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000))
def test_joints_are_the_inverse_kinematics_of_the_pose(seed):
    rng = np.random.default_rng(seed)
    low, high = np.array(WORKSPACE_MM).T
    place = rng.uniform(low, high)
    rotvec = rng.uniform(-1, 1, 3) * (8, 8, 35)
    tip, turn = _forward(joints(place[None], rotvec[None])[0])
    assert tip == pytest.approx(place, abs=1e-6)
    assert turn == pytest.approx(Rotation.from_rotvec(rotvec, degrees=True).as_matrix(), abs=1e-9)


def test_states_are_joints_then_pose_and_smooth_over_a_path():
    t = np.linspace(0, 1, 500)[:, None]
    place = (150, -25, 126) + t * np.array([50, 50, 44])
    rotvec = (-5, 5, -35) + t * np.array([10, -10, 70])
    path = states(place, rotvec)
    assert path.shape == (500, 12)
    assert path[:, 6:9] == pytest.approx(place)
    assert np.abs(np.diff(path, axis=0)).max() < 1.0  # no jump between branches
