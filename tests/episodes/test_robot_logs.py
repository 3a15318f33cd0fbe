"""Robot logs as people's loggers write them, and motion that cannot be true: each planted, and the figure checked."""

import numpy as np
import pytest
from raw_episodes import T0, Raw, smooth_pose, true_action

from vla_lib.core.errors import UserError
from vla_lib.episodes import Episode, build_steps, judge


def said(episode):
    return " | ".join(f.text for f in judge(episode, build_steps(episode)))


def quoted(row):
    return ",".join(f'"{cell}"' for cell in row.split(","))


def rewritten(tmp_path, write):
    """An episode whose log's header and rows went through `write`; it returns text or bytes."""
    path = Raw(seconds=1.5, camera_hz=2.0).write(tmp_path / "d")
    log = next(path.glob("*.csv"))
    head, *body = log.read_text().splitlines()
    content = write(head, body)
    log.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def joined(*rows, end="\n"):
    return end.join(rows) + end


WAYS = {
    "a comma ends the rows": (lambda h, b: joined(h, *(r + "," for r in b)), "rows end with a value"),
    "a comma ends every line": (lambda h, b: joined(h + ",", *(r + "," for r in b)), ""),
    "one value more at the end": (lambda h, b: joined(h, *(r + ",0" for r in b)), "rows end with a value"),
    "an index without a name": (lambda h, b: joined(h, *(f"{k},{r}" for k, r in enumerate(b))), "rows begin with"),
    "an index below an empty name": (lambda h, b: joined("," + h, *(f"{k},{r}" for k, r in enumerate(b))), ""),
    "windows": (lambda h, b: "\ufeff" + joined(h, *b, end="\r\n"), ""),
    "an old mac": (lambda h, b: joined(h, *b, end="\r"), ""),
    "quotes": (lambda h, b: joined(*map(quoted, (h, *b))), ""),
    "utf-16": (lambda h, b: joined(h, *b).encode("utf-16"), "utf-16"),
    "utf-16 without its mark": (lambda h, b: joined(h, *b).encode("utf-16-le"), "utf-16-le"),
    "semicolons": (lambda h, b: joined(h, *b).replace(",", ";"), "separated by ';'"),
    "german": (lambda h, b: joined(h, *b).replace(",", ";").replace(".", ","), "decimal comma"),
    "decimal commas": (lambda h, b: joined(h, *(r.replace(".", ",") for r in b)), "decimal comma"),
    "quoted decimal commas": (lambda h, b: joined(h, *(quoted(r).replace(".", ",") for r in b)), "decimal comma"),
    "tabs": (lambda h, b: joined(h, *b).replace(",", "\t"), "tabs"),
    "spaces": (lambda h, b: joined(h, *b).replace(",", " , "), ""),
    "a comment": (lambda h, b: joined("# Meca500", "", h, *b), "before its header"),
    "two headers": (lambda h, b: joined(h, *b[:50], h, *b[50:]), "header is repeated 1 time(s), first in line 52"),
    "no header": (lambda h, b: joined(*b), "a guess"),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_log_means_the_same_however_it_is_written(tmp_path, way):
    write, words = WAYS[way]
    episode = Episode.open(rewritten(tmp_path, write))
    np.testing.assert_allclose(episode.robot.t_s - T0, np.arange(150) / 100, atol=1e-5)
    np.testing.assert_allclose(episode.robot.pose, smooth_pose(np.arange(150) / 100), atol=1e-6)
    assert words in said(episode)


REFUSED = {
    "a column twice": (lambda h, b: joined(h + ",pose_x", *(r + ",0.0" for r in b)), "pose_x stands twice"),
    "two values more": (lambda h, b: joined(h, *(r + ",0,0" for r in b)), "line 2: 18 cells .* below a header of 16"),
    "one value less": (lambda h, b: joined(h, *(r.rsplit(",", 1)[0] for r in b)), "line 2: 15 cells"),
    "no numbers": (lambda h, b: joined(h, *("\xff" * 90 for _ in b)), "line 2: 1 cells"),
    "quaternions": (
        lambda h, b: joined(h.replace("pose_a,pose_b,pose_r", "qw,qx,qy,qz"), *(r + ",0.5" for r in b)),
        "quaternion .columns qw, qx, qy, qz.*Euler",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_a_log_that_could_be_read_in_two_ways_is_refused_with_its_repair(tmp_path, way):
    write, words = REFUSED[way]
    with pytest.raises(UserError, match=words) as refused:
        Episode.open(rewritten(tmp_path, write))
    assert "robot_state" in str(refused.value) and "record" not in str(refused.value)


# --- motion that cannot be true ----------------------------------------------------------------------------------
def zeros_first(rows):
    rows[:3, 4:] = 0


def one_glitch(rows):
    rows[149:152, 10] += 80  # 30 ms, about a grid instant


def one_glitched_angle(rows):
    rows[150, 14] += 60


def a_jump_that_stays(rows):
    rows[155:, 10] += 80


def frozen_rows(rows):
    rows[101:155, 4:] = rows[100, 4:]  # while the arm moves on by 2 mm


def out_of_reach(rows):
    rows[150, 10:13] = 5000


@pytest.mark.parametrize(
    ("damage", "words", "invalid"),
    (
        (zeros_first, "3 rows (first at 0.00 s) hold a position of zeros", []),
        (one_glitch, "3 rows (first at 1.49 s) jump away", []),
        (one_glitched_angle, "1 rows (first at 1.50 s) jump away", []),
        (a_jump_that_stays, "the pose leaps 1 time(s)", [15]),
        (frozen_rows, "leaps 1 time(s), after up to 0.55 s without change", [10, 11, 12, 13, 14, 15]),
        (out_of_reach, "1 rows (first at 1.50 s) are out of reach", []),
    ),
)
def test_rows_that_cannot_be_true_make_no_action(tmp_path, damage, words, invalid):
    def edit(rows):
        damage(rows)
        return rows

    episode = Episode.open(Raw(seconds=4.0, edit_rows=edit).write(tmp_path / "d"))
    steps = build_steps(episode)
    assert np.flatnonzero(~steps.valid).tolist() == invalid
    expected = true_action(smooth_pose, steps.t_s - T0)
    assert np.abs(steps.action[:, :6] - expected)[steps.valid].max() < 0.02
    assert words in said(episode) and judge(episode, steps).verdict == "usable with exclusions"


def rests_and_darts(t):
    """Rests for a second, then 60 mm/s for 0.7 s."""
    pose = smooth_pose(np.clip(t, 0.0, 0.5))
    pose[..., 0] += 60 * np.clip(t - 1.5, 0, 0.7)
    return pose


@pytest.mark.parametrize(
    "raw",
    (
        Raw(seconds=4.0, pose=rests_and_darts),
        Raw(seconds=4.0, refresh_hz=60.0),
        Raw(seconds=4.0, row_times=np.sort(np.random.default_rng(0).normal(np.arange(0, 4, 0.01), 0.004))),
    ),
    ids=("a rest", "slow refresh", "jitter"),
)
def test_healthy_motion_is_left_alone(tmp_path, raw):
    episode = Episode.open(raw.write(tmp_path / "d"))
    assert [f.text for f in episode.findings if f.stream == "robot" and f.weight != "note"] == []
    assert not episode.robot.unknown


def test_metres_and_radians_are_converted_where_certain(tmp_path):
    def si(rows):
        rows[:, 10:13] /= 1000
        rows[:, 13:], rows[:, 4:10] = np.radians(rows[:, 13:]), np.radians(rows[:, 4:10])
        return rows

    episode = Episode.open(Raw(edit_rows=si).write(tmp_path / "d"))
    t = episode.robot.t_s - T0
    np.testing.assert_allclose(episode.robot.pose, smooth_pose(t), atol=2e-3)
    np.testing.assert_allclose(episode.robot.joints, 0.1 * smooth_pose(t), atol=2e-3)
    assert "positions are in metres" in said(episode) and "in radians" in said(episode)


def test_small_angles_beside_large_joints_stay_and_are_said_to_be_a_guess(tmp_path):
    def small(rows):
        rows[:, 13:] /= 10
        return rows

    episode = Episode.open(Raw(edit_rows=small).write(tmp_path / "d"))
    np.testing.assert_allclose(episode.robot.pose[:, 3:], smooth_pose(np.arange(0, 3, 0.01))[:, 3:] / 10, atol=1e-5)
    assert "read as degrees (a guess)" in said(episode)
