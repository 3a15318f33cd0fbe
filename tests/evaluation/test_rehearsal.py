"""Rehearsals in real time: the same runner, a process of its own, a Stop that gets through. Logic only: counts and
reasons, never milliseconds."""

import asyncio

import numpy as np
import psutil
import pytest

from benchmarks import runtime as bench
from needle_rig.world import VIEWS
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl
from vla_lib.evaluation.rehearsal import RehearsalProcess, rehearse
from vla_lib.evaluation.rollout import Moment
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.evaluation.sim_robot import sim_limits
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.training.checkpoint import load_policy
from vla_lib.workbench import rollout_views
from vla_lib.workbench.jobs import JobCancelled
from vla_lib.workbench.plots.rehearsal import timing


def test_a_checkpoint_is_rehearsed_in_real_time(checkpoint, tmp_path):
    runners, ticks = [], []
    settings = RolloutSettings(checkpoint, max_time_s=0.7)
    found = rehearse(
        settings, 3, lambda tick, observation: ticks.append(tick.step), runners.append, dry_run=tmp_path / "sent.jsonl"
    )
    log = found["log"]
    assert [tick.step for tick in log.ticks] == ticks and runners[0].log is log
    assert found["reason"] and not found["success"] and found["runner"]["ended"] == log.ended
    assert runners[0].settings.views == ("View1_left", "View5") and not runners[0].io.moves
    assert runners[0].io.sent == read_jsonl(tmp_path / "sent.jsonl") and "stop" in runners[0].io.sent[-1]
    assert not np.ptp(found["path"]["position_mm"], axis=0).any()  # a dry run moves nothing


@pytest.fixture
def views(monkeypatch):
    """A person sits before the kernel; every view that is made."""
    made = []

    class Watched(rollout_views.RehearsalView):
        def __init__(self, *given):
            super().__init__(*given)
            made.append(self)

    monkeypatch.setattr(rollout_views, "interactive", lambda: True)
    monkeypatch.setattr(rollout_views, "RehearsalView", Watched)
    return made


def test_the_stop_button_stops_the_robot(checkpoint, views):
    async def click():
        while not (views and bytes(views[0]._picture.value)):  # a moment has been drawn
            await asyncio.sleep(0.05)
        views[0]._stop.click()

    async def both():
        process = RehearsalProcess(RolloutSettings(checkpoint, max_time_s=60.0), 3, go_on=True)
        return (await asyncio.gather(rollout_views.follow(process), click()))[0]

    for _ in range(3):  # on a busy machine safety may end a run before the click
        views.clear()
        record, moments = asyncio.run(both())
        log = record["log"]
        if log.ended != "watchdog":
            break
    assert (log.ended, log.stopped, log.ticks[-1].mode) == ("operator", True, "stop")
    assert [event["kind"] for event in log.events][-2:] == ["stop", "end"] and log.events[-1]["reason"] == "operator"
    assert [seen.tick.step for seen in moments] == [tick.step for tick in log.ticks]  # the watcher saw every tick
    assert views[0]._stop.disabled and "operator" in views[0]._state.value
    assert bytes(views[0]._picture.value).startswith(b"\xff\xd8")
    told = dict(rollout_views.outcome(record).itertuples(index=False))
    assert told["ended by"] == "operator" and told["verdict"].startswith("seed 3: ")
    top = rollout_views.some_pictures(moments).axes[:2]
    assert {axis.get_title() for axis in top} == {"View1_left", "View5"} and top[0].get_ylabel().endswith(" s")


def test_a_rehearsal_without_a_tick_is_told():
    assert "no tick" in rollout_views.moments_slider([]).data and "No picture" in rollout_views.some_pictures([]).data


def test_a_stop_of_a_dead_process_hides_nothing(checkpoint):
    process = RehearsalProcess(RolloutSettings(checkpoint), 3)
    with pytest.raises(RuntimeError, match="still runs"):
        process.result()
    psutil.Process(process.pid).kill()
    while process.running:
        process.stop()
        assert process.poll() == []
    with pytest.raises(RuntimeError, match="process ended before its record came"):
        process.result()
    process.close()


