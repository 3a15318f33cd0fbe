"""A worker of a sweep or night: claims entries of the shared queue and runs each as a `vla run` of its own.

A failing run stops nothing. Ctrl-C and SIGTERM stop the runs, which save their checkpoints, and give their entries
back; the same command goes on. A killed worker's entries are gone on with by any other worker.

A GPU is given to one run at a time: taken by a lock file below /tmp, which the run's supervisor holds too, so that the
GPUs of a killed worker are free only once its run has ended.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl, write_text
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import close_as_pruned, read_record, runs_root, write_results
from vla_lib.workbench import slurm
from vla_lib.workbench.jobs import GRACE_S, Job, JobCancelled, JobFailed, thread_variables
from vla_lib.workbench.notebook import shown
from vla_lib.workbench.parameters import notebook_path
from vla_lib.workbench.queue import ENDED_WELL, Claim, Queue
from vla_lib.workbench.sweeps import Plan

LOCKS = Path("/tmp")  # of this machine, whatever TMPDIR says, and of all its users
NO_GPU = ("", "-1", "NoDevFiles")
WAIT_S = 1.0  # between two looks at a queue in which others work


def run(plan: Plan, parallel: int = 0, gpus_per_run: int = 0) -> int:
    """Work on the queue of `plan` until all its entries have ended; prints each one's start and end, and a comparison.

    parallel: entries at a time; 0: as many as there are GPUs for, one on a CPU. gpus_per_run: GPUs of each; 0: one a
    process of its torchrun. Returns 0, 1 where an entry failed, 130 where this worker was stopped. Raises UserError
    before anything starts."""
    if parallel < 0 or gpus_per_run < 0:
        raise UserError("--parallel and --gpus-per-run are 0 (chosen here) or more.")
    processes = plan.check()
    gpus = Gpus.find(gpus_per_run or processes)
    parallel = parallel or max(1, len(gpus.names) // gpus.per_run)
    threads = thread_variables(parallel * processes)
    queue = Queue.open(plan)
    done = sum(row["state"] in ENDED_WELL for row in queue.rows())
    joined = "" if queue.record else ", joined"
    print(f"{plan.kind}: {len(plan.entries)} runs, {done} done already{joined}; {shown(queue.path)}", flush=True)
    named = f"{gpus.per_run} to a run, of {len(gpus.names)} GPU{'s' * (len(gpus.names) > 1)} ({', '.join(gpus.names)})"
    where = f"{named if gpus.names else 'on the CPU'}, {threads['OMP_NUM_THREADS']} CPU threads to a process"
    print(f"{parallel} at a time, {where}", flush=True)
    stopped = False
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a batch script's children ignore it
    before = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        asyncio.run(Worker(queue, gpus, threads).work(parallel))
    except KeyboardInterrupt:
        stopped = True
    finally:
        signal.signal(signal.SIGTERM, before)
        exit_status = conclude(queue, stopped)
        queue.worker.release()
    return exit_status


def submit(batch: slurm.Batch, plan: Plan, parallel: int) -> int:
    """`vla sweep` or `vla night` on a cluster: an array of `parallel` workers of one study, a run at a time each."""
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


def conclude(queue: Queue, stopped: bool) -> int:
    """Close the queue's record where this worker keeps it, write and print the comparison; returns the exit status."""
    rows = queue.rows()
    failed = [row["entry"] for row in rows if row["state"] not in ENDED_WELL]
    queue.keep_record()
    left = sum(row["state"] in ("waiting", "running") for row in rows)
    stopped, handed_on = stopped and bool(left), not stopped and bool(left)
    state = "cancelled" if left else "failed" if failed else "done"
    why = f"{len(failed)} of {len(rows)} runs did not end as done: {', '.join(failed)}" if failed else ""
    if left:
        why = "interrupted; the same command goes on" if stopped else "left to the workers that still run"
    table = queue.comparison()
    if queue.record:
        write_results(queue.path, {"entries": rows, "objective": queue.plan.objective})
        write_text(queue.path / "comparison.csv", table.to_csv(index=False))
        queue.record.finish(state, why or None)
    text = table.to_string(index=False, na_rep="", float_format="{:.6g}".format)
    print(f"\n{text}\n\n{shown(queue.path / 'comparison.csv')}", flush=True)
    offline = [path for row in rows if row["run"] for path in (runs_root() / row["run"]).glob("wandb/offline-run-*")]
    if offline:
        listed = queue.path / "wandb.txt"
        write_text(listed, "".join(f"{path}\n" for path in sorted(offline)))
        group = f"W&B kept {len(offline)} runs offline, in the group {queue.path.name}"
        print(f"{group}; `xargs wandb sync < {shown(listed)}` uploads them", flush=True)
    if queue.record and not left:
        write_report(queue.path)
    if queue.record and handed_on and not {row["state"] for row in queue.rows()} & {"waiting", "running"}:
        queue.record = None  # the others ended meanwhile, while this worker kept the record
        return conclude(queue, stopped)
    if why:
        print(why if handed_on else f"error: {why}", file=sys.stderr)
    return 0 if handed_on else {"done": 0, "cancelled": 130}.get(state, 1)


