import os
from dataclasses import fields
from types import SimpleNamespace

import pytest

from vla_lib import cli
from vla_lib.core.errors import UserError
from vla_lib.core.files import append_jsonl, read_json
from vla_lib.core.run_folder import PROJECT, RunFolder, read_record
from vla_lib.core.settings import Settings, settings
from vla_lib.evaluation.deployment import DeploySettings
from vla_lib.evaluation.settings import EvaluateSettings
from vla_lib.training.settings import AsyncSettings
from vla_lib.workbench import commands, notebook
from vla_lib.workbench.jobs import Job, JobCancelled
from vla_lib.workbench.parameters import notebook_path, read_parameters, resolve
from vla_lib.workbench.run_all import SETTINGS
from vla_lib.workbench.runs import find_runs

STAGES = {**SETTINGS, "06_evaluate": EvaluateSettings, "08_deploy": DeploySettings}
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


@pytest.fixture
def kernel(monkeypatch):
    """This process as a kernel."""
    none = lambda *_: None  # noqa: E731
    shell = SimpleNamespace(
        events=SimpleNamespace(register=none, unregister=none), run_line_magic=none, set_custom_exc=none
    )
    monkeypatch.setattr(notebook, "_shell", lambda: shell)
    monkeypatch.setattr(notebook, "_current", None)
    monkeypatch.setattr(notebook, "_picks", {})


@settings
class Few(Settings):
    lr: float = 1e-4


TRAIN = "lr: float = 1e-4\nnproc: int = 1"


def test_a_renamed_parameter_is_refused_in_the_first_cell(write_notebook, kernel):
    """It would do nothing: the training would go on with the default, in silence."""
    saved = write_notebook(TRAIN.replace("lr", "learning_rate"), "print(nproc)")
    run = notebook.begin(str(saved), {"learning_rate": 3e-3, "nproc": 1})
    with pytest.raises(
        UserError, match="learning_rate is no setting of small and no cell uses it; .* does not name: .*lr"
    ):
        run.settings(Few)
    live = write_notebook(TRAIN, "print(nproc)")
    cells = ["lr: float = 1e-4\nnproc: int = 1", "learning_rate: float = 3e-3\nnproc: int = 1", "a: int = 3"]
    with pytest.raises(UserError, match="lacks lr .default 0.0001. and has learning_rate in its place"):
        notebook.begin(str(live), {"In": cells, "learning_rate": 3e-3, "nproc": 1})


def test_a_corrected_cell_counts_before_it_is_saved(write_notebook, kernel):
    path = write_notebook("lr: float = 'x'", "")
    corrected = {"In": ["lr: float = 'x'", "lr: float = 2e-4"], "lr": 2e-4}
    with pytest.raises(UserError, match="in the parameters cell is not"):
        notebook.begin(str(path), {"lr": 2e-4})
    assert notebook.begin(str(path), corrected).settings(Few).lr == 2e-4


def test_a_pick_is_the_runs_parameter_and_kept_until_the_cell_says_otherwise(write_notebook, kernel):
    path = str(write_notebook("checkpoint: str = ''\nn: int = 1", "print(checkpoint, n)"))
    first = notebook.begin(path, {"checkpoint": "", "n": 1})
    notebook.pick(checkpoint="wide=/a/b.pt", compare_with=["no parameter of this notebook"])
    assert read_record(first.path)["parameters"] == {"checkpoint": "wide=/a/b.pt", "n": 1}
    again = {"checkpoint": "", "n": 2}
    second = notebook.begin(path, again)
    assert again["checkpoint"] == second.parameters["checkpoint"] == "wide=/a/b.pt"
    assert read_record(second.path)["parameters"] == {"checkpoint": "wide=/a/b.pt", "n": 2}
    for value in ("/c.pt", ""):  # the cell counts more from then on
        last = notebook.begin(path, {"checkpoint": value, "n": 2})
        assert read_record(last.path)["parameters"]["checkpoint"] == value


def test_what_was_picked_is_run_again(write_notebook, kernel, runs_folder):
    """By `vla rerun`, as it was."""
    path = str(write_notebook("episode: str = ''", "run.add_results(shown=episode); run.finish()"))
    first = notebook.begin(path, {"episode": ""})
    notebook.pick(episode="part1/b")
    first.finish()
    assert commands.rerun(first.path.name) == 0
    (second,) = set(runs_folder.iterdir()) - {first.path}
    assert read_record(second)["parameters"] == {"episode": "part1/b"}
    assert read_json(second / "results.json") == {"shown": "part1/b"}


def test_a_setting_that_the_cell_lacks_is_refused_and_not_left_to_its_default(write_notebook, kernel):
    known = {one.name: one for one in read_parameters(notebook_path("04_train_async")).values()}
    lines = [f"{one.name}: {one.kind} = {one.default!r}" for one in known.values() if one.name != "lr"]
    path = write_notebook("\n".join(lines), "print(nproc_per_node, resume_run)", name="04_train_async")
    run = notebook.begin(str(path), {name: one.default for name, one in known.items()})
    with pytest.raises(UserError, match="The parameters cell of 04_train_async lacks lr; write"):
        run.settings(AsyncSettings)
    assert run.settings(AsyncSettings, lr=2e-4).lr == 2e-4


@pytest.mark.parametrize("name", STAGES)
def test_the_notebooks_name_every_setting_but_those_meant_to_stay(name):
    given = read_parameters(notebook_path(name)).keys()
    settings = {field.name for field in fields(STAGES[name])}
    assert set(STAGES[name].unnamed.split()) <= settings - given
    assert settings - given - set(STAGES[name].unnamed.split()) <= {"quiet"}  # notebook 02 gives it


def test_a_resumed_run_is_one_line_in_the_lab_book(write_notebook, kernel):
    path = str(write_notebook("n: int = 1\nresume_run: str = ''", "print(n, resume_run)"))
    first = notebook.begin(path, {"n": 1, "resume_run": ""})
    first.leave()
    again = notebook.begin(path, {"n": 1, "resume_run": first.path.name})
    assert again.path == first.path and read_record(first.path)["state"] == "running"
    again.finish()
    record = read_record(first.path)
    assert (record["state"], record["parameters"]["resume_run"]) == ("done", "") and len(find_runs()) == 1
    RunFolder.create("06_evaluate", {}).finish("done")
    with pytest.raises(UserError, match="names .*-06_evaluate, a run of 06_evaluate; give one of small"):
        notebook.begin(path, {"n": 1, "resume_run": "06_evaluate"})


def test_a_stop_says_where_it_is_and_how_to_go_on(tmp_path):
    job = Job([], tmp_path / "20260101-000000-04_train_async")
    assert job.stopped("stopped").endswith("Run the notebook again to go on.")
    append_jsonl(job.run_dir / "metrics.jsonl", {"step": 260})
    (job.run_dir / "checkpoints").mkdir()
    (job.run_dir / "checkpoints" / "a.pt").touch()
    said = job.stopped("stopped")
    assert said.startswith('stopped at step 260; saved; go on with resume_run = "20260101-000000-04_train_async"')
    os.utime(job.run_dir / "checkpoints" / "a.pt", (0, 0))  # killed before it could save
    assert job.stopped("stopped").startswith("stopped at step 260; its last checkpoint is older; go on with")
    assert JobCancelled(said)._render_traceback_() == [said]
