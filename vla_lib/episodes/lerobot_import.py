"""A LeRobot dataset (format v3.0) comes in as raw episodes of layout F3, which everything here opens and prepares.

    ROOT/NAME/datasets.yaml                instruction and weight of each task
    ROOT/NAME/TASK/data_collection_*/      robot_state_*.csv, ViewN/*.jpg, sensor_data_*.npz where an export had one

What an action means is not in the format, so it is declared. An episode's action here is the motion of its states, as
of every recording; the declared actions are compared with that motion first, and refused where they contradict it.
Source: `lerobot/datasets/lerobot_dataset.py` and `utils.py` of LeRobot 0.4.4.
"""

import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from math import ceil
from pathlib import Path
from typing import Annotated, Any, Literal

import av
import numpy as np
import pyarrow.parquet as pq
import yaml
from annotated_types import Ge, Gt, Le
from PIL import Image
from scipy.spatial.transform import Rotation

from vla_lib.core.errors import UserError, needing_room
from vla_lib.core.files import make_folder, read_json, write_json, write_text
from vla_lib.core.progress import Progress
from vla_lib.core.settings import Settings, flag, settings
from vla_lib.episodes.datasets import DEFAULT, TABLE_NAME
from vla_lib.episodes.layouts import CHANNELS
from vla_lib.episodes.poses import apply_action, delta_action, euler_deg, interpolate, rotation

RECORD = "lerobot_import.json"
VIEW = re.compile(r"View([1-9])(?:_(left|right))?$")
PLACE = re.compile(r"(^|[._])x(_m|_mm)?$")
MOST_LAG = 3  # steps by which an arm may follow its command
CONTRADICTS = 0.5  # part of the motion (RMS) that the actions leave unexplained; a guess, noise and lag stay below
CLEARER = 0.02, 3.0  # from this part on, another meaning that fits so many times better is the right one (a guess)
WAY = 1.0, 10_000.0  # the longest way of an episode in mm lies between; a guess
CHECKED = 200  # episodes, evenly over all, whose actions are compared
STILL = (0.02, 0.02)  # RMS motion a step in mm and degrees below which nothing can be compared
UNKNOWN_START_S = 946_684_800.0  # 2000-01-01, where a dataset does not tell when it was recorded
BEFORE_S = 1.0  # of the sensor before the first step: the longest window
MEANINGS: dict[str, tuple[str, ...]] = {"actions": ("pose", "delta"), "frame": ("base", "tool")}
MEANINGS |= {"angles": ("deg", "rad"), "rotation": ("euler", "rpy", "rotvec")}
"""What is tried beside what was declared."""


@settings
class ImportSettings(Settings):
    """Bring a LeRobot dataset v3.0 in as raw episodes below a root, and prepare them."""

    from_lerobot: Path  # Folder of the LeRobot dataset (with meta/, data/, videos/)
    dataset_root: Path  # Folder of the dataset folders; the new one gets the name of the LeRobot dataset
    actions: Literal["pose", "delta", "joints"]
    """What an action is: the pose to go to, the motion to make, or the joints to go to. Checked against the states."""
    frame: Literal["base", "tool"] = "base"  # In which frame a delta is given
    lengths: Literal["mm", "m"] = "mm"  # Of states and actions
    angles: Literal["deg", "rad"] = "deg"  # Of states and actions
    rotation: Literal["euler", "rpy", "rotvec"] = "euler"
    """Orientation of poses: intrinsic XYZ angles (Mecademic), extrinsic xyz angles (ROS), or a rotation vector; that of
    a delta is always a rotation vector."""
    pose_at: Annotated[int, Ge(0)] | None = None  # First of the six pose numbers in observation.state; default: by name
    joints_at: Annotated[int, Ge(0)] | None = None  # First of six joints in observation.state; default: by name
    action_hz: Annotated[float, Gt(0), Le(1000)] = 10.0  # Actions a second of the prepared episodes


@dataclass(frozen=True)
class Steps:
    """The states and actions of one LeRobot episode, in mm and degrees."""

    pose: np.ndarray  # (N, 6) intrinsic XYZ
    joints: np.ndarray | None  # (N, 6)
    action: np.ndarray  # (N, width), lengths and angles converted, for `kind`

    def targets(self, kind: str, frame: str) -> np.ndarray:
        """(N, 6) where each action leads: a pose, or joints."""
        if kind != "delta":
            return self.action[:, :6]
        delta = self.action[:, :6].copy()
        if frame == "tool":
            turned = rotation(self.pose[:, 3:])
            delta[:, :3], delta[:, 3:] = turned.apply(delta[:, :3]), turned.apply(delta[:, 3:])
        return apply_action(self.pose, delta)


