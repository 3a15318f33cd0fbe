"""Every fault leads to its named reason, and the stop comes within one tick of the limit (simulated clock)."""

import numpy as np
import pytest
from plain_robot import BOX, PlainExpert, striped
from plain_vlm import tokens_of

from vla_lib.episodes.poses import rotation_angle_deg
from vla_lib.runtime import safety

PERIOD = 0.1


def first(log, mode):
    """The first tick of a mode."""
    return next(tick for tick in log.ticks if tick.mode == mode)


def assert_held_then_stopped(setup, log, reason: str, limit_reached_s: float):
    """Held from the first tick at or after the limit, stopped within one tick of the hold's budget, and nothing moved
    since."""
    hold, stop = first(log, "hold"), first(log, "stop")
    assert (hold.reason, stop.reason, log.ended, log.stopped) == (reason, reason, reason, True)
    assert limit_reached_s - 1e-9 <= hold.t_s <= limit_reached_s + PERIOD + 1e-9
    budget = setup.limits.hold_s
    assert hold.t_s + budget - 1e-6 <= stop.t_s <= hold.t_s + budget + PERIOD
    assert setup.robot.stops[0][1] == reason
    moved = [action for t, action in setup.robot.sent if t > hold.t_s - 1e-9]
    assert not np.any([action[:6] for action in moved])
    assert log.ticks[-1] is stop
    assert {"hold", "stop"} <= {event["kind"] for event in log.events}


def mortal(call: int):
    """A VLM that dies at its `call`-th tick."""
    calls = []

    def compute(pictures, instruction):
        calls.append(1)
        if len(calls) == call:
            raise RuntimeError("out of memory")
        return tokens_of(pictures, instruction)

    return compute


def test_a_vlm_delayed_by_two_seconds_holds_then_stops(setup):
    run = setup(latencies_s={"vlm": [0.05] * 4 + [2.0]})
    log = run.run(10)
    # the fifth tick is asked at 1.2 s; features of 0.9 s are older than 1 s after 1.9 s
    assert_held_then_stopped(run, log, "stale VL features", 1.9)


def test_a_vlm_that_comes_back_in_time_lets_the_robot_go_on(setup):
    run = setup(latencies_s={"vlm": [0.05] * 4 + [1.2] + [0.05]})
    log = run.run(6)
    assert log.ended == "time limit" and not log.stopped
    assert log.summary()["reasons"] == {"no VL features yet": 1, "stale VL features": 5}  # 2.0 s to 2.4 s
    assert [event["kind"] for event in log.events] == ["wait", "act", "hold", "resume", "end"]


def test_a_dead_vlm_stops_at_the_next_tick(setup):
    log = setup(compute=mortal(5)).run(10)
    assert log.ended == "VLM worker died: RuntimeError: out of memory"
    assert log.ticks[-1].t_s == pytest.approx(1.2)


def test_a_silent_sensor_holds_then_stops(setup):
    def silent(t_s, fields):
        if t_s > 1.05:
            fields["sensor"], fields["sensor_timestamps"] = fields["sensor"][:0], fields["sensor_timestamps"][:0]

    run = setup(edit=silent)
    assert_held_then_stopped(run, run.run(10), "stale sensor", 1.1)


def test_a_sensor_that_repeats_old_samples_is_silent_too(setup):
    kept = {}

    def frozen(t_s, fields):
        if t_s > 1.05:
            fields.update(kept)
        else:
            kept.update({name: fields[name] for name in ("sensor", "sensor_timestamps")})

    run = setup(edit=frozen)
    assert_held_then_stopped(run, run.run(10), "stale sensor", 1.1)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    (
        (lambda fields: fields["state"].__setitem__(7, np.nan), "non-finite state"),
        (lambda fields: fields["sensor"].__setitem__((slice(None), 0), np.inf), "non-finite sensor"),
        (lambda fields: fields["sensor"].__setitem__((slice(None), 500), np.nan), "broken sensor window"),
        (lambda fields: fields.update(state_timestamp=1000.6), "stale state"),
        (lambda fields: fields.update(picture_timestamps={"View5": 999.9}), "stale pictures"),
    ),
)
def test_what_cannot_be_trusted_is_not_acted_on(setup, spoil, reason):
    run = setup(edit=lambda t_s, fields: spoil(fields) if t_s > 0.95 else None)
    assert_held_then_stopped(run, run.run(10), reason, 1.0)


