"""Starts trainings as programs, small ones, and reads what they told W&B.

python front_doors.py STEP SIGNAL PROGRAM FLAGS...     PROGRAM, which SIGNAL meets in the middle of a step
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

SMALL = {
    "width": 32,
    "layers": 1,
    "heads": 2,
    "sensor_window_size": 13,
    "num_workers": 0,
    "wandb_mode": "disabled",
    "device": "cpu",
    "warmup_steps": 2,
}


def wandb_rows(run: Path) -> list[dict]:
    """What `wandb sync` would upload of a run folder: the history of its only W&B folder, read from its record file
    (LevelDB's log format)."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = run.glob("wandb/*run-*/run-*.wandb")
    data, at, record, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the rest of a block is too short for a header
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record, at = record + data[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part of one
            row, record = Record.FromString(record), b""
            if row.HasField("history"):
                rows.append(
                    {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.history.item}
                )
    return rows


def flags_of(values: dict) -> list[str]:
    """Settings as the words of a command line, beside those of SMALL."""
    words = []
    for name, value in {**SMALL, **values}.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, str(value)]
    return words


def launch(program: str, values: dict, processes: int = 1, signal_after: tuple[int, int] = ()) -> subprocess.Popen:
    """Start a front door as a program, under torchrun where `processes` > 1; returns at once.

    `signal_after`: so many steps, and the signal that the last rank's process group gets in the step that follows.
    """
    words = ["-m", f"vla_lib.{program}", *flags_of(values)]
    if signal_after:
        words = [__file__, *map(str, map(int, signal_after)), *words[1:]]
    if processes > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True, **output)


def signal_midway(step: int, number: int) -> None:
    """From now on: after `step` steps the last rank sends the signal to its process group, loader processes too."""
    from vla_lib.training.schedule import Schedule

    rate, last = Schedule.learning_rate, int(os.environ.get("WORLD_SIZE", 1)) - 1

    def begin(self, state):
        if state.step == step and int(os.environ.get("RANK", 0)) == last:
            os.killpg(0, number)
        return rate(self, state)

    Schedule.learning_rate = begin


if __name__ == "__main__":
    signal_midway(int(sys.argv[1]), int(sys.argv[2]))
    del sys.argv[:3]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
