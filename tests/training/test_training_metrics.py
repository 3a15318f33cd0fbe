"""metrics.jsonl and Weights & Biases: which mode, what W&B has after a resumption, what happens where it cannot be
reached."""

import os
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from front_doors import wandb_rows

from vla_lib.core.files import append_jsonl, read_jsonl
from vla_lib.training import metrics
from vla_lib.training.metrics import MetricsLog, truncate, wandb_mode


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """No key, no netrc, no settings of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_DIR"]:
        monkeypatch.delenv(name)
    for name in ("HOME", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))


def test_wandb_is_offline_without_a_key_and_online_with_one(nobody, monkeypatch, tmp_path):
    """The server takes connections and never answers, as behind a firewall: nobody may ask it."""
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    host = f"127.0.0.1:{server.getsockname()[1]}"
    monkeypatch.setenv("WANDB_BASE_URL", f"http://{host}")

    def mode() -> str:
        code = "from vla_lib.training.metrics import wandb_mode; print(wandb_mode('auto'))"
        done = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, timeout=240)
        return done.stdout.strip()

    assert mode() == "offline"
    (tmp_path / ".netrc").write_text(f"machine {host} login user password {40 * 'n'}\n")  # as `wandb login` leaves it
    assert mode() == "online"
    with pytest.raises(BlockingIOError):
        server.accept()
    (tmp_path / ".netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == "online" and wandb_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"


@pytest.mark.parametrize("key", ["too short", "x" * 40])
def test_a_login_that_fails_leaves_the_training_alone_and_the_run_on_disk(key, nobody, tmp_path):
    """A spoilt key, and a good one without a network: the figures are kept offline, and the log says how to upload
    them."""
    code = f"""
from pathlib import Path
from vla_lib.training import metrics
metrics.REACH_S = 1.0
log = metrics.MetricsLog(Path({str(tmp_path)!r}), "Project", "auto", {{}}, "id-0")
for step in (1, 2):
    log.log({{"step": step, "train/loss_step": 1.0 / step}})
log.close()
"""
    environment = {**os.environ, "WANDB_API_KEY": key, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and done.stdout.startswith("W&B cannot be reached ("), done.stdout + done.stderr
    (folder,) = (path for path in (tmp_path / "wandb").glob("*run-*") if path.is_dir() and not path.is_symlink())
    assert f"`wandb sync {folder}` uploads it" in done.stdout and folder.name.startswith("offline-run-")
    assert [r["train/loss_step"] for r in wandb_rows(tmp_path)] == [
        r["train/loss_step"] for r in read_jsonl(tmp_path / "metrics.jsonl")
    ]


def test_an_online_run_is_told_what_the_server_lacks_and_no_more(monkeypatch, tmp_path):
    """Killed, it had sent steps 1 and 2; the checkpoint is of step 4. Then the network goes away: the run does not
    wait for ever."""
    import wandb

    sent = []

    def finish():
        raise TimeoutError("timed out")

    def init(**options):
        assert (options["id"], options["resume"], options["mode"]) == ("id-0", "allow", "online")
        assert options["settings"].finish_timeout > 0 and options["settings"].finish_timeout_raises
        return SimpleNamespace(
            starting_step=3,
            dir=str(tmp_path / "wandb" / "run-2-id-0" / "files"),
            log=lambda v, step: sent.append((step, v)),
            finish=finish,
        )

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(wandb, "teardown", lambda: time.sleep(60))  # as it has been seen to
    monkeypatch.setattr(metrics, "END_S", 0.05)
    for name in ("run-1-id-0", "run-2-id-0", "run-1-id-9"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    for step in range(1, 5):
        append_jsonl(tmp_path / "metrics.jsonl", {"step": step, "time": 100.0 + step, "train/loss_step": 1.0})
    log = MetricsLog(tmp_path, "Project", "online", {}, "id-0")
    log.log({"step": 5, "train/loss_step": 0.5})
    assert [step for step, _ in sent] == [3, 4, 5] and sent[0][1] == {"train/loss_step": 1.0, "_timestamp": 103.0}
    assert [r["step"] for r in read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    assert sorted(path.name for path in (tmp_path / "wandb").iterdir()) == ["run-1-id-9", "run-2-id-0"]
    log.close()


def test_truncate_drops_what_came_after_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for row in ({"step": 1}, {"step": 2}, {"step": 2, "epoch": 1}, {"step": 3}, {"step": 4}, {"step": 4, "epoch": 2}):
        append_jsonl(path, row)
    with open(path, "a") as file:
        file.write('{"step": 5, "tra')  # killed while writing
    truncate(path, 4, 2)
    assert [(r["step"], r.get("epoch")) for r in read_jsonl(path)] == [
        (1, None),
        (2, None),
        (2, 1),
        (3, None),
        (4, None),
    ]
