"""A prepared episode and its raw files in; random steps computed again by another route, and the differences, out.

The other route shares no code with the preparation: scipy's Slerp over whole logs, unwrapped angles, and plain searches.
"""

from typing import Any

import numpy as np
import pandas as pd
from scipy.spatial.transform import Rotation, Slerp

from vla_lib.episodes.episode import Episode
from vla_lib.episodes.prepared import PreparedEpisode
from vla_lib.episodes.steps import pose_rows

Array = np.ndarray[Any, Any]


def recheck(prepared: PreparedEpisode, episode: Episode, count: int = 20, seed: int = 0) -> pd.DataFrame:
    """One row per random valid step: differences between data.pkl and the raw files.

    Columns: step, seconds (since the start), position_mm and rotation_deg (largest difference of the action), picture and
    sensor (whether the indices agree for all views and for the stream), sample (whether the newest sensor sample is the same,
    number by number), and the action of both routes (`stored`, `recomputed`, (6,) each).
    """
    rows = pose_rows(episode.robot)
    t_s, pose = episode.robot.t_s[rows], episode.robot.pose[rows]
    slerp = Slerp(t_s, Rotation.from_euler("XYZ", pose[:, 3:], degrees=True))
    usable = np.flatnonzero(prepared.valid)
    chosen = np.sort(np.random.default_rng(seed).choice(usable, min(count, len(usable)), replace=False))
    euler = prepared.metadata.get("rotation") == "euler"
    found = []
    for step in chosen.tolist():
        begin = float(prepared.timestamp[step])
        end = min(begin + 1.0 / prepared.action_hz, float(t_s[-1]))
        place = [np.array([np.interp(t, t_s, pose[:, k]) for k in range(3)]) for t in (begin, end)]
        before, after = slerp([begin])[0], slerp([end])[0]
        if euler:
            a, b = (r.as_euler("XYZ", degrees=True) for r in (before, after))
            turn = (b - a + 180.0) % 360.0 - 180.0
        else:
            turn = (after * before.inv()).as_rotvec(degrees=True)
        recomputed = np.concatenate([place[1] - place[0], turn])
        stored = prepared.action[step, :6].astype(float)
        pictures = all(
            _newest(p.t_s, begin) == int(prepared.image_index[view][step]) for view, p in episode.pictures.items()
        )
        sensor, sample = _compare_sensor(prepared, episode, step, begin)
        found.append(
            {
                "step": step,
                "seconds": begin - episode.start_s,
                "position_mm": float(np.abs(stored - recomputed)[:3].max()),
                "rotation_deg": float(np.abs(stored - recomputed)[3:].max()),
                "picture": pictures,
                "sensor": sensor,
                "sample": sample,
                "stored": stored,
                "recomputed": recomputed,
            }
        )
    return pd.DataFrame(found)


def _newest(t_s: Array, at_s: float) -> int:
    before = np.flatnonzero(t_s <= at_s)
    return int(before[-1]) if len(before) else -1


def _compare_sensor(prepared: PreparedEpisode, episode: Episode, step: int, at_s: float) -> tuple[bool, bool]:
    if episode.sensor is None or not prepared.has_sensor:
        same = (episode.sensor is None) == (not prepared.has_sensor)
        return same, same
    number = _newest(episode.sensor.t_s, at_s)
    index_same = number + 1 == int(prepared.sensor_index[step])
    if number < 0:
        return index_same, True
    raw = episode.sensor.rows(np.array([number]))[0]
    return index_same, bool(np.array_equal(raw, prepared.sensor[number], equal_nan=True))
