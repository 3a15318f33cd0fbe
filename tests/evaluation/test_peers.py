"""Peers: what a policy in another Python is shown and answers, and what is kept of an interrupted benchmark."""

import subprocess
import sys
from threading import Barrier
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.peers import PeerExpert, linked, once, side_by_side, table

FAKE = """
import io, struct, sys
import numpy as np
while head := sys.stdin.buffer.read(8):
    given = np.load(io.BytesIO(sys.stdin.buffer.read(struct.unpack("<q", head)[0])))
    state, pictures = given["state"], given["pictures"]
    chunk = np.zeros((8, 7), np.float32)
    chunk[:, 0], chunk[:, 1] = state[0, 0], state[1, 0]
    chunk[:, 2], chunk[:, 3] = pictures[1, 0].mean(), pictures[1, 1].mean()
    chunk[:, 4:] = pictures.shape[:3]
    answer = io.BytesIO()
    np.save(answer, chunk)
    sys.stdout.buffer.write(struct.pack("<q", len(answer.getvalue())) + answer.getvalue())
    sys.stdout.buffer.flush()
"""


def seen(value: int) -> SimpleNamespace:
    pictures = {view: np.full((90, 160, 3), value + k, np.uint8) for k, view in enumerate(("View1_left", "View5"))}
    return SimpleNamespace(state=np.full(12, float(value)), pictures=pictures)


def test_a_peer_sees_the_observation_before_and_the_current_one():
    with subprocess.Popen([sys.executable, "-c", FAKE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        expert = PeerExpert(process, ("View1_left", "View5"), (32, 18))
        answers = []
        for value in (10, 20, 30):
            now = seen(value)
            tokens, _ = expert.compute(now.pictures, "")
            answers.append(expert(SimpleNamespace(tokens=tokens), 0.0, now.state, None)[0])
            expert.watch(None, now)
        process.stdin.close()
    # at the start the current one stands for both
    assert [tuple(answer[:4]) for answer in answers] == [(10, 10, 11, 11), (10, 20, 11, 21), (20, 30, 21, 31)]
    assert tuple(answers[0][4:]) == (2, 2, 18) and len(expert.asked_s) == 3


def test_what_is_done_is_not_done_again(tmp_path):
    calls = []
    for _ in range(2):
        assert once(tmp_path / "one" / "training.json", lambda: calls.append(1) or {"steps": 3}) == {"steps": 3}
    assert calls == [1]


def test_the_table_has_a_row_a_policy():
    closed = {"summary": {"successes": 3, "rollouts": 4, "interval_95": (0.3, 0.95), "punctured": 4}}
    training = {"steps": 10, "batch": 8, "cpu_s": 5.0, "cache_cpu_s": 3.0, "parameters": 2e6}
    opened = {"translation_mae_mm": 0.2, "rotation_mae_deg": 0.1}
    one = {"training": training, "open_loop": opened, "closed_loop": closed, "loader": {"samples_per_s": 90.0}}
    row = table({"LeRobot ACT": one}).iloc[0].to_dict()
    assert row["success"] == "3 of 4" and row["CPU s a step"] == "0.500" and row["95 % interval"] == "30 to 95 %"
    assert (row["CPU s"], row["CPU s of the cache"]) == ("5", "3")


def test_a_root_without_its_cache(tmp_path):
    (tmp_path / "data" / "White" / "episode").mkdir(parents=True)
    (tmp_path / "data" / "White" / "episode" / "data.pkl").write_text("prepared")
    (tmp_path / "data" / "cache").mkdir()
    for _ in range(2):
        root = linked(tmp_path / "data", tmp_path / "out" / "root")
    assert [one.name for one in root.iterdir()] == ["White"]
    assert (root / "White" / "episode" / "data.pkl").read_text() == "prepared"


def test_two_at_once_keep_their_names_and_a_failure_is_no_result():
    meet = Barrier(2, timeout=30)  # each waits for the other
    found = side_by_side({name: lambda name=name: (meet.wait(), name.upper())[1] for name in ("act", "diffusion")})
    assert found == {"act": "ACT", "diffusion": "DIFFUSION"}
    with pytest.raises(ZeroDivisionError):
        side_by_side({"good": lambda: 1, "bad": lambda: 1 / 0})
