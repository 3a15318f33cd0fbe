"""Runs on a Slurm cluster: the same `vla` command, submitted with sbatch, requeued at its time limit, seen and stopped.

    vla run 04_train_async --slurm --nodes 2 --gpus 4 --time 8:00:00 -p dataset_root /shared/data
    vla sweep 04_train_async --grid lr=1e-4,5e-5 --slurm --gpus 1 --parallel 4      # an array of four workers

The notebook runs headless on the first machine; what it starts by torchrun goes to all of them through srun. GRACE_S
before the time limit the run is told to stop: it saves a checkpoint, and the job waits again and goes on from there.
"""

import contextlib
import os
import shlex
import shutil
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import FlagCreatePairsOff, Suppress, arg

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json
from vla_lib.core.processes import LAUNCHER
from vla_lib.core.run_folder import RunFolder, read_record

GRACE_S = 120  # Slurm may tell up to a minute earlier
LEAST_S = 300  # a shorter time limit leaves less than two minutes to work before a run is told to stop
PROGRAM = (sys.executable, "-m", "vla_lib.cli")
# bash: until the child $run has ended, whatever signals come; its exit status is $status then
WAIT = "while :; do wait $run; status=$?; kill -0 $run 2>/dev/null || break; done"
# of an array its first job has the whole array's number too
JOB = "${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"
# bash: srun, whose tasks are given time to save at SIGTERM: srun itself would have them killed at once
RELAY = f"""trap 'scancel --signal=TERM {JOB}' TERM; "$@" & run=$!; {WAIT}; exit $status"""
CPUS_PER_GPU = 2  # a rank and what reads for it; a guess
SUBMITTED = "VLA_SUBMITTED"  # the folder that was made when the job was submitted
FOUND = "VLA_FOUND"  # the folder in which machines of one job tell each other what they found
GONE = "gone"
BATCH_STEP = (None, "", "4294967291")  # SLURM_STEP_ID outside srun


@dataclass(frozen=True)
class Batch:
    """Whether and how a command goes to Slurm."""

    slurm: Annotated[FlagCreatePairsOff[bool], arg(help="submit to Slurm instead of running here")] = False
    nodes: Annotated[int, arg(help="with --slurm: machines of a run")] = 1
    gpus: Annotated[int, arg(help="with --slurm: GPUs of each machine")] = 0
    cpus: Annotated[int, arg(help="with --slurm: cores of each machine; 0: two a GPU")] = 0
    time: Annotated[str, arg(help="with --slurm: time limit, at which a run is saved and waits again")] = ""
    partition: Annotated[str, arg(help="with --slurm: partition")] = ""
    words: Annotated[tuple[str, ...], Suppress] = ()  # the whole command's

    def __post_init__(self) -> None:
        if self.time and _seconds(self.time) < LEAST_S:
            told = f"a run is told to stop up to {(GRACE_S + 60) // 60} minutes before its time limit"
            raise UserError(f"--time {self.time} is too short: {told}; give {LEAST_S // 60} minutes or more.")

    @property
    def submits(self) -> bool:
        """Whether the command is to be submitted: the job's own command is the same, and runs."""
        return self.slurm and SUBMITTED not in os.environ

    def script(self, name: str, folder: Path, words: Sequence[str], array: int = 0) -> str:
        """The job's script: `vla WORDS` on the first machine; on the signal before the limit it is stopped, and the job
        requeued."""
        cpus = self.cpus or CPUS_PER_GPU * max(self.gpus, 1)
        options = {
            "job-name": f"vla-{name}",
            "output": f"{folder}/slurm{'-%a' * bool(array)}.log",
            "open-mode": "append",
            "signal": f"B:USR1@{GRACE_S}",
            "nodes": self.nodes,
            "ntasks-per-node": 1,
            "cpus-per-task": cpus,
            "gres": f"gpu:{self.gpus}" if self.gpus else "",
            "time": self.time,
            "partition": self.partition,
            "array": f"0-{array - 1}" if array else "",
        }
        lines = [f"#SBATCH --{option}={value}" for option, value in options.items() if value]
        command = shlex.join([*PROGRAM, *words])
        return "\n".join(
            [
                "#!/bin/bash",
                *lines,
                "#SBATCH --requeue",
                f"export {SUBMITTED}={shlex.quote(str(folder))}",
                f"export SRUN_CPUS_PER_TASK={cpus}  # since Slurm 22.05 srun asks for one core else",
                "trap 'after=\"scontrol requeue\"; kill -TERM $run' USR1",
                "trap 'after=scancel; kill -TERM $run' USR2  # vla runs stop",
                "trap : TERM  # scancel tells all processes of the job",
                f"{command} & run=$!",
                WAIT,
                f'if [ "$after" ] && [ $status -eq 130 ]; then $after {JOB}; fi',
                "exit $status\n",
            ]
        )


def _seconds(limit: str) -> float:
    """Seconds of a time limit as Slurm writes them: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S. Others are Slurm's to
    judge."""
    days, dash, clock = limit.rpartition("-")
    try:
        parts = [int(part) for part in clock.split(":")]
        units = (3600, 60, 1) if dash or len(parts) > 2 else (60, 1)
        return 86400 * int(days or 0) + sum(unit * part for unit, part in zip(units, parts, strict=False))
    except ValueError:
        return float("inf")


def submit(batch: Batch, name: str, record: RunFolder, words: Sequence[str], array: int = 0) -> int:
    """Submit `vla WORDS`, which takes up the folder of `record`. Raises UserError where Slurm refuses."""
    script = batch.script(name, record.path, words, array)
    try:
        done = _slurm("sbatch", "--parsable", given=script)
    except UserError:
        record.finish("failed", "Slurm did not take it")
        raise
    job = done.strip().partition(";")[0]
    write_json(record.path / "slurm.json", {"job": job})
    record.finish("submitted")
    print(f"Slurm job {job}: {record.path}; `vla runs` shows it, `vla runs stop {record.path.name}` cancels it")
    return 0


