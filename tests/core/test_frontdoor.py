import os
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import psutil
import pytest
from annotated_types import Ge

from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import PROJECT
from vla_lib.core.settings import Settings, settings
from vla_lib.evaluation.deployment import DeploySettings


@settings
class TrialSettings(Settings):
    """A test's settings."""

    batch_size: Annotated[int, Ge(1)] = 4
    sensor_enabled: bool = True
    output: Path | None = None


@pytest.mark.parametrize(
    "words", (["--batch-size", "8", "--no-sensor-enabled"], ["--batch_size", "8", "--no_sensor_enabled"])
)
def test_dashes_and_underscores_are_the_same(words):
    assert frontdoor.parse(TrialSettings, words) == TrialSettings(8, False)


def test_a_bare_boolean_flag_as_in_the_guide():
    assert frontdoor.parse(TrialSettings, ["--sensor-enabled"]).sensor_enabled


@pytest.mark.parametrize("words", (["--batch-size", "0"], ["--batch-size", "four"], ["--lrr", "1"]))
def test_bad_input_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        frontdoor.start(TrialSettings, print, words)
    assert end.value.code == 2
    assert capsys.readouterr().err.strip()


def test_a_failing_rank_tells_its_sentence_to_the_launcher(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=1",
        "-m",
        "vla_lib.train_async",
    ]
    environment = {**os.environ, "TORCHELASTIC_ERROR_FILE": str(tmp_path / "error.json")}
    done = subprocess.run(
        [*command, "--dataset-root", str(tmp_path / "nowhere")], capture_output=True, text=True, env=environment
    )
    assert done.returncode != 0
    assert (
        f"error: --dataset-root {tmp_path / 'nowhere'} is not a folder; give the folder that the datasets lie in."
        in done.stderr
    )
    assert "nowhere is not a folder" in (tmp_path / "error.json").read_text()


def test_a_rank_ends_with_its_output_written_and_its_last_calls_made():
    program = "import atexit\nfrom vla_lib.core import processes\natexit.register(print, 'last')\n"
    program += "print('first')\nprocesses.end()\nprint('never')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\nlast\n", "")


def test_a_notebooks_parameters_become_settings():
    """Its own parameters are left out, an empty path is none, a relative one is meant from the project's folder."""
    parameters = {"batch_size": 8, "output": "", "nproc_per_node": 2}
    assert TrialSettings.of(parameters) == TrialSettings(8)
    assert TrialSettings.of(parameters, output="runs/a").output == PROJECT / "runs/a"
    assert TrialSettings.of(parameters).record() == {"batch_size": 8, "sensor_enabled": True, "output": None}
    for values, sentence in (({"batch_size": 0}, "--batch-size is 0; it should be"), ({"colour": 1}, "--colour is no")):
        with pytest.raises(UserError, match=sentence):
            TrialSettings(**values)
    with pytest.raises(UserError, match="--robot is missing; give it"):
        DeploySettings.of({"robot": "", "checkpoint": "policy.pt"})


@pytest.mark.parametrize("named", [True, False], ids=["its launcher named", "nobody named it"])
def test_a_rank_whose_launcher_died_before_it_looked_dies_too(tmp_path, named):
    """A rank imports torch for seconds, and torchrun may be killed meanwhile: another process is its parent then."""
    rank = "import time\nfrom vla_lib.core import processes\ntime.sleep(1)\nprocesses.die_with_launcher()\n"
    rank += f"open({str(tmp_path / 'alive')!r}, 'w').close()"
    launcher = "import os, subprocess, sys\nfrom vla_lib.core import processes\n"
    launcher += "processes.name_launcher()\n" if named else ""
    launcher += f"child = subprocess.Popen([sys.executable, '-c', {rank!r}])\nprint(child.pid, flush=True)\n"
    launcher += "os.kill(os.getpid(), 9)"
    # the shell takes the orphan where init does not
    done = subprocess.run([sys.executable, "-c", launcher], stdout=subprocess.PIPE, text=True)
    if not named and b"python" in Path(f"/proc/{psutil.Process(int(done.stdout)).ppid()}/cmdline").read_bytes():
        pytest.skip("init is a Python program here")
    psutil.wait_procs([psutil.Process(int(done.stdout))], timeout=20)
    assert not (tmp_path / "alive").exists()


def test_a_rank_whose_launcher_lives_goes_on_and_hands_no_name_over():
    rank = "import os\nfrom vla_lib.core import processes\nprocesses.die_with_launcher()\n"
    rank += "print(processes.LAUNCHER in os.environ)"
    launcher = "import subprocess, sys\nfrom vla_lib.core import processes\nprocesses.name_launcher()\n"
    launcher += f"subprocess.run([sys.executable, '-c', {rank!r}])"
    done = subprocess.run([sys.executable, "-c", launcher], capture_output=True, text=True)
    assert done.stdout == "False\n"


def test_a_front_door_raises_the_limit_of_open_files():
    program = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (100, 400))\n"
    program += "from vla_lib.core import processes\nprocesses.allow_open_files()\n"
    program += "print(resource.getrlimit(resource.RLIMIT_NOFILE))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "(400, 400)\n"
