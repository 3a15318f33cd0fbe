"""The house keeps its own rules: style, size, arrows that point one way, notebook hygiene, short documents."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from vla_lib.workbench.parameters import read_parameters

PROJECT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((PROJECT / "notebooks").glob("*.ipynb"))
ROOMS = (
    "core",
    "episodes",
    "features",
    "policy",
    "training",
    "runtime",
    "sim",
    "evaluation",
    "benchmarks",
    "workbench",
)
MAY_IMPORT = {
    "core": set(),
    "episodes": {"core"},
    "features": {"core", "episodes"},
    "policy": {"core", "episodes", "features"},
    "training": {"core", "episodes", "features", "policy"},
    "runtime": {"core", "episodes", "features", "policy"},
    "evaluation": {"core", "episodes", "features", "policy", "training", "runtime"},
    "workbench": set(ROOMS),
}


@pytest.mark.parametrize("words", (["check", "."], ["format", "--check", "."]), ids=("check", "format"))
def test_ruff_is_clean(words):
    done = subprocess.run([sys.executable, "-m", "ruff", *words], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_arrows_point_one_way():
    wrong = []
    for path in sorted((PROJECT / "vla_lib").glob("*/**/*.py")):
        room = path.relative_to(PROJECT / "vla_lib").parts[0]
        for name in imported(path):
            parts = name.split(".")
            if (
                parts[0] == "vla_lib"
                and len(parts) > 1
                and parts[1] != room
                and parts[1] in ROOMS
                and parts[1] not in MAY_IMPORT[room]
            ):
                wrong.append(f"{path.relative_to(PROJECT)} imports {name}")
    assert wrong == []


def imported(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def test_reading_episodes_imports_nothing_heavy():
    heavy = ("torch", "transformers", "matplotlib")
    code = f"import sys, vla_lib.episodes, vla_lib.preprocess; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.xfail(strict=False, reason="the rooms are being cleared")
def test_the_library_stays_thin():
    modules = [path.read_text().splitlines() for path in (PROJECT / "vla_lib").rglob("*.py")]
    assert len(modules) <= 100
    assert sum(map(len, modules)) <= 12_500


def test_modules_stay_one_noun_long():
    long = {
        str(path.relative_to(PROJECT)): n
        for path in (PROJECT / "vla_lib").rglob("*.py")
        if (n := len(path.read_text().splitlines())) > 400
    }
    assert long == {}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_clean(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert re.fullmatch(r"\d\d_[a-z_]+", path.stem)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert read_parameters(path)
    assert notebook.cells[0].cell_type == "markdown"
    for word in ("question", "inputs", "good answer", "time"):
        assert word in notebook.cells[0].source.lower(), f"the first cell does not tell the {word}"
    for cell in notebook.cells:
        assert re.fullmatch(r"[a-z]+(-[a-z0-9]+)*", cell.id), cell.id
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None, f"{cell.id} has outputs"
            assert cell.id == "parameters" or len(cell.source.splitlines()) <= 14, f"{cell.id} is too long"
            assert not re.search(r"^\s*class ", cell.source, re.M), f"{cell.id} defines a class"


def test_the_readmes_commands_are_the_makefiles():
    told = set(re.findall(r"\bmake ([a-z]+)", (PROJECT / "README.md").read_text()))
    targets = set(re.findall(r"^([a-z]+):", (PROJECT / "Makefile").read_text(), re.M))
    assert {"demo", "test", "lab"} <= told
    assert told - targets == set()
    ci = (PROJECT / ".ci" / "run").read_text()
    assert "make test" in ci


@pytest.mark.parametrize(
    "files",
    (
        pytest.param("*/**/*.py", marks=pytest.mark.xfail(strict=False, reason="the rooms are being cleared")),
        "*.md",
        "docs/*.md",
    ),
)
def test_no_line_is_wider_than_120(files):
    wide = [
        f"{path.relative_to(PROJECT)}:{number}"
        for path in PROJECT.glob(files)
        if path.relative_to(PROJECT).parts[0][0] != "."
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 120 and not (line.startswith("    ") and "https://" in line)
    ]
    assert wide == []


def test_the_readme_is_short():
    for name in ("README.md", "README.ko.md"):
        text = (PROJECT / name).read_text()
        assert len(text.splitlines()) <= 130 and len(text.split()) <= 1300, name
