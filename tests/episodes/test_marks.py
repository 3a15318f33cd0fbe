"""Decisions about episodes: one text file at the root, which every later step follows; verdicts that are kept."""

import errno
import json
from itertools import pairwise

import numpy as np
import pytest
import yaml
from preparing import prepare_all
from raw_episodes import Raw

from vla_lib import preprocess
from vla_lib.core.errors import UserError
from vla_lib.episodes import find_episodes, find_prepared, load_prepared, load_used
from vla_lib.episodes.datasets import Marks
from vla_lib.episodes.survey import left_out
from vla_lib.preprocess import Settings
from vla_lib.workbench.runs import data_state
from vla_lib.workbench.triage import episode_rows, first_that_opens, fitting

SMALL = Raw(seconds=2.0, camera_hz=2.0)
A, B, BROKEN = "part1/recv_all_20250101_000001", "part1/recv_all_20250101_000002", "part1/recv_all_20240101_000000"


@pytest.fixture
def root(tmp_path):
    """Two good episodes, and one that sorts first and has an empty log."""
    for key in (A, B):
        SMALL.write(tmp_path / "root" / "part1", key.split("/")[1])
    (tmp_path / "root" / BROKEN).mkdir()
    (tmp_path / "root" / BROKEN / "robot_state.csv").write_text("")
    return tmp_path / "root"


def judged(root, **more):
    return preprocess.main(Settings(root, workers=1, quiet=True, **more))


def state(root):
    return data_state({"dataset_root": str(root)})["fingerprint"]


def test_an_excluded_episode_is_left_out_everywhere_and_comes_back(root):
    judged(root)
    before, files = state(root), sorted(path.name for path in (root / B).iterdir())
    Marks.load(root).write(B, exclude=True, note="the camera was moved")
    assert [path.name for path in find_prepared(root)] == list(load_used(root))[0].split("/")[1:] == [A[6:]]
    assert left_out(root) == "1 of 2 prepared episodes: 1 excluded in marks.yaml"
    assert state(root) != before and sorted(path.name for path in (root / B).iterdir()) == files
    done = judged(root)
    assert (done["episodes"], done["excluded"]) == (2, 1)
    assert f"{B}: excluded in marks.yaml (the camera was moved)" in done["left_out"]
    Marks.load(root).write(B, exclude=None, note=None)
    assert state(root) == before and judged(root)["unchanged"] == 2
    assert [line[0] for line in (root / "marks.yaml").read_text().splitlines()] == ["#"]


def test_a_dataset_is_excluded_but_for_one_episode_and_weight_0_means_left_out(root):
    judged(root)
    (root / "marks.yaml").write_text(f"part1: {{exclude: true}}\n{A}: {{exclude: false}}\n")
    assert list(load_used(root)) == [A]
    (root / "marks.yaml").unlink()
    (root / "datasets.yaml").write_text("part1: {weight: 0}\n")
    assert find_prepared(root) == [] and "weight 0 in datasets.yaml" in left_out(root)
    with pytest.raises(UserError, match="All 2 prepared episodes .* are left out .*weight 0"):
        load_used(root)


def test_a_trim_shortens_the_steps_and_an_old_data_pkl_is_refused_until_prepared_again(root):
    judged(root)
    whole = load_prepared(root / A)
    action, times, index = whole.action, whole.timestamp, whole.sensor_index
    Marks.load(root).write(A, start_s=0.5, end_s=1.7)
    with pytest.raises(UserError, match=r"prepared before its line in marks.yaml was changed; run python -m"):
        load_used(root)
    done = judged(root)
    assert (done["written"], done["unchanged"]) == (1, 1)
    cut = load_used(root)[A]
    assert len(cut) == 12  # steps that begin at 0.5 to 1.6 s
    assert np.array_equal(cut.action, action[5:17]) and np.array_equal(cut.timestamp, times[5:17])
    assert np.array_equal(cut.sensor_index, index[5:17])
    assert "only 0.5 s to 1.7 s are used" in cut.metadata["report"]["summary"]["reasons"]


def test_a_task_is_said_in_the_instruction(tmp_path):
    Raw("F2", seconds=2.0, camera_hz=2.0).write(tmp_path / "New_dataset" / "Blue_point", "episode_20250101_000001")
    Marks.load(tmp_path).write("New_dataset/Blue_point", task="Red point")
    prepare_all(tmp_path)
    (episode,) = load_used(tmp_path).values()
    assert episode.instruction == "Perform Red point insertion task"


