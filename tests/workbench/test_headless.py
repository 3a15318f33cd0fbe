import asyncio
import os
import re
import signal
import subprocess
import sys
import threading
import time

import nbformat
import pytest

from vla_lib import cli
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json
from vla_lib.core.run_folder import read_record
from vla_lib.workbench import headless
from vla_lib.workbench.headless import run_notebook
from vla_lib.workbench.jobs import Job, JobCancelled, JobFailed
from vla_lib.workbench.parameters import notebook_path


def test_a_headless_run_leaves_notebook_page_and_record(write_notebook):
    """The page opens offline: plots are in it, and widgets are plain text."""
    path = write_notebook(
        "n: int = 1",
        "import matplotlib.pyplot as plt\nplt.plot([n, 2]); plt.show()",
        "import ipywidgets\nipywidgets.IntSlider(value=3, description='frame')",
        "run.add_results(n=n); run.finish()",
    )
    result = run_notebook(path, {"n": 7}, log=False)
    assert result.state == "done"
    assert read_record(result.path)["parameters"] == {"n": 7}
    assert read_json(result.path / "results.json") == {"n": 7}
    page = result.page.read_text()
    assert "data:image/png;base64" in page
    assert not re.findall(r"<(?:script|link|img)[^>]+(?:src|href)=[\"'](https?:[^\"']+)", page)
    assert "frame = 3" in page and "IntSlider(" not in page


def test_a_stopped_run_goes_on_in_its_own_folder(write_notebook, tmp_path, capsys):
    """With its checkpoint, which the notebook is given as `resume_run`; its parameters stay those of the run."""
    path = write_notebook(
        "n: int = 1\nresume_run: str = ''",
        "(run.path / 'checkpoints').mkdir(exist_ok=True); (run.path / 'checkpoints' / 'latest.pt').touch()\n"
        "if not resume_run: raise KeyboardInterrupt",
        "run.add_results(n=n, went_on=resume_run); run.finish()",
    )
    words = ["run", str(path), "-p", "n", "2", "--resume", "--run-dir", str(tmp_path / "run")]
    for status in (130, 0):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == status
    record = read_record(tmp_path / "run")
    assert (record["state"], record["parameters"]) == ("done", {"n": 2, "resume_run": ""})
    assert read_json(tmp_path / "run" / "results.json") == {"n": 2, "went_on": str(tmp_path / "run")}
    with pytest.raises(UserError, match="--resume needs --run-dir"):
        run_notebook(path, {}, resume=True)


@pytest.mark.parametrize("most", (headless.SOCKET_BYTES, 5))
def test_a_long_tmpdir_takes_no_run_along(most, write_notebook, tmp_path, monkeypatch):
    """As batch systems make them: sockets go to a folder with a short name; where there is none, to TCP ports."""
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(headless.tempfile, "tempdir", None)
    monkeypatch.setattr(headless, "SOCKET_BYTES", most)
    result = run_notebook(write_notebook("n: int = 1", "run.finish()"), {}, log=False)
    assert (result.state, result.error) == ("done", None)


def test_a_kernel_that_cannot_start_ends_the_run(write_notebook, tmp_path):
    path = write_notebook("n: int = 1", "run.finish()")
    code = "import sys; from pathlib import Path; from vla_lib import cli; from vla_lib.workbench import headless\n"
    code += "headless.SOCKET_BYTES = 999; cli.main(['run', sys.argv[1], '--run-dir', sys.argv[2]])"
    long = tmp_path / ("x" * 100)
    long.mkdir()
    words = [sys.executable, "-c", code, str(path), str(tmp_path / "run")]
    done = subprocess.run(words, env={**os.environ, "TMPDIR": str(long)}, capture_output=True, text=True, timeout=60)
    (told,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]  # the kernel's words may follow
    assert done.returncode == 1 and "File name too long" in told
    assert read_record(tmp_path / "run")["state"] == "failed"


def test_a_failing_cell_fails_the_run_with_its_cause(write_notebook):
    result = run_notebook(write_notebook("n: int = 1", "1 / 0"), {}, log=False)
    assert result.state == "failed"
    assert "ZeroDivisionError" in read_record(result.path)["error"]
    assert "ZeroDivisionError" in result.page.read_text()