class LeRobotDataset:
    """A dataset's tables, read episode by episode. Raises UserError where it is none, or not of v3."""

    def __init__(self, path: Path, settings: ImportSettings):
        self.path, self.settings = path, settings
        self.info: dict[str, Any] = read_json(path / "meta" / "info.json")
        version = str(self.info.get("codebase_version"))
        if not version.startswith("v3."):
            remedy = "convert it with LeRobot's convert_dataset_v21_to_v30"
            raise UserError(f"{path} is of LeRobot's format {version}, v3 is needed; {remedy}.")
        self.features, self.fps = self.info["features"], float(self.info["fps"])
        for name in ("observation.state", "action"):
            if len(self.features.get(name, {}).get("shape", ())) != 1:
                raise UserError(f"{path} has no vector {name} (features: {', '.join(self.features)}).")
        names = [str(name).lower() for name in _flat(self.features["observation.state"].get("names"))]
        at = [k for k, name in enumerate(names) if PLACE.search(name)]
        self.pose_at = settings.pose_at if settings.pose_at is not None else next(iter(at), None)
        numbered = [k for k, name in enumerate(names) if re.match(r"j(oint)?_?1(\D|$)", name)]
        self.joints_at = settings.joints_at if settings.joints_at is not None else next(iter(numbered), None)
        width = self.features["observation.state"]["shape"][0]
        if self.pose_at is None or self.pose_at + 6 > width:
            held = f"its {width} numbers are {', '.join(names) or 'not named'}"
            raise UserError(f"No pose is known in observation.state of {path}: {held}; say with --pose-at where it is.")
        if self.features["action"]["shape"][0] < 6:
            raise UserError(f"An action of {path} has {self.features['action']['shape'][0]} numbers, 6 are needed.")

    @cached_property
    def episodes(self) -> list[dict[str, Any]]:
        """One row an episode, by number; without its statistics."""
        rows = []
        for file in sorted((self.path / "meta" / "episodes").glob("*/*.parquet")):
            wanted = [name for name in pq.read_schema(file).names if not name.startswith("stats/")]
            rows += pq.read_table(file, columns=wanted).to_pylist()
        return sorted(rows, key=lambda row: int(row["episode_index"]))

    @property
    def cameras(self) -> list[str]:
        return [name for name, one in self.features.items() if one["dtype"] in ("video", "image")]

    @cached_property
    def views(self) -> dict[str, tuple[int, str]]:
        """Feature of each camera -> number and side of its view: by name, else the next that is free."""
        found = {name: (int(m[1]), m[2] or "left") for name in self.cameras if (m := VIEW.search(name))}
        free = [number for number in range(1, 10) if number not in {number for number, _ in found.values()}]
        others = [name for name in self.cameras if name not in found][: len(free)]
        return found | {name: (number, "left") for name, number in zip(others, free, strict=False)}

    def table(self, row: dict[str, Any], *columns: str) -> Any:
        """Columns of an episode's frames."""
        place = {"chunk_index": row["data/chunk_index"], "file_index": row["data/file_index"]}
        file = self.path / self.info["data_path"].format(**place)
        found = pq.read_table(file, columns=list(columns), filters=[("episode_index", "=", row["episode_index"])])
        if len(found) != row["length"]:
            raise UserError(f"{file} holds {len(found)} frames of episode {row['episode_index']}, not {row['length']}.")
        return found

    def steps(self, row: dict[str, Any], chosen: ImportSettings) -> Steps:
        """An episode's states and actions, as `chosen` says what they mean."""
        table = self.table(row, "observation.state", "action")
        state, action = (np.array(table[name].to_pylist(), float) for name in ("observation.state", "action"))
        if not (np.isfinite(state).all() and np.isfinite(action).all()):
            raise UserError(f"Episode {row['episode_index']} of {self.path} holds values that are no numbers.")
        degrees = np.degrees if chosen.angles == "rad" else np.asarray
        joints = degrees(state[:, self.joints_at :][:, :6]) if self.joints_at is not None else None
        assert self.pose_at is not None
        pose = _pose(state[:, self.pose_at : self.pose_at + 6], chosen)
        if chosen.actions == "joints":
            action = degrees(action)
        else:
            action = _pose(action[:, :6], replace(chosen, rotation="euler") if chosen.actions == "delta" else chosen)
        return Steps(pose, joints, action)

    def pictures(self, row: dict[str, Any], camera: str) -> Iterator[Image.Image]:
        """The pictures of an episode's frames, in order. Raises UserError where one is missing."""
        if self.features[camera]["dtype"] == "image":
            for cell in self.table(row, camera)[camera]:
                yield Image.open(io.BytesIO(cell.as_py()["bytes"])).convert("RGB")
            return
        name, wanted = f"videos/{camera}", 0
        place = {"chunk_index": row[f"{name}/chunk_index"], "file_index": row[f"{name}/file_index"]}
        file = self.path / self.info["video_path"].format(video_key=camera, **place)
        begin_s = float(row[f"{name}/from_timestamp"])
        try:
            with av.open(str(file)) as container:
                container.seek(int(begin_s * av.time_base))
                for frame in container.decode(video=0):
                    if frame.time is not None and round((frame.time - begin_s) * self.fps) == wanted:
                        yield frame.to_image()
                        wanted += 1
                        if wanted == row["length"]:
                            return
        except (av.FFmpegError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}).") from error
        raise UserError(f"{file} ends at frame {wanted} of {row['length']} of episode {row['episode_index']}.")


