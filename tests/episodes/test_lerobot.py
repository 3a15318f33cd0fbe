"""Prepared episodes as a LeRobot dataset and back; read by other libraries, and by LeRobot where it is installed.

LeRobot is no dependency: VLA_LEROBOT_PYTHON names a Python that has it, else the tests that need it are skipped.
"""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from preparing import prepare_all
from raw_episodes import T0, Raw, smooth_pose, true_action
from scipy.spatial.transform import Rotation

from vla_lib import cli
from vla_lib.core.errors import UserError
from vla_lib.episodes import DatasetTable, find_prepared, lerobot_export, lerobot_import, lerobot_shard, load_prepared
from vla_lib.episodes.lerobot_export import ExportSettings, export
from vla_lib.workbench.headless import run_notebook

LEROBOT = os.environ.get("VLA_LEROBOT_PYTHON", "")
needs_lerobot = pytest.mark.skipif(not LEROBOT, reason="VLA_LEROBOT_PYTHON names no Python with LeRobot")
VIEWS = [f"View{k}_left" for k in (1, 2, 3, 4)] + ["View5"]


def lerobot(what: str, *words: Path) -> dict[str, Any]:
    """What LeRobot's own code says; it may not ask any hub."""
    script = Path(__file__).with_name("lerobot_reader.py")
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(words[-1].parent / "hf"), "HF_DATASETS_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | offline
    command = [LEROBOT, str(script), what, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="session")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three datasets: a hole of 0.4 s in a robot log, an F2 with its sensor, one without sensor. Read only."""
    root = tmp_path_factory.mktemp("recorded")
    rows = np.arange(0, 4, 0.01)
    rows = rows[(rows < 1.5) | (rows > 1.9)]
    Raw("F1", scenery=True, seconds=4, row_times=rows, right=True).write(root / "White_silicone_white_circle")
    Raw("F2", scenery=True, start=T0 + 600).write(root / "New_dataset" / "Red_point")
    Raw("F3", scenery=True, sensor=False, start=T0 + 1200.7654321).write(root / "New_dataset3" / "Eye_trocar")
    (root / "marks.yaml").write_text("New_dataset3: {label: failure}\n")  # a folder, so all of its episodes
    prepare_all(root)
    return root


@pytest.fixture(scope="session")
def exported(recorded: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "lerobot"
    export(ExportSettings(recorded, out, workers=1))
    return out


def truth(root: Path) -> dict[str, np.ndarray]:
    """What a LeRobot dataset of these episodes must hold, frame by frame: the valid steps in order."""
    rows = []
    for folder in find_prepared(root):
        episode = load_prepared(folder)
        rows += [(episode, step) for step in np.flatnonzero(episode.valid)]
    return {
        "state": np.stack([episode.state[step] for episode, step in rows]),
        "action": np.stack([episode.action[step] for episode, step in rows]),
        "pictures": np.array([[str(episode.picture_path(view, step)) for episode, step in rows] for view in VIEWS]),
        "views": np.array(VIEWS),
        "instruction": np.array([episode.instruction for episode, _ in rows]),
    }


def episode_rows(out: Path) -> pd.DataFrame:
    return pd.read_parquet(out / "meta" / "episodes" / "chunk-000" / "file-000.parquet")


def test_each_valid_step_is_a_frame_and_no_other(recorded, exported):
    frames, wanted = pd.read_parquet(exported / "data" / "chunk-000" / "file-000.parquet"), truth(recorded)
    assert np.array_equal(np.stack(frames["observation.state"]), wanted["state"])
    assert np.array_equal(np.stack(frames["action"]), wanted["action"])
    assert frames["index"].tolist() == list(range(len(frames)))
    rows = episode_rows(exported)
    # the hole splits its recording: no frame stands beside one that is not the next step
    assert rows["vla/episode"].str.contains("recv_all").sum() == 2
    for row in rows.to_dict("records"):
        part = frames[frames["episode_index"] == row["episode_index"]]
        assert (row["dataset_from_index"], row["dataset_to_index"]) == (part["index"].min(), part["index"].max() + 1)
        assert np.allclose(part["timestamp"], np.arange(len(part)) / 10) and len(part) == row["length"]
        episode = load_prepared(recorded / row["vla/episode"])
        steps = np.arange(row["length"]) + row["vla/first_step"]
        assert episode.valid[steps].all() and episode.timestamp[steps[0]] == row["vla/start_unix_s"]
    labels = dict(zip(rows["vla/episode"], rows["vla/label"], strict=True))
    assert [label for key, label in labels.items() if "New_dataset3" in key] == ["failure"]
    assert sum(map(bool, labels.values())) == 1
    assert set(rows["vla/weight"]) == {2.0, 3.0} and set(rows["vla/layout"]) == {"F1", "F2", "F3"}


def test_videos_show_the_newest_picture_of_each_frame(recorded, exported):
    wanted = truth(recorded)
    for number, view in enumerate(VIEWS):
        path = exported / "videos" / f"observation.images.{view}" / "chunk-000" / "file-000.mp4"
        with av.open(str(path)) as container:
            assert container.streams.video[0].codec.canonical_name == "h264"
            shown = [(frame.time, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        assert np.allclose([time for time, _ in shown], np.arange(len(wanted["state"])) / 10)
        away = []
        for (_, pixels), name in zip(shown, wanted["pictures"][number], strict=True):
            with Image.open(name) as picture:
                away.append(np.abs(pixels.astype(float) - np.asarray(picture.convert("RGB"), float)).mean())
        assert max(away) < 3.0  # grey levels: the codec's loss; a picture later differs by ten times that


def test_the_sensor_goes_along_without_loss_of_rate(recorded, exported):
    frames, rows = pd.read_parquet(exported / "data" / "chunk-000" / "file-000.parquet"), episode_rows(exported)
    seen = 0
    for row in rows.to_dict("records"):
        part = frames[frames["episode_index"] == row["episode_index"]]
        if not row["vla/sensor"]:
            assert not part["force_valid"].any() and "New_dataset3" in row["vla/episode"]
            continue
        stream = np.load(exported / row["vla/sensor"] / "sensor.npy", mmap_mode="r")
        times = np.load(exported / row["vla/sensor"] / "timestamp.npy")
        assert np.array_equal(stream, np.load(recorded / row["vla/episode"] / "sensor.npy"))
        for k, frame in enumerate(part.to_dict("records")):
            now = row["vla/start_unix_s"] + k / 10
            before, after = times[frame["sensor_index"] - 1 : frame["sensor_index"] + 1]
            assert before <= now + 1e-6 and now - 1e-6 <= after
            if frame["force_valid"]:
                seen += 1
                end = frame["sensor_index"]
                assert np.array_equal(frame["observation.force"], stream[end - 65 : end, 0])
    assert seen > 50


def test_an_interrupted_export_goes_on_and_a_foreign_folder_is_left_alone(recorded, exported, tmp_path, monkeypatch):
    monkeypatch.setattr(lerobot_export, "SHARD_FRAMES", 30)
    written, write = [], lerobot_shard.write_shard

    def breaks(shard):
        if len(written) == 2:
            raise OSError(28, "No space left on device")
        written.append(shard.number)
        return write(shard)

    settings = ExportSettings(recorded, tmp_path / "out", workers=1)
    monkeypatch.setattr(lerobot_export, "write_shard", breaks)
    with pytest.raises(UserError, match="Make room"):
        export(settings)
    assert not (tmp_path / "out" / "meta" / "info.json").exists()
    killed = tmp_path / "out" / "videos" / "observation.images.View5" / "chunk-000" / ".file-002.mp4.0a1b2c.partial"
    killed.write_bytes(b"half a video")  # kill -9 leaves it
    monkeypatch.setattr(lerobot_export, "write_shard", lambda shard: written.append(shard.number) or write(shard))
    done = export(settings)
    assert written == sorted(set(written)) and len(written) > 2  # nothing was written twice
    assert not (tmp_path / "out" / ".shards").exists() and not killed.exists()
    one, other = (episode_rows(folder) for folder in (tmp_path / "out", exported))
    assert done["frames"] == one["length"].sum() == other["length"].sum()
    assert json.loads((tmp_path / "out" / "meta" / "stats.json").read_text()).keys() >= {"action", "observation.state"}
    assert export(settings)["status"] == "unchanged"
    with pytest.raises(UserError, match="other settings"):
        export(ExportSettings(recorded, tmp_path / "out", crf=40))
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="no export of ours"):
        export(ExportSettings(recorded, tmp_path / "foreign"))
    assert (tmp_path / "foreign" / "thesis.txt").read_text() == "mine"


def test_av1_other_sizes_and_chosen_views(recorded, tmp_path):
    size = {"image_resize_width": 64, "image_resize_height": 64}
    export(ExportSettings(recorded, tmp_path / "out", codec="av1", views=("View5",), workers=1, **size))
    (video,) = (tmp_path / "out" / "videos").rglob("*.mp4")
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec.canonical_name, stream.width, stream.height) == ("av1", 64, 64)
    with pytest.raises(UserError, match="has no View7"):
        export(ExportSettings(recorded, tmp_path / "none", views=("View7",)))
    with pytest.raises(UserError, match="both"):
        export(ExportSettings(recorded, tmp_path / "none", image_resize_width=64))


def test_marks_decide_what_goes_out(recorded, tmp_path):
    shutil.copytree(recorded, tmp_path / "root")
    (tmp_path / "root" / "marks.yaml").write_text("New_dataset3: {exclude: true, note: blurred}\n")
    done = export(ExportSettings(tmp_path / "root", tmp_path / "out", workers=1))
    assert not episode_rows(tmp_path / "out")["vla/episode"].str.contains("New_dataset3").any()
    assert any("blurred" in text for text in done["left_out"])


def test_notebook_02_exports_too(tmp_path, monkeypatch):
    Raw("F1", scenery=True).write(tmp_path / "root" / "White_silicone_white_circle")
    monkeypatch.setenv("VLA_RUNS", str(tmp_path / "runs"))
    given = {"dataset_root": str(tmp_path / "root"), "workers": 1, "lerobot_out": str(tmp_path / "out")}
    done = run_notebook("02_detect_hz", given, log=False)
    assert done.state == "done", done.error
    frames = pd.read_parquet(tmp_path / "out" / "data" / "chunk-000" / "file-000.parquet")
    assert np.array_equal(np.stack(frames["action"]), truth(tmp_path / "root")["action"])


def test_a_damaged_sensor_is_not_exported(tmp_path):
    path = Raw("F1").write(tmp_path / "root" / "White_silicone_white_circle")
    prepare_all(tmp_path / "root")
    with open(path / "sensor.npy", "r+b") as file:
        file.seek(100_000)
        file.write(b"\x01\x02\x03")
    with pytest.raises(UserError, match="damaged"):
        export(ExportSettings(tmp_path / "root", tmp_path / "out", workers=1))
    assert not (tmp_path / "out" / "meta" / "info.json").exists()


@needs_lerobot
@pytest.mark.parametrize("codec", ["h264", "av1"])
def test_lerobot_reads_every_frame(codec, recorded, exported, tmp_path):
    wanted = truth(recorded)
    np.savez(tmp_path / "frames.npz", **wanted)
    if codec == "av1":
        exported = tmp_path / "av1"
        export(ExportSettings(recorded, exported, codec="av1", workers=1))
    found = lerobot("read", exported, tmp_path / "frames.npz")
    assert found["state"] == found["action"] == found["chunk"] == 0.0
    assert found["picture"] < (3.0 if codec == "h264" else 5.0)  # grey levels
    assert found["tasks"] == wanted["instruction"].tolist()
    assert found["epoch"] == len(wanted["state"])
    assert found["pictures_shape"] == [2, 3, 36, 64]
    assert found["padded"] == [False, False, True, True]
    assert np.shape(found["observation.force"]) == (len(wanted["state"]), 65)


@needs_lerobot
def test_lerobots_edit_operations_leave_a_whole_dataset(recorded, exported, tmp_path):
    found, state = lerobot("edit", exported, tmp_path / "edited"), truth(recorded)["state"]
    lengths = episode_rows(exported)["length"].tolist()
    starts = np.cumsum([0, *lengths])
    wanted = {"delete": state[lengths[0] :], "merge": np.concatenate([state, state])}
    wanted |= {"split a": state[: starts[2]], "split b": state[starts[2] : starts[3]]}
    for name, one in found.items():
        assert np.allclose(one["state"], wanted.get(name, state)), name
    assert len(found) == 6


@needs_lerobot
def test_statistics_are_those_of_lerobot(recorded, exported, tmp_path):
    np.savez(tmp_path / "frames.npz", **truth(recorded))
    found = lerobot("stats", exported, tmp_path / "frames.npz")
    assert found["keys"] == sorted(json.loads((exported / "meta" / "info.json").read_text())["features"])
    away = found["away"]
    # LeRobot squares pictures as uint8, which overflows: its spread of videos is no truth to compare with
    del away["video std"]
    assert max(away.values()) < 1e-3, away
    assert found["counts"]["action"] == len(truth(recorded)["action"])


# ---- import


def import_(*words: Any) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["import", *map(str, words)])
    assert ended.value.code == 0


def by_start(root: Path) -> dict[float, Any]:
    episodes = [load_prepared(folder) for folder in find_prepared(root)]
    return {round(float(episode.timestamp[0]), 3): episode for episode in episodes}


def test_a_round_trip_keeps_actions_pictures_and_sensor(recorded, exported, tmp_path, capsys):
    import_("--from-lerobot", exported, "--dataset-root", tmp_path / "root", "--actions", "delta")
    assert "0.0% of the motion in place" in capsys.readouterr().out
    back, compared = by_start(tmp_path / "root"), 0
    for row in episode_rows(exported).to_dict("records"):
        ours, first = load_prepared(recorded / row["vla/episode"]), row["vla/first_step"]
        theirs = back[round(row["vla/start_unix_s"], 3)]
        assert len(theirs) == row["length"] and theirs.valid.all()
        steps = slice(first, first + row["length"])
        assert np.abs(theirs.action - ours.action[steps]).max() < 2e-4  # states are rounded to float32
        assert np.abs(theirs.state - ours.state[steps]).max() < 1e-4
        assert theirs.instruction == ours.instruction and theirs.views == VIEWS
        for step in range(0, row["length"], 3):
            paths = ours.picture_path("View5", first + step), theirs.picture_path("View5", step)
            one, other = (np.asarray(Image.open(path), float) for path in paths)
            assert np.abs(one - other).mean() < 4.0
            assert theirs.clocks.sensor.offset_s == 0.0
            window = ours.sensor_window(first + step, 65)
            if window is not None and step > 1:
                assert np.array_equal(theirs.sensor_window(step, 65), window)
                compared += 1
    assert compared > 8
    table = DatasetTable.load(tmp_path / "root")
    weights = {table.weight(episode.dataset, episode.task) for episode in back.values()}
    assert weights == {2.0, 3.0}


def made(folder: Path, fps: float, written: str, seconds: float = 4.0, **info: Any) -> Path:
    """A LeRobot dataset written by hand: two episodes, cameras `top` and `wrist`, metres and radians.

    written: `tool` (deltas in the tool frame) or `pose` (where to go); orientations are rotation vectors.
    """
    frames, length = [], round(seconds * fps)
    t = np.arange(length) / fps
    for number in range(2):
        pose, after = (smooth_pose(t + number + shift) for shift in (0, 1 / fps))
        turned, target = (Rotation.from_euler("XYZ", one[:, 3:], degrees=True) for one in (pose, after))
        action = np.hstack([after[:, :3] / 1000, target.as_rotvec()])
        if written == "tool":
            place = turned.inv().apply(after[:, :3] - pose[:, :3]) / 1000
            action = np.hstack([place, (turned.inv() * target).as_rotvec()])
        state = np.hstack([pose[:, :3] / 1000, turned.as_rotvec(), np.full((length, 1), 0.04)])
        columns = {"observation.state": list(state), "action": list(action), "episode_index": number}
        frames.append(pd.DataFrame(columns))
    table = pd.concat(frames).assign(index=range(2 * length), task_index=0)
    for name in ("data/chunk-000", "meta/episodes/chunk-000", "videos/observation.images.top/chunk-000"):
        (folder / name).mkdir(parents=True)
    (folder / "videos/observation.images.wrist/chunk-000").mkdir(parents=True)
    table.to_parquet(folder / "data/chunk-000/file-000.parquet")
    rows, features = [], {"observation.state": {"dtype": "float32", "shape": [7]}, "action": {"dtype": "float32"}}
    features["action"]["shape"] = [6]
    features["observation.state"]["names"] = ["ee.x", "ee.y", "ee.z", "ee.wx", "ee.wy", "ee.wz", "grip"]
    for camera in ("observation.images.top", "observation.images.wrist"):
        features[camera] = {"dtype": "video", "shape": [36, 64, 3], "names": ["height", "width", "channels"]}
        with av.open(str(folder / "videos" / camera / "chunk-000/file-000.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=int(fps))
            stream.width, stream.height, stream.pix_fmt = 64, 36, "yuv420p"
            for k in range(2 * length):  # the picture tells its number
                pixels = np.full((36, 64, 3), 40, np.uint8)
                pixels[:, : 8 + 2 * (k % 28)] = 200
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    for number in range(2):
        row = {"episode_index": number, "tasks": ["Push the point"], "length": length}
        row |= {"data/chunk_index": 0, "data/file_index": 0, "dataset_from_index": number * length}
        for camera in ("top", "wrist"):
            name = f"videos/observation.images.{camera}"
            row |= {f"{name}/chunk_index": 0, f"{name}/file_index": 0, f"{name}/from_timestamp": number * length / fps}
        rows.append(row)
    pd.DataFrame(rows).to_parquet(folder / "meta/episodes/chunk-000/file-000.parquet")
    paths = {"data_path": "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"}
    paths |= {"video_path": "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"}
    values = {"codebase_version": "v3.0", "fps": fps, "features": features} | paths | info
    (folder / "meta/info.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize(("fps", "written"), [(30.0, "tool"), (5.0, "pose"), (10.0, "pose")])
def test_what_others_wrote_becomes_episodes_at_our_rate(fps, written, tmp_path):
    """Other rates, views and units; no sensor, no joints."""
    source = made(tmp_path / "theirs", fps, written)
    words = {"actions": "pose"} if written == "pose" else {"actions": "delta", "frame": "tool"}
    units = {"lengths": "m", "angles": "rad", "rotation": "rotvec"}
    lerobot_import.bring_in(cli.ImportSettings(source, tmp_path / "root", **words, **units))
    prepare_all(tmp_path / "root")
    episodes = list(by_start(tmp_path / "root").values())
    assert len(episodes) == 2
    for number, episode in enumerate(episodes):
        assert len(episode) == 40 and episode.valid.all() and not episode.has_sensor
        assert episode.views == ["View1_left", "View2_left"] and episode.instruction == "Push the point"
        t = np.arange(40) / 10
        wanted = true_action(smooth_pose, t + number)
        if fps >= 10:
            assert np.abs(episode.action[:, :6] - wanted).max() < 2e-3
        else:  # between two states the way is straight
            pairs = episode.action[:, :6].reshape(20, 2, 6).sum(axis=1)
            assert np.abs(pairs - true_action(smooth_pose, t[::2] + number, 0.2)).max() < 0.02
        assert np.abs(episode.state[:, 6:9] - smooth_pose(t + number)[:, :3])[:: 1 if fps >= 10 else 2].max() < 1e-3
        for step in range(40):  # the newest picture at or before the step
            frame = int(np.floor(step / 10 * fps + 1e-9)) + number * round(4 * fps)
            with Image.open(episode.picture_path("View2_left", step)) as picture:
                bright = (np.asarray(picture.convert("L"), float) > 120).mean(axis=0) > 0.5
            assert abs(int(bright.sum()) - (8 + 2 * (frame % 28))) <= 1


def test_what_contradicts_the_states_is_refused(tmp_path):
    source = made(tmp_path / "theirs", 10.0, "tool")

    def refused(match: str, *words: str, root: str = "root") -> None:
        settings = cli.ImportSettings(source, tmp_path / root, **dict(zip(words[::2], words[1::2], strict=True)))
        with pytest.raises(UserError, match=match):
            lerobot_import.bring_in(settings)
        assert not list(tmp_path.glob(f"{root}/*/*/data_collection*"))

    right = ("lengths", "m", "angles", "rad", "rotation", "rotvec")
    refused("no delta in the base frame.*with --frame tool", "actions", "delta", *right)
    refused("no pose.*with --actions delta --frame tool", "actions", "pose", *right)
    refused("hold no joints", "actions", "joints", *right)
    tool = ("actions", "delta", "frame", "tool", "lengths", "m")
    refused("with --rotation rotvec", *tool, "angles", "rad", "rotation", "euler")
    refused("with --angles rad", *tool, "rotation", "rotvec")
    (tmp_path / "taken" / "theirs").mkdir(parents=True)
    refused("is not this import", "actions", "delta", "frame", "tool", *right, root="taken")
    video = source / "videos/observation.images.wrist/chunk-000/file-000.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    refused("cannot be read", "actions", "delta", "frame", "tool", *right)
    info = json.loads((source / "meta/info.json").read_text())
    (source / "meta/info.json").write_text(json.dumps(info | {"codebase_version": "v2.1"}))
    refused("convert", "actions", "delta", *right)


def test_where_an_arm_that_follows_later_would_have_gone_is_no_step(tmp_path):
    source = made(tmp_path / "theirs", 10.0, "pose")
    table = source / "data/chunk-000/file-000.parquet"
    frames = pd.read_parquet(table).reset_index(drop=True)
    for _, part in frames.groupby("episode_index"):
        wanted = list(part["action"])
        frames.loc[part.index, "action"] = pd.Series([*wanted[2:], *wanted[-1:] * 2], part.index)
    frames.to_parquet(table)
    words = {"lengths": "m", "angles": "rad", "rotation": "rotvec"}
    done = lerobot_import.bring_in(cli.ImportSettings(source, tmp_path / "root", "pose", **words))
    assert "2 step(s) later" in done["residual"]
    prepare_all(tmp_path / "root")
    for number, episode in enumerate(by_start(tmp_path / "root").values()):
        wanted = true_action(smooth_pose, np.arange(39) / 10 + number)
        assert np.abs(episode.action[:, :6] - wanted).max() < 2e-3


def test_units_in_which_states_and_actions_agree_are_checked_too(tmp_path):
    source = made(tmp_path / "theirs", 10.0, "pose")
    for wrong, match in (({"angles": "rad"}, "0.0.* mm at most in an episode; give --lengths m"), ({}, "--lengths m")):
        with pytest.raises(UserError, match=match):
            lerobot_import.bring_in(cli.ImportSettings(source, tmp_path / "root", "pose", rotation="rotvec", **wrong))
    table = source / "data/chunk-000/file-000.parquet"
    frames = pd.read_parquet(table)
    for column in ("observation.state", "action"):  # now in mm and degrees
        frames[column] = [one * np.array([*[1000] * 3, *[180 / np.pi] * 3, *one[6:] * 0]) for one in frames[column]]
    frames.to_parquet(table)
    for wrong, match in (({"angles": "rad"}, "--angles deg"), ({"lengths": "m"}, " m at most.*give --lengths mm")):
        with pytest.raises(UserError, match=match):
            lerobot_import.bring_in(cli.ImportSettings(source, tmp_path / "root", "pose", rotation="rotvec", **wrong))
    assert not (tmp_path / "root").exists()
    lerobot_import.bring_in(cli.ImportSettings(source, tmp_path / "root", "pose", rotation="rotvec"))


def test_a_sensor_stream_outside_the_dataset_is_not_read(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "theirs")
    file = tmp_path / "theirs" / "meta" / "episodes" / "chunk-000" / "file-000.parquet"
    rows = pd.read_parquet(file)
    rows["vla/sensor"] = "../../private"
    rows.to_parquet(file)
    with pytest.raises(UserError, match="outside its folder"):
        lerobot_import.bring_in(cli.ImportSettings(tmp_path / "theirs", tmp_path / "root", "delta"))


@needs_lerobot
def test_what_lerobot_writes_comes_in(tmp_path):
    t, lengths = np.arange(25) / 10, np.array([25, 18])
    state = np.concatenate([np.hstack([smooth_pose(t[:n]) * 0.1, smooth_pose(t[:n])]) for n in lengths])
    action = np.concatenate([true_action(smooth_pose, t[:n]) for n in lengths])
    pictures = np.random.default_rng(0).integers(0, 255, (1, len(state), 48, 64, 3), np.uint8)
    names = [f"joint_{k}" for k in range(1, 7)] + ["x", "y", "z", "a", "b", "r"]
    values = {"state": state.astype(np.float32), "action": action.astype(np.float32), "pictures": pictures}
    np.savez(tmp_path / "in.npz", **values, views=["front"], names=names, fps=10, lengths=lengths)
    lerobot("write", tmp_path / "theirs", tmp_path / "in.npz")
    import_("--from-lerobot", tmp_path / "theirs", "--dataset-root", tmp_path / "root", "--actions", "delta")
    episodes = list(by_start(tmp_path / "root").values())
    assert [len(episode) for episode in episodes] == lengths.tolist()
    found = np.concatenate([episode.action[:, :6] for episode in episodes])
    assert np.abs(found - action).max() < 2e-3
    assert [episode.instruction for episode in episodes] == ["task 0", "task 1"]
