"""The guide's letter: every flag under its name, dashes or underscores; refusals; no torch."""

import subprocess
import sys

import pytest

from vla_lib.core.errors import UserError
from vla_lib.core.frontdoor import parse
from vla_lib.training.metrics import wandb_mode
from vla_lib.training.settings import AsyncSettings, DiffusionSettings, resume_conflicts


def test_the_guides_async_line_parses_verbatim():
    line = "--batch-size 4 --grad-accum-steps 8 --lr 1e-4 --sensor-enabled --vlm-reuse-count 3 "
    line += "--sensor-window-size 65 --image-resize-height 360 --image-resize-width 640"
    settings = parse(AsyncSettings, line.split())
    assert settings == AsyncSettings()  # the guide's values are the defaults
    assert (settings.batch_size, settings.grad_accum_steps, settings.lr, settings.sensor_window_size) == (4, 8, 1e-4, 65)


def test_the_guides_diffusion_line_parses_verbatim():
    line = "--dataset_dir /data --training-stage stage1 --batch_size 4 --grad_accum 8 --lr 1e-4 --epochs 20 --diffusion_timesteps 100"
    settings = parse(DiffusionSettings, line.split())
    assert str(settings.dataset_root) == "/data" and settings.grad_accum_steps == 8 and settings.sensor_window_size == 650
    assert (settings.epochs, settings.diffusion_timesteps, settings.training_stage) == (20, 100, "stage1")


@pytest.mark.parametrize("settings_class", [AsyncSettings, DiffusionSettings])
@pytest.mark.parametrize("joint", ["-", "_"])
def test_every_flag_of_the_guide_with_dashes_and_underscores(settings_class, joint):
    flags = "dataset-dir x batch-size 2 grad-accum 16 lr 5e-5 epochs 50 vlm-reuse-count 4 num-workers 8 "
    flags += "sensor-loss-weight 3.0 seed 5 horizon 4 max-steps 9 run-dir y"
    words = flags.split()
    argv = [w if k % 2 else "--" + w.replace("-", joint) for k, w in enumerate(words)] + [f"--no{joint}sensor{joint}enabled", "--resume"]
    settings = parse(settings_class, argv)
    assert (settings.batch_size, settings.grad_accum_steps, settings.lr, settings.epochs, settings.vlm_reuse_count) == (2, 16, 5e-5, 50, 4)
    assert (settings.num_workers, settings.sensor_loss_weight, settings.sensor_enabled, settings.resume, settings.seed) == (
        8,
        3.0,
        False,
        True,
        5,
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"lr": -1.0}, "--lr is -1.0"),
        ({"val_fraction": 1.0}, "--val-fraction is 1.0"),
        ({"num_workers": -1}, "--num-workers is -1"),
    ],
)
def test_impossible_values_are_refused_with_their_flag(changes, message):
    with pytest.raises(UserError, match=message):
        AsyncSettings(**changes)


def test_settings_need_no_torch():
    code = "import sys, vla_lib.train_async, vla_lib.train_diffusion; vla_lib.train_async.Settings(); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_what_does_not_change_the_learning_may_differ_on_resume():
    before, now = AsyncSettings(epochs=2), AsyncSettings(epochs=5, num_workers=0, resume=True)
    assert resume_conflicts(before.to_dict(), now.to_dict()) == []
    assert resume_conflicts(before.to_dict(), AsyncSettings(seed=1).to_dict()) == ["--seed: checkpoint 0, now 1"]
    older = {name: value for name, value in before.to_dict().items() if name != "lora_rank"}  # written before the setting existed
    assert resume_conflicts(older, now.to_dict()) == []
    assert resume_conflicts(older, AsyncSettings(lora_rank=3).to_dict()) == ["--lora-rank: checkpoint 16, now 3"]


def test_wandb_is_offline_without_a_key(monkeypatch, tmp_path):
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb_mode("auto") == "offline" and wandb_mode("disabled") == "disabled"
    monkeypatch.setenv("WANDB_API_KEY", "x" * 40)
    assert wandb_mode("auto") == "online"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert wandb_mode("auto") == "offline"