def _pose(values: np.ndarray, chosen: ImportSettings) -> np.ndarray:
    """(N, 6) in mm and intrinsic XYZ angles in degrees; a vector in degrees where `chosen` says euler of a delta."""
    place = values[:, :3] * 1000 if chosen.lengths == "m" else values[:, :3]
    turn = np.degrees(values[:, 3:6]) if chosen.angles == "rad" else values[:, 3:6]
    if chosen.rotation == "rpy":
        turn = euler_deg(Rotation.from_euler("xyz", turn, degrees=True))
    elif chosen.rotation == "rotvec":
        turn = euler_deg(Rotation.from_rotvec(turn, degrees=True))
    return np.hstack([place, turn])


def _flat(names: Any) -> list[Any]:
    """Names of a vector's numbers: LeRobot has them as a list, or as a dict of lists."""
    inner = names.values() if isinstance(names, dict) else [names or []]
    return [name for part in inner for name in (part if isinstance(part, list) else [part])]


# ---- what the actions mean


@dataclass(frozen=True)
class Residual:
    """How far the states are from where the actions lead, as a part of the motion (RMS), at the best lag."""

    part: float  # the larger of the two below, of what moves
    place: float
    turn: float
    lag: int  # steps

    def __str__(self) -> str:
        later = f", {self.lag} step(s) later" if self.lag else ""
        return f"{self.place:.1%} of the motion in place, {self.turn:.1%} in rotation{later}"


def residual(episodes: list[Steps], kind: str, frame: str = "base") -> Residual:
    """Compare actions with the motion of the states. Raises UserError where the states hold no joints to compare."""
    found = []
    for lag in range(MOST_LAG + 1):
        away, moved, count = np.zeros(2), np.zeros(2), 0
        for one in episodes:
            state = one.joints if kind == "joints" else one.pose
            if state is None:
                raise UserError("The states hold no joints to compare the actions with; say with --joints-at where.")
            after, target = state[1 + lag :], one.targets(kind, frame)[: len(state) - 1 - lag]
            now = state[lag : len(state) - 1] if kind == "delta" else state[: len(state) - 1 - lag]
            if kind == "delta" and lag:  # the motion of one step, made later
                target = apply_action(now, delta_action(state[: len(now)], target))
            if len(after):
                compare = np.subtract if kind == "joints" else lambda a, b: delta_action(a, b)[..., :6]
                for total, values in ((away, compare(after, target)), (moved, compare(now, after))):
                    total += [np.square(values[:, :3]).sum(), np.square(values[:, 3:]).sum()]
                count += len(after)
        rest = np.square(STILL) * max(count, 1)
        place, turn = np.sqrt(away / np.maximum(moved, rest))
        found.append(Residual(float(max(place, turn)), float(place), float(turn), lag))
    return min(found, key=lambda one: one.part)


