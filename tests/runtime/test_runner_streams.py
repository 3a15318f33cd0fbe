"""Streams that lie: stamps from the future, out of order, data that stay the same, a clock that steps."""

import numpy as np
import pytest
from plain_robot import PlainExpert, striped
from test_runner_safety import assert_held_then_stopped, first

from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.runtime.streams import SensorBuffer, Streams

AFTER = 0.95  # faults begin with the tick at 1 s


def after(spoil, begin_s=AFTER, end_s=99.0):
    """An edit of observations that spoils those within a time."""
    return lambda t_s, fields: spoil(fields) if begin_s < t_s < end_s else None


def shift(name, by_s):
    """Move a stamp, an array of stamps or all stamps of pictures."""

    def spoil(fields):
        value = fields[name]
        moved = {view: stamp + by_s for view, stamp in value.items()} if isinstance(value, dict) else value + by_s
        fields[name] = moved

    return spoil


def swap_last(fields):
    """The last two samples change places."""
    fields["sensor_timestamps"][-2:] = fields["sensor_timestamps"][-2:][::-1].copy()


@pytest.mark.parametrize("ahead_s", (30.0, 3600.0))
def test_one_sample_from_the_future_does_not_hide_a_force(setup, ahead_s):
    def edit(t_s, fields):
        if AFTER < t_s < 1.05:
            fields["sensor_timestamps"][-1] += ahead_s
        if t_s > 1.45:
            fields["sensor"][:, 0] = 900.0

    run = setup(edit=edit, expert=PlainExpert((0, 0, -0.3, 0, 0, 0)))
    log = run.run(10)
    back = [tick for tick in log.ticks if tick.mode == "retreat"]
    assert log.ended == "force limit" and back[0].t_s == pytest.approx(1.5)
    assert log.summary()["reasons"]["sensor stamped ahead"] == 1  # one tick; then the stream is sound again
    assert [tick.mode for tick in log.ticks[11:15]] == ["act"] * 4


@pytest.mark.parametrize("by_s", (3600.0, -3600.0, np.nan))
def test_a_force_is_seen_whatever_its_stamps_say(setup, by_s):
    def edit(t_s, fields):
        if t_s > AFTER:
            shift("sensor_timestamps", by_s)(fields)
            fields["sensor"][:, 0] = -900.0

    log = setup(edit=edit).run(10)
    assert log.ended == "force limit" and first(log, "retreat").t_s == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    (
        (shift("sensor_timestamps", 0.06), "sensor stamped ahead"),
        (shift("state_timestamp", 0.06), "state stamped ahead"),
        (shift("picture_timestamps", 0.06), "view stamped ahead View5"),
        (shift("picture_timestamps", 3600.0), "view stamped ahead View5"),
        (swap_last, "sensor out of order"),
        (shift("timestamp", 3600.0), "clock step"),
        (shift("timestamp", 0.2), "clock step"),
        (shift("timestamp", -3600.0), "clock step"),
    ),
)
def test_stamps_that_cannot_be_true_hold_then_stop(setup, spoil, reason):
    run = setup(edit=after(spoil))
    assert_held_then_stopped(run, run.run(10), reason, 1.0)


@pytest.mark.parametrize("name", ("sensor_timestamps", "state_timestamp", "picture_timestamps"))
def test_a_little_ahead_is_no_fault(setup, name):
    assert setup(edit=after(shift(name, 0.04))).run(3).summary()["modes"] == {"act": 30}


def test_all_clocks_that_step_together_are_noticed(setup):
    def spoil(fields):
        for name in ("timestamp", "sensor_timestamps", "state_timestamp", "picture_timestamps"):
            shift(name, 3600.0)(fields)

    run = setup(edit=after(spoil))
    assert_held_then_stopped(run, run.run(10), "clock step", 1.0)


@pytest.mark.parametrize(
    ("name", "reason"), (("state_timestamp", "state out of order"), ("picture_timestamps", "view out of order View5"))
)
def test_stamps_that_go_back_and_forth_are_noticed(setup, name, reason):
    ticks = []

    def edit(t_s, fields):
        ticks.append(t_s)
        if t_s > AFTER and len(ticks) % 2:
            shift(name, -0.15)(fields)

    log = setup(edit=edit).run(10)
    assert log.ended == reason and log.ticks[-1].t_s < 2.2


def test_a_sensor_whose_clock_steps_back_is_noticed(setup):
    log = setup(edit=after(shift("sensor_timestamps", -0.2)), sensor_age_s=0.5).run(10)
    assert first(log, "hold").reason == "sensor out of order" and first(log, "hold").t_s == pytest.approx(1.0)
    assert log.ended == "broken sensor window"  # its samples are 0.2 s old from now on


