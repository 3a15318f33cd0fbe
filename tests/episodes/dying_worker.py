"""A job that kills its worker: in a module of its own, so that a fresh worker process can import it."""

import os
import signal

from vla_lib.preprocess import run_job


def die_on_the_first(job):
    if job.key.endswith("1"):
        os.kill(os.getpid(), signal.SIGKILL)
    return run_job(job)
