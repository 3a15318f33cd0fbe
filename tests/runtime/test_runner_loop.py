"""The loop on the simulated clock: ages, latencies, chunks, the log, the dry run."""

import json

import numpy as np
import pytest
from plain_robot import START, PlainExpert

from vla_lib.core.errors import UserError
from vla_lib.episodes.poses import apply_action, rotation_angle_deg
from vla_lib.runtime.clock import Latency, SimulatedClock
from vla_lib.runtime.expert import ChunkPlan
from vla_lib.runtime.robot_io import DryRunIO
from vla_lib.runtime.streams import SensorBuffer


def ages(log) -> list[int]:
    return [round(10 * tick.vl_age_s) for tick in log.ticks if tick.mode == "act"]


@pytest.mark.parametrize(
    ("vlm_s", "expected"),
    (
        (0.0, [0, 1, 2, 0, 1, 2, 0, 1]),
        (0.05, [1, 2, 3, 1, 2, 3, 1, 2]),  # acts from step 1 on
        (0.3, [3, 4, 5, 3, 4, 5, 3, 4]),
        (0.6, [6, 7, 8, 9, 10, 11, 6, 7]),  # one moment at a time: half the rate
    ),
)
def test_features_are_the_newest_finished_with_their_age(setup, vlm_s, expected):
    run = setup(latencies_s={"vlm": [vlm_s]}, vl_age_s=1.5)
    log = run.run(3)
    assert ages(log)[:8] == expected
    acted = [tick.t_s for tick in log.ticks if tick.mode == "act"]
    for t_s, (features, age_s, *_) in zip(acted, run.expert.asked, strict=True):
        assert t_s == pytest.approx(0.1 * features.step + age_s)  # the age is that of the pictures
        assert t_s >= 0.1 * features.step + vlm_s - 1e-9  # finished before it is used


def test_latencies_are_deterministic_by_the_seed(setup):
    latency = {"vlm": Latency(80, 60), "expert": Latency(10, 20)}
    first, again, other = (setup(latency=latency, seed=seed).run(5) for seed in (3, 3, 4))
    assert first.ticks == again.ticks and first.vlm_ms == again.vlm_ms
    assert first.vlm_ms != other.vlm_ms
    assert min(first.vlm_ms) >= 80 and np.mean(first.vlm_ms) == pytest.approx(140, rel=0.5)


def test_each_kind_of_work_draws_its_own_latencies():
    clock = SimulatedClock({"vlm": Latency(1, 5), "expert": Latency(1, 5)}, seed=1)
    alone = SimulatedClock({"vlm": Latency(1, 5)}, seed=1)
    drawn = []
    for _ in range(5):
        clock.spend("expert")
        drawn.append(clock.draw_s("vlm"))
    assert drawn == [alone.draw_s("vlm") for _ in range(5)]
    with pytest.raises(UserError, match="no work named camera"):
        SimulatedClock({"camera": Latency()})
    with pytest.raises(UserError, match="0 or more"):
        Latency(-1)


def test_trap_34_sent_actions_are_base_frame_motions_in_mm_and_degrees(setup):
    pose = (50.0, 50, 50, 20.0, -30.0, 40.0)
    step = np.array([0.1, -0.05, 0.2, 0.5, -0.3, 0.8])
    run = setup(expert=PlainExpert(step), pose=pose)
    log = run.run(2)
    expected = np.array(pose)
    for _ in range(20):
        expected = apply_action(expected, step)
    assert np.array(log.ticks[-1].commanded) == pytest.approx(expected)
    assert run.robot.pose == pytest.approx(np.array(log.ticks[-1].commanded), abs=1e-4)
    assert run.robot.pose[:3] - pose[:3] == pytest.approx(20 * step[:3])  # a tool frame would have turned it
    assert rotation_angle_deg(np.array(pose), run.robot.pose) == pytest.approx(20 * np.linalg.norm(step[3:]), rel=1e-6)
    added = np.array(pose[3:]) + 20 * step[3:]
    assert np.abs(log.ticks[-1].commanded[3:] - added).max() > 1  # Euler angles are not added


