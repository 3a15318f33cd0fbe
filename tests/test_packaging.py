"""What is installed: a lock for users, one for developers, the same for pip and conda; hooks run the same programs."""

import os
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

PROJECT = Path(__file__).resolve().parents[1]


def read(name: str) -> str:
    return (PROJECT / name).read_text()


def pins(lock: str, python: str) -> dict[str, SpecifierSet]:
    """What a lock pins on this platform, by lower-case name."""
    here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    lines = [Requirement(line) for line in read(lock).splitlines() if line and not line.startswith("#")]
    return {line.name.lower(): line.specifier for line in lines if line.marker is None or line.marker.evaluate(here)}


def test_the_locks_satisfy_what_pyproject_and_conda_ask():
    pyproject = tomllib.loads(read("pyproject.toml"))
    conda = yaml.safe_load(read("environment.yml"))["dependencies"]
    (python,) = [item.partition("=")[2] for item in conda if isinstance(item, str) and item.startswith("python=")]
    assert SpecifierSet(pyproject["project"]["requires-python"]).contains(f"{python}.0")
    user, dev = pins("requirements.lock", python), pins("requirements-dev.lock", python)
    for pinned, asked in ((user, pyproject["project"]["dependencies"]), (dev, pyproject["dependency-groups"]["dev"])):
        for wanted in map(Requirement, asked):
            (pin,) = pinned[wanted.name.lower()]
            assert pin.operator == "==" and wanted.specifier.contains(pin.version, prereleases=True), (
                f"{wanted} against {pin}"
            )
    assert {name: user[name] for name in user.keys() & dev.keys()} == {
        name: dev[name] for name in user.keys() & dev.keys()
    }
    tools = {Requirement(wanted).name for wanted in pyproject["dependency-groups"]["dev"]}
    assert not tools & user.keys(), "a user would install what only developers need"


def test_the_hooks_run_what_the_lock_pins(tmp_path):
    hooks = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"][0]["hooks"]
    dev = pins("requirements-dev.lock", "3.11")
    for hook in hooks:
        program = hook["entry"].split()[0].removeprefix(".venv/bin/")
        assert hook["language"] == "system" and program in dev
    (strip,) = [shlex.split(hook["entry"])[1:] for hook in hooks if hook["id"] == "nbstripout"]
    notebooks = sorted(map(str, PROJECT.glob("notebooks/*.ipynb")))
    done = subprocess.run([sys.executable, "-m", "nbstripout", *strip, "--verify", *notebooks], capture_output=True)
    assert done.returncode == 0, done.stdout


def test_conda_installs_the_users_lock():
    dependencies = yaml.safe_load(read("environment.yml"))["dependencies"]
    assert dependencies[-1] == {"pip": ["--requirement requirements.lock", "--editable ."]}
    assert {item if isinstance(item, str) else "pip:" for item in dependencies} == {"python=3.11", "pip", "pip:"}


def test_a_demo_installs_nothing_of_developers():
    """make demo and make lab install the users' lock, make test and make lint both."""
    for target, both in (("demo", False), ("lab", False), ("test", True), ("lint", True)):
        command = ["make", "-n", "VENV=.venv-none", target]
        # without the variables of `make test` itself
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(command, cwd=PROJECT, env=outer, capture_output=True, text=True, check=True)
        assert "--requirement requirements.lock" in done.stdout
        assert ("--requirement requirements-dev.lock" in done.stdout) == both, target
