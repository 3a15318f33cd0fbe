"""The pool of workers: results as they finish, an exception where the work raised it or its worker died."""

import os
import signal
import subprocess
import sys

from vla_lib.core.pool import WorkerDied, run_jobs


def _work(number):
    if number == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return 10 // number


def test_each_job_has_its_result_or_what_became_of_it():
    results = dict(run_jobs(_work, [5, 0, 2, 1], 2))
    assert results[5] == 2 and results[1] == 10
    assert isinstance(results[0], ZeroDivisionError) and isinstance(results[2], WorkerDied)
    assert "status -9" in str(results[2])


def test_a_script_without_its_guard_gets_pythons_own_error(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("from vla_lib.core.pool import run_jobs\nprint(list(run_jobs(len, ['a'], 1)))\n")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    assert "before the\n        current process has finished its bootstrapping phase" in done.stderr
    assert "no worker process could be started" in done.stdout  # and it ends