def chunk(value: float) -> np.ndarray:
    return value + np.arange(8)[:, None] * np.ones(7)


def test_first_action_takes_the_newest_chunks_own_step():
    plan = ChunkPlan(1)
    plan.add(0, chunk(0))
    plan.add(3, chunk(100))
    assert plan.wants_chunk(4) and plan.action(3)[0] == 100 and plan.action(5)[0] == 102
    assert plan.action(11) is None


def test_chunk_of_n_asks_every_n_steps():
    plan = ChunkPlan(3)
    asked, taken = [], []
    for step in range(7):
        if plan.wants_chunk(step):
            asked.append(step)
            plan.add(step, chunk(10 * step))
        taken.append(plan.action(step)[0])
    assert asked == [0, 3, 6] and taken == [0, 1, 2, 30, 31, 32, 60]


def test_the_buffer_gives_whole_windows_that_end_now():
    buffer = SensorBuffer(100, 650.0)
    samples = np.zeros((260, 1026), np.float32)
    samples[:, 0] = np.arange(260)
    times = np.arange(260) / 650
    for begin in range(0, 260, 37):
        read = slice(max(0, begin - 20), begin + 37)  # repeats samples
        new = buffer.append(samples[read], times[read])
        assert len(new) == min(37, 260 - begin)
        now = times[min(begin + 36, 259)]
        window = buffer.window(30, now)
        assert list(window[:, 0]) == list(range(min(begin + 37, 260) - 30, min(begin + 37, 260)))
    assert len(buffer) == 100 and buffer.newest_s == times[-1]
    assert buffer.window(30, times[-1] + 0.06) is None  # too old
    buffer.append(samples[:5], times[-1] + 0.07 + np.arange(1, 6) / 650)
    assert buffer.window(30, times[-1] + 0.08) is None  # a gap inside
    assert buffer.window(5, times[-1] + 0.08) is not None
    with pytest.raises(UserError, match="does not fit"):
        buffer.window(101, 0.0)
    with pytest.raises(UserError, match="shape"):
        buffer.append(samples[:, :1025], times)


def test_a_window_is_a_copy():
    buffer = SensorBuffer(10)
    buffer.append(np.ones((10, 1026)), np.arange(10) / 650)
    window = buffer.window(10, 9 / 650)
    buffer.append(np.zeros((10, 1026)), 1 + np.arange(10) / 650)
    assert window.min() == 1


def test_the_dry_run_sends_nothing_and_writes_everything(setup, tmp_path):
    run = setup()
    path = tmp_path / "actions.jsonl"
    run.runner.io = DryRunIO(run.robot, path)
    run.run(1)
    assert run.robot.sent == [] and run.robot.stops == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 11 and lines[0]["action"][0] == pytest.approx(0.1) and lines[-1]["stop"] == "time limit"


def test_a_dry_run_is_judged_by_where_the_robot_is(setup):
    run = setup(expert=PlainExpert((0.5, 0, 0, 0, 0, 0)))
    run.runner.io = DryRunIO(run.robot)
    log = run.run(30)  # sent, it would leave the box after 10 s
    assert (log.ended, log.summary()["modes"]) == ("time limit", {"act": 300})
    assert all(tick.commanded[0] == pytest.approx(START[0] + 0.5) for tick in log.ticks)
    outside = setup(expert=PlainExpert((0.5, 0, 0, 0, 0, 0)), pose=(100.0, *START[1:]))
    outside.runner.io = DryRunIO(outside.robot)
    assert outside.run(30).ended == "workspace box"


def test_the_log_is_written_as_json_lines(setup, tmp_path):
    log = setup(latencies_s={"vlm": [0.05]}).run(1)
    log.write(tmp_path / "log.jsonl")
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [next(iter(line)) for line in lines] == ["tick"] * 10 + ["event"] * 3 + ["summary"]
    assert lines[-1]["summary"]["modes"] == {"wait": 1, "act": 9}
    assert log.column("vl_age_s").shape == (10,) and log.column("pose")[0] == pytest.approx(START)


def test_a_run_always_ends_with_one_stop(setup):
    run = setup()
    run.run(1)
    assert [reason for _, reason in run.robot.stops] == ["time limit"]
