"""Runs in a Python that has LeRobot, not in ours: what LeRobot's own code makes of a dataset, printed as JSON.

python lerobot_reader.py read DATASET FRAMES.npz      every frame, windows of time, an epoch of a DataLoader
python lerobot_reader.py edit DATASET FOLDER          edit operations, each result read again
python lerobot_reader.py stats DATASET FRAMES.npz     its statistics of each episode beside those in the dataset
python lerobot_reader.py write FOLDER FRAMES.npz      a dataset that LeRobot writes
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from lerobot.datasets import compute_stats, dataset_tools
from lerobot.datasets.lerobot_dataset import LeRobotDataset
from PIL import Image


def opened(root, **more):
    return LeRobotDataset("local/test", root=root, **more)


def read(root, truth):
    data, found = opened(root), {"state": 0.0, "action": 0.0, "picture": 0.0, "tasks": []}
    rows = [data[k] for k in range(len(data))]
    for name in ("state", "action"):
        key = {"state": "observation.state", "action": "action"}[name]
        found[name] = float(np.abs(np.stack([row[key].numpy() for row in rows]) - truth[name]).max())
    for k, row in enumerate(rows):
        for number, view in enumerate(truth["views"]):
            shown = row[f"observation.images.{view}"].numpy().transpose(1, 2, 0) * 255
            with Image.open(str(truth["pictures"][number][k])) as picture:
                away = np.abs(shown - np.asarray(picture.convert("RGB"), float)).mean()
            found["picture"] = max(found["picture"], float(away))
    found["tasks"] = [row["task"] for row in rows]
    found["episodes"] = [int(row["episode_index"]) for row in rows]
    for extra in ("observation.force", "force_valid", "sensor_index"):
        if extra in rows[0]:
            found[extra] = np.stack([row[extra].numpy() for row in rows]).tolist()
    window = [k / data.fps for k in range(-1, 3)]
    timed = opened(root, delta_timestamps={"action": window, "observation.images." + truth["views"][0]: [-0.1, 0.0]})
    starts = np.flatnonzero(np.diff(found["episodes"], prepend=-1))
    chunk = timed[int(starts[0]) + 1]
    found["chunk"] = float(np.abs(chunk["action"].numpy() - truth["action"][starts[0] : starts[0] + 4]).max())
    found["pictures_shape"] = list(chunk["observation.images." + truth["views"][0]].shape)
    found["padded"] = timed[len(timed) - 1]["action_is_pad"].tolist()
    loader = torch.utils.data.DataLoader(timed, batch_size=8, shuffle=True, num_workers=0)
    found["epoch"] = sum(len(batch["index"]) for batch in loader)
    return found


def edit(root, folder):
    data = opened(root)
    first = {"delete": dataset_tools.delete_episodes(data, [0], output_dir=folder / "delete", repo_id="local/delete")}
    splits = dataset_tools.split_dataset(data, {"a": [0, 1], "b": [2]}, output_dir=folder / "split")
    first |= {f"split {name}": one for name, one in splits.items()}
    first["merge"] = dataset_tools.merge_datasets([data, opened(root)], "local/merged", output_dir=folder / "merge")
    for name in ("sensor_index", "observation.images.View2_left"):
        if name in data.features:
            made = dataset_tools.remove_feature(data, name, output_dir=folder / name, repo_id="local/removed")
            first[f"remove {name}"] = made
    found = {}
    for name, one in first.items():
        rows = [one[k] for k in range(len(one))]  # every frame and its pictures
        found[name] = {"state": [row["observation.state"].tolist() for row in rows]}
        found[name]["episodes"] = [int(row["episode_index"]) for row in rows]
        assert all(np.isfinite(row["observation.images.View1_left"].numpy()).all() for row in rows)
    return found


def stats(root, truth):
    data, away = opened(root), {}
    table = data.hf_dataset.with_format("numpy")[:]
    for number in range(data.meta.total_episodes):
        chosen = np.asarray(table["episode_index"]) == number
        held = dataset_tools._load_episode_with_stats(data, number)
        columns = {key: np.stack(table[key])[chosen] for key in table if key in data.features}
        columns = {key: np.asarray(one, float) for key, one in columns.items()}
        for place, view in enumerate(truth["views"]):
            columns[f"observation.images.{view}"] = [str(path) for path in truth["pictures"][place][chosen]]
        theirs = compute_stats.compute_episode_stats(columns, data.features)
        for key, one in theirs.items():
            for name, value in one.items():
                flat = np.array(np.asarray(held[f"stats/{key}/{name}"]).tolist(), float).reshape(value.shape)
                scale = max(float(np.abs(one["max"] - one["min"]).max()), 1e-6)
                label = f"{'video' if 'images' in key else 'table'} {name}"
                away[label] = max(away.get(label, 0.0), float(np.abs(flat - value).max()) / scale)
    total = compute_stats.aggregate_stats(
        [{key: {n: np.array(np.asarray(v).tolist()) for n, v in one.items()} for key, one in data.meta.stats.items()}]
    )
    return {"away": away, "keys": sorted(total), "counts": {key: int(one["count"][0]) for key, one in total.items()}}


def write(folder, truth):
    views = [str(view) for view in truth["views"]]
    size = truth["pictures"].shape[2:]
    picture = {"dtype": "video", "shape": tuple(size), "names": ["height", "width", "channels"]}
    vector = {name: {"dtype": "float32", "shape": truth[name].shape[1:], "names": None} for name in ("state", "action")}
    vector["state"]["names"] = [str(name) for name in truth["names"]]
    features = {"observation.state": vector["state"], "action": vector["action"]}
    features |= {f"observation.images.{view}": dict(picture) for view in views}
    data = LeRobotDataset.create("local/made", int(truth["fps"]), features, root=folder, vcodec="h264")
    for number in range(len(truth["lengths"])):
        for k in range(int(truth["lengths"][:number].sum()), int(truth["lengths"][: number + 1].sum())):
            frame = {"observation.state": truth["state"][k], "action": truth["action"][k], "task": f"task {number % 2}"}
            data.add_frame(frame | {f"observation.images.{v}": truth["pictures"][n][k] for n, v in enumerate(views)})
        data.save_episode(parallel_encoding=False)
    data.finalize()
    return {"frames": int(truth["lengths"].sum())}


if __name__ == "__main__":
    what, root, other = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    given = other if what == "edit" else np.load(other, allow_pickle=False)
    print(json.dumps({"read": read, "edit": edit, "stats": stats, "write": write}[what](root, given)))