def taken_up(name: str, parameters: dict[str, Any]) -> RunFolder:
    """The folder that was made when this command was submitted, opened again; a new one where it was not."""
    folder = os.environ.pop(SUBMITTED, "")
    return RunFolder.resume(Path(folder), parameters) if folder else RunFolder.create(name, parameters)


def _slurm(*words: str, given: str = "") -> str:
    try:
        done = subprocess.run(words, input=given, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"Slurm's {words[0]} cannot be called here ({error}); go to a machine of the cluster."
        ) from None
    if done.returncode:
        raise UserError(f"Slurm refused: {' '.join(done.stderr.split()) or f'{words[0]} failed'}.")
    return done.stdout


def job_of(run: Path) -> str:
    """The Slurm job of a run, "" where it has none."""
    with contextlib.suppress(UserError, KeyError, TypeError):
        return str(read_json(run / "slurm.json")["job"])
    return ""


def states(runs: Iterable[Path]) -> dict[str, str]:
    """What Slurm says of the jobs of those runs that have one, by run: `12 RUNNING`, of an array `12 RUNNING 3`."""
    jobs = {run.name: job for run in runs if (job := job_of(run))}
    if not jobs:
        return {}
    try:
        known = [line.split() for line in _slurm("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()]
    except UserError:
        return {run: f"{job} ?" for run, job in jobs.items()}
    found = {}
    for run, job in jobs.items():
        counted = Counter(state for number, state in known if number.partition("_")[0] == job)
        several = sum(counted.values()) > 1
        said = [f"{state} {count}" if several else state for state, count in counted.items()]
        found[run] = f"{job} {', '.join(said) or GONE}"
    return found


def holds(run: Path, state: str) -> bool:
    """Whether Slurm has a run's job, running or waiting (again): where it cannot be asked, by the record's `state`."""
    said = states([run]).get(run.name, "")
    return any(one in said for one in ("PENDING", "RUNNING")) or ("?" in said and state in ("running", "submitted"))


def cancel(run: Path) -> str:
    """Cancel the Slurm job of a run, which saves its checkpoint first, unlike at `scancel` on several machines; returns
    a sentence."""
    job, said = job_of(run), states([run]).get(run.name, "")
    if "RUNNING" not in said or "PENDING" in said:  # of an array there may be both
        _slurm("scancel", "--state=PENDING", job)
    if "RUNNING" in said:
        _slurm("scancel", "--signal=USR2", "--batch", "--state=RUNNING", job)
    if read_record(run)["state"] == "submitted":
        RunFolder.resume(run, read_record(run)["parameters"]).finish("cancelled", "cancelled before it began")
    return f"Slurm job {job} is cancelled"


def nodes() -> int:
    """The machines of the Slurm job that this process is the first of; 1 outside one, and in its steps."""
    inside = "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_STEP_ID") in BATCH_STEP
    return int(os.environ.get("SLURM_JOB_NUM_NODES") or 1) if inside else 1


def torchrun_words(count: int) -> list[str]:
    """What stands before torchrun's own words so that it runs on all machines of the job, and how they find each other:
    on a free port of this one."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = probe.getsockname()[1]
    # ranks look for the launcher's number among their parents; here that is srun's, on another machine
    relay = ["bash", "-c", RELAY, "relay"]
    srun = [*relay, "srun", f"--nodes={count}", f"--ntasks={count}", "--ntasks-per-node=1", "env", "-u", LAUNCHER]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={count}", "--rdzv-backend=c10d"]
    meet = [f"--rdzv-endpoint={socket.gethostname()}:{port}", f"--rdzv-id={os.environ['SLURM_JOB_ID']}"]
    return [*srun, *torchrun, *meet]


@contextlib.contextmanager
def on_other_nodes(module: str, words: Sequence[str], folder: Path) -> Iterator[None]:
    """Inside, `python -m MODULE WORDS` also runs on the other machines of this Slurm job, which share the work by its
    locks and by `found_once` (in files below `folder`, for the time); they are waited for. Outside a job of several
    machines nothing happens."""
    others = nodes() - 1
    if others < 1:
        yield
        return
    os.environ[FOUND] = str(folder / "found")
    srun = ["srun", f"--nodes={others}", f"--ntasks={others}", "--ntasks-per-node=1", "--relative=1"]
    helpers = subprocess.Popen([*srun, sys.executable, "-m", module, *words], stdin=subprocess.DEVNULL)
    try:
        yield
        helpers.wait()
    finally:
        if helpers.poll() is None:
            helpers.terminate()
            helpers.wait()
        shutil.rmtree(os.environ.pop(FOUND), ignore_errors=True)


def found_once(name: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `find` gives, or what it gave on another machine of this job under that name (see `on_other_nodes`)."""
    if FOUND not in os.environ:
        return find()
    file = Path(os.environ[FOUND]) / f"{name}.json"
    if file.exists():
        return dict(read_json(file))
    found = find()
    with contextlib.suppress(OSError):
        write_json(file, found)
    return found


def share(count: int) -> int:
    """Where this machine begins in a list of `count` things: helpers (see `on_other_nodes`) not at its top."""
    if os.environ.get("SLURM_STEP_ID") in BATCH_STEP:
        return 0
    number, tasks = (int(os.environ.get(f"SLURM_{name}", 1)) for name in ("PROCID", "STEP_NUM_TASKS"))
    return count * (number + 1) // (tasks + 1)
