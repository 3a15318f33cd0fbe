"""Preparing many episodes: incremental, parallel, atomic, safe twice at once, and hostile or broken input."""

import errno
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from dying_worker import die_on_the_first
from preparing import prepare_all
from raw_episodes import T0, Raw, samples

from vla_lib import preprocess
from vla_lib.core.errors import UserError
from vla_lib.core.files import file_lock
from vla_lib.episodes import find_episodes, find_prepared, load_prepared
from vla_lib.preprocess import Settings, left_out, main, make_jobs, run_jobs
from vla_lib.workbench import slurm
from vla_lib.workbench.triage import episode_rows

LOCK = ".data.pkl.lock"
SMALL = Raw(seconds=1.5, camera_hz=2.0)


def statuses(reports):
    return [report.status for report in reports]


def everything(root):
    """Every raw file's path, size and time of change."""
    ours = {"data.pkl", "sensor.npy", "verdicts.json"}
    return {
        p.relative_to(root).as_posix(): (p.stat().st_size, p.stat().st_mtime_ns)
        for p in root.rglob("*")
        if p.is_file() and p.name not in ours
    }


@pytest.fixture
def root(tmp_path):
    SMALL.write(tmp_path / "root" / "part1", "recv_all_20250101_000001")
    SMALL.write(tmp_path / "root" / "part1", "recv_all_20250101_000002")
    return tmp_path / "root"


# --- incremental ---------------------------------------------------------------------------------------------
def test_unchanged_episodes_are_skipped_and_nothing_raw_is_touched(root):
    before = everything(root)
    assert statuses(prepare_all(root)) == ["written", "written"]
    stamps = [p.stat().st_mtime_ns for p in sorted(root.rglob("data.pkl"))]
    again = prepare_all(root)
    assert statuses(again) == ["unchanged", "unchanged"] and again[0].summary["verdict"] == "good"
    assert [p.stat().st_mtime_ns for p in sorted(root.rglob("data.pkl"))] == stamps
    assert everything(root) == before
    assert statuses(prepare_all(root, overwrite=True)) == ["written", "written"]


@pytest.mark.parametrize(
    "change", ("hz", "rotation", "offset", "views", "log", "sensor", "picture", "table", "window", "npy", "pkl")
)
def test_a_change_of_input_or_settings_prepares_again(root, change):
    prepare_all(root)
    first = find_episodes(root)[0].path
    settings = {"hz": {"action_hz": 5.0}, "rotation": {"rotation": "euler"}, "offset": {"sensor_clock_offset_ms": 10.0}}
    settings |= {"views": {"views": ("View5",)}, "window": {"sensor_window_size": 650}}
    if change == "log":
        log = next(first.glob("*.csv"))
        text = log.read_text()
        log.write_text(text[:-4] + ("1" if text[-4] != "1" else "2") + text[-3:])
    elif change == "sensor":
        with np.load(next(first.glob("*.npz"))) as old:
            held = {key: old[key].copy() for key in old}
        held["forces"][3] += 1
        np.savez(next(first.glob("*.npz")), **held)
    elif change == "picture":
        next((first / "View1" / "left").glob("*.jpg")).unlink()
    elif change == "table":
        (root / "datasets.yaml").write_text("part1: {instruction: Do it}\n")
    elif change in ("npy", "pkl"):
        path = first / {"npy": "sensor.npy", "pkl": "data.pkl"}[change]
        path.write_bytes(path.read_bytes()[:-100])
    alone = change in ("log", "sensor", "picture", "npy", "pkl")
    assert statuses(prepare_all(root, **settings.get(change, {}))) == ["written", "unchanged" if alone else "written"]


def test_other_actions_leave_the_sensor_stream_as_it_is(root):
    prepare_all(root)
    path = find_prepared(root)[0] / "sensor.npy"
    before = path.stat().st_mtime_ns
    prepare_all(root, action_hz=5.0)
    assert path.stat().st_mtime_ns == before and load_prepared(path.parent).action_hz == 5.0
    np.testing.assert_array_equal(load_prepared(path.parent).sensor, samples(975))