def write_report(sweep: Path) -> None:
    """Notebook 09 on a sweep or night that has ended, in its folder; what fails there is told, and changes nothing."""
    from vla_lib.workbench.headless import run_notebook

    try:
        made = run_notebook("09_compare_runs", {"sweep": sweep.name}, log=False, run_dir=sweep / "report", resume=True)
        print(f"report: {shown(made.page)}" if made.state == "done" else f"no report: {made.error}", flush=True)
    except (OSError, UserError) as error:
        print(f"no report: {error}", flush=True)


@dataclass(frozen=True)
class Share:
    """The GPUs of one run (none on a CPU), its from `take` to `release`, and the open lock files that say so."""

    names: tuple[str, ...] = ()
    handles: tuple[int, ...] = ()

    @property
    def variables(self) -> dict[str, str]:
        """What the run's environment says of them."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(self.names)} if self.names else {}

    def release(self) -> None:
        """Let other runs have them, once the run's supervisor has ended too."""
        for handle in self.handles:
            os.close(handle)


@dataclass(frozen=True)
class Gpus:
    """The machine's GPUs, given out `per_run` at a time; without any, runs share the CPU."""

    names: tuple[str, ...]
    per_run: int

    @classmethod
    def find(cls, per_run: int) -> "Gpus":
        """The GPUs that CUDA_VISIBLE_DEVICES names already, else all. Raises UserError where a run wants more GPUs than
        there are."""
        named = os.environ.get("CUDA_VISIBLE_DEVICES")
        if named is None:
            words, named = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], ""
            with contextlib.suppress(OSError, subprocess.SubprocessError):
                named = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
        listed = (name.strip() for name in named.replace("\n", ",").split(","))
        names = tuple(name for name in listed if name not in NO_GPU)
        if names and per_run > len(names):
            which = f"there are {len(names)} ({', '.join(names)})"
            raise UserError(f"A run wants {per_run} GPUs, but {which}; give --gpus-per-run or nproc_per_node less.")
        return cls(names, per_run)

    def take(self) -> Share | None:
        """`per_run` GPUs that no run has; None where so many are not free now."""
        if not self.names:
            return Share()
        taken: dict[str, int] = {}
        for name in self.names:
            if len(taken) < self.per_run and (handle := _lock(name)) is not None:
                taken[name] = handle
        share = Share(tuple(taken), tuple(taken.values()))
        if len(taken) == self.per_run:
            return share
        share.release()
        return None


def _lock(gpu: str) -> int | None:
    """An open lock file of a GPU, None where another run has it. In a Slurm job numbers are the job's own."""
    file = LOCKS / f"vla-gpu-{os.environ.get('SLURM_JOB_ID', '')}-{gpu.replace('/', '_')}.lock"
    with contextlib.suppress(FileExistsError):
        os.close(os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666))
    handle = os.open(file, os.O_RDONLY)  # it may be another user's
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle


