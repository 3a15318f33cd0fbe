"""The lab book's commands: runs shown, compared, removed and repeated, the machine looked at."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from vla_lib import cli
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json, write_text
from vla_lib.core.owner import owned
from vla_lib.core.run_folder import RunFolder, git_state, read_record
from vla_lib.training import metrics
from vla_lib.workbench import commands, doctor, runs
from vla_lib.workbench.jobs import Job


@pytest.fixture
def two_runs() -> tuple[Path, Path]:
    made = []
    for lr in (1e-4, 5e-5):
        run = RunFolder.create("04_train_async", {"lr": lr, "seed": 0})
        write_json(run.path / "results.json", {"val_mae_mm": 1000 * lr, "cache": "tiny-1"})
        run.finish("done")
        made.append(run.path)
    return made[0], made[1]


def test_runs_are_listed_shown_and_compared(two_runs, capsys):
    cli_exit(["runs"])
    listed = capsys.readouterr().out
    assert "val_mae_mm" in listed and "tiny-1" in listed and "lr" not in listed.splitlines()[0]
    assert read_record(two_runs[0])["started"][:16].replace("T", " ") in listed
    cli_exit(["runs", "ls", "04_train_async", "--sort", "lr"])
    rows = capsys.readouterr().out.splitlines()
    assert "lr" in rows[0] and "seed" not in rows[0] and two_runs[1].name in rows[1]
    cli_exit(["runs", "show", two_runs[0].name])
    assert "lr: 0.0001" in capsys.readouterr().out
    differ = runs.diff(*two_runs).set_index("what")
    assert differ.loc["lr", ["of", "first", "second"]].tolist() == ["parameters", "0.0001", "5e-05"]
    assert "seed" not in differ.index
    with pytest.raises(UserError, match="2 runs match"):
        runs.find_run("2")


def test_a_list_of_runs_fits_120_columns(capsys):
    """However many parameters differ and however long they are: who, when and how it went is always said."""
    for number in range(3):
        given = {f"parameter_{k}": f"흰색_실리콘_{k}_{number}" for k in range(20)}
        run = RunFolder.create("04_train_async", given)
        write_json(run.path / "results.json", {"val_mae_mm": 0.1, "cache": "tiny-1"})
        run.finish("done")
    for words in (["runs"], ["runs", "ls", "04_train_async"]):
        cli_exit(words)
        lines = capsys.readouterr().out.splitlines()
        wide = [len(line) + len(re.findall("[가-힣]", line)) for line in lines]  # such a letter takes two columns
        assert len(lines) == 4 and max(wide) <= 120
        assert run.path.name in lines[-1] and "done" in lines[-1]


def test_a_run_is_removed_only_on_purpose(two_runs):
    with pytest.raises(UserError, match="--yes"):
        commands.rm([two_runs[0].name], False)
    user = RunFolder.create("06_evaluate", {"checkpoint": str(two_runs[0] / "checkpoints" / "best.pt")})
    with pytest.raises(UserError, match="named by the parameters of 1 other"):
        commands.rm([two_runs[0].name], True)
    with pytest.raises(UserError, match="is running"):
        commands.rm([user.path.name], True)
    assert commands.rm([two_runs[1].name, str(two_runs[1])], True) == 0  # named twice
    assert two_runs[0].exists() and not two_runs[1].exists()


@pytest.mark.parametrize("bad", ("{", "null", '{"name": "x", "state": "running", "started": "2025-01-01", "pid": -1}'))
def test_one_damaged_record_hides_no_other_run(bad, two_runs, runs_folder, capsys):
    for name in ("20990101-000000-04_train_async", "a_folder"):
        (runs_folder / name).mkdir()
        (runs_folder / name / "run.json").write_text(bad)
    write_text(two_runs[1] / "results.json", "[")
    cli_exit(["runs"])
    said = capsys.readouterr().out
    assert said.count("unreadable") == 2 and "a_folder/run.json" in said and "0.1" in said and two_runs[1].name in said
    assert runs.table("04_train_async")["state"].tolist() == ["done", "done", "unreadable"]
    for words in (["ls", "--state", "unreadable"], ["ls", "04_train_async"], ["show", "a_folder"]):
        cli_exit(["runs", *words])
    assert "error: " in capsys.readouterr().out
    with pytest.raises(UserError, match="by hand|restore it"):
        commands.rm(["a_folder"], True)


@pytest.mark.parametrize("bad", ("{", "[]", '{"state": "running", "supervisor_pid": -1, "command": 7}'))
def test_a_damaged_job_record_is_told(bad, tmp_path):
    (tmp_path / "job.json").write_text(bad)
    for ask in (lambda: Job.attach(tmp_path), lambda: Job(["true"], tmp_path).start()):
        with pytest.raises(UserError, match="job.json .*remove"):
            ask()


def test_only_folders_that_runs_made_below_the_runs_root_are_removed(two_runs, runs_folder, tmp_path, monkeypatch):
    """A data folder that was given as --run-dir, a run elsewhere, the folder one stands in, links, the root itself."""
    data = runs_folder / "data"
    data.mkdir()
    (data / "episode.pkl").touch()
    RunFolder.create("train_async", {}, path=data).finish("done")
    RunFolder.create("train_async", {}, path=tmp_path / "elsewhere").finish("done")
    (runs_folder / "20250101-000000-linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root").mkdir()
    RunFolder.create("x", {}, path=runs_folder).finish("done")
    monkeypatch.chdir(tmp_path / "elsewhere")
    for name in ("data", "../elsewhere", ".", "20250101-000000-linked", str(runs_folder), f"{runs_folder}/data/.."):
        with pytest.raises(UserError, match="only those are removed here|was there before its run"):
            commands.rm([name], True)
    assert (tmp_path / "elsewhere" / "run.json").exists() and (data / "episode.pkl").exists()
    (two_runs[0] / "link").symlink_to(data)
    own = RunFolder.create("train_async", {}, path=runs_folder / "a_trial")
    own.finish("done")
    with owned(own.path), pytest.raises(UserError, match="is running"):
        commands.rm(["a_trial"], True)
    assert commands.rm([two_runs[0].name, "a_trial"], True) == 0
    assert (data / "episode.pkl").exists() and not two_runs[0].exists() and not own.path.exists()


def test_a_run_is_repeated_and_says_what_has_changed(write_notebook, tmp_path, runs_folder, capsys):
    (tmp_path / "data").mkdir()
    path = write_notebook("n: int = 1\ndataset_root: str = ''", "run.add_results(step=n); run.finish()")
    cli_exit(["run", str(path), "-p", "n", "7", "-p", "dataset_root", str(tmp_path / "data")])
    (first,) = runs_folder.iterdir()
    (tmp_path / "data" / "part1" / "episode").mkdir(parents=True)
    (tmp_path / "data" / "part1" / "episode" / "data.pkl").write_bytes(b"new")
    write_json(tmp_path / "data" / "cache" / "qwen_vl_features" / "tiny-1" / "binding.json", {})
    record = read_record(first)
    write_json(first / "run.json", record | {"git": {"commit": "0123456789", "branch": "main", "changed": 2}})
    path.write_text(path.read_text().replace("n: int = 1", "n: int = 1\\nm: int = 4"))
    capsys.readouterr()
    cli_exit(["rerun", first.name])
    said = capsys.readouterr().out
    commit = git_state()["commit"][:8]
    for line in (
        "data: 0 prepared episodes then, 1 now",
        "caches: none then, tiny-1 now",
        f"code: commit 01234567 then, {commit} now",
        "code: 2 changed files then, ",
        "small has a new parameter m (it is 4)",
    ):
        assert f"changed since: {line}" in said
    (second,) = set(runs_folder.iterdir()) - {first}
    assert read_record(second)["parameters"] == record["parameters"] | {"m": 4}
    assert read_json(second / "results.json") == {"step": 7}


def test_the_doctor_names_what_is_missing_and_what_to_do(monkeypatch, capsys):
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    monkeypatch.setattr(doctor, "WIDGET_PACKAGES", ("not_installed",))
    monkeypatch.setitem(doctor.LOOKS, "EGL", lambda: ("ok", ""))
    assert doctor.doctor() == 1
    said = capsys.readouterr().out
    assert "fail JupyterLab" in said and "apt-get install chromium" in said
    assert "WANDB_MODE is offline: runs are logged offline" in said and "wandb login" in said
    assert "ok   Python" in said


@pytest.mark.parametrize(
    "mode, level, said",
    (("online", "ok", "a key is set"), ("offline", "warn", "no key"), ("disabled", "warn", "unset it")),
)
def test_the_doctor_tells_where_trainings_are_logged(mode, level, said, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setattr(metrics, "wandb_mode", lambda asked: mode)
    found = doctor._wandb()
    assert found[0] == level and said in found[1]


def test_the_doctor_tells_what_loader_processes_live_from(monkeypatch):
    assert {"open files", "shared mem"} <= doctor.LOOKS.keys()
    monkeypatch.setattr(doctor.resource, "getrlimit", lambda _: (256, 256))
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(total=64 << 20, free=64 << 20))
    for look, remedy in ((doctor._open_files, "ulimit -n"), (doctor._shared_memory, "--shm-size")):
        level, sentence = look()
        assert level == "warn" and remedy in sentence


def test_the_doctor_compares_the_packages_with_the_lock(monkeypatch, tmp_path):
    assert doctor._packages()[0] == "ok"
    (tmp_path / "requirements.lock").write_text(
        "# a comment\npandas==0.0.1\nno-such-package==1\nnumpy==1 ; sys_platform == 'win32'\n"
    )
    monkeypatch.setattr(doctor, "PROJECT", tmp_path)
    level, said = doctor._packages()
    assert level == "warn" and "pandas " in said and "no-such-package missing (lock: 1)" in said and "numpy" not in said


def cli_exit(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