@pytest.mark.parametrize("gone", ("pictures", "picture_timestamps"))
def test_a_view_of_the_policy_that_is_missing_holds_then_stops(setup, gone):
    def edit(t_s, fields):
        fields["pictures"]["View3_left"], fields["picture_timestamps"]["View3_left"] = (
            striped(100),
            fields["timestamp"],
        )
        if t_s > 0.95:
            del fields[gone]["View3_left"]

    run = setup(edit=edit, views=("View3_left", "View5"))
    assert_held_then_stopped(run, run.run(10), "missing view View3_left", 1.0)
    log = setup(edit=edit).run(3)  # no policy asks for it
    assert log.ended == ("time limit" if gone == "pictures" else "missing view View3_left")
    never = setup(views=("View5", "View9"), start_s=1.0)
    assert never.run(10).ended == "not ready: missing view View9" and not never.robot.sent


def test_the_vlm_is_shown_the_policys_views_and_no_old_picture(setup):
    shown = []

    def compute(pictures, instruction):
        shown.append(set(pictures))
        return tokens_of(pictures, instruction)

    def edit(t_s, fields):
        fields["pictures"]["View9"] = np.zeros((2, 2, 3))  # not the policy's, and old
        fields["picture_timestamps"]["View9"] = 0.0
        if 0.85 < t_s < 1.15:  # three ticks, one of them the VLM's
            fields["picture_timestamps"]["View5"] = 999.5

    log = setup(edit=edit, compute=compute, views=("View5",)).run(2)
    assert log.summary()["reasons"] == {"stale pictures": 3} and log.ended == "time limit"
    assert shown == [{"View5"}] * 6  # at 0, 0.3, 0.6 s, then at 1.2 s, as soon as there was a fresh picture


def test_a_robot_that_does_not_follow_holds_then_stops(setup):
    run = setup(expert=PlainExpert((0.5, 0, 0, 0, 0, 0)))
    send = run.robot.send_action
    # it is stuck from 1 s on
    run.robot.send_action = lambda action: send(action if run.clock.now() < 0.95 else np.zeros(7))
    log = run.run(10)
    hold = first(log, "hold")
    assert hold.reason == log.ended == "robot does not follow"
    assert hold.t_s == pytest.approx(2.1)  # eleven steps of 0.5 mm were sent
    assert log.ticks[-1].t_s == pytest.approx(hold.t_s + run.limits.hold_s)


def test_an_arm_that_does_not_follow_a_turn_holds_then_stops(setup):
    run = setup(expert=PlainExpert((0, 0, 0, 0, 0, 2.0)))
    send = run.robot.send_action
    run.robot.send_action = lambda action: send(action if run.clock.now() < 0.95 else np.zeros(7))
    log = run.run(10)
    hold = first(log, "hold")
    assert hold.reason == log.ended == "robot does not follow"
    assert hold.t_s == pytest.approx(1.8)  # eight steps of 2 degrees were sent: more than 15
    lagging = setup(expert=PlainExpert((0, 0, 0, 0, 0, 4.5)))
    send_late, ahead = lagging.robot.send_action, [np.zeros(7)] * 3
    lagging.robot.send_action = lambda action: (ahead.append(action), send_late(ahead.pop(0)))
    assert lagging.run(1.0).summary()["modes"] == {"act": 10}  # three periods at full speed


def test_a_turn_without_end_is_held_at_the_edge_of_its_range_then_stopped(setup):
    pose = (50.0, 50, 50, 20.0, -30.0, 40.0)
    run = setup(expert=PlainExpert((0.1, 0, 0, 1.0, 2.0, 4.0)), pose=pose)  # 45.8 degrees a second
    log = run.run(10)
    assert log.ended == "rotation range" and first(log, "hold").t_s == pytest.approx(1.0)
    assert rotation_angle_deg(np.array(pose), run.robot.pose) == pytest.approx(45.0, abs=0.01)
    assert log.summary()["limited"]["rotation range"] >= 1


