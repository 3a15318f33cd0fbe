"""What lies below a dataset root: datasets at any depth, folders of others, the same recording twice, locks, rights."""

import errno
import fcntl
import os
import pickle
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from preparing import prepare_all
from raw_episodes import JPEG, Raw

from vla_lib.core.errors import UserError
from vla_lib.core.files import append_jsonl, atomic_path, file_lock, write_text
from vla_lib.episodes import DatasetTable, find_episodes, find_prepared, load_prepared
from vla_lib.episodes.survey import survey
from vla_lib.features.cache import episode_key
from vla_lib.preprocess import Settings, main

SMALL = Raw(seconds=1.5, camera_hz=2.0)
ROBOT_HEADER = "origin_timestamp," + ",".join(f"pose_{k}" for k in "xyzabr")
OURS = ("data.pkl", "sensor.npy", "verdicts.json")


def report(root, **settings):
    return main(Settings(root, workers=1, **settings))


# --- datasets ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("below", ("Make_dataset", "lab/2025/Make_dataset"))
def test_the_guides_path_gets_its_weight_and_instruction_at_any_depth(tmp_path, below):
    path = Raw("F2", seconds=1.5).write(tmp_path / below / "New_dataset" / "Red_point")
    assert prepare_all(tmp_path)[0].key == path.relative_to(tmp_path).as_posix()
    episode = load_prepared(path)
    assert (episode.dataset, episode.task) == ("New_dataset", "Red_point")
    assert DatasetTable.load(tmp_path).weight(episode.dataset, episode.task) == 3
    assert episode.instruction == "Perform Red point insertion task"


@pytest.mark.parametrize("root", ("New_dataset", "New_dataset/Red_point"))
def test_a_root_that_is_the_dataset_or_its_task_is_known_by_its_own_name(tmp_path, root):
    SMALL.write(tmp_path / "New_dataset" / "Red_point")
    (files,) = find_episodes(tmp_path / root)
    assert (files.dataset, files.task) == ("New_dataset", "Red_point")


def test_names_match_without_regard_to_case(tmp_path):
    SMALL.write(tmp_path / "new_dataset" / "Red_point", "RECV_ALL_20250101_000001")
    (files,) = find_episodes(tmp_path)
    assert DatasetTable().weight(files.dataset, files.task) == 3


def test_an_unknown_dataset_is_named_once_with_what_it_gets(tmp_path, capsys):
    for number in (1, 2):
        SMALL.write(tmp_path / "Pig_eye", f"recv_all_20250101_00000{number}")
    found = report(tmp_path, report_only=True)["unknown_datasets"]
    assert len(found) == 1 and "Pig_eye" in found[0] and "weight 1" in found[0] and "Perform the insertion" in found[0]
    assert capsys.readouterr().out.count("Dataset Pig_eye") == 1
    (tmp_path / "datasets.yaml").write_text("pig_eye: {weight: 2}\n")
    assert report(tmp_path, report_only=True)["unknown_datasets"] == []


# --- what is no episode ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("stray", ("notes.csv", "view_2_old", "View1", "robot.csv", "data.pkl", "blank.csv"))
def test_what_lies_beside_episodes_does_not_turn_their_dataset_into_one(tmp_path, stray):
    dataset = tmp_path / "part1"
    paths = [SMALL.write(dataset, f"recv_all_20250101_00000{number}") for number in (1, 2)]
    if stray == "view_2_old":
        (dataset / stray).mkdir()
        (dataset / stray / "zed_49429257_left_1761003616.250.jpg").write_bytes(JPEG)
    elif stray == "View1":
        (dataset / stray).mkdir()
    elif stray == "data.pkl":
        (dataset / stray).write_bytes(pickle.dumps({"action": []}))
    else:
        rows = {"notes.csv": "who,when\nme,today\n", "robot.csv": ROBOT_HEADER + "\n1761003616.25,1,2,3,4,5,6\n"}
        (dataset / stray).write_text(rows.get(stray, ""))
    results = report(tmp_path)
    assert results["written"] == 2 and sorted(find_prepared(tmp_path)) == paths
    if stray != "View1":
        assert any(stray in line for line in results["no_episodes"]), results["no_episodes"]


