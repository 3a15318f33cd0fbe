import pytest

from vla_lib import cli
from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import PROJECT
from vla_lib.workbench.parameters import notebook_path, read_parameters, resolve

CELL = "lr: float = 1e-4\nbatch_size: int = 4\nsensor_enabled: bool = True\nname: str = ''\nviews: list[str] = []"


def test_command_line_words_mean_what_they_say(write_notebook):
    path = write_notebook(CELL)
    words = {"lr": "1e-3", "batch_size": "8", "sensor_enabled": "false", "name": "12", "views": "View1_left,View5"}
    assert resolve(path, words, text=True) == {
        "lr": 1e-3,
        "batch_size": 8,
        "sensor_enabled": False,
        "name": "12",
        "views": ["View1_left", "View5"],
    }
    assert resolve(path, {"lr": "1"}, text=True)["lr"] == 1.0


def test_an_unknown_parameter_is_refused_with_the_known_ones(write_notebook):
    with pytest.raises(
        UserError, match="small has no parameter lrr; it has lr, batch_size, sensor_enabled, name, views"
    ):
        resolve(write_notebook(CELL), {"lrr": "1"}, text=True)


@pytest.mark.parametrize(
    "name, word",
    (
        ("lr", "NaN"),
        ("lr", "1e999"),
        ("batch_size", "Infinity"),
        ("batch_size", "4.5"),
        ("batch_size", "true"),
        ("lr", "fast"),
        ("sensor_enabled", "1"),
        ("views", "[1]"),
    ),
)
def test_a_wrong_type_is_refused(write_notebook, name, word):
    with pytest.raises(UserError, match=f"parameter {name} wants"):
        resolve(write_notebook(CELL), {name: word}, text=True)


@pytest.mark.parametrize(
    "line", ("a = 1", "a: int = 1 + 1", "a: Path = 'x'", "import os", "a: int = 'x'", "a: int = print()")
)
def test_a_parameters_cell_holds_typed_literals_only(write_notebook, line):
    with pytest.raises(UserError, match="in the parameters cell is not"):
        read_parameters(write_notebook(line))


def test_help_shows_what_each_parameter_is(write_notebook, capsys):
    lines = [
        "# of the training",
        "lr: float = 1e-4  # peak rate, the °C of learning",
        "name: str = 'a # b'  # of the run",
    ]
    cell = "\n".join([*lines, "views: list[str] = [", "    'View1',", "]  # all"])
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", str(write_notebook(cell)), "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for line in (
        "  lr     peak rate, the °C of learning (float, default: 0.0001)",
        "  name   of the run (str, default: 'a # b')",
        "  views  all (list[str], default: ['View1'])",
    ):
        assert line in shown.splitlines()
    assert "--run-dir" in shown


def test_a_notebook_in_a_wrong_folder_is_not_the_projects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    expected = PROJECT / "notebooks" / "04_train_async.ipynb"
    for name in ("04_train_async", "04_train_async.ipynb", "notebooks/04_train_async.ipynb", expected):
        assert notebook_path(name) == expected
    for name in ("mine/04_train_async.ipynb", tmp_path / "04_train_async.ipynb"):
        with pytest.raises(
            UserError, match="There is no notebook .*04_train_async.ipynb; there are 01_inspect_episodes, "
        ):
            notebook_path(name)
