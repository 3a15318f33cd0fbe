import os
import subprocess
import sys
from dataclasses import dataclass

import pytest

from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError


@dataclass(frozen=True)
class Settings:
    """A test's settings."""

    batch_size: int = 4
    sensor_enabled: bool = True

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}; give 1 or more.")


@pytest.mark.parametrize(
    "words", (["--batch-size", "8", "--no-sensor-enabled"], ["--batch_size", "8", "--no_sensor_enabled"])
)
def test_dashes_and_underscores_are_the_same(words):
    assert frontdoor.parse(Settings, words) == Settings(8, False)


def test_a_bare_boolean_flag_as_in_the_guide():
    assert frontdoor.parse(Settings, ["--sensor-enabled"]).sensor_enabled


@pytest.mark.parametrize("words", (["--batch-size", "0"], ["--batch-size", "four"], ["--lrr", "1"]))
def test_bad_input_exits_with_2(words, capsys):
    with pytest.raises(SystemExit) as end:
        frontdoor.start(Settings, print, words)
    assert end.value.code == 2
    assert capsys.readouterr().err.strip()


def test_a_failing_rank_tells_its_sentence_to_the_launcher(tmp_path):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
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
    program = "import atexit\nfrom vla_lib.core import processes\natexit.register(print, 'last')\nprint('first')\nprocesses.end()\nprint('never')"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "first\nlast\n", "")
