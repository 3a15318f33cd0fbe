"""`vla doctor`: looks at the machine; one line a finding (ok, warn, fail) with what to do, and an exit status, out."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from vla_lib.core.errors import UserError
from vla_lib.core.run_folder import PROJECT, runs_root

Finding = tuple[str, str, str]  # ok | warn | fail, what was looked at, what was found and what to do
NEEDED_GB = 14.0  # what the demo writes
WIDGET_PACKAGES = ("jupyterlab", "ipywidgets", "jupyterlab_widgets", "ipykernel")


def run() -> int:
    """Print every finding. Returns 0, or 1 where something fails."""
    failed = False
    for level, what, said in findings():
        failed = failed or level == "fail"
        print(f"{level:5}{what:12}{said}", flush=True)
    return int(failed)


def findings() -> Iterator[Finding]:
    """Everything that is looked at, in order."""
    version = sys.version.split()[0]
    yield (
        ("ok", "Python", version)
        if sys.version_info >= (3, 11)
        else ("fail", "Python", f"{version}; install 3.11 or newer, then `make clean` and `make test`")
    )
    yield _packages()
    yield from _torch()
    yield _pictures()
    yield _disk()
    yield _wandb()
    yield from _widgets()
    chromium = shutil.which("chromium")
    yield (
        ("ok", "Chromium", chromium)
        if chromium
        else ("warn", "Chromium", "not here: the browser tests are skipped; apt-get install chromium")
    )


def _packages() -> Finding:
    """The installed packages against the lock (lines that hold on every platform)."""
    odd, pinned = [], 0
    for line in (PROJECT / "requirements.lock").read_text().splitlines():
        name, equals, version = line.partition("==")
        if not equals or ";" in line or line.startswith("#"):
            continue
        pinned += 1
        try:
            installed = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed = "missing"
        if installed.partition("+")[0] != version:  # torch 2.15.0+cu130 is 2.15.0
            odd.append(f"{name} {installed} (lock: {version})")
    if not odd:
        return "ok", "packages", f"{pinned} as the lock pins them"
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return (
        "warn",
        "packages",
        f"{', '.join(odd[:3])}{more} differ from requirements.lock; `make clean`, then `make test`",
    )


def _torch() -> Iterator[Finding]:
    try:
        import torch
        import transformers
    except ImportError as error:
        yield "fail", "torch", f"cannot be imported ({error}); `make clean`, then `make test` installs it anew"
        return
    yield "ok", "torch", f"{torch.__version__}, transformers {transformers.__version__}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        yield "ok", "CUDA", f"{torch.version.cuda}, {len(names)} GPU: {', '.join(names)}"
    elif Path("/proc/driver/nvidia/version").exists():
        yield (
            "fail",
            "CUDA",
            f"a driver is there, but torch (for CUDA {torch.version.cuda}) sees no GPU; `nvidia-smi`, then a torch build for that driver",
        )
    else:
        yield "warn", "CUDA", "no GPU here: everything runs on the CPU, with the tiny VL model"


def _pictures() -> Finding:
    from vla_lib.evaluation.sim_robot import check_drawing

    try:
        check_drawing()
    except UserError as error:
        return "fail", "EGL", str(error)
    probe = "from needle_rig import NeedleInsertion; NeedleInsertion(picture_width=32, picture_height=24).reset(seed=1)"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return (
            "fail",
            "EGL",
            f"the simulated cameras draw nothing ({said}); on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri",
        )
    return "ok", "EGL", f"the simulated cameras draw (MUJOCO_GL={os.environ.get('MUJOCO_GL', 'egl')})"


def _disk() -> Finding:
    root = runs_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    free = shutil.disk_usage(existing).free / 1e9
    said = f"{free:.0f} GB free below {root}"
    if not os.access(existing, os.W_OK):
        return "fail", "disk", f"{existing} cannot be written; set VLA_RUNS to a folder that can"
    return (
        ("ok", "disk", said)
        if free >= NEEDED_GB
        else ("warn", "disk", f"{said}; the demo writes {NEEDED_GB:.0f} GB: free some, or set VLA_RUNS")
    )


def _wandb() -> Finding:
    from vla_lib.training.metrics import wandb_mode

    mode = wandb_mode("auto")  # as a training decides
    if mode == "online":
        return "ok", "W&B", "a key is set: trainings are logged online"
    if mode == "disabled":
        return "warn", "W&B", "WANDB_MODE is disabled: trainings are logged in their run folders only; unset it for W&B"
    cause = f"WANDB_MODE is {os.environ['WANDB_MODE']}" if os.environ.get("WANDB_MODE") else "no key"
    return (
        "warn",
        "W&B",
        f"{cause}: trainings are logged offline in their run folders; `wandb login` for online, `wandb sync` for later",
    )


def _widgets() -> Iterator[Finding]:
    missing = [name for name in WIDGET_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        yield "fail", "JupyterLab", f"{', '.join(missing)} not installed; `make clean`, then `make lab`"
        return
    extension = Path(
        sys.prefix, "share", "jupyter", "labextensions", "@jupyter-widgets", "jupyterlab-manager", "package.json"
    )
    said = f"{importlib.metadata.version('jupyterlab')}, ipywidgets {importlib.metadata.version('ipywidgets')}"
    yield ("ok", "JupyterLab", said) if extension.exists() else (
        "fail", "JupyterLab", f"{said}, but its widget extension is not in {extension.parent}; pip install --force-reinstall jupyterlab-widgets"
    )  # fmt: skip
