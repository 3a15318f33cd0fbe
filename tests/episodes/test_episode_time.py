"""Time logic under random input: rising times, newest-at-or-before, gaps, stitched windows, poses and their actions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.spatial.transform import Rotation, Slerp

from vla_lib.episodes.findings import Findings
from vla_lib.episodes.poses import (
    apply_action,
    delta_action,
    interpolate,
    pose_to_matrix,
    rotation,
    rotation_angle_deg,
)
from vla_lib.episodes.sensor_log import stitch
from vla_lib.episodes.steps import window_full
from vla_lib.episodes.timeline import (
    clean_times,
    find_gaps,
    grid,
    in_seconds,
    longest_rising,
    newest_at_or_before,
    overlaps,
    spread_packets,
)

seconds = st.floats(0, 100, allow_nan=False)
angle = st.floats(-180, 180)
pose = st.tuples(*[st.floats(-300, 300)] * 3, angle, st.floats(-90, 90), angle).map(np.array)


@given(hnp.arrays(float, st.integers(0, 60), elements=st.one_of(seconds, st.just(np.nan), st.just(1e12))))
def test_cleaned_times_strictly_rise_and_every_row_is_accounted_for(stamps):
    cleaned = clean_times(stamps + 1.7e9)
    kept = (stamps + 1.7e9)[cleaned.keep]
    assert np.all(np.diff(kept) > 0)
    assert len(kept) + cleaned.unusable + cleaned.backwards + cleaned.repeats == len(stamps)


@given(st.lists(st.integers(0, 6), max_size=9))
def test_as_few_rows_as_possible_are_dropped(values):
    longest = max(
        (bin(m).count("1") for m in range(1 << len(values)) if rises([v for k, v in enumerate(values) if m >> k & 1])),
        default=0,
    )
    chain = longest_rising(np.array(values, float))
    assert len(chain) == longest and rises([values[k] for k in chain])


def rises(values):
    return all(a <= b for a, b in zip(values, values[1:], strict=False))


@given(st.lists(seconds, max_size=30), st.lists(seconds, min_size=1, max_size=10))
def test_newest_at_or_before_is_what_it_says(times, at):
    times = sorted(times)
    expected = [max((k for k, t in enumerate(times) if t <= a), default=-1) for a in at]
    assert newest_at_or_before(np.array(times), np.array(at)).tolist() == expected


@given(seconds, st.floats(0.001, 60), st.sampled_from([1.0, 3.0, 10.0, 30.0, 650.0]))
def test_steps_fill_the_log_and_never_leave_it(start, length, hz):
    t = grid(start, start + length, hz)
    assert len(t) == 0 or (t[0] == start and t[-1] + 1 / hz <= start + length + 1e-5)
    assert start + (len(t) + 1) / hz > start + length - 1e-5


@given(st.lists(seconds, min_size=2, max_size=20, unique=True), st.floats(0.1, 20))
def test_gaps_are_the_long_intervals_and_steps_across_them_are_hit(times, longest):
    times = np.array(sorted(times))
    spans = find_gaps(times, longest)
    assert [e - b > longest for b, e in spans] == [True] * int((np.diff(times) > longest).sum())
    begin, end = times[:-1], times[1:]
    assert overlaps(begin, end, spans).tolist() == (np.diff(times) > longest).tolist()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 79), min_size=1, max_size=12), st.integers(0, 2**32 - 1), st.booleans())
def test_windows_of_any_stride_become_the_stream_they_were_cut_from(strides, seed, constant):
    width, random = 80, np.random.default_rng(seed)
    ends = width + np.concatenate([[0], np.cumsum(strides)])
    stream = np.zeros((ends[-1], 9), np.float32) if constant else random.random((ends[-1], 9), np.float32)
    windows = np.stack([stream[e - width : e] for e in ends])
    times = ends / 650 + random.uniform(-2e-4, 2e-4, len(ends))
    joined = stitch(windows, width, np.sort(times), Findings())
    assert joined.new.tolist() == [width, *strides]
    assert np.all(np.diff(joined.t_s) > 0) and not joined.gaps
    np.testing.assert_allclose(joined.t_s[ends - 1], np.sort(times), atol=1e-9)
    np.testing.assert_allclose(joined.t_s, np.arange(1, ends[-1] + 1) / 650, atol=0.03 if joined.hz != 650 else 2e-3)


def test_a_window_is_full_only_where_its_samples_are_there_and_fresh():
    t = np.arange(1000) / 650
    at = np.array([0.05, 0.1, 0.5, 1.0, 1.6])
    index = newest_at_or_before(t, at) + 1
    assert window_full(index, t, at, 65, 650, []).tolist() == [
        False,
        True,
        True,
        True,
        False,
    ]  # the last one is 60 ms stale
    assert window_full(index, t, at, 65, 650, [(0.45, 0.47)]).tolist() == [False, True, False, True, False]
    assert window_full(index, t, at, 650, 650, []).tolist() == [False, False, False, True, False]
    holed = np.where(t > 0.45, t + 0.2, t)  # a hole that nobody listed
    later = np.array([0.44, 0.7, 0.8])
    assert window_full(newest_at_or_before(holed, later) + 1, holed, later, 65, 650, []).tolist() == [True, False, True]
    assert not window_full(np.zeros(5, int), np.empty(0), at, 65, 650, []).any()
    sparse = np.arange(100) / 50  # nine of ten samples were lost: 65 of them span 1.28 s
    ends = newest_at_or_before(sparse, sparse) + 1
    assert not window_full(ends, sparse, sparse, 65, 650, []).any()


@given(pose, pose)
def test_an_action_leads_from_one_pose_to_the_next(a, b):
    reached = apply_action(a, delta_action(a, b))
    np.testing.assert_allclose(reached[:3], b[:3], atol=1e-9)
    assert rotation_angle_deg(reached, b) < 1e-5
    action = delta_action(a, b)
    assert np.linalg.norm(action[3:6]) <= 180 + 1e-9 and action[6] == 1.0


@given(pose)
def test_poses_and_matrices_are_intrinsic_xyz(p):
    a, b, r = np.radians(p[3:])
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    ry = np.array([[np.cos(b), 0, np.sin(b)], [0, 1, 0], [-np.sin(b), 0, np.cos(b)]])
    rz = np.array([[np.cos(r), -np.sin(r), 0], [np.sin(r), np.cos(r), 0], [0, 0, 1]])
    matrix = pose_to_matrix(p)
    np.testing.assert_allclose(matrix[:3, :3], rx @ ry @ rz, atol=1e-12)


def test_the_action_rotates_about_base_axes():
    turned = apply_action(np.array([0, 0, 0, 90.0, 0, 0]), np.array([0, 0, 0, 0, 0, 90.0, 1]))
    expected = Rotation.from_euler("z", 90, degrees=True) * Rotation.from_euler("x", 90, degrees=True)
    assert (rotation(turned[3:]) * expected.inv()).magnitude()[0] < 1e-9


@given(st.lists(pose, min_size=2, max_size=6), st.lists(st.floats(0, 1), min_size=1, max_size=5))
def test_interpolation_is_linear_and_slerp(poses, parts):
    t = np.arange(len(poses)) * 0.01
    at = np.sort(np.array(parts)) * t[-1]
    got, turned = interpolate(t, np.array(poses), at)
    expected = Slerp(t, rotation(np.array(poses)[:, 3:]))(at)
    flips = (turned * expected.inv()).magnitude()
    half_turn = (
        rotation_angle_deg(np.array(poses)[:-1], np.array(poses)[1:]).max() > 179.9
    )  # both ways round are right there
    assert half_turn or flips.max() < 1e-6
    assert (rotation(got[:, 3:]) * turned.inv()).magnitude().max() < np.radians(0.006)
    for k in range(3):
        np.testing.assert_allclose(got[:, k], np.interp(at, t, np.array(poses)[:, k]), atol=1e-9)


def test_stamps_of_packets_are_spread_over_their_span():
    true = np.arange(1950) / 650 + 1.7e9
    stamped = true[(np.arange(1950) // 13 + 1) * 13 - 1]  # 13 samples share the stamp of their last
    findings = Findings()
    np.testing.assert_allclose(spread_packets(stamped, findings), true, atol=1e-6)
    assert "packets of 13" in findings[0].text
    lost = np.delete(np.arange(1950), np.s_[650:845])  # 0.3 s of packets never came: the rest is not spread over it
    np.testing.assert_allclose(spread_packets(stamped[lost], Findings()), true[lost], atol=1e-6)
    repeated = np.sort(np.append(true, true[::50]))  # two in a hundred repeat, as on every robot log
    assert spread_packets(repeated, Findings()) is repeated


@pytest.mark.parametrize(
    ("per_second", "unit"), ((1, ""), (1e3, "milliseconds"), (1e6, "microseconds"), (1e9, "nanoseconds"))
)
def test_units_of_times_are_told_from_their_size(per_second, unit):
    findings, seconds_ = Findings(), np.array([np.nan, 1761003616.25, 1761003616.5])
    np.testing.assert_allclose(in_seconds(seconds_ * per_second, "robot", findings), seconds_, atol=1e-6)
    assert [finding.text for finding in findings] == ([f"its times are {unit}, and read as such"] if unit else [])
