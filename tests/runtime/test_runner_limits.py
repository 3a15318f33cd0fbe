"""Limits, box, force and the hold budget, apart from the loop."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vla_lib.core.errors import UserError
from vla_lib.episodes.poses import apply_action
from vla_lib.runtime.safety import OUTSIDE, HoldBudget, SafetyLimits, greatest_force, limit_action, retreat_action

LIMITS = SafetyLimits(workspace_mm=((0.0, 100.0), (0.0, 100.0), (0.0, 100.0)), speed_mm_s=15, turn_deg_s=45)
MIDDLE = np.full(3, 50.0)
number = st.floats(-1e3, 1e3, allow_nan=False, width=32)


@given(st.lists(number, min_size=6, max_size=6))
def test_trap_35_the_norm_is_limited_and_the_direction_kept(values):
    action = np.array([*values, 1.0])
    limited, touched = limit_action(action, LIMITS, 0.1, MIDDLE)
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
    limited, touched = limit_action(action, LIMITS, 0.1, place)
    after = place + limited[:3]
    for axis in range(3):
        beyond = max(after[axis] - 100, -after[axis], 0)
        assert beyond <= max(place[axis] - 100, -place[axis], 0) + 1e-9
    assert np.linalg.norm(np.cross(limited[:3], action[:3])) < 1e-6 * max(1, np.linalg.norm(action[:3]))
    free, _ = limit_action(action, LIMITS, 0.1, MIDDLE)
    assert (OUTSIDE in touched) == (not np.array_equal(limited[:3], free[:3]))


def test_a_motion_back_into_the_box_is_let_through():
    back, touched = limit_action(np.array([1.0, 0, 0, 0, 0, 0, 1]), LIMITS, 0.1, np.array([-5.0, 50, 50]))
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
