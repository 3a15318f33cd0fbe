"""What `--slurm` makes of a command: what can be refused is refused here, a folder is made, a job submitted."""

from pathlib import Path
from typing import TYPE_CHECKING

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench import slurm
from vla_lib.workbench.parameters import notebook_path, resolve
from vla_lib.workbench.runs import data_state

if TYPE_CHECKING:  # Optuna takes a second to import
    from vla_lib.workbench.sweeps import Plan


def submit_run(batch: slurm.Batch, notebook: str, given: dict[str, str], run_dir: Path | None) -> int:
    """`vla run` on a cluster; torchrun gets one process a GPU unless it is told otherwise."""
    path = notebook_path(notebook)
    values = resolve(path, given, text=True)
    if batch.gpus and "nproc_per_node" in values and "nproc_per_node" not in given:
        given = given | {"nproc_per_node": str(batch.gpus)}
        values = resolve(path, given, text=True)
    noted = {"notebook": str(path), "given": sorted(given), "data": data_state(values)}
    record = RunFolder.create(path.stem, values, path=run_dir, **noted)
    words = [word for name, value in given.items() for word in ("-p", name, value)]
    words = ["run", str(path), *words, "--run-dir", str(record.path), "--resume"]
    return slurm.submit(batch, path.stem, record, words)


def submit_queue(batch: slurm.Batch, plan: "Plan", parallel: int) -> int:
    """`vla sweep` or `vla night` on a cluster: an array of `parallel` workers of one study, a run at a time each."""
    from vla_lib.workbench.queue import Queue

    plan.check()
    queue = Queue.open(plan)
    queue.worker.release()
    waits = queue.record is not None and slurm.holds(queue.path, "")
    if queue.record is None or waits:
        if queue.record:
            queue.record.finish("submitted")
        state = "waits in Slurm's queue" if waits else "is running"
        raise UserError(f"The same {plan.kind} {state} already, {queue.path}; stop it first, or wait for it.")
    words = [*batch.words, "--parallel", "1"]
    return slurm.submit(batch, plan.kind, queue.record, words, array=max(1, parallel))


def submit_flow(batch: slurm.Batch, name: str, root: str) -> int:
    """`vla run-all` on a cluster; what is up to date when it is requeued is skipped."""
    record = RunFolder.create(name, {"dataset_root": root})
    return slurm.submit(batch, name, record, batch.words)
