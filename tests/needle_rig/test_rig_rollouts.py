"""The demonstrator, its judgement and the rig's reset and step (no pictures)."""

import warnings
from dataclasses import replace

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from needle_rig import NeedleInsertion, RigError
from needle_rig.demonstrator import demonstrate, demonstrator_action, measure, velocity
from needle_rig.world import ASKED_DEPTH_MM, FORCE_LIMIT_MN, sample_world


def run(rig: NeedleInsertion, seed: int, act) -> tuple[dict, list[np.ndarray]]:
    """Run a rollout to its end; the last info and all states."""
    observation, info = rig.reset(seed=seed)
    seen, done = [observation["state"]], False
    while not done:
        observation, _, terminated, truncated, info = rig.step(act(rig))
        seen.append(observation["state"])
        done = terminated or truncated
    return info, seen


@pytest.fixture(scope="module")
def shown() -> list:
    return [demonstrate(sample_world(seed)) for seed in range(20)]


def test_the_demonstrator_succeeds_with_pushes_and_stays_under_the_force_limit(shown):
    assert sum(d.verdict["success"] for d in shown) >= 19
    assert max(d.verdict["peak_force_mN"] for d in shown) < FORCE_LIMIT_MN
    assert np.mean([d.pushed.mean() for d in shown]) > 0.03  # recoveries are in the data
    assert all(6 < d.seconds < 25 for d in shown)


def test_the_demonstrator_moves_at_human_speeds_and_smoothly(shown):
    for d in shown:
        steps = np.linalg.norm(np.diff(d.position_mm[::65], axis=0), axis=1)  # mm a 100 ms
        assert steps.max() < 1.8
        assert 0.15 < np.median(steps[: int(0.7 * len(steps))]) < 0.7


def test_repeating_the_last_motion_is_no_good_policy(shown):
    repeat, nothing = [], []
    for d in shown:
        v = np.diff(d.position_mm[::65], axis=0)
        for k in range(1, len(v) - 8):
            repeat.append(np.square(v[k : k + 8] - v[k - 1]).mean())
            nothing.append(np.square(v[k : k + 8]).mean())
    assert np.mean(repeat) > 0.2 * np.mean(nothing)


def test_the_demonstrator_acts_on_what_is_measured_now_and_slows_before_the_goal():
    world = sample_world(3)
    tip = np.array([*world.target_xy_mm, world.membrane_z_mm + 3.0])
    far = velocity(measure(world, tip, np.zeros(3), punctured=False))
    near = velocity(measure(world, tip - (0, 0, 2.9), np.zeros(3), punctured=False))
    behind = velocity(measure(world, tip - (0, 0, 3.0 + ASKED_DEPTH_MM + 0.4), np.zeros(3), punctured=True))
    assert far[2] < near[2] < 0 < behind[2]  # too deep: it draws back
    unseen = replace(world, gel_mm=world.gel_mm + 1.0)
    high = np.array([*world.target_xy_mm, world.surface_z_mm + 9.0])
    args = (high, np.zeros(3), False)
    assert np.array_equal(
        velocity(measure(world, *args)), velocity(measure(unseen, *args))
    )  # out of the sensor's range: no knowledge


def test_the_rig_is_solved_at_10_hz_and_is_deterministic():
    rig = NeedleInsertion(views=())
    infos = [run(rig, seed, demonstrator_action)[0] for seed in range(1000, 1010)]
    assert all(info["success"] for info in infos), [info["reason"] for info in infos]
    first, again = run(rig, 5, demonstrator_action), run(NeedleInsertion(views=()), 5, demonstrator_action)
    assert first[0] == again[0]
    assert np.array_equal(first[1], again[1])


def test_observations_hold_measurements_only_with_their_times():
    rig = NeedleInsertion(views=())
    observation, info = rig.reset(seed=4)
    assert observation["sensor"].shape == (650, 1026) and observation["sensor"].dtype == np.float32
    samples = observation["sensor"]
    for _ in range(3):
        before = observation["timestamp"]
        observation, reward, terminated, truncated, info = rig.step(np.array([0.2, 0, -0.3, 0, 0, 0.5, 1.0]))
        assert observation["sensor"].shape == (650, 1026)
        assert np.array_equal(observation["sensor"][:-65], samples[65:])  # 65 are new, the older ones move up
        samples = observation["sensor"]
        assert observation["timestamp"] - before == pytest.approx(0.1, abs=1e-6)
        times = observation["sensor_timestamps"][-65:]
        assert before < times[0] and times[-1] <= observation["timestamp"] + 1e-9
        assert 0 <= observation["timestamp"] - observation["state_timestamp"] < 1 / 60 + 2 / 650
    assert set(observation) == {
        "pictures", "picture_timestamps", "state", "state_timestamp", "sensor", "sensor_timestamps", "timestamp",
    }  # fmt: skip
    assert observation["state"].shape == (12,) and observation["state"].dtype == np.float32
    assert (reward, terminated, truncated) == (0.0, False, False) and info["truth"]["membrane_z_mm"] < info["truth"][
        "surface_z_mm"
    ]