def check_actions(source: LeRobotDataset, rows: Sequence[dict[str, Any]]) -> Residual:
    """The residual of the declared actions. Raises UserError where they contradict the states, with what fits."""
    chosen = source.settings

    def tried(settings: ImportSettings) -> Residual:
        return residual([source.steps(row, settings) for row in rows], settings.actions, settings.frame)

    found, others = tried(chosen), []
    for name, values in MEANINGS.items() if chosen.actions != "joints" else ():
        for value in values:
            told: dict[str, Any] = {name: value}
            other = replace(chosen, **told)
            if value != getattr(chosen, name) and not (name == "frame" and chosen.actions == "pose"):
                others.append((tried(other), f"{flag(name)} {value}"))
    if chosen.actions == "pose":
        others += [(tried(replace(chosen, actions="delta", frame="tool")), "--actions delta --frame tool")]
    best = min(others, key=lambda pair: pair[0].part, default=(found, ""))
    clearer = found.part > CLEARER[0] and best[0].part * CLEARER[1] < found.part
    if found.part <= CONTRADICTS and not clearer:
        return found
    said = f"{chosen.actions} in the {chosen.frame} frame" if chosen.actions == "delta" else chosen.actions
    text = f"The actions are no {said}, or written otherwise: the states are away from them by {found}"
    remedy = f"with {best[1]} it would be {best[0]}" if clearer else "look at the flags, and at --pose-at"
    raise UserError(f"{text}; {remedy}.")


def check_units(source: LeRobotDataset, rows: Sequence[dict[str, Any]]) -> None:
    """Raises UserError where the states cannot be in the declared units: actions in the same ones would agree."""
    written = replace(source.settings, lengths="mm", angles="deg", rotation="euler")  # nothing is converted
    poses = [source.steps(row, written).pose for row in rows]
    way = max(float(np.ptp(pose[:, :3], axis=0).max()) for pose in poses)
    turned, lengths = max(float(np.abs(pose[:, 3:]).max()) for pose in poses), source.settings.lengths
    if not WAY[0] <= way * (1000 if lengths == "m" else 1) <= WAY[1]:
        said = f"The places change by {way:.3g} {lengths} at most in an episode"
        raise UserError(f"{said}; give --lengths {'mm' if lengths == 'm' else 'm'}, or look at --pose-at.")
    if source.settings.angles == "rad" and turned > 2 * np.pi + 0.01:
        raise UserError(f"The angles go up to {turned:.3g}, too far for radians; give --angles deg.")


# ---- the episodes


def bring_in(settings: ImportSettings) -> dict[str, Any]:
    """Write the raw episodes; returns `folder` (the dataset), `residual`, `views`, `left_out`.

    An interrupted import goes on behind its last whole episode. Raises UserError where the declared actions contradict
    the states, where the dataset is not whole, or where its folder below the root is somebody else's.
    """
    source = LeRobotDataset(settings.from_lerobot, settings)
    rows = source.episodes
    if not rows:
        raise UserError(f"{source.path} holds no episode.")
    few = rows[:: ceil(len(rows) / CHECKED)]
    found = check_actions(source, few)
    check_units(source, few)
    folder = settings.dataset_root / _slug(settings.from_lerobot.resolve().name)
    digest = hashlib.sha256((source.path / "meta" / "info.json").read_bytes() + repr(settings).encode()).hexdigest()
    known = folder / RECORD
    if folder.is_dir() and (not known.exists() or read_json(known).get("inputs") != digest[:32]):
        raise UserError(f"{folder} is there and is not this import; move it away, or choose another --dataset-root.")
    table: dict[str, Any] = {}
    with needing_room(folder, "Make room and give the same command again, which goes on."):
        make_folder(folder)
        told = {"inputs": digest[:32], "settings": settings.record(), "residual": str(found)}
        write_json(known, told | {"views": {name: f"View{number}" for name, (number, _) in source.views.items()}})
        with Progress(sum(row["length"] for row in rows), "importing", "frames") as progress:
            for row in rows:
                instruction = (row["tasks"] or [DEFAULT["instruction"]])[0]
                entry = {"instruction": instruction, "weight": float(row.get("vla/weight") or 1.0)}
                task = _slug(str(row.get("vla/dataset") or instruction))[:60]
                while table.setdefault(f"{folder.name}/{task}", entry) != entry:
                    task += "_"
                _write_episode(source, row, folder / task, found.lag)
                progress.update(row["length"])
        write_text(folder / TABLE_NAME, yaml.safe_dump(table, allow_unicode=True, sort_keys=False))
    left_out = [f"{name}: there is no number left for its view" for name in source.cameras if name not in source.views]
    width = source.features["action"]["shape"][0]
    if width > 6:
        left_out.append(f"the last {width - 6} of an action's {width} numbers: a needle has no gripper")
    return {"folder": folder, "residual": str(found), "views": source.views, "left_out": left_out}


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text, flags=re.ASCII).strip("_") or "dataset"


