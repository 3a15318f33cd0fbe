"""`vla record`: raw episodes of a lab's rig without a policy, while a person moves the arm."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.robots.arm import StateStream
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.recording import Recording, enter, judge
from vla_lib.robots.settings import RobotSettings
from vla_lib.workbench.notebook import shown

TOLD_EVERY_S = 2.0


def stream_table(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """One row a stream, as people read it."""
    names = {"rate_hz": "rate (Hz)", "age_ms": "age (ms)", "clock_offset_ms": "clock offset (ms)"}
    return pd.DataFrame(rows).rename(columns=names)


def record(robot_file: Path, root: Path, dataset: str, seconds: float, by: str) -> Path:
    """Record one episode for `seconds` (0: until Ctrl-C, or until the arm's other host ends its own); returns its
    folder. On a terminal a person is asked how it went. Raises UserError."""
    settings = RobotSettings.load(robot_file)
    if "/" in dataset or dataset.startswith("."):
        raise UserError(f"The dataset {dataset!r} must be the name of a folder; its root is --dataset-root.")
    with LabRobot(settings) as robot:
        robot.wait_ready()
        print(stream_table(robot.streams()).to_string(index=False), flush=True)
        with Recording(root / dataset, robot, {"kind": "recording", "instruction": settings.instruction}) as recording:
            print(f"recording into {shown(recording.folder)}; Ctrl-C ends it", flush=True)
            recording.close(ended=_wait(robot, seconds))
    if row := enter(root, dataset, settings.instruction):
        print(row)
    folder = recording.folder
    if sys.stdin.isatty():
        folder = ask_outcome(folder, by)
    print(f"recorded {shown(folder)}; notebook 01 opens it", flush=True)
    return folder


def _wait(robot: LabRobot, seconds: float) -> str:
    begun_s = told_s = time.monotonic()
    arm = robot.arm
    ended = arm.episodes_ended if isinstance(arm, StateStream) else 0
    try:
        while not seconds or time.monotonic() - begun_s < seconds:
            if isinstance(arm, StateStream) and arm.episodes_ended > ended:
                return "the arm's host ended its episode"
            if time.monotonic() - told_s > TOLD_EVERY_S:
                told_s = time.monotonic()
                rates = (f"{row['stream']} {row['rate_hz']:g} Hz" for row in robot.streams())
                print(f"{told_s - begun_s:5.0f} s  {', '.join(rates)}", flush=True)
            time.sleep(0.05)
    except KeyboardInterrupt:
        return "operator"
    return "time limit"


def ask_outcome(folder: Path, by: str, ask: Callable[[str], str] = input) -> Path:
    """Ask a person on the terminal how an episode went; returns where it lies then."""
    answers = {"y": True, "n": False, "": None}
    while (answer := ask("Did it succeed? [y/n, Enter: not judged] ").strip().lower()[:1]) not in answers:
        print("y or n")
    return judge(folder, answers[answer], ask("Note: ").strip(), by or ask("Your name: ").strip())