def test_reset_without_a_seed_draws_new_phantoms_in_an_order_that_the_last_seed_fixes():
    rig = NeedleInsertion(views=())
    orders = [[rig.reset(seed=seed)[1]["seed"], *(rig.reset()[1]["seed"] for _ in range(3))] for seed in (11, 11, 12)]
    assert orders[0] == orders[1] and orders[0][0] == 11 and len({*orders[0], *orders[2]}) == 8
    assert rig.reset(seed=11)[1]["truth"] == sample_world(11).to_dict()
    given = replace(sample_world(11), gel_mm=4.0)
    assert rig.reset(seed=11, options={"world": given})[1]["truth"] == given.to_dict()


def test_gymnasium_finds_the_rig_and_has_nothing_to_say_but_that_actions_are_millimetres():
    rig = gymnasium.make("needle_rig/NeedleInsertion-v0", picture_width=32, picture_height=24, render_mode="rgb_array")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_env(rig.unwrapped)
    assert len(said) == 1 and "normalized space" in str(said[0].message), [str(one.message) for one in said]
    observation, _ = rig.reset(seed=1)
    assert np.array_equal(rig.render()[:, -32:], observation["pictures"]["View5"]) and rig.render().shape == (
        24,
        160,
        3,
    )
    assert rig.observation_space.contains(observation)
    rig.close()


@pytest.mark.parametrize(
    ("name", "act", "reason"),
    [
        ("plunge", lambda rig: np.array([0, 0, -1.0, 0, 0, 0, 1]), "force over the limit"),
        ("stay", lambda rig: np.zeros(7), "no puncture"),
        ("flee", lambda rig: np.array([1.4, 0, 0, 0, 0, 0, 1]), "left the workspace"),
    ],
)
def test_failures_are_named(name, act, reason):
    info, _ = run(NeedleInsertion(views=(), max_time_s=6.0), 3, act)
    assert (info["success"], info["reason"]) == (False, reason)


def offset_demonstrator(offset_xy=(0.0, 0.0), depth=0.0):
    """The demonstrator, led to a wrong place."""

    def act(rig):
        world = rig.world
        moved = replace(world, target_xy_mm=tuple(np.add(world.target_xy_mm, offset_xy)), gel_mm=world.gel_mm + depth)
        seen = measure(moved, rig.arm.pose[:3], rig.arm.pose[3:], rig.tissue.punctured)
        return np.concatenate([velocity(seen) / rig.action_hz, [1.0]])

    return act


@pytest.mark.parametrize(
    ("offset", "depth", "success", "reason"),
    [
        ((1.2, 0.0), 0.0, True, ""),
        ((1.9, 0.0), 0.0, False, "beside the target"),
        ((0.0, 0.0), 0.6, False, "too deep"),
        ((0.0, 0.0), -0.45, False, "too shallow"),
    ],
)
def test_success_needs_place_and_depth(offset, depth, success, reason):
    info, _ = run(NeedleInsertion(views=(), max_time_s=20.0), 6, offset_demonstrator(offset, depth))
    assert (info["success"], info["reason"]) == (success, reason)


def test_actions_that_are_not_finite_never_move_the_rig():
    rig = NeedleInsertion(views=())
    with pytest.raises(RigError, match="reset"):
        rig.step(np.zeros(7))
    rig.reset()
    before = rig.arm.pose.copy()
    for action in (np.full(7, np.nan), np.array([0, 0, np.inf, 0, 0, 0, 1]), np.zeros(3)):
        with pytest.raises(RigError, match="cannot move"):
            rig.step(action)
    assert np.array_equal(rig.arm.pose, before)
    with pytest.raises(RigError, match="divides 650"):
        NeedleInsertion(views=(), action_hz=12)


def test_creeping_through_the_right_depth_is_no_success():
    rig = NeedleInsertion(views=(), max_time_s=60.0)

    def creep(rig):
        if rig.tissue.punctured:
            return np.array([0, 0, -0.03, 0, 0, 0, 1])  # 0.3 mm/s, without end
        return demonstrator_action(rig)

    info, _ = run(rig, 6, creep)
    assert (info["success"], info["reason"]) == (False, "force over the limit")


def test_a_needle_that_stays_in_place_but_trembles_succeeds_at_the_time_limit():
    def tremble(rig):
        action = demonstrator_action(rig)
        action[2] += 0.25 * (-1) ** (rig.steps // 2) if rig.tissue.punctured else 0
        return action

    info, _ = run(NeedleInsertion(views=(), max_time_s=15.0), 6, tremble)
    assert (info["success"], info["time_s"]) == (True, 15.0)