def _write_episode(source: LeRobotDataset, row: dict[str, Any], parent: Path, lag: int) -> None:
    """Write one raw episode under another name, then rename it: it is there whole or not at all."""
    start_s = row.get("vla/start_unix_s")
    if start_s is None:
        start_s = UNKNOWN_START_S + row["dataset_from_index"] / source.fps + 10.0 * row["episode_index"]
    stamp = datetime.fromtimestamp(start_s, UTC).strftime("%Y%m%d_%H%M%S")
    folder = parent / f"data_collection_{stamp}_{row['episode_index']:06d}"
    if folder.is_dir():
        return
    partial = parent / f".{folder.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # of a run of ours that was killed
    make_folder(partial)
    _write_robot(source, row, start_s, partial / f"robot_state_{stamp}.csv", lag)
    for camera, (number, side) in source.views.items():
        make_folder(partial / f"View{number}")
        for frame, picture in enumerate(source.pictures(row, camera)):
            taken_s = start_s + frame / source.fps - 0.0005  # the newest at the step's time, however that is rounded
            picture.save(partial / f"View{number}" / f"ZED_import_{side}_{taken_s:.6f}.jpg", quality=95, subsampling=0)
    end_s = start_s + row["length"] / source.fps
    _write_sensor(source, row, (start_s - BEFORE_S, end_s), partial / f"sensor_data_{stamp}.npz")
    os.rename(partial, folder)


def _write_robot(source: LeRobotDataset, row: dict[str, Any], start_s: float, path: Path, lag: int) -> None:
    """Write the states, and where the last action leads, as a robot log; between them where they are too few."""
    chosen = source.settings
    steps = source.steps(row, chosen)
    t_s = np.arange(len(steps.pose) + 1) / source.fps
    pose, joints = steps.pose, steps.joints
    if chosen.actions == "joints" or lag:
        t_s = t_s[:-1]  # nobody knows where the tool is one step after the last
    else:
        pose = np.vstack([pose, steps.targets(chosen.actions, chosen.frame)[-1]])
        joints = np.vstack([joints, joints[-1]]) if joints is not None else None
    between = ceil(chosen.action_hz / source.fps - 1e-9)
    at_s = np.arange((len(t_s) - 1) * between + 1) / (source.fps * between)
    poses, _ = interpolate(t_s, pose, at_s)
    columns = {"origin_timestamp": start_s + at_s}
    columns["origin_timestamp"][-1] += 2e-6  # the last step must not be lost to the rounding of its ends
    if joints is not None:
        columns |= {f"joint_{k + 1}": np.interp(at_s, t_s, joints[:, k]) for k in range(6)}
    columns |= {f"pose_{axis}": poses[:, k] for k, axis in enumerate("xyzabr")}
    table, formats = np.column_stack(list(columns.values())), ["%.6f"] + ["%.9g"] * (len(columns) - 1)
    np.savetxt(path, table, formats, ",", header=",".join(columns), comments="")


def _write_sensor(source: LeRobotDataset, row: dict[str, Any], span: tuple[float, float], path: Path) -> None:
    """Write the part of an exported sensor stream that an episode needs; nothing where there is none."""
    place = Path(row.get("vla/sensor") or "")
    if not place.name:
        return
    if place.is_absolute() or ".." in place.parts:
        raise UserError(f"{source.path} names a sensor stream outside its folder ({place}); it is not read.")
    folder = source.path / place
    try:
        t_s = np.load(folder / "timestamp.npy", allow_pickle=False)
        samples = np.load(folder / "sensor.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"The sensor stream {folder} cannot be read ({error}).") from error
    if samples.shape != (len(t_s), CHANNELS):
        raise UserError(f"{folder} holds {samples.shape} samples and {len(t_s)} times; both must be of one stream.")
    part = slice(*np.searchsorted(t_s, span))
    np.savez(path, timestamps=t_s[part], forces=samples[part, 0], alines=samples[part, 1:])
