"""Benchmark rows of the simulated rig: pictures a second, and how much faster than real time it records and steps."""

import tempfile
import time
from pathlib import Path

from benchmarks.rows import BenchRow
from needle_rig import NeedleInsertion
from needle_rig.demonstrator import demonstrate, demonstrator_action
from needle_rig.recorder import record
from needle_rig.render import open_scene
from needle_rig.settings import RecordSettings
from needle_rig.world import VIEWS, sample_world
from vla_lib.evaluation.sim_robot import check_drawing


def rows(fast: bool = False) -> list[BenchRow]:
    """Draw for some seconds, record some episodes in a temporary folder, step one rollout. UserError without EGL."""
    check_drawing()
    return [pictures_row(0.5 if fast else 2.0), recording_row(2 if fast else 8, workers=2), rig_row()]


def pictures_row(least_s: float) -> BenchRow:
    """Pictures of 320x180 a second on one core, as drawn, against the five views at the cameras' 5 Hz."""
    world = sample_world(0)
    shown = demonstrate(world)
    scene = open_scene(320, 180)
    scene.show(world)
    for view in VIEWS:
        scene.picture(view, shown.position_mm[0], shown.rotvec_deg[0])
    drawn, start = 0, time.perf_counter()
    while time.perf_counter() - start < least_s:
        k = 65 * drawn % len(shown.force_mN)
        scene.picture(VIEWS[drawn % len(VIEWS)], shown.position_mm[k], shown.rotvec_deg[k])
        drawn += 1
    rate = drawn / (time.perf_counter() - start)
    scene.close()
    note = "320x180, one process; baseline: five cameras at 5 Hz"
    return BenchRow("needle_rig.pictures", rate, 25.0, "pictures/s", "> 500 on one core", note)


def recording_row(episodes: int, workers: int) -> BenchRow:
    """Seconds of episode written a second of wall clock, all files included."""
    with tempfile.TemporaryDirectory() as folder:
        f2 = episodes // 4
        settings = RecordSettings(Path(folder), episodes_f1=episodes - f2, episodes_f2=f2, workers=workers)
        start = time.perf_counter()
        entries = record(settings, show=False)["episodes"]
        took = time.perf_counter() - start
    recorded = sum(entry["seconds"] + settings.idle_tail_s for entry in entries)
    note = f"{episodes} episodes, {workers} processes, their start included; baseline: real time"
    return BenchRow("needle_rig.recording", recorded / took, 1.0, "s/s", "several times real time", note)


def rig_row() -> BenchRow:
    """Seconds of rig time a second of wall clock, stepping at 10 Hz with five cameras at 5 Hz."""
    rig = NeedleInsertion()
    rig.reset(seed=0)
    start = time.perf_counter()
    done = False
    while not done:
        *_, terminated, truncated, info = rig.step(demonstrator_action(rig))
        done = terminated or truncated
    factor = info["time_s"] / (time.perf_counter() - start)
    rig.close()
    note = "one process, five views; baseline: real time"
    return BenchRow("needle_rig.step", factor, 1.0, "s/s", "faster than real time", note)
