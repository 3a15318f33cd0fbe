"""The recorder: raw episodes as FORMATS says, idempotent, resumable, the same however many processes wrote them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from needle_rig import RigError, recorder
from needle_rig.__main__ import main
from needle_rig.arm import euler_poses
from needle_rig.demonstrator import demonstrate
from needle_rig.recorder import MANIFEST, record
from needle_rig.settings import RecordSettings
from needle_rig.world import sample_world

TAIL_S = 2.0
COLUMNS = [
    "joint_1",
    "joint_2",
    "joint_3",
    "joint_4",
    "joint_5",
    "joint_6",
    "pose_x",
    "pose_y",
    "pose_z",
    "pose_a",
    "pose_b",
    "pose_r",
]


def plan(root: Path, **changes) -> RecordSettings:
    given = {"episodes_f1": 1, "episodes_f2": 1, "seed": 3, "picture_width": 64, "picture_height": 36, "camera_hz": 2.0}
    return RecordSettings(dataset_root=root, **given | {"idle_tail_s": TAIL_S} | changes)


def start_s(entry: dict) -> float:
    return plan(Path()).episodes()[entry["index"]].start_s


@pytest.fixture(scope="module")
def recorded(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recorded") / "root"
    record(plan(root), show=False)
    return root


@pytest.fixture
def copy(recorded, tmp_path) -> Path:
    return Path(shutil.copytree(recorded, tmp_path / "copy"))


def episode(root: Path, layout: str) -> tuple[Path, dict]:
    entries = json.loads((root / MANIFEST).read_text())["episodes"]
    (entry,) = (entry for entry in entries if entry["layout"] == layout)
    return root / entry["folder"], entry


def stamps(folder: Path) -> np.ndarray:
    return np.array(sorted(float(re.search(r"(\d{10}\.\d+)\.jpg$", path.name)[1]) for path in folder.glob("*.jpg")))


def test_f1_is_written_as_the_lab_writes_it(recorded):
    folder, _ = episode(recorded, "F1")
    session = folder.name.removeprefix("recv_all_")
    assert re.fullmatch(r"\d{8}_\d{6}", session) and folder.parent.name == "White_silicone_white_circle"
    log = pd.read_csv(folder / f"robot_state_{session}.csv")
    assert list(log.columns) == ["recv_timestamp", "origin_timestamp", "send_timestamp", "force_placeholder", *COLUMNS]
    assert (log.force_placeholder == 0).all()
    for view, serial in {"View1": 41182735, "View2": 49429257, "View3": 44377151, "View4": 49045152}.items():
        names = [path.name for path in (folder / view / "left").iterdir()]
        assert names and all(re.fullmatch(rf"zed_{serial}_left_\d{{10}}\.\d{{3}}\.jpg", name) for name in names)
    assert all(re.fullmatch(r"oak_CAM_A_\d{10}\.\d{3}\.jpg", path.name) for path in (folder / "View5").iterdir())
    (path,) = folder.glob("sensor_data_*.npz")
    with np.load(path) as sensor:
        assert set(sensor.files) == {"timestamps", "send_timestamps", "forces", "alines"}
        assert path.name == f"sensor_data_{session}_{int(sensor['timestamps'][0])}.npz"
        n = len(sensor["timestamps"])
        assert sensor["alines"].shape == (n, 1025) and sensor["forces"].shape == sensor["send_timestamps"].shape == (n,)
        assert [sensor[key].dtype for key in ("timestamps", "send_timestamps", "forces", "alines")] == [
            np.float64
        ] * 2 + [np.float32] * 2
        assert 1 / np.median(np.diff(sensor["timestamps"])) == pytest.approx(650, rel=0.01)


def test_f2_is_written_as_the_lab_writes_it(recorded):
    folder, entry = episode(recorded, "F2")
    assert re.fullmatch(r"episode_\d{8}_\d{6}", folder.name) and folder.parent.relative_to(recorded) == Path(
        "New_dataset/Silicone_block"
    )
    log = pd.read_csv(folder / "robot_states.csv")
    assert list(log.columns) == ["recv_timestamp", "origin_timestamp", "send_timestamp", "force", *COLUMNS]
    assert all(re.fullmatch(r"\d{10}\.\d{6}\.jpg", path.name) for path in folder.glob("images/View*/*"))
    assert sorted(path.name for path in (folder / "images").iterdir()) == [f"View{k}" for k in range(1, 6)]
    with np.load(folder / "sensor_data.npz") as sensor:
        assert set(sensor.files) == {"timestamps", "data"}
        times, data = sensor["timestamps"], sensor["data"]
    assert data.shape == (len(times), 650, 1026) and data.dtype == np.float32 and times.dtype == np.float64
    assert np.diff(times) == pytest.approx(0.2, abs=0.001)  # about five a second
    assert times[0] - log.origin_timestamp[0] == pytest.approx(1.0, abs=0.01)  # stamped with the last of its samples
    assert np.array_equal(data[0, 130:], data[1, :-130])  # overlapping
    metadata = json.loads((folder / "metadata.json").read_text())
    assert sorted(metadata["camera_views"]) == [f"View{k}" for k in range(1, 6)]
    assert metadata["camera_frames_count"] != entry["pictures"] and metadata["sensor_windows_count"] != len(times)


@pytest.mark.parametrize("layout", ["F1", "F2"])
def test_streams_start_and_end_as_in_the_lab(recorded, layout):
    folder, entry = episode(recorded, layout)
    log = pd.read_csv(next(folder.glob("robot_state*.csv")))
    t = log.origin_timestamp.to_numpy()
    assert 1 / np.diff(t).mean() == pytest.approx(100, rel=0.02) and np.diff(t).std() > 2e-4  # jitter
    poses = log[COLUMNS[6:]].to_numpy()
    moving = slice(100, len(poses) - 150)
    distinct = 1 + (np.abs(np.diff(poses[moving], axis=0)).max(axis=1) > 0).sum()
    assert distinct / (t[moving][-1] - t[moving][0]) == pytest.approx(60, rel=0.05)
    assert (log.recv_timestamp > log.origin_timestamp).all()
    places = [p for p in folder.rglob("*") if p.is_dir() and any(p.glob("*.jpg"))]
    assert len(places) == 5
    first = [stamps(place)[0] - t[0] for place in places]
    assert min(first) >= 0 and max(first) <= 0.21 and np.ptp(first) > 0.01  # staggered
    tails = [stamps(place)[-1] - t[-1] for place in places]
    assert min(tails) > TAIL_S - 0.6
    with np.load(next(folder.glob("sensor_data*.npz"))) as sensor:
        assert sensor["timestamps"][-1] - t[-1] > TAIL_S - 0.3
        begins = sensor["timestamps"][0] - (1.0 if layout == "F2" else 0.0)
    assert begins - t[0] == pytest.approx(0, abs=0.01)
    with Image.open(next(folder.rglob("*.jpg"))) as picture:
        assert picture.size == (64, 36) and picture.format == "JPEG"
    assert entry["seconds"] == pytest.approx(t[-1] - t[0], abs=0.05)


def test_the_log_holds_the_pose_of_the_demonstration(recorded):
    folder, entry = episode(recorded, "F1")
    shown = demonstrate(sample_world(entry["seed"], entry["task"]), tail_s=TAIL_S)
    log = pd.read_csv(next(folder.glob("robot_state*.csv")))
    t = log.origin_timestamp.to_numpy() - start_s(entry)
    logged = log[COLUMNS[6:]].to_numpy()
    fresh, stale = (np.abs(euler_poses(*shown.at(t - age)) - logged).max() for age in (1 / 120, 0.3))
    assert fresh < 0.3 < stale


def test_nothing_of_the_truth_is_written(recorded):
    names = {
        path.name for path in recorded.rglob("*") if path.is_file() and path.suffix not in (".jpg", ".csv", ".npz")
    }
    assert names == {MANIFEST, "metadata.json"}
    text = (recorded / MANIFEST).read_text() + "".join(p.read_text() for p in recorded.rglob("metadata.json"))
    assert not re.search("target|membrane|gel_mm|yaw|surface", text)


def digests(root: Path) -> dict[str, bytes]:
    return {
        p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.suffix in (".jpg", ".csv", ".npz")
    }


def test_one_process_writes_the_very_same_files_as_two(recorded, tmp_path):
    record(plan(tmp_path / "root", workers=1), show=False)
    assert digests(tmp_path / "root") == digests(recorded)


def test_the_same_recording_is_recognised_and_kept_even_after_later_stages(copy, monkeypatch):
    for folder in copy.glob("*/*/"):
        (folder / "data.pkl").write_bytes(b"later")
    (copy / "cache").mkdir()
    monkeypatch.setattr(recorder, "_record_one", lambda *_: pytest.fail("recorded again"))
    before = {p: p.stat().st_mtime_ns for p in copy.rglob("*")}
    manifest = record(plan(copy), show=False)
    assert manifest["state"] == "done" and before == {p: p.stat().st_mtime_ns for p in copy.rglob("*")}


def test_a_missing_episode_is_recorded_again_and_an_altered_one_is_refused(copy, recorded):
    folder, _ = episode(copy, "F1")
    shutil.rmtree(folder)
    (copy / ".recording-0").mkdir()  # what a killed recording leaves
    record(plan(copy, workers=1), show=False)
    assert digests(copy) == digests(recorded) and not (copy / ".recording-0").exists()
    next(folder.rglob("*.jpg")).unlink()
    with pytest.raises(RigError, match="not as it was recorded"):
        record(plan(copy), show=False)


def test_anything_else_in_the_root_is_refused(copy, tmp_path):
    with pytest.raises(RigError, match="another recording.*seed 3 there, 4 asked"):
        record(plan(copy, seed=4), show=False)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    with pytest.raises(RigError, match="did not record"):
        record(plan(foreign), show=False)
    with pytest.raises(RigError, match="is a file"):
        record(plan(foreign / "notes.txt"), show=False)
    assert [p.name for p in foreign.iterdir()] == ["notes.txt"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 10))
    with pytest.raises(RigError, match="GB are free"):
        record(plan(tmp_path / "root"), show=False)
    assert not (tmp_path / "root").exists()


def test_the_front_door_counts_what_it_wrote(copy, capsys):
    main(plan(copy))
    (line,) = capsys.readouterr().out.splitlines()
    pictures = len(list(copy.rglob("*.jpg")))
    assert line.startswith("2 episodes (1 F1, 1 F2), 0.") and f" {pictures} pictures, " in line and str(copy) in line


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"episodes_f1": 0, "episodes_f2": 0}, "ask for one episode or more"),
        ({"workers": 0}, "--workers should be greater than or equal to 1, not 0"),
        ({"camera_hz": 0.0, "seed": -1}, "--seed should be .* 0, not -1; --camera-hz should be .*0.5, not 0.0"),
        ({"picture_width": 5000}, "--picture-width should be .* 2048, not 5000"),
        ({"task": "../elsewhere"}, "cannot name a folder"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_a_sentence(given, told):
    with pytest.raises(RigError, match=told):
        RecordSettings(**given)


def test_prepared_episodes_hold_what_the_rig_did(copy):
    from vla_lib import preprocess
    from vla_lib.episodes import load_prepared
    from vla_lib.evaluation.sim_robot import instruction_of

    preprocess.run_jobs(preprocess.make_jobs(preprocess.Settings(copy)), workers=1)
    for layout in ("F1", "F2"):
        folder, entry = episode(copy, layout)
        prepared = load_prepared(folder)
        shown = demonstrate(sample_world(entry["seed"], entry["task"]), tail_s=TAIL_S)
        t = prepared.timestamp - start_s(entry)
        poses = euler_poses(*shown.at(t - 1 / 120))  # the controller's pose is half a refresh old on average
        assert np.abs(prepared.state[:, 6:] - poses).max() < 0.25
        moved = np.diff(shown.at(np.append(t, t[-1] + 0.1))[0], axis=0)
        assert (
            np.abs(prepared.action[:, :3] - moved).max() < 0.25 and np.abs(prepared.action[:, :3] - moved).mean() < 0.03
        )
        assert prepared.instruction == instruction_of(entry["task"])
        seen = np.all([prepared.image_index[view] >= 0 for view in prepared.views], axis=0)
        assert np.array_equal(prepared.valid, seen) and seen[3:].all() and len(prepared.views) == 5
        k = int(np.argmax(t > entry["seconds"] - 0.5))  # at rest behind the membrane
        scan = prepared.sensor_window(k, 65)[:, 1:].mean(axis=0)
        depth = shown.world.membrane_z_mm - shown.at(t[k : k + 1])[0][0, 2]
        echo_mm = np.argmax(np.convolve(scan, np.ones(9) / 9, mode="same")) * 0.0075
        assert echo_mm == pytest.approx(shown.world.layer_mm - depth, abs=0.2)