def test_the_fingerprint_survives_copying(root, tmp_path):
    prepare_all(root)
    other = tmp_path / "other"
    SMALL.write(other / "part1", "recv_all_20250101_000001")
    prepare_all(other)
    assert load_prepared(find_prepared(other)[0]).fingerprint == load_prepared(find_prepared(root)[0]).fingerprint


# --- parallel, locks, kills ------------------------------------------------------------------------------------
def test_workers_give_the_same_as_one_process(root, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    prepare_all(root, output_root=one)
    assert statuses(prepare_all(root, 2, output_root=two)) == ["written", "written"]
    for a, b in zip(find_prepared(one), find_prepared(two), strict=True):
        assert (a / "data.pkl").read_bytes() == (b / "data.pkl").read_bytes()
        assert (a / "sensor.npy").read_bytes() == (b / "sensor.npy").read_bytes()


def test_two_runs_at_once_write_each_episode_once(root):
    command = [sys.executable, "-m", "vla_lib.preprocess", "--dataset-root", str(root), "--workers", "1", "--report"]
    runs = [subprocess.Popen([*command, str(root.parent / f"{k}.json")], stdout=subprocess.DEVNULL) for k in range(2)]
    assert [run.wait(timeout=60) for run in runs] == [0, 0]
    reports = [json.loads((root.parent / f"{k}.json").read_text()) for k in range(2)]
    assert sum(report["written"] for report in reports) == 2 and sum(report["unchanged"] for report in reports) == 2
    assert not list(root.rglob(".*"))
    assert all(load_prepared(p).sensor.shape == (975, 1026) for p in find_prepared(root))


def _hold(folder, ready, release):
    with file_lock(folder / LOCK):
        ready.set()
        release.wait(20)


def test_a_held_lock_is_waited_for_and_a_killed_holder_frees_it(tmp_path):
    context = multiprocessing.get_context("fork")
    ready, release = context.Event(), context.Event()
    holder = context.Process(target=_hold, args=(tmp_path, ready, release))
    holder.start()
    assert ready.wait(10)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    with file_lock(tmp_path / LOCK):
        assert (tmp_path / LOCK).exists()
    assert not (tmp_path / LOCK).exists()


def test_a_lock_file_that_went_while_waiting_is_not_taken_for_the_lock(tmp_path):
    opened, seen = threading.Event(), []

    def second():
        opened.set()
        with file_lock(tmp_path / LOCK):
            seen.append((tmp_path / LOCK).exists())

    waiting = threading.Thread(target=second)
    with file_lock(tmp_path / LOCK):
        waiting.start()
        assert opened.wait(10)
        time.sleep(0.3)  # by now it waits for the file that goes with this lock
    waiting.join(10)
    assert seen == [True]


def test_a_lock_file_that_went_as_soon_as_it_was_opened_is_made_again(tmp_path, monkeypatch):
    opened, really = [], os.open

    def open_late(path, *how):
        handle = really(path, *how)
        if not opened:  # its holder is done in between
            os.unlink(path)
        opened.append(path)
        return handle

    monkeypatch.setattr(os, "open", open_late)
    with file_lock(tmp_path / LOCK) as locked:
        assert locked and (tmp_path / LOCK).exists() and len(opened) == 2


def test_a_kill_in_the_middle_leaves_no_half_file(root):
    code = (
        "import sys, time\nfrom vla_lib import preprocess\n"
        "from vla_lib.preprocess import Settings, make_jobs, run_jobs\nfrom pathlib import Path\n"
        "from vla_lib.episodes.sensor_file import SensorFile\nblocks = SensorFile.blocks\n"
        "def slow(self):\n    for block in blocks(self):\n        yield block\n"
        "        print('half', flush=True)\n        time.sleep(30)\n"
        "SensorFile.blocks = slow\npreprocess.ask_job = lambda job: job\n"
        "run_jobs(make_jobs(Settings(sys.argv[1])), 1, show=False)\n"
    )
    run = subprocess.Popen([sys.executable, "-c", code, str(root)], stdout=subprocess.PIPE)
    assert run.stdout.readline() == b"half\n"
    run.kill()
    run.wait()
    run.stdout.close()
    first = find_episodes(root)[0].path
    assert not (first / "data.pkl").exists() and not (first / "sensor.npy").exists()
    assert [p.name for p in first.glob(".sensor.npy.*")] and find_prepared(root) == []
    assert statuses(prepare_all(root)) == ["written", "written"]
    assert not list(first.glob(".*"))


def test_a_worker_that_dies_names_its_episode_and_the_rest_goes_on(root, monkeypatch):
    monkeypatch.setattr(preprocess, "run_job", die_on_the_first)
    reports = prepare_all(root, 2)
    assert [report.status for report in reports] == ["interrupted", "written"]
    assert "worker process ended" in reports[0].reasons[0]


@pytest.mark.parametrize("raised", (MemoryError(), OSError(errno.EIO, "Input/output error"), None))
def test_what_the_machine_failed_at_is_no_verdict_and_another_run_makes_up_for_it(root, monkeypatch, capsys, raised):
    def fail(job):
        raise raised

    monkeypatch.setattr(preprocess, *(("prepare_episode", fail) if raised else ("run_job", die_on_the_first)))
    settings = Settings(dataset_root=root, workers=1 if raised else 2)
    with pytest.raises(SystemExit) as end:
        main(settings)
    assert end.value.code == 1
    said = capsys.readouterr()
    assert "not judged" in said.out and " 0 rejected" in said.out and "again" in said.err
    monkeypatch.undo()
    assert main(replace(settings, workers=1))["interrupted"] == 0
    assert len(find_prepared(root)) == 2


def test_machines_of_one_job_begin_apart_and_ask_the_motion_of_an_episode_once(root, tmp_path, monkeypatch):
    asked, evidence = [], preprocess.evidence
    monkeypatch.setattr(preprocess, "evidence", lambda episode: asked.append(episode.path) or evidence(episode))
    jobs = make_jobs(Settings(root, report_only=True))
    first, second = (job.files.path for job in jobs)
    monkeypatch.setenv(slurm.FOUND, str(tmp_path / "found"))
    here = run_jobs(jobs, 1)
    for name, value in (("ID", "0"), ("NUM_TASKS", "1")):  # a helper on the other machine
        monkeypatch.setenv(f"SLURM_STEP_{name}", value)
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert run_jobs(jobs, 1) == here and asked == [first, second]
    monkeypatch.delenv(slurm.FOUND)
    assert run_jobs(jobs, 1) == here and asked[2:] == [second, first]


# --- hostile and broken input ----------------------------------------------------------------------------------
def test_broken_episodes_never_stop_the_others_and_all_are_listed(root):
    data = root / "part1"
    (data / "recv_all_20250101_000003").mkdir()  # empty
    for number, damage in enumerate(("zero", "header", "npz", "garbage", "npz_zero"), start=4):
        path = SMALL.write(data, f"recv_all_20250101_00000{number}")
        log, sensor = next(path.glob("*.csv")), next(path.glob("*.npz"))
        if damage == "zero":
            log.write_bytes(b"")
        elif damage == "header":
            log.write_text(log.read_text().splitlines()[0] + "\n")
        elif damage == "npz":
            sensor.write_bytes(sensor.read_bytes()[: sensor.stat().st_size // 2])
        elif damage == "npz_zero":
            sensor.write_bytes(b"")
        else:
            log.write_bytes(log.read_bytes().splitlines(keepends=True)[0] + os.urandom(20000) + b"\n")
    reports = prepare_all(root)
    status = {report.key[-1]: report.status for report in reports}
    assert status == {
        "1": "written",
        "2": "written",
        "3": "rejected",
        "4": "rejected",
        "5": "rejected",
        "6": "written",
        "7": "rejected",
        "8": "written",
    }
    text = "\n".join(left_out(reports))
    assert len(left_out(reports)) == 6
    for words in ("no robot log", "header but no rows", "is no whole .npz file"):
        assert words in text
    assert not load_prepared(data / "recv_all_20250101_000006").has_sensor


def test_symlink_loops_end(root):
    (root / "part1" / "loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "part1" / "recv_all_20250101_000001" / "View1" / "again").symlink_to(root)
    assert len(find_episodes(root)) == 2
    prepare_all(root)
    assert len(find_prepared(root)) == 2


def test_object_arrays_in_a_sensor_file_are_never_opened(tmp_path):
    path = Raw(seconds=1.5, sensor=False).write(tmp_path / "root" / "part1")
    np.savez(
        path / "s.npz",
        timestamps=np.arange(10) + T0,
        forces=np.array([Trap()] * 10, object),
        alines=np.zeros((10, 1025), np.float32),
    )
    report = prepare_all(tmp_path / "root")[0]
    assert "Python objects" in report.left_out[0] and not load_prepared(path).has_sensor


class Trap:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_a_compressed_stream_that_breaks_off_costs_only_the_sensor(tmp_path):
    path = Raw(seconds=1.5, compressed=True).write(tmp_path / "root" / "part1")
    file = next(path.glob("*.npz"))
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2 : len(raw) // 2 + 2000] = os.urandom(2000)
    file.write_bytes(raw)
    report = prepare_all(tmp_path / "root")[0]
    assert report.status == "written" and "the stream is not used" in report.left_out[0]
    assert not (path / "sensor.npy").exists() and not load_prepared(path).has_sensor and not list(path.glob(".*"))


@pytest.mark.parametrize("key", ("alines", "forces", "timestamps"))
def test_a_flipped_bit_in_a_stored_sensor_file_costs_the_sensor(tmp_path, key):
    path = Raw(seconds=1.5).write(tmp_path / "root" / "part1")
    file = next(path.glob("*.npz"))
    raw = bytearray(file.read_bytes())
    raw[raw.index(f"{key}.npy".encode()) + 1500] ^= 0x40  # inside the values: a force of 1e22, a time of another day
    file.write_bytes(raw)
    report = prepare_all(tmp_path / "root")[0]
    assert report.status == "written" and "ad CRC-32 for" in report.left_out[0] and key in report.left_out[0]
    assert not (path / "sensor.npy").exists() and not load_prepared(path).has_sensor


def write_sensor(path, t_s):
    held = {"timestamps": T0 + t_s, "forces": np.arange(len(t_s), dtype=np.float32)}
    np.savez_compressed(path / "s.npz", **held, alines=np.zeros((len(t_s), 1025), np.float32))


def test_of_a_small_file_that_inflates_to_hours_only_the_time_of_the_log_is_used(tmp_path):
    path = Raw(seconds=1.5, sensor=False).write(tmp_path / "root" / "part1")
    write_sensor(path, np.arange(-100.0, 600, 0.2))
    report = prepare_all(tmp_path / "root")[0]
    said = "3500 times over 700 s (0.0 GB) beside a robot log of 1 s: only the samples within 10 s of it are used"
    assert report.status == "written" and any(said in text for text in report.reasons)
    assert not any("impossible" in text for text in report.reasons)
    stream = load_prepared(path).sensor
    assert stream[:, 0].tolist() == list(range(450, 450 + len(stream))) and 107 <= len(stream) <= 109


def test_a_file_that_is_denser_than_any_sensor_or_far_away_is_never_read(tmp_path, monkeypatch):
    path = Raw(seconds=1.5, sensor=False).write(tmp_path / "root" / "part1")
    away = Raw(seconds=1.5, sensor=False).write(tmp_path / "root" / "part1", "recv_all_20251020_234016")
    write_sensor(path, np.arange(0, 1, 1e-4))
    write_sensor(away, np.arange(5000.0, 5700))
    monkeypatch.setattr("vla_lib.episodes.sensor_file.SensorFile.blocks", lambda self: pytest.fail("it was read"))
    dense, far = prepare_all(tmp_path / "root")
    assert "10000 times over 1 s" in dense.left_out[0] and "beside a robot log of 1 s" in dense.left_out[0]
    assert "700 times over" in far.left_out[0]
    assert dense.status == far.status == "written" and not (path / "sensor.npy").exists()


def test_what_was_prepared_goes_when_its_raw_files_are_no_longer_usable(root):
    prepare_all(root)
    first = find_episodes(root)[0]
    first.robot_log.write_text(first.robot_log.read_text().splitlines()[0] + "\n")
    assert statuses(prepare_all(root)) == ["rejected", "unchanged"] and len(find_prepared(root)) == 1


def test_a_root_that_cannot_be_written_is_told_with_the_remedy(root, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system", str(root))

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match="cannot be written.*--output-root"):
        prepare_all(root)


def test_an_output_root_leaves_the_dataset_alone(root, tmp_path):
    before = everything(root)
    prepare_all(root, output_root=tmp_path / "out")
    assert everything(root) == before and find_prepared(root) == []
    episode = load_prepared(tmp_path / "out" / "part1" / "recv_all_20250101_000001")
    assert episode.picture_path("View1_left", 10).is_file() and episode.dataset == "part1"
    assert statuses(prepare_all(root, output_root=tmp_path / "out")) == ["unchanged", "unchanged"]


def test_an_output_root_inside_the_dataset_is_not_taken_for_recordings(root):
    prepare_all(root, output_root=root / "prepared")
    assert len(find_episodes(root)) == 2 and len(find_prepared(root)) == 2


def test_gaps_reach_data_pkl_and_the_windows(tmp_path):
    t, sensor = np.arange(0, 3, 0.01), np.arange(1950) / 650
    raw = Raw(
        row_times=t[(t < 1.015) | (t > 1.205)], sensor_times=sensor[(sensor < 2.02) | (sensor > 2.33)], camera_hz=2.0
    )
    path = raw.write(tmp_path / "root" / "part1")
    report = prepare_all(tmp_path / "root")[0]
    episode = load_prepared(path)
    assert report.verdict == "usable with exclusions" and np.flatnonzero(~episode.valid).tolist() == [
        10,
        11,
        12,
        20,
        21,
        22,
        23,
    ]
    assert np.flatnonzero(~episode.sensor_full(65)).tolist() == [0, 21, 22, 23, 24]
    assert [episode.sensor_window(k, 65) is None for k in (20, 22, 24, 25)] == [False, True, True, False]
    assert set(episode.metadata["gaps"]) == {"robot", "sensor"} and report.summary["full_windows"] == 24


def test_memory_stays_small_however_large_the_sensor_files(tmp_path):
    Raw("F2", seconds=5.0, stride=65, compressed=True, camera_hz=2).write(
        tmp_path / "root" / "New_dataset" / "A"
    )  # 110 MB of windows
    jobs = make_jobs(Settings(tmp_path / "root"))
    tracemalloc.start()
    reports = run_jobs(jobs, 1, show=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert statuses(reports) == ["written"] and peak < 40e6


# --- the front door ----------------------------------------------------------------------------------------------
def test_the_front_door_reports_and_strict_turns_left_out_into_3(root, capsys):
    (root / "part1" / "recv_all_20250101_000009").mkdir()
    results = main(Settings(dataset_root=root, workers=1))
    assert (results["episodes"], results["written"], results["rejected"], len(results["left_out"])) == (3, 2, 1, 1)
    out = capsys.readouterr().out
    assert "Left out:" in out and "recv_all_20250101_000009: " in out
    with pytest.raises(SystemExit) as stop:
        main(Settings(dataset_root=root, workers=1, strict=True, quiet=True))
    assert stop.value.code == 3


def test_report_only_writes_nothing(root):
    results = main(Settings(dataset_root=root, report_only=True, workers=1, quiet=True))
    assert results["good"] == 2 and find_prepared(root) == [] and not list(root.rglob(".*"))


def test_dataset_folders_decide_names(root):
    results = main(Settings(dataset_dirs=(root / "part1",), workers=1, quiet=True))
    assert results["written"] == 2 and load_prepared(find_prepared(root)[0]).dataset == "part1"
    assert main(Settings(dataset_root=root / "part1", workers=1, quiet=True))["unchanged"] == 2


def test_thousands_of_episodes_fill_no_screen_and_the_worst_comes_first(root, capsys, monkeypatch):
    monkeypatch.setattr(preprocess, "MOST_LINES", 1)
    SMALL.write(root / "part1", "recv_all_20250101_000003")
    next((root / "part1" / "recv_all_20250101_000003").glob("*.csv")).write_text("no log\n")
    main(Settings(root, report_only=True, workers=1))
    lines = capsys.readouterr().out.splitlines()
    (first,) = [line for line in lines if line.startswith(("rejected", "good", "usable"))]
    assert first.startswith("rejected") and "recv_all_20250101_000003" in first
    assert lines[lines.index(first) + 1] == "and 2 more (--report FILE lists all)"


@pytest.mark.parametrize(
    ("flags", "words"),
    (
        (["--dataset-root", "/nowhere"], "no dataset folder"),
        ([], "--dataset-root"),
        (["--dataset-root", "{root}", "--action-hz", "0"], "--action-hz"),
        (["--dataset-root", "{root}", "--rotation", "quaternion"], "--rotation"),
        (["--dataset-root", "{empty}"], "No episode was found"),
    ),
)
def test_bad_requests_end_in_one_sentence_and_status_2(root, tmp_path, capsys, monkeypatch, flags, words):
    from vla_lib.core import frontdoor

    (tmp_path / "empty").mkdir()
    flags = [flag.format(root=root, empty=tmp_path / "empty") for flag in flags]
    with pytest.raises(SystemExit) as stop:
        frontdoor.start(Settings, main, flags)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and words in error and len(error.strip().splitlines()) == 1


# --- data.pkl ----------------------------------------------------------------------------------------------------
@pytest.fixture
def prepared(root):
    prepare_all(root)
    return find_prepared(root)[0]


def content_of(folder):
    return pickle.loads((folder / "data.pkl").read_bytes())  # written by this very test


def test_data_pkl_keeps_its_contract(prepared):
    content = content_of(prepared)
    n = len(content["timestamp"])
    assert (
        content["action"].shape == (n, 7)
        and content["action"].dtype == np.float32
        and (content["action"][:, 6] == 1).all()
    )
    assert (
        content["timestamp"].dtype == np.float64
        and content["valid"].dtype == bool
        and content["state"].shape == (n, 12)
    )
    assert content["image_index"]["View5"].dtype == np.int32 and isinstance(content["image"]["View5"][0], str)
    assert content["sensor_data"]["array"] == "sensor.npy" and content["sensor_data"]["timestamp"].dtype == np.float64
    keys = set(content["metadata"])
    assert {
        "episode_name",
        "dataset",
        "layout",
        "robot_hz",
        "robot_pose_hz",
        "action_hz",
        "num_actions",
        "num_robot_states",
    } <= keys
    assert {
        "duration_seconds",
        "has_sensor",
        "sensor_hz",
        "camera_hz",
        "clock_offsets",
        "findings",
        "schema_version",
        "fingerprint",
    } <= keys


def test_a_pickle_that_tries_to_execute_is_refused(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for bomb in (Trap(), {"action": Trap()}, np.array([Trap()], object)):
        (prepared / "data.pkl").write_bytes(pickle.dumps(bomb))
        with pytest.raises(UserError, match="only plain Python and numpy"):
            load_prepared(prepared)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "path", ("../../secret.jpg", "/etc/passwd", "View1/../../x.jpg", "", "C:\\x.jpg", "a\\..\\..\\b", "a\nb", 7)
)
def test_a_path_that_leaves_the_folder_is_refused(prepared, path):
    content = content_of(prepared)
    content["image"]["View5"][1] = path
    (prepared / "data.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="refused"):
        load_prepared(prepared)


@pytest.mark.parametrize("key", ("action", "timestamp", "image_index", "sensor", "metadata", "array"))
def test_content_that_breaks_the_contract_is_refused(prepared, key):
    content = content_of(prepared)
    if key == "action":
        content["action"] = content["action"][:, :6]
    elif key == "timestamp":
        content["timestamp"] = content["timestamp"].astype(np.float32)
    elif key == "image_index":
        content["image_index"]["View5"] = content["image_index"]["View5"] + 1000
    elif key == "sensor":
        content["sensor_data"]["index"] = content["sensor_data"]["index"] + 10**6
    elif key == "array":
        content["sensor_data"]["array"] = "../sensor.npy"
    else:
        del content["metadata"]
    (prepared / "data.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="refused"):
        load_prepared(prepared)


@pytest.mark.parametrize(
    "key, value",
    [("action_hz", value) for value in (0.0, -10.0, float("nan"), float("inf"), "10", None)]
    + [("sensor_hz", float("nan")), ("sensor_hz", None), ("verdict", None), ("num_actions", -1), ("dataset", 7)]
    + [(key, "gone") for key in ("action_hz", "verdict", "num_actions", "duration_seconds", "fingerprint", "layout")],
)
def test_metadata_that_readers_cannot_use_are_refused_at_the_door(prepared, key, value):
    content = content_of(prepared)
    content["metadata"][key] = value
    if value == "gone":
        del content["metadata"][key]
    (prepared / "data.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=f"data.pkl is refused: metadata .*{key}.*preprocess"):
        load_prepared(prepared)
    root = prepared.parent.parent
    row = episode_rows(root, find_episodes(root))[0]
    assert key in row["verdict"]  # notebook 01 shows it beside the others


@pytest.mark.parametrize("damage", ("reversed", "reversed sensor", "no number", "a step without a number"))
def test_times_that_run_back_and_values_that_are_no_numbers_are_refused(prepared, damage):
    content = content_of(prepared)
    if damage == "reversed":
        content["timestamp"] = content["timestamp"][::-1]
    elif damage == "reversed sensor":
        content["sensor_data"]["timestamp"] = content["sensor_data"]["timestamp"][::-1]
    elif damage == "no number":
        content["timestamp"][3] = np.nan
    else:
        content["state"][np.flatnonzero(content["valid"])[0], 7] = np.inf
    (prepared / "data.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="go forward|no numbers at valid steps"):
        load_prepared(prepared)


@pytest.mark.parametrize("raw", (b"", b"garbage", b"\x80\x04]\x94."))
def test_what_is_no_data_pkl_is_refused_with_the_remedy(prepared, raw):
    (prepared / "data.pkl").write_bytes(raw)
    with pytest.raises(UserError, match="preprocess"):
        load_prepared(prepared)


def test_an_untouched_episode_costs_little_memory(tmp_path):
    Raw(seconds=20.0, right=True, camera_hz=10).write(tmp_path / "root" / "part1")
    prepare_all(tmp_path / "root")
    path = find_prepared(tmp_path / "root")[0]
    others = [tmp_path / f"copy{k}" for k in range(20)]
    for other in others:
        other.mkdir()
        shutil.copy(path / "data.pkl", other)
    load_prepared(path)
    tracemalloc.start()
    kept = [load_prepared(other) for other in others]
    cost = tracemalloc.get_traced_memory()[0] / len(kept)
    times = [episode.timestamp[0] + episode.image_index["View1_left"][-1] for episode in kept]
    touched = tracemalloc.get_traced_memory()[0] / len(kept)
    tracemalloc.stop()
    assert cost < 100e3 and touched < 200e3 and len(times) == 20


def test_progress_counts_episodes(root, capsys):
    run_jobs(make_jobs(Settings(root)), 1)
    assert "preparing 2/2 episodes" in capsys.readouterr().out
