"""A rank that stands in for one of a training, without torch: steps that take no work, a forked worker, a checkpoint
on SIGTERM. Which processes end is tested, not what they compute."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

from vla_lib.core import frontdoor, settings
from vla_lib.core.files import append_jsonl, write_json
from vla_lib.core.processes import die_with_launcher, follow_parent

CHECKPOINT = "stand_in.pt"


@settings.settings
class Settings(settings.Settings):
    """Where the checkpoint goes, and whether it is gone on with."""

    run_dir: Path = Path()
    resume: bool = False


def work() -> None:
    follow_parent()
    time.sleep(3600)


def main(given: Settings) -> None:
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: asked.append(number))
    worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    worker.start()
    checkpoint, first = given.run_dir / "checkpoints" / CHECKPOINT, os.environ["RANK"] == "0"
    step = read_step(checkpoint) if given.resume else 0
    print(f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} begins at step {step}", flush=True)
    while not asked:
        time.sleep(0.02)
        step += 1
        if first:
            append_jsonl(given.run_dir / "metrics.jsonl", {"step": step})
            if step == 5:
                write_json(checkpoint, {"step": step})
    if first:
        write_json(checkpoint, {"step": step})
    worker.kill()  # it has this process's handler of SIGTERM


def read_step(checkpoint: Path) -> int:
    return int(json.loads(checkpoint.read_text())["step"])


if __name__ == "__main__":
    die_with_launcher()
    main(frontdoor.parse(Settings))
