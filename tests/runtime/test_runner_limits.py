"""Limits, box, force and the hold budget, apart from the loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plain_robot import PlainExpert

from vla_lib.core.errors import UserError
from vla_lib.episodes.poses import apply_action, rotation_angle_deg
from vla_lib.runtime.safety import (
    OUTSIDE,
    ROTATION_RANGE,
    HoldBudget,
    SafetyLimits,
    greatest_force,
    limit_action,
    retreat_action,
    retreat_leaves,
)

LIMITS = SafetyLimits(workspace_mm=((0.0, 100.0), (0.0, 100.0), (0.0, 100.0)), speed_mm_s=15, turn_deg_s=45)
MIDDLE = np.array([50.0, 50, 50, 0, 0, 0])
number = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@given(st.lists(number, min_size=6, max_size=6))
def test_trap_35_the_norm_is_limited_and_the_direction_kept(values):
    action = np.array([*values, 1.0])
    limited, touched = limit_action(action, LIMITS, 0.1, MIDDLE, MIDDLE)
    for name, part, most in (("speed", slice(0, 3), 1.5), ("rotation", slice(3, 6), 4.5)):
        before, after = action[part], limited[part]
        assert np.linalg.norm(after) <= most * (1 + 1e-9)
        assert np.linalg.norm(np.cross(before, after)) <= 1e-9 * max(1.0, np.linalg.norm(before)) * most
        assert before @ after >= 0
        assert (name in touched) == (np.linalg.norm(before) > most)
        if name not in touched:
            assert np.array_equal(before, after)
    assert limited[6] == 1.0


@given(st.lists(number, min_size=3, max_size=3), st.lists(st.floats(-20, 120), min_size=3, max_size=3))
def test_no_motion_leads_out_of_the_box_and_none_is_bent(step, place):
    place = np.array(place)
    action = np.array([*step, 0, 0, 0, 1.0])
    limited, touched = limit_action(action, LIMITS, 0.1, np.array([*place, 0, 0, 0]), MIDDLE)
    after = place + limited[:3]
    for axis in range(3):
        beyond = max(after[axis] - 100, -after[axis], 0)
        assert beyond <= max(place[axis] - 100, -place[axis], 0) + 1e-9
    assert np.linalg.norm(np.cross(limited[:3], action[:3])) < 1e-6 * max(1, np.linalg.norm(action[:3]))
    free, _ = limit_action(action, LIMITS, 0.1, MIDDLE, MIDDLE)
    assert (OUTSIDE in touched) == (not np.array_equal(limited[:3], free[:3]))


angles = st.lists(st.floats(-80, 80), min_size=3, max_size=3)


@given(angles, angles, st.lists(number, min_size=3, max_size=3))
def test_no_turn_leads_out_of_its_range_and_none_is_bent(start, angles_deg, turn):
    start, pose = np.array([50, 50, 50, *start]), np.array([50, 50, 50, *angles_deg])
    action = np.array([1.0, 0, 0, *turn, 1.0])
    limited, touched = limit_action(action, LIMITS, 0.1, pose, start)
    before, after = (rotation_angle_deg(start, one) for one in (pose, apply_action(pose, limited)))
    assert after <= max(LIMITS.turn_deg, before) + 1e-5
    assert np.linalg.norm(np.cross(limited[3:6], turn)) < 1e-6 * max(1, np.linalg.norm(turn))
    assert limited[3:6] @ turn >= 0 and limited[0] == 1.0
    free, _ = limit_action(action, LIMITS, 0.1, pose, pose)
    assert (ROTATION_RANGE in touched) == (not np.array_equal(limited[3:6], free[3:6]))


def test_a_turn_ends_at_the_edge_of_its_range_and_leads_back_from_beyond():
    near, beyond = (np.array([50.0, 50, 50, 0, 0, gamma]) for gamma in (43.0, 60.0))
    out, back = (np.array([0, 0, 0, 0, 0, turn, 1.0]) for turn in (4.0, -4.0))
    assert limit_action(out, LIMITS, 0.1, near, MIDDLE)[0][5] == pytest.approx(2.0, abs=1e-4)
    assert limit_action(out, LIMITS, 0.1, beyond, MIDDLE)[0][5] == pytest.approx(0.0, abs=1e-4)
    assert limit_action(back, LIMITS, 0.1, beyond, MIDDLE) == (pytest.approx(back), [])


def test_a_retreat_that_the_wall_would_cut_short_is_seen():
    assert not retreat_leaves(np.array([50.0, 50, 94.9, 0, 0, 0]), LIMITS)
    assert retreat_leaves(np.array([50.0, 50, 95.1, 0, 0, 0]), LIMITS)
    assert retreat_leaves(np.array([50.0, 4.0, 50, 90.0, 0, 0]), LIMITS)  # the tool lies along -y
    assert not retreat_leaves(np.array([50.0, 96.0, 50, 90.0, 0, 0]), LIMITS)


def test_a_motion_back_into_the_box_is_let_through():
    back, touched = limit_action(
        np.array([1.0, 0, 0, 0, 0, 0, 1]), LIMITS, 0.1, np.array([-5.0, 50, 50, 0, 0, 0]), MIDDLE
    )
    assert back[0] == 1.0 and touched == []


def test_trap_34_the_retreat_follows_the_tilted_needle_in_the_base_frame():
    tilted = np.array([50.0, 50, 50, 30.0, 0, 0])  # 30 degrees about the base's x axis
    action = retreat_action(tilted, LIMITS, 0.1)
    assert action[:3] == pytest.approx(0.5 * np.array([0, -np.sin(np.pi / 6), np.cos(np.pi / 6)]))
    assert apply_action(tilted, action)[3:] == pytest.approx(tilted[3:])
    both = np.array([0.0, 0, 0, 30.0, 90.0, 0])  # intrinsic: Rx(30) Ry(90); extrinsic angles would point to +x alone
    assert retreat_action(both, LIMITS, 0.1)[:3] == pytest.approx([0.5, 0, 0], abs=1e-9)
    both[3:] = 30.0, 40.0, 50.0
    assert retreat_action(both, LIMITS, 0.1)[1] == pytest.approx(-0.5 * np.sin(np.radians(30)) * np.cos(np.radians(40)))


def test_force_is_a_mean_of_thirteen_samples_and_no_peak_between_readings_is_lost():
    quiet = np.full(65, 10.0)
    spike = quiet.copy()
    spike[30] = 500  # one bad sample
    assert greatest_force(quiet, spike) == pytest.approx(10 + 490 / 13)
    peak = quiet.copy()
    peak[20:40] = 180
    assert greatest_force(quiet, peak) == pytest.approx(180)
    split = greatest_force(peak[:30], peak[30:])  # a peak across two readings
    assert split == pytest.approx(180)
    assert greatest_force(-quiet, -peak) == pytest.approx(180)  # a sensor whose push is negative
    assert greatest_force(quiet, np.empty(0)) == -np.inf
    assert np.isnan(greatest_force(quiet, np.array([1.0, np.nan])))


def test_holds_add_up_within_twice_the_budget():
    budget = HoldBudget(0.5)
    for k in range(5):
        assert not budget.spent(0.1 * k)
        budget.held(0.1 * k, 0.1 * (k + 1))
    assert budget.spent(0.5)
    assert not budget.spent(5.0)  # long ago
    flicker = HoldBudget(0.5)
    spent = []
    for k in range(30):
        if k % 2 == 0:
            flicker.held(0.1 * k, 0.1 * (k + 1))
        spent.append(flicker.spent(0.1 * (k + 1)))
    assert any(spent)


def test_impossible_limits_are_refused():
    with pytest.raises(UserError, match="workspace"):
        SafetyLimits(workspace_mm=((1, 0), (0, 1), (0, 1)))
    with pytest.raises(UserError, match="speed_mm_s"):
        SafetyLimits(workspace_mm=((0, 1),) * 3, speed_mm_s=float("nan"))
    with pytest.raises(UserError, match="turn_deg is 90; it must be below 90"):
        SafetyLimits(workspace_mm=((0, 1),) * 3, turn_deg=90)


def test_features_older_than_any_in_training_are_said_once(setup):
    expert = PlainExpert()
    expert.vl_ages_s = 0.0, 0.3
    told = setup(expert, latencies_s={"vlm": [0.1, 0.5]}).run(4.0).events
    assert [one["kind"] for one in told if "old; the policy was trained with ages up to 0.3 s" in one["reason"]] == [
        "warning"
    ]
    expert.vl_ages_s = 0.0, 0.0  # not known
    assert not [one for one in setup(expert, latencies_s={"vlm": [0.5]}).run(3.0).events if one["kind"] == "warning"]


def test_what_the_robot_refuses_is_not_sent(setup):
    made = setup()
    made.robot.refuses = lambda action: "joint limit 3" if made.clock.now() > 1.0 else ""
    log = made.run(4.0)
    assert log.ended == "joint limit 3" and log.ticks[-1].mode == "stop"
    assert not [action for t_s, action in made.robot.sent if t_s > 1.0 and action[:6].any()]


def test_a_released_key_holds_and_then_stops(setup):
    made = setup()
    log = made.runner.run(4.0, held=lambda: 0.5 < made.clock.now() < 1.5)
    assert log.ended == "hold-to-run key released"
    assert {tick.reason for tick in log.ticks if tick.mode == "wait"} >= {"hold-to-run key released"}
    acted = [tick.t_s for tick in log.ticks if tick.mode == "act"]
    assert acted[0] > 0.5 and acted[-1] < 1.5
