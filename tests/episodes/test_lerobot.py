"""Prepared episodes as a LeRobot dataset and back; read by other libraries, and by LeRobot where it is installed.

LeRobot is no dependency: VLA_LEROBOT_PYTHON names a Python that has it, else the tests that need it are skipped.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import av
import numpy as np
import pandas as pd
import pytest
from conftest import prepare_all
from PIL import Image
from raw_episodes import T0, Raw

from vla_lib.core.errors import UserError
from vla_lib.episodes import find_prepared, lerobot_export, lerobot_shard, load_prepared
from vla_lib.episodes.lerobot_export import ExportSettings, export

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
    Raw("F3", scenery=True, sensor=False, start=T0 + 1200).write(root / "New_dataset3" / "Eye_trocar")
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
    monkeypatch.setattr(lerobot_export, "write_shard", lambda shard: written.append(shard.number) or write(shard))
    done = export(settings)
    assert written == sorted(set(written)) and len(written) > 2  # nothing was written twice
    assert not (tmp_path / "out" / ".shards").exists()
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
def test_lerobot_reads_every_frame(recorded, exported, tmp_path):
    wanted = truth(recorded)
    np.savez(tmp_path / "frames.npz", **wanted)
    found = lerobot("read", exported, tmp_path / "frames.npz")
    assert found["state"] == found["action"] == found["chunk"] == 0.0
    assert found["picture"] < 3.0
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
