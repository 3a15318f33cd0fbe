"""Workers of a sweep over n = 1 ... 6 as programs of their own, with a stand-in for `vla run` that starts in a moment:
what the queue does is tested, not the notebook.

    python sweep_stub.py worker NOTEBOOK PARALLEL     one worker
    python sweep_stub.py vla WORDS...                 `vla WORDS`
    python sweep_stub.py entry FOLDER N RUN           one entry: counts its starts and ends in files of FOLDER

FOLDER is the notebook's. An entry works until FOLDER/go is there (a checkpoint is what it has), then ends; n = 3 fails.
The report of a sweep is an empty file.
"""

import os
import signal
import sys
import time
from pathlib import Path

from vla_lib.core.files import read_json
from vla_lib.core.run_folder import RunFolder, read_record, write_results

GRID = "n=1,2,3,4,5,6"


def work(mode: str, words: list[str]) -> int:
    from vla_lib import cli
    from vla_lib.workbench import sweeps, worker
    from vla_lib.workbench.jobs import Job
    from vla_lib.workbench.queue import Claim

    def stand_in(self: worker.Worker, claim: Claim) -> Job:
        folder = str(Path(claim.entry.notebook).parent)
        command = [sys.executable, __file__, "entry", folder, claim.words["n"], str(claim.run)]
        return Job(command, self.queue.path / "jobs" / claim.run.name, "vla.log")

    worker.Worker._job = stand_in  # type: ignore[method-assign]
    worker.write_report = lambda sweep: (sweep / "reported").touch()
    if mode == "vla":
        cli.main(words)
    return worker.run(sweeps.plan_sweep(words[0], [GRID], {}), int(words[1]))


def entry(folder: Path, n: int, path: Path) -> None:
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
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
        write_results(path, {"val_action_loss": n, "resumed": resume, "gpus": gpus})
        run.finish("done")
    except KeyboardInterrupt:
        run.finish("cancelled", "interrupted")
    except ValueError as error:
        run.finish("failed", f"ValueError: {error}")
        raise SystemExit(1) from None


def counted(file: Path) -> list[int]:
    """The entries in FOLDER/begun or FOLDER/ended."""
    return sorted(map(int, file.read_text().split())) if file.exists() else []


def check_each_was_done_once(folder: Path, runs: Path) -> list[dict[str, object]]:
    """After two entries were stopped in the middle and gone on with; the results of those that ended well."""
    (sweep,) = runs.glob("*-sweep")
    rows = {row["entry"]: row for row in read_json(sweep / "results.json")["entries"]}
    assert {name: row["state"] for name, row in rows.items()} == {
        f"n={n}": "failed" if n == 3 else "done" for n in range(1, 7)
    }
    assert counted(folder / "ended") == [1, 2, 4, 5, 6]
    assert len(list(runs.glob("*-small"))) == 6  # what was stopped went on in its own folder
    found = [read_json(runs / row["run"] / "results.json") for row in rows.values() if row["state"] == "done"]
    assert sorted(one["resumed"] for one in found) == [False, False, False, True, True]
    record = read_record(sweep)
    assert (record["state"], record["error"]) == ("failed", "1 of 6 runs did not end as done: n=3")
    assert (sweep / "reported").exists()
    return found


if __name__ == "__main__":
    mode, *words = sys.argv[1:]
    if mode != "entry":
        raise SystemExit(work(mode, words))
    entry(Path(words[0]), int(words[1]), Path(words[2]))
