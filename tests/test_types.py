"""mypy over vla_lib and needle_rig: the third of `make lint`'s checks (ruff's two are in test_house.py)."""

import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]


def test_types_are_clean():
    done = subprocess.run([sys.executable, "-m", "mypy"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
