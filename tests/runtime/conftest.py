"""Shared by the tests of the runtime room."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from plain_robot import Setup


@pytest.fixture
def setup():
    """Builder of simulated runs of a plain robot."""
    return Setup
