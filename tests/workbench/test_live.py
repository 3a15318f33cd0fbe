import asyncio
import sys

import pytest

from vla_lib.core.files import append_jsonl
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
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "train/loss_step": 1 / step, "train/lr": 1e-4, "time": float(step)})
    asyncio.run(live.follow(Job([sys.executable, "-c", "print('step <3>')"], tmp_path)))
    (view,) = views
    assert "step &lt;3&gt;" in view._log.value
    assert bytes(view._curves.value).startswith(b"\x89PNG")
    assert view._stop.disabled and view._state.value == "<b>done</b>"


def test_a_cache_job_has_progress_but_no_curves(tmp_path, views):
    append_jsonl(tmp_path / "metrics.jsonl", {"ticks": 3, "total": 9})
    asyncio.run(live.follow(Job([sys.executable, "-c", "print('features 3/9 ticks')"], tmp_path)))
    assert "features 3/9 ticks" in views[0]._log.value and not bytes(views[0]._curves.value)


def test_the_stop_button_stops_the_job(tmp_path, views):
    async def click() -> None:
        while not (views and "step 1" in views[0]._log.value):
            await asyncio.sleep(0.05)
        views[0]._stop.click()

    async def both() -> None:
        await asyncio.gather(live.follow(Job([sys.executable, "-c", SLEEPER], tmp_path)), click())

    with pytest.raises(JobCancelled, match="stopped by SIGTERM"):
        asyncio.run(both())
    assert views[0]._state.value == "<b>stopped by SIGTERM</b>"
