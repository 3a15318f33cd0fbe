import asyncio
import sys

import pytest

from vla_lib.core.errors import UserError
from vla_lib.core.files import append_jsonl, read_json
from vla_lib.workbench import live
from vla_lib.workbench.jobs import Job, JobCancelled

SLEEPER = "import time; print('step 1', flush=True); time.sleep(600)"


@pytest.fixture
def views(monkeypatch) -> list[live.TrainingView]:
    """A person sits before the kernel; every view that is made."""
    made = []

    class Watched(live.TrainingView):
        def __init__(self, job):
            super().__init__(job)
            made.append(self)

    monkeypatch.setattr(live, "interactive", lambda: True)
    monkeypatch.setattr(live, "TrainingView", Watched)
    return made


def test_the_view_shows_log_curves_and_end(tmp_path, views):
    for step in range(1, 4):
        row = {
            "step": step,
            "train/loss_step": 1 / step,
            "train/lr": 1e-4,
            "elapsed_s": 2.0 * step,
            "train/loader_wait_s": 0.5,
        }
        append_jsonl(tmp_path / "metrics.jsonl", {**row, "train/gpu_memory_gib": 11.5})
    baselines = {f"val/baseline_{name}_action_loss": 0.4 for name in ("zero", "mean", "persistence")}
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 3, "epoch": 1, "val/action_loss": 0.3, **baselines})
    script = "from vla_lib.core.progress import Progress\n"
    script += "with Progress(4, 'train', 'steps') as p: p.update(3); print('loss <3>')"
    asyncio.run(live.follow(Job([sys.executable, "-c", script], tmp_path)))
    (view,) = views
    assert "loss &lt;3&gt;" in view._log.value and "train 3/4 steps" in view._log.value
    assert view._bar.value == 0.75 and view._counted.value.startswith("3 of 4 steps, ETA 0:0")
    assert bytes(view._curves.value).startswith(b"\x89PNG")
    for words in (
        "loss 0.3333",
        "lr 1.00e-04",
        "loader wait 25 %",
        "GPU memory 11.5 GiB",
        "held-out error 0.3000 (baselines: zero 0.4000",
    ):
        assert words in view._figures.value
    assert view._stop.disabled and view._state.value == "<b>done</b>"


def test_a_cache_job_has_progress_but_no_curves(tmp_path, views):
    append_jsonl(tmp_path / "metrics.jsonl", {"ticks": 3, "total": 9})
    asyncio.run(live.follow(Job([sys.executable, "-c", "print('features 3/9 ticks')"], tmp_path)))
    assert "features 3/9 ticks" in views[0]._log.value and not bytes(views[0]._curves.value)


async def until(true) -> None:
    while not true():
        await asyncio.sleep(0.05)


def test_the_stop_button_stops_the_job(tmp_path, views):
    async def click() -> None:
        await until(lambda: views and "step 1" in views[0]._log.value)
        views[0]._stop.click()

    async def both() -> None:
        await asyncio.gather(live.follow(Job([sys.executable, "-c", SLEEPER], tmp_path)), click())

    with pytest.raises(JobCancelled, match="^stopped.* what it wrote is in "):
        asyncio.run(both())
    assert views[0]._state.value.startswith("<b>stopped; what it wrote is in ")


def test_a_second_view_attaches_leaves_the_job_alone_and_can_stop_it(tmp_path, views):
    """What a person does whose browser tab was closed: look at the run again, look away, come back, stop it."""
    append_jsonl(tmp_path / "metrics.jsonl", {"step": 1, "train/loss_step": 0.5, "train/lr": 1e-4})
    starter = Job([sys.executable, "-c", SLEEPER], tmp_path)

    async def look() -> None:
        first = asyncio.create_task(starter.watch(lambda lines: None))
        await until(lambda: starter.log.exists() and "step 1" in starter.log.read_text())
        second = asyncio.create_task(live.follow(tmp_path))
        await until(lambda: views and "step 1" in views[0]._log.value)
        assert bytes(views[0]._curves.value).startswith(b"\x89PNG")  # drawn at once, from the file
        second.cancel()
        with pytest.raises(JobCancelled, match="the job goes on"):
            await second
        assert starter.running and views[0]._stop.disabled and "running on" in views[0]._state.value
        again = asyncio.create_task(live.follow(Job(starter.command, tmp_path)))  # the launch cell, run again
        await until(lambda: len(views) == 2 and "step 1" in views[1]._log.value)
        assert read_json(tmp_path / "job.json")["supervisor_pid"] == starter._process.pid  # no second job
        views[1]._stop.click()
        for view in (first, again):
            with pytest.raises(JobCancelled, match="^stopped.* what it wrote is in "):
                await view

    asyncio.run(look())


def test_a_finished_job_is_shown_not_started_again(tmp_path, views, capsys):
    script = f"open({str(tmp_path / 'starts')!r}, 'a').write('x'); print('the end')"
    for _ in range(2):
        status = asyncio.run(live.follow(Job([sys.executable, "-c", script], tmp_path)))
    assert status["returncode"] == 0 and (tmp_path / "starts").read_text() == "x"
    assert "the end" in views[1]._log.value and views[1]._state.value == "<b>done</b>"
    assert "nothing is started again" in capsys.readouterr().out


def test_a_folder_without_a_job_is_told(tmp_path):
    with pytest.raises(UserError, match="No job was started in"):
        asyncio.run(live.follow(tmp_path))
