"""One owner of a folder at a time: on this machine, on others that share it, and after a death."""

import contextlib
import os
import subprocess
import sys
import threading

import pytest

from vla_lib.core import owner
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_json, write_json
from vla_lib.core.owner import Owner, living, owned, owner_file

TAKE = "import sys, time; from pathlib import Path; from vla_lib.core.owner import Owner; "
TAKE += "Owner.take(Path(sys.argv[1])); print('mine', flush=True); time.sleep(60)"


def test_a_second_owner_is_refused_and_a_killed_one_is_none(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", TAKE, str(tmp_path)], stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"mine\n"
    with pytest.raises(UserError, match=f"in use by process {other.pid} of this machine"):
        Owner.take(tmp_path)
    other.kill()
    other.wait()
    with owned(tmp_path), pytest.raises(UserError, match="in use by"):
        Owner.take(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_of_many_at_once_one_gets_it_also_over_a_dead_one(tmp_path):
    for dead in (None, {"machine": owner.machine(), "host": "h", "pid": 2**22 + 1, "pid_created": 1.0, "token": "t"}):
        if dead:
            write_json(owner_file(tmp_path), dead)
        got, begin = [], threading.Barrier(8)

        def take(got=got, begin=begin):
            begin.wait()
            with contextlib.suppress(UserError):
                got.append(Owner.take(tmp_path))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(got) == 1
        got[0].check()
        got[0].release()
        assert list(tmp_path.iterdir()) == []


def test_another_machines_owner_is_known_by_its_heartbeat(tmp_path, monkeypatch):
    there = {"machine": "there 1", "host": "there", "pid": os.getpid(), "pid_created": 1.0, "token": "t"}
    write_json(owner_file(tmp_path), there)
    with pytest.raises(UserError, match=rf"in use by process {os.getpid()} on there, last heard of \d+ s ago"):
        Owner.take(tmp_path)
    heard = owner_file(tmp_path).stat().st_mtime - owner.STALE_S - 1
    os.utime(owner_file(tmp_path), (heard, heard))
    assert living(owner_file(tmp_path)) == ""
    monkeypatch.setattr(owner, "HEARTBEAT_S", 0.05)
    mine = Owner.take(tmp_path)
    os.utime(owner_file(tmp_path), (heard, heard))
    for _ in range(100):
        if owner_file(tmp_path).stat().st_mtime > heard:
            break
        threading.Event().wait(0.05)
    assert owner_file(tmp_path).stat().st_mtime > heard
    write_json(owner_file(tmp_path), there)  # this machine was stopped for long, and another took over
    with pytest.raises(UserError, match="taken over by process .* on there"):
        mine.check()
    mine.release()
    assert read_json(owner_file(tmp_path)) == there


def test_a_note_that_is_being_written_counts_and_one_left_so_does_not_for_ever(tmp_path):
    owner_file(tmp_path).touch()
    with pytest.raises(UserError, match="a process that has just begun"):
        Owner.take(tmp_path)
    os.utime(owner_file(tmp_path), (1.0, 1.0))
    with owned(tmp_path):
        pass


def test_a_folder_made_for_nothing_is_removed_again(tmp_path):
    with pytest.raises(ZeroDivisionError), owned(tmp_path / "new"):
        print(1 / 0)
    assert not (tmp_path / "new").exists()