def test_a_run_does_not_begin_where_the_needle_cannot_be_drawn_back(setup):
    run = setup(pose=(50.0, 50, 96.0, 0, 0, 0), latencies_s={"vlm": [0.5]})
    log = run.run(10)
    assert log.ended == "retreat leaves the box" and log.stopped and len(log.ticks) == 1 and not run.robot.sent
    free = setup(pose=(50.0, 50, 96.0, 0, 0, 0), sensor_required=False)  # no force, no retreat
    assert free.run(1).ended == "time limit"


def test_a_robot_that_lags_by_three_periods_at_full_speed_follows(setup):
    run = setup(expert=PlainExpert((1.5, 0, 0, 0, 0, 0)), pose=(1.0, 50, 50, 0, 0, 0))
    send, ahead = run.robot.send_action, [np.zeros(7)] * 3
    run.robot.send_action = lambda action: (ahead.append(action), send(ahead.pop(0)))
    assert run.run(6).ended == "time limit"


def test_a_robot_whose_answers_freeze_is_noticed_by_the_runners_own_clock(setup):
    kept = {}

    def frozen(t_s, fields):
        if t_s > 0.95:
            fields.update(kept)
        else:
            kept.update(fields)

    run = setup(edit=frozen)
    log = run.run(10)
    assert log.ended == "stale sensor" and log.ticks[-1].t_s < 2.0


def test_a_slow_first_reading_makes_nothing_look_old(setup):
    def slow(t_s, fields):
        if t_s == 0.0:
            run.clock.sleep_until(0.7)
            fields.update(timestamp=1000.7, state_timestamp=1000.7, picture_timestamps={"View5": 1000.7})

    run = setup(edit=slow)
    log = run.run(3)
    assert log.ended == "time limit" and log.summary()["modes"] == {"wait": 1, "act": 23}  # from 0.7 s on


def test_nan_actions_hold_then_stop(setup):
    bad = np.full((8, 7), np.nan)
    run = setup(expert=PlainExpert(act=lambda call: np.full((8, 7), 0.01) if call < 10 else bad))
    assert_held_then_stopped(run, run.run(10), "non-finite action", 1.0)


def test_single_nan_actions_are_held_and_forgotten_but_flickering_ones_stop(setup):
    good, bad = np.full((8, 7), 0.01), np.full((8, 7), np.inf)
    log = setup(expert=PlainExpert(act=lambda call: bad if call == 10 else good)).run(4)
    assert log.ended == "time limit" and log.summary()["modes"] == {"act": 39, "hold": 1}
    log = setup(expert=PlainExpert(act=lambda call: bad if call % 2 else good)).run(10)
    assert log.ended == "non-finite action" and log.ticks[-1].t_s < 1.5


def test_missed_deadlines_hold_then_stop_and_send_nothing_late(setup):
    run = setup(latencies_s={"expert": [0.02] * 10 + [0.13]})
    log = run.run(10)
    assert log.ended == "missed deadline"
    assert first(log, "hold").t_s == pytest.approx(1.0)
    assert log.ticks[-1].t_s <= 1.0 + run.limits.hold_s + PERIOD + 0.13
    assert all((t + 1e-9) % PERIOD < 0.03 for t, _ in run.robot.sent)  # never after the deadline
    assert log.summary()["missed_deadlines"] >= 4


def test_a_single_missed_deadline_is_survived_and_a_chunk_bridges_slow_experts(setup):
    log = setup(latencies_s={"expert": [0.02] * 10 + [0.13, 0.02]}).run(4)
    assert log.ended == "time limit" and log.summary()["missed_deadlines"] == 1
    slow = {"expert": [0.13]}
    log = setup(latencies_s=slow, steps_per_chunk=6).run(4)
    assert log.ended == "time limit" and log.summary()["modes"]["act"] > 30


def test_ticks_that_a_blocked_expert_ate_are_skipped_not_made_up(setup):
    run = setup(latencies_s={"expert": [0.02] * 10 + [0.45, 0.02]}, vl_age_s=2.0, hold_s=1.0)
    log = run.run(3)
    steps = [tick.step for tick in log.ticks]
    assert steps == sorted(set(steps)) and log.summary()["skipped_ticks"] == 3
    assert 14 in steps and 13 not in steps


