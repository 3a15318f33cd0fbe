"""What the documents show is what the programs take: every command is parsed by its own parser, and run on small data or named as needing more."""

import importlib
import os
import re
import shlex
import subprocess
import tomllib
import webbrowser
from pathlib import Path
from typing import Any

import papermill.cli
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from torch.distributed.run import get_args_parser

from needle_rig import __main__ as simulate
from vla_lib import cli, preprocess
from vla_lib.core import frontdoor
from vla_lib.core.files import write_text
from vla_lib.core.run_folder import PROJECT, RunFolder
from vla_lib.workbench import queue, run_all
from vla_lib.workbench.parameters import notebook_path, resolve

DOCUMENTS = ("README.md", "README.ko.md")
PROGRAMS = ("vla", "python", "torchrun", "papermill", "make", "conda")
ELSEWHERE = {  # how a command begins: the test that runs it
    "make test": "tests/test_house.py::test_the_readmes_commands_are_the_makefiles",
    "papermill": "tests/workbench/test_headless.py::test_plain_papermill_works_too",
    "vla run 07_rehearse -p checkpoint runs/": "tests/workbench/test_flow.py::test_notebook_07_rehearses_in_real_time_without_a_person",
    "vla run-all": "tests/workbench/test_flow.py::test_run_all_skips_every_step_that_is_up_to_date",
    "vla sweep": "tests/workbench/test_lab_book.py::test_a_sweep_survives_a_failing_run_and_goes_on_where_it_was",
    "vla night": "tests/workbench/test_lab_book.py::test_a_stopped_queue_leaves_no_process_and_true_records",
    "vla rerun": "tests/workbench/test_lab_book.py::test_a_run_is_repeated_and_says_what_has_changed",
    "vla doctor": "tests/workbench/test_lab_book.py::test_the_doctor_names_what_is_missing_and_what_to_do",
    "vla cache rm": "tests/features/test_features_cache.py::test_list_verify_remove",
    "python -m vla_lib.evaluate": "tests/workbench/test_flow.py::test_the_front_door_evaluates_as_the_documents_say",
    "python -m benchmarks": "tests/needle_rig/test_rig_plots_and_bench.py::test_the_bench_prints_and_writes_its_rows",
}


def blocks(document: str) -> list[str]:
    """The commands of a document's code blocks, comments and line breaks taken out."""
    text = (PROJECT / document).read_text().replace("\\\n", " ")
    lines = [
        " ".join(shlex.split(line, comments=True, posix=False)) for line in re.findall(r"^    (\S.*)$", text, re.M)
    ]
    return [line for line in lines if line.split(" ")[0] in PROGRAMS]


def spans(document: str) -> list[str]:
    """The whole commands among a document's `code` in running text: neither a mere name of a block's command nor an entry of the table."""
    shown = blocks(document)
    text = re.sub(r"^(?:    |\| `).*$", "", (PROJECT / document).read_text(), flags=re.M)
    found = [
        span
        for span in re.findall(r"`([^`\n]+)`", text)
        if span.split(" ")[0] in PROGRAMS and " " in span and "..." not in span
    ]
    return [span for span in found if not any(command.startswith(f"{span} ") for command in shown)]


def exceptions(document: str) -> list[str]:
    """What a command that the tests do not run contains, from the table that says so."""
    text = (PROJECT / document).read_text()
    table = text[text.index("| `make demo` |") :].split("\n\n")[0]
    return [mark for row in table.splitlines() for mark in re.findall(r"`([^`]+)`", row.split("|")[1])]


COMMANDS = sorted({command for document in DOCUMENTS for command in [*blocks(document), *spans(document)]})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents' placeholders stand for: a recorded and prepared ROOT, checkpoints, jobs.yaml."""
    folder = tmp_path_factory.mktemp("documents")
    pictures = {"picture_width": 32, "picture_height": 24, "idle_tail_s": 0.2, "workers": 1}
    simulate.main(simulate.Settings(folder / "ROOT", episodes_f1=1, episodes_f2=1, **pictures))
    preprocess.main(preprocess.Settings(folder / "ROOT", quiet=True))
    write_text(folder / "PATH", "")
    for command in COMMANDS:
        for word in re.findall(r"[^\s=]+\.pt\b", command):
            (folder / word).parent.mkdir(parents=True, exist_ok=True)
            (folder / word).touch()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood_by_its_program(command, place, monkeypatch):
    monkeypatch.chdir(place)
    understand(shlex.split(command))


