"""The guide's letter: every flag under its name, dashes or underscores; refusals; no torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl
from vla_lib.core.frontdoor import parse
from vla_lib.training.checkpoint import read_checkpoint
from vla_lib.training.settings import AsyncSettings, DiffusionSettings, resume_conflicts

# The guide's two lines as they stand there.
ASYNC = """
torchrun --nproc_per_node=4 training/A6_VLA_TRAIN_ASYNC.py \\
  --batch-size 4 \\
  --grad-accum-steps 8 \\
  --lr 1e-4 \\
  --sensor-enabled \\
  --vlm-reuse-count 3 \\
  --sensor-window-size 65 \\
  --image-resize-height 360 \\
  --image-resize-width 640
"""
DIFFUSION = """
torchrun --nproc_per_node=4 training/A5st_VLA_TRAIN_Diffusion_with_sensor.py \\
  --dataset_dir /home/najo/NAS/VLA/dataset \\
  --training-stage stage1 \\
  --batch_size 4 \\
  --grad_accum 8 \\
  --lr 1e-4 \\
  --epochs 20 \\
  --diffusion_timesteps 100
"""


@pytest.mark.parametrize(
    ("line", "settings_class", "processes"), [(ASYNC, AsyncSettings, 1), (DIFFUSION, DiffusionSettings, 2)]
)
def test_the_guides_lines_run_verbatim(line, settings_class, processes, mixed, tmp_path):
    """But for the module's name, the dataset's path and the number of processes; shortened to two steps."""
    program, guide = line.split("training/")[1].split(" ")[0], "/home/najo/NAS/VLA/dataset"
    line = line.replace(f"training/{program}", f"-m vla_lib.{settings_class.name}").replace(
        "node=4", f"node={processes}"
    )
    line = line.replace(guide, str(mixed)).rstrip() + " --max-steps 2 --num-workers 0 --device cpu --run-dir run"
    (tmp_path / "dataset").symlink_to(mixed)  # where the async line, which names none, looks for it
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "OMP_NUM_THREADS": "1",
        "WANDB_MODE": "disabled",
        "PET_STANDALONE": "1",
    }  # a port of its own
    done = subprocess.run(
        ["bash", "-c", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = read_checkpoint(tmp_path / "run" / "checkpoints" / settings_class().checkpoints.latest)
    shortened = {
        "max_steps": 2,
        "num_workers": 0,
        "device": "cpu",
        "run_dir": "run",
        "dataset_root": found["settings"]["dataset_root"],
    }
    assert found["settings"] == settings_class().record() | shortened  # the guide's values are the defaults
    assert found["training"]["world"] == processes and found["step"] == 2
    assert all(r[settings_class.loss_key] > 0 for r in read_jsonl(tmp_path / "run" / "metrics.jsonl")[:2])


@pytest.mark.parametrize("settings_class", [AsyncSettings, DiffusionSettings])
@pytest.mark.parametrize("joint", ["-", "_"])
def test_every_flag_of_the_guide_with_dashes_and_underscores(settings_class, joint):
    flags = "dataset-dir x batch-size 2 grad-accum 16 lr 5e-5 epochs 50 vlm-reuse-count 4 num-workers 8 "
    flags += (
        "sensor-loss-weight 3.0 seed 5 horizon 4 max-steps 9 run-dir y sensor-window-size 130 image-resize-height 180 "
    )
    flags += "image-resize-width 320 training-stage stage1" + (
        " diffusion-timesteps 50" if settings_class is DiffusionSettings else ""
    )
    words = flags.split()
    argv = [w if k % 2 else "--" + w.replace("-", joint) for k, w in enumerate(words)] + [
        f"--no{joint}sensor{joint}enabled",
        "--resume",
    ]
    settings = parse(settings_class, argv)
    assert (settings.batch_size, settings.grad_accum_steps, settings.lr, settings.epochs, settings.vlm_reuse_count) == (
        2,
        16,
        5e-5,
        50,
        4,
    )
    assert (
        settings.num_workers,
        settings.sensor_loss_weight,
        settings.sensor_enabled,
        settings.resume,
        settings.seed,
    ) == (
        8,
        3.0,
        False,
        True,
        5,
    )
    assert (settings.sensor_window_size, settings.image_resize_height, settings.image_resize_width) == (130, 180, 320)
    assert (settings.horizon, settings.max_steps, str(settings.run_dir), str(settings.dataset_root)) == (4, 9, "y", "x")
    assert getattr(settings, "diffusion_timesteps", 50) == 50


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
    code = "import sys, vla_lib.train_async, vla_lib.train_diffusion; vla_lib.train_async.Settings(); "
    code += "assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_what_does_not_change_the_learning_may_differ_on_resume():
    before, now = AsyncSettings(epochs=2), AsyncSettings(epochs=5, num_workers=0, resume=True)
    assert resume_conflicts(before.record(), now) == []
    assert resume_conflicts(before.record(), AsyncSettings(seed=1)) == ["--seed: checkpoint 0, now 1"]
    older = {
        name: value for name, value in before.record().items() if name != "lora_rank"
    }  # written before the setting existed
    assert resume_conflicts(older, now) == []
    assert resume_conflicts(older, AsyncSettings(lora_rank=3)) == ["--lora-rank: checkpoint 16, now 3"]
