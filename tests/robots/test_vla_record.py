"""`vla record`: an episode of a rig on loopback without a policy, and what a person says of it."""

import json

import pytest
from fake_rig import CameraHost, SensorHost, mapping, write

from benchmarks.fake_arm import FakeArm
from vla_lib import cli
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json
from vla_lib.episodes.episode import Episode
from vla_lib.workbench import record


def test_an_episode_is_recorded_without_a_policy(tmp_path, capsys):
    with FakeArm() as arm:
        content = mapping(arm)
        path = write(tmp_path / "robot.yaml", content)
        with CameraHost(content["zmq_port"]), SensorHost(content["sensor"]["port"]):
            words = [
                "record",
                "--robot",
                str(path),
                "--dataset-root",
                str(tmp_path),
                "--seconds",
                "1",
                "--dataset",
                "by_hand",
            ]
            assert cli.parse(words)() == 0
        assert not [text for _, text in arm.log if "Move" in text or "Resume" in text]
    (folder,) = (tmp_path / "by_hand").glob("data_collection_*")
    episode = Episode.open(folder)
    assert len(episode.robot.t_s) > 20 and len(episode.sensor.t_s) > 300 and len(episode.pictures) == 2
    told = capsys.readouterr().out
    assert "clock offset (ms)" in told and "notebook 01 opens it" in told
    assert "by_hand: {weight: 1, instruction: 'insert'}" in (tmp_path / "datasets.yaml").read_text()
    with pytest.raises(UserError, match="must be the name of a folder"):
        record.record(path, tmp_path, "../elsewhere", 1.0, "")


def test_a_person_is_asked_until_the_answer_is_one(tmp_path, capsys):
    folder = tmp_path / "by_hand" / "data_collection_1"
    folder.mkdir(parents=True)
    (folder / "rollout.json").write_text(json.dumps({"kind": "recording"}))
    answers = iter(["maybe", "n", "too deep", "Kim"])
    place = record.ask_outcome(folder, "", lambda question: next(answers))
    outcome = read_json(place / "rollout.json")["outcome"]
    assert (outcome["success"], outcome["note"], outcome["by"]) == (False, "too deep", "Kim")
    assert place.parent.name == "by_hand_failed"
