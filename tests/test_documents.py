"""What the documents show is what the programs take: each command is read by its own parser, and run on small data."""

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import webbrowser
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_type_hints
from unittest.mock import create_autospec

import papermill.cli
import pytest
import yaml
from torch.distributed.run import get_args_parser

from vla_lib import cli
from vla_lib.core import frontdoor
from vla_lib.core.files import write_text
from vla_lib.core.run_folder import PROJECT, RunFolder
from vla_lib.evaluation import rehearsal
from vla_lib.runtime.robot_io import RobotIO
from vla_lib.workbench import run_all, sweeps
from vla_lib.workbench.parameters import notebook_path, resolve

DOCUMENTS = sorted(str(path.relative_to(PROJECT)) for path in [*PROJECT.glob("*.md"), *PROJECT.glob("docs/*.md")])
PAIRS = (("README.md", "README.ko.md"), ("docs/INFERENCE_GUIDE.md", "docs/INFERENCE_GUIDE.ko.md"))
PROGRAMS = ("vla", "python", "torchrun", "papermill", "make", "conda", "ruff", "pre-commit")
FLOW, LAB_BOOK = "tests/workbench/test_flow.py::", "tests/workbench/test_lab_book.py::"
SWEEPS = "tests/workbench/test_sweeps.py::"
ELSEWHERE = {  # how a command begins: the test that runs it
    "make test": "tests/test_house.py::test_the_readmes_commands_are_the_makefiles",
    "make lint": "tests/test_house.py::test_ruff_is_clean",
    "ruff": "tests/test_house.py::test_ruff_is_clean",
    "python -m pytest": "tests/test_documents.py::understand",
    "papermill": "tests/workbench/test_headless.py::test_plain_papermill_works_too",
    "vla run 07_rehearse -p checkpoint runs/": f"{FLOW}test_notebook_07_rehearses_in_real_time_without_a_person",
    "vla run-all": f"{FLOW}test_run_all_skips_every_step_that_is_up_to_date",
    "vla sweep": f"{SWEEPS}test_a_sweep_survives_a_failing_run_and_goes_on_where_it_was",
    "vla night": f"{SWEEPS}test_a_stopped_queue_leaves_no_process_and_true_records",
    "vla rerun": f"{LAB_BOOK}test_a_run_is_repeated_and_says_what_has_changed",
    "vla doctor": f"{LAB_BOOK}test_the_doctor_names_what_is_missing_and_what_to_do",
    "vla record": "tests/robots/test_vla_record.py::test_an_episode_is_recorded_without_a_policy",
    "python -m vla_lib.deploy": "tests/robots/test_deploy.py::"
    "test_a_session_goes_through_its_stages_and_every_run_is_an_episode",
    "vla cache rm": "tests/features/test_features_cache.py::test_list_verify_remove",
    "vla import": "tests/episodes/test_lerobot.py::test_a_round_trip_keeps_actions_pictures_and_sensor",
    "python -m vla_lib.evaluate": f"{FLOW}test_the_front_door_evaluates_as_the_documents_say",
    "python -m benchmarks": "tests/needle_rig/test_rig_plots_and_bench.py::test_the_bench_prints_and_writes_its_rows",
}


def read(document: str) -> str:
    return (PROJECT / document).read_text()


def blocks(document: str) -> list[str]:
    """The commands of a document's code blocks, comments and line breaks taken out."""
    text = read(document).replace("\\\n", " ")
    lines = [
        " ".join(shlex.split(line, comments=True, posix=False))
        for line in re.findall(r"^    (\S.*)$", text, re.M)
        if line.split(" ")[0] in PROGRAMS
    ]
    return lines


def code_spans(document: str) -> set[str]:
    """All `code` of a document's running text, lists and tables."""
    return set(re.findall(r"`([^`\n]+)`", re.sub(r"^    .*$", "", read(document), flags=re.M)))


def spans(document: str) -> list[str]:
    """The whole commands in running text: neither a mere name of some block's command nor an entry of a table."""
    shown = [command for other in DOCUMENTS for command in blocks(other)]
    text = re.sub(r"^(?:    |\| `).*$", "", read(document), flags=re.M)
    found = [
        span
        for span in re.findall(r"`([^`\n]+)`", text)
        if span.split(" ")[0] in PROGRAMS and " " in span and "..." not in span
    ]
    return [span for span in found if not any(command.startswith(f"{span} ") for command in shown)]