def test_marks_of_two_people_are_one_line_each_and_comments_stay(root):
    path = root / "marks.yaml"
    path.write_text(f"# ours\n{B}:  # by Kim\n  exclude: true\n  note: 흔들림\npart9: {{label: failure}}\n# end\n")
    marks = Marks.load(root).write(A, label="success", note='say "no": ok, #1')
    lines = path.read_text().splitlines()
    assert (lines[0], lines[-1], len(lines)) == ("# ours", "# end", 7) and lines[1].startswith(A)
    marks = marks.write(B, end_s=3.0)
    lines = path.read_text().splitlines()
    assert len(lines) == 5 and lines[2] == f"{B}: {{exclude: true, end_s: 3.0, note: 흔들림}}"
    assert (
        marks.of(A).said == {"label": "success", "note": 'say "no": ok, #1'}
        and len(yaml.safe_load(path.read_text())) == 3
    )
    marks.write(B, exclude=None, end_s=None, note=None)
    assert [line.split(":")[0] for line in path.read_text().splitlines()] == ["# ours", A, "part9", "# end"]
    for name in ("z", "b", "a c", "가"):
        marks.write(name, note=name)
    keys = [line.split(":")[0] for line in path.read_text().splitlines() if line[0] != "#"]
    assert all(a < b for a, b in pairwise(keys)) and len(keys) == 6


@pytest.mark.parametrize(
    "text, why",
    (
        ("a: {exclude: maybe}", "the mark of a is refused .exclude"),
        ("a: {exlude: true}", "exlude: Extra inputs"),
        ("a: {start_s: 3, end_s: 2}", "nothing is left"),
        ("a: {note: x}\na: {note: y}", "marks a twice .line 2"),
        ("<<<<<<< HEAD\na: {note: x}", "cannot be read as YAML"),
        ("- a", "must map episodes to marks"),
    ),
)
def test_marks_that_cannot_be_understood_are_refused_and_never_ignored(root, text, why):
    (root / "marks.yaml").write_text(text)
    for follow in (find_prepared, lambda root: judged(root), lambda root: data_state({"dataset_root": str(root)})):
        with pytest.raises(UserError, match=why):
            follow(root)


def rows(root):
    return {row["key"]: row for row in episode_rows(root, find_episodes(root))}


def test_verdicts_are_kept_for_rejected_episodes_and_stay_true(root):
    assert {row["verdict"] for row in rows(root).values()} == {"not judged yet"}
    judged(root)
    found = rows(root)
    assert found[BROKEN]["verdict"] == "rejected" and "no robot log" in found[BROKEN]["reasons"]
    assert found[A]["verdict"] == "good" and found[A]["steps"] == 19
    kept = (root / "verdicts.json").read_text()
    judged(root, dataset_dirs=(root / "part1",))
    assert (root / "verdicts.json").read_text() == kept  # a part of the root takes nothing away
    Marks.load(root).write(B, exclude=True)
    (root / BROKEN / "robot_state.csv").unlink()
    (root / BROKEN).rmdir()
    judged(root)
    assert set(json.loads((root / "verdicts.json").read_text())) == {A, B}
    (root / "verdicts.json").write_text("{")
    judged(root)
    assert rows(root)[A]["verdict"] == "good"


def test_a_broken_episode_that_sorts_first_is_passed_over_in_words(root):
    found = dict(zip(rows(root), find_episodes(root), strict=True))
    first = first_that_opens(fitting(found))
    assert first.key == A and first.episode.path == root / A
    assert len(first.broken) == 1 and "holds no robot log" in first.broken[0]
    assert first_that_opens(fitting(found, episode="20240101")) == ("", None, first.broken)
    with pytest.raises(UserError, match="the datasets there are part1"):
        fitting(found, "part2")


def test_a_read_only_root_is_one_sentence_and_no_verdict_on_the_recordings(root, monkeypatch):
    """The lock file, which is not there, cannot be made."""

    def refuse(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr("vla_lib.episodes.prepare.file_lock", refuse)
    with pytest.raises(UserError, match=r"cannot be written .Read-only file system.; give --output-root"):
        judged(root)
    assert not (root / "verdicts.json").exists()
    monkeypatch.setattr("vla_lib.episodes.datasets.file_lock", refuse)
    with pytest.raises(UserError, match=r"marks.yaml cannot be written .*Read-only.* Give a root that you may write"):
        Marks.load(root).write(A, exclude=True)