def test_folders_called_runs_or_cache_are_searched_unless_they_are_ours(tmp_path):
    SMALL.write(tmp_path / "runs" / "part1", "recv_all_20250101_000001")
    SMALL.write(tmp_path / "cache", "recv_all_20250101_000002")
    for ours in ("cache/qwen_vl_features/x.pt", "runs/20250101-04_train/run.json"):
        (tmp_path / ours).parent.mkdir(parents=True)
        (tmp_path / ours).write_text("{}")
    SMALL.write(tmp_path / "runs" / "20250101-04_train" / "rollouts", "recv_all_20250101_000003")
    assert [files.name[-1] for files in find_episodes(tmp_path)] == ["1"]
    shutil.rmtree(tmp_path / "cache" / "qwen_vl_features")
    assert sorted(files.name[-1] for files in find_episodes(tmp_path)) == ["1", "2"]


def test_logs_that_nobody_knows_are_named_with_their_columns(tmp_path, capsys):
    SMALL.write(tmp_path / "part1")
    for folder in ("force_gauge", "part1/episode_20250101_000009"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "gauge.csv").write_text("seconds,newton\n0,1\n")
    results = report(tmp_path, report_only=True)
    assert any("force_gauge" in line and "seconds, newton" in line for line in results["no_episodes"])
    assert any("000009" in line and "seconds, newton" in line for line in results["left_out"])
    assert "No episodes:" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ("#recycle", "@eaDir", "#snapshot", "$RECYCLE.BIN", "lost+found", ".Trash-1000", "@Recycle", ".hidden")
)
def test_a_nas_own_folders_are_no_datasets(tmp_path, name):
    SMALL.write(tmp_path / "part1")
    SMALL.write(tmp_path / name / "part1", "recv_all_20250101_000002")
    found = survey(tmp_path)
    assert [files.dataset for files in found.episodes] == ["part1"] and not found.copies
    assert name == ".hidden" or name[0] == "." or any(path.name == name for path, _ in found.remarks)


# --- the same recording twice --------------------------------------------------------------------------------
def test_a_recording_counts_once_however_often_it_was_copied(tmp_path):
    path = SMALL.write(tmp_path / "part1")
    shutil.copytree(path, path.with_name(path.name + " (copy)"))
    prepared = prepare_all(path.with_name(path.name + " (copy)"))  # the copy was prepared when it was alone
    assert prepared[0].status == "written"
    shutil.copytree(path, tmp_path / "a_backup" / path.name)
    next((tmp_path / "a_backup" / path.name).glob("*.npz")).unlink()
    before = {p for p in tmp_path.rglob("*") if p.name not in OURS}
    results = report(tmp_path)
    assert results["written"] == 1 and find_prepared(tmp_path) == [path]
    assert sum(f"the same recording as part1/{path.name}" in line for line in results["left_out"]) == 2
    assert {p for p in tmp_path.rglob("*") if p.name not in OURS} == before


def test_logs_without_rows_are_not_the_same_recording(tmp_path):
    for number in (1, 2):
        path = SMALL.write(tmp_path / "part1", f"recv_all_20250101_00000{number}")
        next(path.glob("*.csv")).write_text(ROBOT_HEADER + "\n")
    assert not survey(tmp_path).copies


# --- links -----------------------------------------------------------------------------------------------------
def test_linked_datasets_and_episodes_have_the_key_of_their_link(tmp_path):
    root = tmp_path / "root"
    one, two = SMALL.write(tmp_path / "disk" / "part1"), SMALL.write(tmp_path / "disk2", "recv_all_20250101_000002")
    (root / "OCT_insertion").mkdir(parents=True)
    (root / "part1").symlink_to(one.parent)
    (root / "OCT_insertion" / two.name).symlink_to(two)
    assert [r.status for r in prepare_all(root)] == ["written", "written"]
    keys = [episode_key(root, load_prepared(folder).path) for folder in find_prepared(root)]
    assert keys == [f"OCT_insertion/{two.name}", f"part1/{one.name}"]
    assert load_prepared(root / keys[0]).dataset == "OCT_insertion"


def test_a_link_beside_the_real_folder_adds_nothing(tmp_path):
    path = SMALL.write(tmp_path / "z_real")
    (tmp_path / "a_link").symlink_to(tmp_path / "z_real")
    assert [files.path for files in find_episodes(tmp_path)] == [path]
    prepare_all(tmp_path)
    assert find_prepared(tmp_path) == [path]


