"""A worker of a sweep as a program of its own, with a stand-in for `vla run` that starts in a moment: what the queue
does is tested, not the notebook.

    python sweep_stub.py worker FOLDER PARALLEL     the sweep over n = 1 ... 6
    python sweep_stub.py vla_run FOLDER N RUN       one entry: counts its starts and ends in files of FOLDER

An entry works until FOLDER/go is there (a checkpoint is what it has), then ends; n = 3 fails.
"""

import signal
import sys
import time
from pathlib import Path

from vla_lib.core.run_folder import RunFolder, write_results


def work(folder: Path, parallel: int) -> int:
    from vla_lib.workbench import sweeps, worker
    from vla_lib.workbench.jobs import Job
    from vla_lib.workbench.queue import Claim

    def stand_in(self: worker.Worker, claim: Claim) -> Job:
        words = [sys.executable, __file__, "vla_run", str(folder), claim.words["n"], str(claim.run)]
        return Job(words, self.queue.path / "jobs" / claim.run.name, "vla.log")

    worker.Worker._job = stand_in  # type: ignore[method-assign]
    entries = [sweeps.Entry(f"n={n}", str(folder / "small.ipynb"), {"n": str(n)}, f"n={n}") for n in range(1, 7)]
    return worker.run(sweeps.Plan("sweep", entries), parallel)


def vla_run(folder: Path, n: int, path: Path) -> None:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    resume = (path / "run.json").exists()
    run = RunFolder.resume(path, {"n": n}) if resume else RunFolder.create("small", {"n": n}, path=path)
    with open(folder / "begun", "a") as log:
        log.write(f"{n}\n")
    try:
        while not (folder / "go").exists():
            time.sleep(0.02)
        if n == 3:
            raise ValueError("three is broken")
        with open(folder / "ended", "a") as log:
            log.write(f"{n}\n")
        write_results(path, {"val_action_loss": n, "resumed": resume})
        run.finish("done")
    except KeyboardInterrupt:
        (path / "checkpoints").mkdir(exist_ok=True)
        (path / "checkpoints" / "saved.pt").touch()
        run.finish("cancelled", "interrupted")
    except ValueError as error:
        run.finish("failed", f"ValueError: {error}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    if sys.argv[1] == "worker":
        raise SystemExit(work(Path(sys.argv[2]), int(sys.argv[3])))
    vla_run(Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