def understand(words: list[str]) -> None:
    """Parse a command as its program would. Raises SystemExit or UserError where the program would refuse it."""
    program, *rest = words
    if program == "vla":
        arguments = cli._parser().parse_args(rest)
        given = dict(getattr(arguments, "parameters", []))
        if rest[0] == "run-all":
            plan = run_all.Plan(arguments.dataset_root, diffusion=arguments.diffusion)
            run_all.assign(given, plan.notebooks)
        elif rest[0] == "sweep":
            for entry in queue.grid(arguments.notebook, arguments.grid, given):
                resolve(notebook_path(entry.notebook), entry.parameters, text=True)
        elif rest[0] == "run":
            resolve(notebook_path(arguments.notebook), given, text=True)
    elif program == "python":
        assert rest[0] == "-m"
        door = importlib.import_module(rest[1])
        assert frontdoor.parse(door.Settings, rest[2:])
    elif program == "torchrun":
        arguments = get_args_parser().parse_args(rest)
        assert arguments.module
        understand(["python", "-m", arguments.training_script, *arguments.training_script_args])
    elif program == "papermill":
        found = papermill.cli.papermill.make_context("papermill", list(rest)).params
        values = {name: papermill.cli._resolve_type(value) for name, value in found["parameters"]}
        resolve(notebook_path(found["notebook_path"]), values)
    elif program == "make":
        outer = {
            key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))
        }  # of `make test` itself
        done = subprocess.run(["make", "-n", *rest], cwd=PROJECT, env=outer, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        started = shlex.split(done.stdout.splitlines()[-1])
        assert started[0].startswith(".venv/bin/")
        if started[0].endswith("/vla"):
            understand(["vla", *started[1:]])
    elif rest[0] == "activate":
        assert rest[1:] == [yaml.safe_load((PROJECT / "environment.yml").read_text())["name"]]
    else:
        assert rest[:3] == ["env", "create", "--file"] and (PROJECT / rest[3]).is_file()


def test_the_shown_list_of_a_night_is_one(tmp_path):
    for document in DOCUMENTS:
        (shown,) = re.findall(r"vla night jobs.yaml +#.*?(- \{.*\}\})", (PROJECT / document).read_text())
        (tmp_path / "jobs.yaml").write_text(shown)
        (entry,) = queue.read_list(tmp_path / "jobs.yaml")
        resolve(notebook_path(entry.notebook), entry.parameters, text=True)


def test_both_languages_show_the_same_commands_and_exceptions():
    english, korean = (set(blocks(document)) for document in DOCUMENTS)
    assert english == korean
    assert exceptions(DOCUMENTS[0]) == exceptions(DOCUMENTS[1])


SMALLER = {
    "--episodes-f1 30 --episodes-f2 10": "--episodes-f1 1 --episodes-f2 0 --picture-width 32 --picture-height 24 --idle-tail-s 0.2"
}
RUN_HERE = ("python -m needle_rig", "python -m vla_lib.preprocess", "vla cache ls", "vla cache verify", "vla runs")


@pytest.mark.parametrize("command", [one for one in COMMANDS if one.startswith(RUN_HERE) and "DATA" not in one])
def test_a_light_command_runs(command, place, monkeypatch, tmp_path):
    monkeypatch.chdir(place)
    monkeypatch.setattr(webbrowser, "open", lambda address: None)
    for name in ("RUN", "OTHER_RUN"):
        run = RunFolder.create("04_train_async", {"lr": len(name) * 1e-4})
        (run.path / "notebook.html").touch()
        write_text(run.path / "results.json", '{"val_mae_mm": 0.1}')
        run.finish("done")
        command = re.sub(rf"\b{name}\b(?!_)", run.path.name, command)
    for words, fewer in SMALLER.items():
        command = command.replace(f"ROOT {words}", f"{tmp_path / 'new'} {fewer}")
    program, *rest = shlex.split(command)
    assert run_in_process(program, rest) in (0, None)


def run_in_process(program: str, words: list[str]) -> Any:
    if program == "python":
        door = importlib.import_module(words[1])
        door.main(frontdoor.parse(door.Settings, words[2:]))
        return 0
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    return ended.value.code


def test_every_command_is_run_by_a_test_or_named_as_needing_more():
    marks = exceptions(DOCUMENTS[0])
    for command in COMMANDS:
        if not command.startswith((*RUN_HERE, *ELSEWHERE)):
            assert any(mark in command for mark in marks), f"{command} is neither run by a test nor named in the table"
    for mark in marks:
        assert any(mark in command for command in COMMANDS), f"{mark} is in the table, but in no command"
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}" in (PROJECT / path).read_text(), test


def test_the_lock_satisfies_what_pyproject_and_conda_ask():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = [
        Requirement(line)
        for line in (PROJECT / "requirements.lock").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    conda = yaml.safe_load((PROJECT / "environment.yml").read_text())["dependencies"]
    (python,) = [item.partition("=")[2] for item in conda if isinstance(item, str) and item.startswith("python=")]
    assert SpecifierSet(project["requires-python"]).contains(f"{python}.0")
    here = {"python_version": python, "python_full_version": f"{python}.9", "sys_platform": "linux"}
    pinned = {line.name.lower(): line.specifier for line in lines if line.marker is None or line.marker.evaluate(here)}
    for wanted in map(Requirement, project["dependencies"]):
        (pin,) = pinned[wanted.name.lower()]
        assert pin.operator == "==" and wanted.specifier.contains(pin.version, prereleases=True), (
            f"{wanted} against {pin}"
        )