# --- files of others --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("content", (pickle.dumps({"action": [], "sensor_data": None}), b"", b"garbage"))
@pytest.mark.parametrize("broken", (False, True), ids=("good", "rejected"))
def test_a_data_pkl_of_somebody_else_is_never_touched(tmp_path, content, broken):
    path = SMALL.write(tmp_path / "part1")
    theirs = path / "data.pkl"
    theirs.write_bytes(content)
    if broken:
        next(path.glob("*.csv")).write_text(ROBOT_HEADER + "\n")
    results = report(tmp_path)
    assert theirs.read_bytes() == content and not (path / "sensor.npy").exists()
    assert "--set-aside" in results["left_out"][0] and results["written"] == 0
    assert report(tmp_path, set_aside=True)["written"] == (not broken)
    assert (path / "data.pkl.theirs").read_bytes() == content and theirs.exists() == (not broken)


def test_a_sensor_npy_of_somebody_else_is_never_touched(tmp_path):
    path = SMALL.write(tmp_path / "part1")
    (path / "sensor.npy").write_bytes(b"\x93NUMPY\x01\x00theirs")
    assert report(tmp_path)["written"] == 0 and (path / "sensor.npy").read_bytes().endswith(b"theirs")
    assert report(tmp_path, set_aside=True)["written"] == 1 and (path / "sensor.npy.theirs").exists()


def test_our_own_files_are_replaced_cut_off_or_left_by_a_kill(tmp_path):
    path = SMALL.write(tmp_path / "part1")
    report(tmp_path)
    data = path / "data.pkl"
    data.write_bytes(data.read_bytes()[:3000])
    assert report(tmp_path)["written"] == 1
    data.unlink()  # a kill between the two files
    assert report(tmp_path)["written"] == 1 and len(load_prepared(path).sensor) == 975


# --- locks and rights -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS))
def test_a_mount_without_locks_works_and_says_so_once(tmp_path, monkeypatch, capsys, number):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    for name in ("1", "2"):
        SMALL.write(tmp_path / "part1", f"recv_all_20250101_00000{name}")
    monkeypatch.setattr(fcntl, "flock", fail)
    assert report(tmp_path)["written"] == 2 and capsys.readouterr().out.count("File locks do not work") == 1
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_lock_that_another_users_killed_run_left_stops_nobody():
    folder = Path(tempfile.mkdtemp())  # pytest's own folders are closed to other users
    folder.chmod(0o777)
    lock = folder / ".data.pkl.lock"
    lock.touch()
    lock.chmod(0o644)
    child = os.fork()
    if not child:
        status = 1
        try:
            os.setuid(65534)
            with file_lock(lock) as locked:
                status = 0 if locked else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0 and not lock.exists()
    folder.rmdir()


def test_what_one_user_writes_another_can_read(tmp_path):
    tmp_path.chmod(0o755)
    before = os.umask(0o077)
    try:
        write_text(tmp_path / "a" / "b.json", "{}")
        append_jsonl(tmp_path / "a" / "c.jsonl", {})
        with atomic_path(tmp_path / "d.npy") as path:
            path.write_bytes(b"x")
        (tmp_path / "private").mkdir()
        write_text(tmp_path / "private" / "e.json", "{}")
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    shared = {"a": 0o755, "b.json": 0o644, "c.jsonl": 0o644, "d.npy": 0o644}
    assert modes == shared | {"private": 0o700, "e.json": 0o600}


def test_a_root_that_became_read_only_gets_one_sentence_and_what_is_prepared_still_counts(tmp_path, monkeypatch):
    SMALL.write(tmp_path / "part1")
    report(tmp_path)
    refuse = OSError(errno.EROFS, "Read-only file system", str(tmp_path))
    monkeypatch.setattr(os, "open", lambda *_, **__: (_ for _ in ()).throw(refuse))
    assert report(tmp_path)["unchanged"] == 1
    with pytest.raises(UserError, match="cannot be written.*--output-root"):
        report(tmp_path, overwrite=True)


def test_the_front_door_on_a_mount_without_locks_ends_well(tmp_path):
    SMALL.write(tmp_path / "root" / "part1")
    (tmp_path / "sitecustomize.py").write_text(
        "import errno, fcntl\ndef fail(*_): raise OSError(errno.ENOLCK, 'No locks available')\nfcntl.flock = fail\n"
    )
    env = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.getcwd()}"}
    command = [sys.executable, "-m", "vla_lib.preprocess", "--dataset-root", str(tmp_path / "root"), "--workers", "1"]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0 and "1 written" in done.stdout and "File locks do not work" in done.stdout
