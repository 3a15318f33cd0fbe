"""What a run gets of its machine: GPUs, none of them to two runs, and its share of the CPU's cores as threads.

A GPU is taken by a lock file below /tmp, which the run's supervisor holds too: where a worker is killed, its GPUs are
free only once its run has ended.
"""

import contextlib
import fcntl
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from vla_lib.core.errors import UserError

LOCKS = Path("/tmp")  # of this machine, whatever TMPDIR says, and of all its users
NO_GPU = ("", "-1", "NoDevFiles")


def visible_gpus() -> list[str]:
    """The GPUs that runs may have, as CUDA_VISIBLE_DEVICES names them: those that it names already, else all."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        words = ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"]
        try:
            named = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
        except (OSError, subprocess.SubprocessError):
            return []
    return [name.strip() for name in named.replace("\n", ",").split(",") if name.strip() not in NO_GPU]


def cores() -> int:
    """The cores that this process may use: of its affinity, and of its Slurm job."""
    allowed = len(os.sched_getaffinity(0))
    return min(allowed, int(os.environ.get("SLURM_CPUS_ON_NODE") or allowed))


def thread_variables(processes: int) -> dict[str, str]:
    """OMP_NUM_THREADS for each of so many processes at once, and threads that sleep while they wait.

    Threads that spin at a barrier, OpenMP's default, collapse beside other work: docs/FIGURES.md has the figures.
    What the user has set stays.
    """
    chosen = {"OMP_NUM_THREADS": str(max(1, cores() // processes)), "OMP_WAIT_POLICY": "PASSIVE"}
    return {name: os.environ.get(name, value) for name, value in chosen.items()}


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
        """Raises UserError where a run wants more GPUs than there are."""
        names = tuple(visible_gpus())
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