def test_an_interrupted_cell_stops_the_robot_and_ends_the_process(checkpoint, views, monkeypatch):
    process = RehearsalProcess(RolloutSettings(checkpoint, max_time_s=60.0), 3, go_on=True)

    stops, stop = [], process.stop
    monkeypatch.setattr(process, "stop", lambda: (stops.append(psutil.pid_exists(process.pid)), stop()))

    async def interrupted():
        task = asyncio.create_task(rollout_views.follow(process))
        while not (views and bytes(views[0]._picture.value)):  # the robot moves
            await asyncio.sleep(0.05)
        task.cancel()
        await task

    with pytest.raises(JobCancelled, match="the robot is stopped"):
        asyncio.run(interrupted())
    assert stops == [True] and not psutil.pid_exists(process.pid)  # told to stop before its process ended


def test_the_live_view_draws_the_runners_own_limits():
    ticks = [Tick(k, k / 5, 0.1, expert_ms=5.0, vl_age_s=0.2) for k in range(4)]
    moments = [Moment(tick, 0.2, np.full((10, 1026), 20.0), tick.t_s + np.arange(10) / 50, {}) for tick in ticks]
    axes = {
        axis.get_ylabel() or axis.get_xlabel(): axis
        for axis in rollout_views.moment(moments, rollout_views.FORCE_MN).axes
    }
    assert axes["force (mN)"].lines[-1].get_ydata()[0] == sim_limits()["force_mN"]
    (deadline,) = next(axis for axis in axes.values() if axis.get_xlabel() == "duration of the expert (ms)").lines
    assert deadline.get_xdata()[0] == 200  # at 5 Hz
    assert 500 in [line.get_xdata()[0] for line in timing(RunLog(ticks, period_s=0.5)).axes[1].lines]


def test_the_benchmark_counts_every_tick():
    ticks = [
        Tick(k, k / 10, 0.1 * k, vl_age_s=0.1, expert_ms=6.0 if k % 3 == 0 else 5.0, vl_busy=k % 3 == 0)
        for k in range(1, 31)
    ]
    log = RunLog([*ticks, Tick(33, 3.3, 9.0, "hold", "missed deadline")], vlm_ms=[30.0, 32.0], ended="time limit")
    late, beside = bench.lateness_row(log, "diffusion"), bench.concurrency_row(log, "diffusion")
    assert 3.0 < late.ours < 9.0 and late.ratio == pytest.approx(5.0 / late.ours)
    assert "31 ticks" in late.note and "max 9.00 ms; 1 missed deadlines, 3 skipped, 1 held" in late.note
    assert (beside.ours, beside.baseline) == (6.0, 5.0)
    assert "10 of 30 expert calls fell into VLM work; 2 VLM ticks" in beside.note


def test_the_benchmark_rehearses_an_untrained_policy_of_each_model_on_all_views(monkeypatch):
    windows = []

    def rehearsed(settings, seed, go_on):
        policy, info = load_policy(settings.checkpoint)
        windows.append((policy.config.head, policy.config.sensor_window_size))
        assert tuple(info["binding"]["views"]) == policy.config.views == VIEWS and go_on
        ticks = [
            Tick(k, k / 10, 2.0, expert_ms=5.0, vl_busy=k % 2 == 0) for k in range(round(10 * settings.max_time_s))
        ]
        return {"log": RunLog(ticks, vlm_ms=[30.0], ended="time limit")}

    monkeypatch.setattr(bench, "rehearse", rehearsed)
    late, beside, *others = bench.rows(fast=True)
    assert windows == [("regression", 65), ("diffusion", 650)] and ["diffusion" in row.name for row in others] == [
        True,
        True,
    ]
    assert late.ours == pytest.approx(2.0) and "30 ticks, ended by time limit" in late.note
    assert "15 of 30 expert calls fell into VLM work" in beside.note


def test_what_cannot_be_rehearsed_is_told(checkpoint):
    with pytest.raises(UserError, match="choose simulated rig or dry run"):
        rollout_views.prepare(checkpoint, None, "real arm")
    settings, table = rollout_views.prepare(checkpoint, None, "dry run", max_time_s=3.0)
    # not the rig's own pictures: as large as its VLM asks
    assert (settings.picture_width, settings.picture_height, settings.max_time_s) == (640, 360, 3.0)
    told = dict(table.itertuples(index=False))
    assert told["speed"] == "15 mm/s, 45 deg/s" and told["age of VL features in training"] == "0 to 200 ms"
