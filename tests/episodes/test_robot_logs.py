"""Robot logs as people's loggers write them, and motion that cannot be true: each planted, and the figure checked."""

import numpy as np
import pytest
from raw_episodes import T0, Raw, smooth_pose

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
