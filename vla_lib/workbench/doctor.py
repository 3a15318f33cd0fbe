"""`vla doctor`: looks at the machine; one line a finding (ok, warn, fail) with what to do, and an exit status."""

import importlib.metadata
import importlib.util
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from vla_lib.core.run_folder import PROJECT, runs_root

Finding = tuple[str, str]  # ok | warn | fail, and what was found with what to do
NEEDED_GB = 14.0  # what the demo writes
NEEDED_FILES = 1_024  # open at once, by a training with loader processes
NEEDED_SHARED_GIB = 1.0  # Docker gives 64 MiB; a batch of 128 has 33 MiB of sensor windows, and several wait at once
WIDGET_PACKAGES = ("jupyterlab", "ipywidgets", "jupyterlab_widgets", "ipykernel")
WIDGET_EXTENSION = "share/jupyter/labextensions/@jupyter-widgets/jupyterlab-manager"
DRAW = "from needle_rig import NeedleInsertion; NeedleInsertion(picture_width=32, picture_height=24).reset(seed=1)"


def doctor() -> int:
    """Look at the machine, and say what to do."""
    failed = False
    for what, look in LOOKS.items():
        level, sentence = look()
        failed = failed or level == "fail"
        print(f"{level:5}{what:12}{sentence}", flush=True)
    return int(failed)


def _packages() -> Finding:
    """The installed packages against the lock (lines that hold on every platform)."""
    lines = [line.partition("==") for line in (PROJECT / "requirements.lock").read_text().splitlines()]
    pinned = {name: version for name, _, version in lines if version and ";" not in version and name[0] != "#"}
    found = {name: _installed(name) for name in pinned}
    # torch 2.15.0+cu130 is 2.15.0
    differ = [name for name, version in pinned.items() if found[name].partition("+")[0] != version]
    odd = [f"{name} {found[name]} (lock: {pinned[name]})" for name in differ]
    if not odd:
        return "ok", f"{len(pinned)} as the lock pins them"
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return "warn", f"{', '.join(odd[:3])}{more} differ from requirements.lock; `make clean`, then `make test`"


def _installed(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _torch() -> Finding:
    try:
        import torch
        import transformers
    except ImportError as error:
        return "fail", f"cannot be imported ({error}); `make clean`, then `make test` installs it anew"
    both = f"{torch.__version__}, transformers {transformers.__version__}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
        return "ok", f"{both}, CUDA {torch.version.cuda}, {len(names)} GPU: {', '.join(names)}"
    if Path("/proc/driver/nvidia/version").exists():
        sees = f"{both}; a driver is there, but torch (for CUDA {torch.version.cuda}) sees no GPU"
        return "fail", f"{sees}; `nvidia-smi`, then a torch build for that driver"
    return "warn", f"{both}; no GPU here: everything runs on the CPU, with the tiny VL model"


def _pictures() -> Finding:
    done = subprocess.run([sys.executable, "-c", DRAW], capture_output=True, text=True)  # a broken driver may abort it
    if done.returncode:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1]
        remedy = "on Debian or Ubuntu: apt-get install libegl1 libgl1-mesa-dri"
        return "fail", f"the simulated cameras draw nothing ({cause}); {remedy}"
    return "ok", f"the simulated cameras draw (MUJOCO_GL={os.environ.get('MUJOCO_GL', 'egl')})"


def _disk() -> Finding:
    root = runs_root()
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        return "fail", f"{existing} cannot be written; set VLA_RUNS to a folder that can"
    free = shutil.disk_usage(existing).free / 1e9
    if free < NEEDED_GB:
        needs = f"the demo writes {NEEDED_GB:.0f} GB: free some, or set VLA_RUNS"
        return "warn", f"{free:.0f} GB free below {root}; {needs}"
    return "ok", f"{free:.0f} GB free below {root}"


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < NEEDED_FILES:
        remedy = f"`ulimit -n {NEEDED_FILES}` as root, in Docker --ulimit nofile={NEEDED_FILES}"
        return "warn", f"a program may open {hard} at most, few for loader processes; {remedy}"
    return "ok", f"{soft} by default; trainings raise it by themselves"


def _shared_memory() -> Finding:
    if not os.path.isdir("/dev/shm"):
        return "ok", "not a machine with /dev/shm"
    total = shutil.disk_usage("/dev/shm").total / 2**30
    if total < NEEDED_SHARED_GIB:
        remedy = "in Docker: docker run --shm-size=8g; else --num-workers 0"
        return "warn", f"/dev/shm has {total:.2g} GiB, few for the batches of loader processes; {remedy}"
    return "ok", f"/dev/shm has {total:.2g} GiB"


def _wandb() -> Finding:
    from vla_lib.training.metrics import wandb_mode

    mode = wandb_mode("auto")  # as a training run decides
    if mode == "online":
        return "ok", "a key is set: runs are logged online"
    if mode == "disabled":
        return "warn", "WANDB_MODE is disabled: runs are logged in their run folders only; unset it for W&B"
    cause = f"WANDB_MODE is {os.environ['WANDB_MODE']}" if os.environ.get("WANDB_MODE") else "no key"
    remedy = "`wandb login` for online, `wandb sync` for later"
    return "warn", f"{cause}: runs are logged offline in their run folders; {remedy}"


def _widgets() -> Finding:
    if missing := [name for name in WIDGET_PACKAGES if importlib.util.find_spec(name) is None]:
        return "fail", f"{', '.join(missing)} not installed; `make clean`, then `make lab`"
    both = f"{_installed('jupyterlab')}, ipywidgets {_installed('ipywidgets')}"
    if (Path(sys.prefix) / WIDGET_EXTENSION / "package.json").exists():
        return "ok", both
    remedy = "pip install --force-reinstall jupyterlab-widgets"
    return "fail", f"{both}, but its widget extension is not in {Path(sys.prefix) / WIDGET_EXTENSION}; {remedy}"


def _chromium() -> Finding:
    found = shutil.which("chromium")
    return ("ok", found) if found else ("warn", "not here: the browser tests are skipped; apt-get install chromium")


# with a Python older than 3.11 nothing of vla_lib can be imported
LOOKS = {"Python": lambda: ("ok", sys.version.split()[0]), "packages": _packages, "torch": _torch, "EGL": _pictures}
LOOKS |= {"disk": _disk, "open files": _open_files, "shared mem": _shared_memory, "W&B": _wandb}
LOOKS |= {"JupyterLab": _widgets, "Chromium": _chromium}