def test_a_failing_page_is_told_and_changes_no_state(write_notebook, monkeypatch, capsys):
    monkeypatch.setattr(headless, "export_html", lambda notebook, page: page.write_text(str(1 / 0)))
    result = run_notebook(write_notebook("n: int = 1", "run.finish()"), {}, log=False)
    assert (result.state, result.error, read_record(result.path)["state"]) == ("done", None, "done")
    assert "notebook.html could not be written: ZeroDivisionError" in capsys.readouterr().err
    assert result.summary == f"done: {result.path}"


def test_the_log_holds_the_cells_lines_and_no_reprs(write_notebook, capsys):
    cell = "import matplotlib.pyplot as plt\nprint('<a> is printed\\nExecuting the next line'); plt.figure()"
    result = run_notebook(write_notebook("n: int = 1", cell, "run.finish()"), {})
    lines = [line.partition(" ")[2] for line in (result.path / "run.log").read_text().splitlines()]
    assert lines == [f"run folder: {result.path}", "<a> is printed", "Executing the next line", f"done: {result.path}"]
    assert [line.partition(" ")[2] for line in capsys.readouterr().out.splitlines()] == lines


def test_an_interrupt_between_two_cells_is_not_lost(write_notebook, runs_folder):
    """A kernel ignores interrupts while no cell runs, which in a notebook of short cells is nearly always."""
    path = write_notebook("n: int = 1", "print('begun')", *["n += 1"] * 300, "print('the end')")
    command = [sys.executable, "-m", "vla_lib.cli", "run", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert any("begun" in line for line in process.stdout)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate()
    (run,) = runs_folder.iterdir()
    assert (process.returncode, read_record(run)["state"]) == (130, "cancelled") and "the end" not in said


def test_a_cell_that_refuses_its_input_exits_2_with_its_sentence(write_notebook):
    path = write_notebook(
        "n: int = 1",
        "from vla_lib.core.errors import UserError\nraise UserError('There is no dataset root x; give one.')",
    )
    done = subprocess.run([sys.executable, "-m", "vla_lib.cli", "run", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "error: There is no dataset root x; give one."


def test_a_run_whose_kernel_dies_is_lost(write_notebook):
    result = run_notebook(write_notebook("n: int = 1", "import os; os._exit(1)"), {}, log=False)
    record = read_record(result.path)
    assert (record["state"], record["error"]) == ("lost", "the kernel died (killed, or out of memory)")
    assert result.page.exists()


def test_a_bad_parameter_starts_nothing(write_notebook, runs_folder):
    with pytest.raises(UserError, match="has no parameter m"):
        run_notebook(write_notebook("n: int = 1"), {"m": 1})
    assert not runs_folder.exists()


def test_vla_run_exits_2_on_a_bad_parameter(write_notebook):
    command = [sys.executable, "-m", "vla_lib.cli", "run", str(write_notebook("n: int = 1")), "-p", "n", "few"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: small: parameter n wants int, got 'few' (str).\n"


def test_plain_papermill_works_too(write_notebook, runs_folder, tmp_path):
    path = write_notebook("n: int = 1", "run.finish()")
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(path),
        str(tmp_path / "out.ipynb"),
        "-p",
        "n",
        "3",
        "-k",
        "python3",
    ]
    subprocess.run(command, check=True, capture_output=True)
    (folder,) = runs_folder.iterdir()
    record = read_record(folder)
    assert (record["state"], record["parameters"]) == ("done", {"n": 3})


@pytest.mark.parametrize(
    "words, said",
    (
        (["lrr", "1e-3"], "04_train_async has no parameter lrr; it has dataset_root, cache_id, "),
        (["sensor_enabled", "true"], "parameter sensor_enabled wants bool, got 'true' (str); write True or False."),
    ),
)
def test_plain_papermill_refuses_what_the_notebook_does_not_take(words, said, write_notebook, runs_folder, tmp_path):
    cells = nbformat.read(notebook_path("04_train_async"), as_version=4).cells
    (parameters,) = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    path = write_notebook(parameters, "run.finish()", name="04_train_async")
    command = [sys.executable, "-m", "papermill", str(path), str(tmp_path / "out.ipynb"), "-p", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0 and said in done.stderr
    assert not runs_folder.exists()


def test_relative_folders_are_meant_from_where_the_command_is_given(write_notebook, tmp_path, monkeypatch):
    cell = "from vla_lib.core.run_folder import runs_root\nrun.add_results(root=str(runs_root())); run.finish()"
    path, here = write_notebook("n: int = 1", cell), tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("VLA_RUNS", "book")
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(path), "--run-dir", "out"])
    assert ended.value.code == 0
    assert read_json(here / "out" / "results.json") == {"root": str(here / "book")}
    assert read_record(here / "out")["state"] == "done"


def test_a_failing_job_raises_its_cause_first(tmp_path):
    job = Job([sys.executable, "-c", "print('step 1'); raise SystemExit(3)"], tmp_path)
    with pytest.raises(JobFailed, match=r"^The job ended with exit status 3") as failure:
        asyncio.run(job.watch())
    assert "step 1" in str(failure.value)


def test_the_first_failing_rank_explains_itself(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import os, time\nif os.environ['RANK'] == '0': time.sleep(60)\n"
        "from torch.distributed.elastic.multiprocessing.errors import record\n@record\ndef main():\n"
        "    raise ValueError('the needle is bent')\nmain()"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    with pytest.raises(JobFailed) as failure:
        asyncio.run(Job(command, tmp_path / "run").watch())
    assert "the needle is bent" in str(failure.value).splitlines()[0]


def test_a_killed_rank_is_named_before_the_errors_of_those_that_miss_it(tmp_path):
    """Also where an earlier start in the same folder has left another cause in the log."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "train.log").write_text(
        "torch/distributed/elastic\n  rank      : 7 (local_rank: 7)\n  exitcode  : -11 (pid: 1)\n"
        "  error_file: <N/A>\n  traceback : Signal 11 (SIGSEGV) received by PID 1\n"
    )
    os.mkfifo(tmp_path / "connection")
    script = tmp_path / "worker.py"
    script.write_text(
        "from torch.distributed.elastic.multiprocessing.errors import record\n"
        "import os, signal\n@record\ndef main():\n"
        f"    peer = open({str(tmp_path / 'connection')!r}, 'w' if os.environ['RANK'] == '1' else 'r')\n"
        "    print('step 1', flush=True)\n    if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
        "    peer.read()  # ends when rank 1 is dead\n    raise RuntimeError('connection closed by peer')\nmain()"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    with pytest.raises(JobFailed) as failure:
        asyncio.run(Job(command, tmp_path / "run").watch())
    said = str(failure.value)
    assert (
        said.startswith("rank 1 was killed by SIGKILL (often: out of memory); go on with --resume.\n")
        and "step 1" in said
    )
    assert "SIGSEGV" not in said


def test_of_two_starts_in_one_folder_one_is_refused(tmp_path):
    job, ended = Job([sys.executable, "-c", "import time; time.sleep(600)"], tmp_path), []

    def start(job: Job) -> None:
        try:
            job.start()
        except UserError as error:
            ended.append(str(error))

    both = [job, Job(job.command, tmp_path)]
    threads = [threading.Thread(target=start, args=(one,)) for one in both]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (refusal,) = ended
    assert refusal == f"A job already runs in {tmp_path}; stop it first, or use another run folder."
    (started,) = [one for one in both if one._process is not None]
    started.stop()
    with pytest.raises(JobCancelled, match="^stopped.* what it wrote is in "):
        asyncio.run(started.watch())


def test_a_command_that_cannot_be_started_is_told(tmp_path):
    with pytest.raises(JobFailed, match="No such file or directory: 'no-such-program'"):
        asyncio.run(Job(["no-such-program"], tmp_path).watch())
    assert read_json(tmp_path / "job.json")["state"] == "ended"


def test_a_supervisor_is_not_fooled_by_an_old_record(tmp_path):
    write_json(tmp_path / "job.json", {"state": "running", "supervisor_pid": os.getpid()})
    job = Job([sys.executable, "-c", "print('new')"], tmp_path).start()
    while job.status.get("state") != "ended":
        time.sleep(0.05)
    assert job.log.read_text() == "new\n"


def test_vla_run_starts_without_a_grammar_that_no_notebook_needs():
    code = "import vla_lib.workbench.headless, sys; print([name for name in ('lark', 'torch') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