class Worker:
    """Runs entries of a queue, some at a time."""

    def __init__(self, queue: Queue, gpus: Gpus, threads: dict[str, str]):
        self.queue, self.gpus, self.threads = queue, gpus, threads
        self._jobs: set[Job] = set()

    async def work(self, parallel: int) -> None:
        """Run entries until all of the queue's have ended, here or elsewhere."""
        places = [asyncio.create_task(self._place()) for _ in range(parallel)]
        keeper = asyncio.create_task(self._keep_record())
        try:
            ended, _ = await asyncio.wait(places, return_when=asyncio.FIRST_EXCEPTION)
            for place in ended:
                place.result()
        finally:
            for job in self._jobs:  # all at once: each is given time to save its checkpoint
                job.stop()
            for task in (keeper, *places):
                task.cancel()
            await asyncio.gather(keeper, *places, return_exceptions=True)

    async def _keep_record(self) -> None:
        while True:
            self.queue.keep_record()
            await asyncio.sleep(WAIT_S)

    async def _place(self) -> None:
        while True:
            if share := self.gpus.take():  # before an entry is claimed: another worker may have GPUs for that
                try:
                    if claim := self.queue.claim():
                        await self._run(claim, share)
                        continue
                finally:
                    share.release()
            open_states = {row["state"] for row in self.queue.rows()} & {"waiting", "running"}
            if not open_states or (open_states == {"running"} and "SLURM_JOB_ID" in os.environ):
                return  # a cluster's machines are not kept for what others run
            await asyncio.sleep(WAIT_S)

    async def _run(self, claim: Claim, share: Share) -> None:
        """Run a claimed entry to its end, however that is."""
        name, start = claim.title, time.monotonic()
        job = self._job(claim)
        job.environment = {**self.threads, **share.variables, "WANDB_RUN_GROUP": self.queue.path.name}
        job.held = share.handles
        self._jobs.add(job)
        begins = "goes on with" if claim.resume else "started"
        on = f" on GPU {', '.join(share.names)}" if share.names else ""
        print(f"{_now()} {begins} {name}{on}: {shown(claim.run)}", flush=True)
        watch = _Validations(claim, self.queue.plan.objective)
        try:
            await job.watch(lambda _lines: job.stop() if watch.poor() else None)
        except (JobFailed, JobCancelled) as error:
            task = asyncio.current_task()
            if task and task.cancelling():  # Ctrl-C: this entry waits again
                self.queue.give_back(claim)
                raise asyncio.CancelledError from error
        finally:
            self._jobs.discard(job)
        if watch.pruned:
            close_as_pruned(claim.run, watch.pruned)
        state, cause = "lost", f"it never began, see {job.log}"
        if (claim.run / "run.json").exists():
            record = read_record(claim.run)
            state, cause = record["state"], (record.get("error") or "").partition("\n")[0]
        state = self.queue.tell(claim, state, cause)
        cause = f"\n  {cause}" if cause else ""
        print(f"{_now()} {state} after {clock(time.monotonic() - start)}: {name}{cause}", flush=True)

    def _job(self, claim: Claim) -> Job:
        """The supervised `vla run` of an entry; it is given time to stop a training of its own."""
        words = [word for name, value in claim.words.items() for word in ("-p", name, value)]
        command = [sys.executable, "-m", "vla_lib.cli", "run", str(notebook_path(claim.entry.notebook))]
        command += ["--run-dir", str(claim.run), *(["--resume"] if claim.resume else [])]
        return Job([*command, *words], self.queue.path / "jobs" / claim.run.name, "vla.log", grace_s=2 * GRACE_S + 15)


class _Validations:
    """Reports a run's validations to Optuna as they come in its metrics.jsonl, until its pruner calls the run poor."""

    def __init__(self, claim: Claim, objective: str):
        self.claim, self.pruned = claim, ""
        self.key = objective.replace("val_", "val/", 1)
        self._file, self._bytes, self._rows = claim.run / "metrics.jsonl", 0, 0

    def poor(self) -> bool:
        size = self._file.stat().st_size if self._file.exists() else 0
        if self.pruned or size == self._bytes:
            return bool(self.pruned)
        self._bytes = size
        rows = [row for row in read_jsonl(self._file) if self.key in row]
        for row in rows[self._rows :]:
            self.claim.trial.report(row[self.key], row["step"])
            if self.claim.trial.should_prune():
                self.pruned = f"pruned at step {row['step']}: {self.key} {row[self.key]:.4g} is poorer than the others'"
        self._rows = len(rows)
        return bool(self.pruned)


def _now() -> str:
    return time.strftime("%H:%M:%S")