@pytest.mark.parametrize("force_mN", (200.0, -200.0))
def test_force_over_the_limit_draws_the_needle_back_and_stops(setup, force_mN):
    def press(t_s, fields):
        if 0.95 < t_s < 1.05:
            fields["sensor"][:, 0] = force_mN

    run = setup(edit=press, pose=(50.0, 50, 50, 0, 0, 0), expert=PlainExpert((0, 0, -0.3, 0, 0, 0)))
    log = run.run(10)
    assert log.ended == "force limit" and log.stopped
    back = [tick for tick in log.ticks if tick.mode == "retreat"]
    assert back[0].t_s == pytest.approx(1.0)  # the very tick that saw it
    assert sum(tick.action[2] for tick in back) == pytest.approx(run.limits.retreat_mm)
    assert all(tick.action[2] > 0 for tick in back)
    assert log.ticks[-1].step == back[-1].step + 1


def test_the_retreat_goes_on_when_sensor_and_vlm_fail_in_it(setup):
    def press(t_s, fields):
        if t_s > 0.95:
            fields["sensor"][:, 0] = 200.0
        if t_s > 1.15:
            fields["sensor"], fields["sensor_timestamps"] = fields["sensor"][:0], fields["sensor_timestamps"][:0]

    log = setup(edit=press).run(10)
    assert log.ended == "force limit" and sum(tick.mode == "retreat" for tick in log.ticks) == 10


@pytest.mark.parametrize("call", (4, 5))
def test_a_vlm_that_dies_with_the_force_or_in_the_retreat_does_not_end_the_retreat(setup, call):
    def press(t_s, fields):
        if 0.85 < t_s < 0.95:  # the VLM's fourth tick is that of 0.9 s, its fifth one falls into the retreat
            fields["sensor"][:, 0] = 200.0

    run = setup(edit=press, compute=mortal(call))
    log = run.run(10)
    back = [tick for tick in log.ticks if tick.mode == "retreat"]
    assert run.vlm.failure and log.ended == "force limit" and back[0].t_s == pytest.approx(0.9)
    assert sum(tick.action[2] for tick in back) == pytest.approx(run.limits.retreat_mm)
    assert {"kind": "warning", "reason": "VLM worker died: RuntimeError: out of memory"}.items() <= log.events[
        -3
    ].items()


def test_the_time_limit_does_not_end_a_retreat(setup):
    def press(t_s, fields):
        if 0.95 < t_s < 1.05:
            fields["sensor"][:, 0] = 200.0

    for seconds in (1.0, 1.3):  # in the tick that sees the force, and in the retreat
        log = setup(edit=press).run(seconds)
        assert log.ended == "force limit" and log.summary()["modes"]["retreat"] == 10


def test_the_wall_of_the_box_holds_then_stops(setup):
    run = setup(expert=PlainExpert((0, 0, -1.0, 0, 0, 0)), pose=(50, 50, 10.5, 0, 0, 0))
    log = run.run(10)
    assert log.ended == "workspace box"
    assert run.robot.pose[2] == pytest.approx(BOX[2][0])
    assert log.summary()["limited"]["workspace box"] >= 1
    assert all(tick.pose[2] >= -1e-5 for tick in log.ticks)


def test_after_a_hold_at_the_wall_the_policy_is_asked_anew(setup):
    down, up = np.tile([0, 0, -1.0, 0, 0, 0, 1], (8, 1)), np.tile([0, 0, 0.1, 0, 0, 0, 1], (8, 1))
    expert = PlainExpert(act=lambda call: up if call else down)
    log = setup(expert=expert, pose=(50, 50, 3.0, 0, 0, 0), steps_per_chunk=6).run(2)
    assert log.ended == "time limit" and log.summary()["modes"] == {"act": 19, "hold": 1}
    assert [tick.step for tick in log.ticks if tick.expert_ms is not None] == [0, 4, 10, 16]