def exceptions() -> list[str]:
    """What a command that the tests do not run contains, from the table that says so."""
    text = read("CONTRIBUTING.md")
    table = text[text.index("| `make demo` |") :].split("\n\n")[0]
    return [mark for row in table.splitlines() for mark in re.findall(r"`([^`]+)`", row.split("|")[1])]


COMMANDS = sorted({command for document in DOCUMENTS for command in [*blocks(document), *spans(document)]})


# ---- the programs' own parsers, each in one place


def front_door(module: str) -> tuple[type[Any], Callable[[Any], Any]]:
    """The settings class and `main` of what `python -m module` starts."""
    spec = importlib.util.find_spec(module)
    assert spec, f"there is no module {module}"
    main = importlib.import_module(f"{module}.__main__" if spec.submodule_search_locations else module).main
    return next(iter(get_type_hints(main).values())), main


def parse_vla(words: list[str]) -> Namespace:
    """What `vla` makes of its words. Raises SystemExit where it refuses them."""
    return Namespace(**cli.parse(words).keywords)


def understand(words: list[str]) -> None:
    """Parse a command as its program would. Raises SystemExit, UserError or AssertionError where it would refuse."""
    program, *rest = words
    if program == "vla":
        arguments = parse_vla(rest)
        given = dict(getattr(arguments, "parameters", []))
        if rest[0] == "run-all":
            plan = run_all.FlowPlan(arguments.dataset_root, diffusion=arguments.diffusion)
            run_all.assign(given, plan.notebooks)
        elif rest[0] == "sweep":
            how = {name: getattr(arguments, name, default) for name, default in SWEEP.items()}
            sweeps.plan_sweep(arguments.notebook, fixed=given, **how).check()
        elif rest[0] == "run":
            resolve(notebook_path(arguments.notebook), given, text=True)
    elif words[:3] == ["python", "-m", "pytest"]:
        (path,) = [word for word in rest if word.startswith("tests/")]
        chosen = rest[rest.index("-k") + 1] if "-k" in rest else ""
        assert re.search(rf"^def test_\w*{chosen}", read(path), re.M)
    elif program == "python":
        assert rest[0] == "-m"
        assert frontdoor.parse(front_door(rest[1])[0], rest[2:])
    elif program == "torchrun":
        arguments = get_args_parser().parse_args(rest)
        assert arguments.module
        understand(["python", "-m", arguments.training_script, *arguments.training_script_args])
    elif program == "papermill":
        found = papermill.cli.papermill.make_context("papermill", list(rest)).params
        values = {name: papermill.cli._resolve_type(value) for name, value in found["parameters"]}
        resolve(notebook_path(found["notebook_path"]), values)
    elif program == "make":
        # without the variables of `make test` itself
        outer = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
        done = subprocess.run(["make", "-n", *rest], cwd=PROJECT, env=outer, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        started = shlex.split(done.stdout.splitlines()[-1])
        if started[0].endswith("/vla"):
            understand(["vla", *started[1:]])
    elif program in ("ruff", "pre-commit"):
        done = subprocess.run([sys.executable, "-m", program.replace("-", "_"), *rest, "--help"], capture_output=True)
        assert done.returncode == 0, done.stderr
    elif rest[0] == "activate":
        assert rest[1:] == [yaml.safe_load(read("environment.yml"))["name"]]
    else:
        assert rest[:3] == ["env", "create", "--file"] and (PROJECT / rest[3]).is_file()


def run_in_process(words: list[str]) -> int | None:
    """Run a command here, and give its exit status."""
    program, *rest = words
    if program == "python":
        settings, main = front_door(rest[1])
        main(frontdoor.parse(settings, rest[2:]))
        return 0
    with pytest.raises(SystemExit) as ended:
        cli.main(rest)
    return ended.value.code


# ---- each command is understood, and the light ones run

SMALL = "--picture-width 32 --picture-height 24 --idle-tail-s 0.2"
ONE = f"--episodes-f1 1 --episodes-f2 0 {SMALL}"
SMALLER = {"ROOT --episodes-f1 30 --episodes-f2 10": f"NEW {ONE}", "--varied": f"--varied --dataset-root NEW {ONE}"}
SWEEP = {"grid": (), "search": (), "trials": 0, "seeds": 1}
RUN_HERE = (
    "python -m needle_rig",
    "python -m vla_lib.preprocess",
    "vla cache ls",
    "vla cache verify",
    "vla export",
    "vla runs",
    "vla --help",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the documents' placeholders stand for: a recorded and prepared ROOT, checkpoints."""
    folder = tmp_path_factory.mktemp("documents")
    record = (
        f"python -m needle_rig --dataset-root {folder / 'ROOT'} --episodes-f1 1 --episodes-f2 1 --workers 1 {SMALL}"
    )
    for command in (record, f"python -m vla_lib.preprocess --dataset-root {folder / 'ROOT'} --quiet"):
        run_in_process(shlex.split(command))
    write_text(folder / "PATH", "")
    for command in COMMANDS:
        for word in re.findall(r"[^\s=]+\.pt\b", command):
            (folder / word).parent.mkdir(parents=True, exist_ok=True)
            (folder / word).touch()
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_understood_by_its_program(command, place, monkeypatch):
    monkeypatch.chdir(place)
    try:
        understand(shlex.split(command))
    except SystemExit as ended:
        assert ended.code == 0  # --help


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
        command = command.replace(words, fewer.replace("NEW", str(tmp_path / "new")))
    assert run_in_process(shlex.split(command)) in (0, None)


def test_every_command_is_run_by_a_test_or_named_as_needing_more():
    marks = exceptions()
    for command in COMMANDS:
        if not command.startswith((*RUN_HERE, *ELSEWHERE)):
            assert any(mark in command for mark in marks), f"{command} is neither run by a test nor named in the table"
    for mark in marks:
        assert any(mark in command for command in COMMANDS), f"{mark} is in the table, but in no command"
    for test in ELSEWHERE.values():
        path, _, name = test.partition("::")
        assert f"def {name}" in read(path), test


def test_the_shown_list_of_a_night_is_one(tmp_path):
    for document in PAIRS[0]:
        (shown,) = re.findall(r"vla night jobs.yaml +#.*?(- \{.*\}\})", read(document))
        (tmp_path / "jobs.yaml").write_text(shown)
        (entry,) = sweeps.read_list(tmp_path / "jobs.yaml")
        resolve(notebook_path(entry.notebook), entry.parameters, text=True)


@pytest.mark.parametrize("document", PAIRS[1])
def test_the_shown_pilot_drives_a_robot(document, place, monkeypatch):
    """The names and arguments are those of the real classes; nothing is loaded."""
    monkeypatch.chdir(place)
    pilot = create_autospec(rehearsal.Pilot)
    pilot.return_value.__enter__.return_value = pilot.return_value
    monkeypatch.setattr(rehearsal, "Pilot", pilot)
    block = re.search(r"(?:^(?:    .*)?\n)+", read(document)[read(document).index("    from vla_lib") :], re.M)[0]
    code = re.sub(r"^    ", "", block, flags=re.M)
    exec(code, {"MyArm": create_autospec(RobotIO)})
    assert pilot.return_value.run.call_args.kwargs == {"max_s": 30}


def test_the_reasons_that_the_guide_names_are_the_runners():
    text = read("docs/INFERENCE_GUIDE.md")
    table = text[text.index("| `stale VL features`") :].split("\n\n")[0]
    sources = "".join(path.read_text() for path in (PROJECT / "vla_lib" / "runtime").glob("*.py"))
    for row in table.splitlines():
        for reason in re.findall(r"`([^`]+)`", row.split("|")[1]):
            assert f'"{reason.removesuffix(" NAME")}"' in sources, reason


# ---- the documents agree with each other and with the house


def test_both_languages_show_the_same():
    for english, korean in PAIRS:
        assert blocks(english) == blocks(korean)
        assert code_spans(english) == code_spans(korean)
        assert len(re.findall("^## ", read(english), re.M)) == len(re.findall("^## ", read(korean), re.M))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_what_a_document_points_to_exists(document):
    text, folder = read(document), (PROJECT / document).parent
    assert "```" not in text, "code blocks are indented: the tests read those"
    for target in re.findall(r"\]\(([^)#]+)", text):
        assert target.startswith("https://") or (folder / target).is_file(), target
    for path in re.findall(r"(?<![\w./-])(?:vla_lib|needle_rig|benchmarks|tests|notebooks)/[\w/.]*\w", text):
        assert (PROJECT / path).exists(), path
    for name in re.findall(r"`(\w+\.py)`", text):
        assert list(PROJECT.glob(f"vla_lib/**/{name}")), name
    for notebook in set(re.findall(r"\b(\d\d_[a-z_]+)\b", text)) - {"08_name"}:
        assert notebook_path(notebook).is_file(), notebook
    for module in set(re.findall(r"-m ([a-z_.]+)", text)):
        assert importlib.util.find_spec(module), module