def test_a_sensor_ahead_never_begins_a_run_and_says_why(setup):
    run = setup(edit=after(shift("sensor_timestamps", 5.0), -1.0), start_s=1.0)
    assert run.run(10).ended == "not ready: sensor stamped ahead" and not run.robot.sent


@pytest.mark.parametrize("part", (slice(0, 1), slice(1, None), slice(None)), ids=("force", "A-line", "both"))
def test_a_sensor_that_repeats_a_value_with_new_stamps_is_noticed(setup, part):
    def spoil(fields):
        fields["sensor"][:, part] = 7.0

    run = setup(edit=after(spoil))
    assert_held_then_stopped(run, run.run(10), "frozen sensor", 1.2)  # 0.3 s of it have come, 0.25 s are allowed


def test_a_robot_without_a_sensor_needs_no_live_one(setup):
    def spoil(fields):
        fields["sensor"][:] = 0.0

    run = setup(edit=after(spoil, -1.0), sensor_required=False, expert=PlainExpert(sensor_window=0))
    assert run.run(2).summary()["modes"] == {"act": 20}


def test_a_picture_that_does_not_change_while_the_arm_moves_is_noticed(setup):
    def spoil(fields):
        fields["pictures"] = {"View5": striped(128)}

    run = setup(edit=after(spoil), expert=PlainExpert((0.5, 0, 0, 0, 0, 0)))
    log = run.run(10)
    assert_held_then_stopped(run, log, "frozen view View5", 1.7)  # 3.5 mm after the first of them
    still = setup(edit=after(spoil), expert=PlainExpert((0.01, 0, 0, 0, 0, 0)))
    assert still.run(5).summary()["modes"] == {"act": 50}  # 0.4 mm need not show


def test_a_picture_that_shows_nothing_is_noticed(setup):
    def spoil(fields):
        fields["pictures"] = {"View5": np.random.default_rng(0).integers(0, 8, (90, 160, 3), np.uint8)}  # a dark noise

    run = setup(edit=after(spoil))
    assert_held_then_stopped(run, run.run(10), "blank view View5", 1.0)


@pytest.mark.parametrize("since_s", (-1.0, 1.0))
def test_a_run_goes_on_without_as_many_views_as_it_can_spare(setup, since_s):
    """From its beginning on, or from then on; not shown to the VLM, and told once each."""

    def two(fields):
        fields["pictures"]["View4"] = striped(0)
        fields["picture_timestamps"]["View4"] = fields["timestamp"]

    def spoil(t_s, fields):
        two(fields)
        if t_s >= since_s:
            fields["pictures"]["View4"] = np.zeros((90, 160, 3), np.uint8)

    one = setup(edit=spoil, spare_views=1)
    log = one.run(3)
    assert log.summary()["modes"]["act"] >= 28 and log.ended == "time limit"
    told = [event for event in log.events if "without this view" in str(event)]
    assert len(told) == 1 and "blank view View4" in str(told[0])
    strict = setup(edit=spoil)
    assert "blank view View4" in strict.run(20).ended


def test_a_late_camera_is_waited_for_even_where_a_view_can_be_spared(setup):
    def spoil(t_s, fields):
        if t_s < 1.0:
            fields["pictures"], fields["picture_timestamps"] = {}, {}

    run = setup(edit=spoil, spare_views=1, views=("View5",))
    modes = [tick.mode for tick in run.run(2).ticks]
    assert modes[:10] == ["wait"] * 10 and modes[-1] == "act"


def test_a_buffer_is_frozen_only_over_the_whole_span():
    buffer, noise = SensorBuffer(400), np.random.default_rng(0).normal(size=(400, 1026))
    assert not buffer.frozen(0.25)
    buffer.append(noise[:200], np.arange(200) / 650)
    assert not buffer.frozen(0.25)
    noise[:, 0] = 3.0
    buffer.append(noise[:160], np.arange(200, 360) / 650)
    assert not buffer.frozen(0.25)  # one of its samples is a live one
    buffer.append(noise[160:170], np.arange(360, 370) / 650)
    assert buffer.frozen(0.25) and not buffer.frozen(0.3) and not buffer.frozen(1.0)


def test_a_slow_first_reading_and_slow_drift_are_no_step():
    streams = Streams(SafetyLimits(workspace_mm=((0, 1),) * 3), 10)

    def read(stamp, asked_s, had_s):
        streams.take(Observation(stamp, np.zeros(12), stamp), asked_s, had_s)
        return streams.clock_fault

    assert read(1000.0, 0.0, 0.7) == ""  # stamped as the reading began
    assert read(1000.8, 0.8, 0.8) == "" and streams.now == pytest.approx(1000.8)
    assert read(1060.0 + 0.1, 60.0, 60.0) == ""
    assert read(1060.3, 60.1, 60.1) == "clock step" and streams.now == pytest.approx(1000.0 - 0.7 + 60.1)
    assert read(1060.2, 60.2, 60.2) == ""  # a single wrong one