def test_nothing_moves_before_the_first_features_and_the_first_full_window(setup):
    log = setup(latencies_s={"vlm": [0.35, 0.05]}).run(2)
    assert [tick.mode for tick in log.ticks[:5]] == ["wait"] * 4 + ["act"]
    run = setup(latencies_s={"vlm": [1e9]}, start_s=2.0)
    log = run.run(10)
    assert log.ended == "not ready: no VL features yet" and not run.robot.sent and 2.0 < log.ticks[-1].t_s < 2.2

    def late(t_s, fields):
        keep = fields["sensor_timestamps"] > 1000.31
        fields["sensor"], fields["sensor_timestamps"] = fields["sensor"][keep], fields["sensor_timestamps"][keep]

    log = setup(edit=late, expert=PlainExpert(sensor_window=325)).run(3)
    assert first(log, "act").t_s == pytest.approx(0.9)  # half a second of samples from 0.31 s on
    assert log.ticks[0].reason == "no full sensor window yet"


def test_a_robot_that_raises_stops_with_its_words(setup):
    def broken(t_s, fields):
        if t_s > 0.95:
            raise ConnectionError("cable")

    run = setup(edit=broken)
    log = run.run(10)
    assert log.ended == "robot failed: ConnectionError: cable" and log.ticks[-1].t_s == pytest.approx(1.0)
    run = setup()
    run.robot.send_action = lambda action: (_ for _ in ()).throw(ConnectionError("cable"))
    assert run.run(10).ended == "robot failed: ConnectionError: cable" and run.robot.stops


@pytest.mark.parametrize("failures", (1, 99))
def test_a_stop_that_raises_is_told_again_and_the_log_is_kept(setup, failures):
    run = setup(expert=PlainExpert(act=lambda call: 1 / 0))
    tries = []

    def stop(reason):
        tries.append(reason)
        if len(tries) <= failures:
            raise ConnectionError("cable")

    run.robot.stop = stop
    log = run.run(10)
    assert log.ended.startswith("policy failed: ZeroDivisionError") and log.stopped
    assert len(tries) == min(3, failures + 1) and set(tries) == {log.ended}
    failed = [event["reason"] for event in log.events if event["kind"] == "stop failed"]
    assert failed == ["ConnectionError: cable"] * min(3, failures) and log.summary()["failed_stops"] == len(failed)
    tries.clear()
    run = setup()
    run.robot.stop = stop
    assert run.run(1).ended == "time limit" and len(tries) == 2


def test_a_policy_that_raises_stops_and_a_watcher_that_raises_stops_too(setup):
    run = setup(expert=PlainExpert(act=lambda call: 1 / 0))
    assert run.run(10).ended.startswith("policy failed: ZeroDivisionError")
    run = setup()
    run.runner._watch = lambda tick, observation: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.run(10)
    assert run.robot.stops


def test_the_operators_stop_is_the_last_word(setup):
    run = setup()

    def watch(tick, observation):
        if tick.step == 7:
            run.runner.request_stop()

    run.runner._watch = watch
    log = run.run(10)
    assert log.ended == safety.OPERATOR and len(log.ticks) == 9 and len(run.robot.sent) == 8


def test_no_action_follows_a_stop_that_comes_while_the_policy_thinks(setup):
    run = setup()
    run.expert.act = lambda call: (run.runner.request_stop() if call == 5 else None, np.full((8, 7), 0.01))[1]
    log = run.run(10)
    assert log.ended == safety.OPERATOR and len(run.robot.sent) == 5 and log.ticks[-1].step == 5


def test_a_stop_that_comes_while_an_action_is_sent_is_said_again_after_it(setup):
    run = setup()
    send = run.robot.send_action

    def slow_send(action):
        if len(run.robot.sent) == 5:
            run.runner.request_stop()
        send(action)

    run.robot.send_action = slow_send
    log = run.run(10)
    assert log.ended == safety.OPERATOR and len(run.robot.sent) == 6 and len(run.robot.stops) == 2


def test_trap_35_a_limit_below_the_demonstrated_speed_is_told(setup):
    class Shown(PlainExpert):
        def usual_step(self):
            return 1.2, 2.0  # mm, degrees a step

    assert not setup(expert=Shown()).runner.log.events
    (event,) = setup(expert=Shown(), speed_mm_s=5.0).runner.log.events
    assert event["kind"] == "warning" and "0.50 mm a step is below the demonstrated 1.20 mm" in event["reason"]
