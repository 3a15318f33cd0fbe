import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from vla_lib.core.errors import UserError
from vla_lib.core.files import append_jsonl, atomic_path, read_json, read_jsonl, write_json, write_text


def test_a_failed_write_leaves_the_old_file_and_no_leftover(tmp_path):
    path = tmp_path / "record.json"
    write_text(path, "old")
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["record.json"]


def test_a_killed_writer_never_shows_half_a_file(tmp_path):
    path = tmp_path / "big.json"
    write_json(path, {"n": 0})
    code = (
        "import sys, itertools; from vla_lib.core.files import write_json\n"
        "for n in itertools.count(): write_json(sys.argv[1], {'n': n, 'pad': 'x' * 200_000})"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)])
    while read_json(path)["n"] < 3:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert json.loads(path.read_text())["n"] >= 3


def test_json_takes_paths_and_numpy(tmp_path):
    write_json(tmp_path / "a.json", {"path": tmp_path, "scalar": np.float32(0.5), "array": np.arange(3)})
    assert read_json(tmp_path / "a.json") == {"path": str(tmp_path), "scalar": 0.5, "array": [0, 1, 2]}


def test_a_broken_json_file_is_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(UserError, match="a.json cannot be read as JSON"):
        read_json(tmp_path / "a.json")


def test_json_lines_leave_out_a_line_still_being_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"step": 1})
    append_jsonl(path, {"step": 2})
    with open(path, "a") as file:
        file.write('{"step": 3, "lo')
    assert read_jsonl(path) == [{"step": 1}, {"step": 2}]


def test_a_line_that_the_disk_took_only_in_part_is_an_error(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, data[:5]))
    with pytest.raises(OSError, match="No space left"):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": 1})
