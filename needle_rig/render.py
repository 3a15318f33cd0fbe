"""Drawing on a machine without a display: through EGL, where it works; pictures as the camera host stores them."""

import contextlib
import importlib
import io
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from needle_rig.world import RigError

if TYPE_CHECKING:
    from needle_rig.scene import Scene

JPEG_QUALITY = 90
_REMEDY = (
    "install Mesa's EGL (Debian, Ubuntu: `apt-get install libegl1 libgl1-mesa-dri`) or an NVIDIA driver with EGL, "
    "or set MUJOCO_GL=osmesa where OSMesa is installed"
)
_PROBE = """
import mujoco
context = mujoco.GLContext(16, 16)
context.make_current()
drawing = mujoco.MjrContext(mujoco.MjModel.from_xml_string('<mujoco/>'), 50)
context.free()
"""
_checked: set[str] = set()  # a probe takes a second, and holds for the process


def prepare_gl() -> None:
    """Choose EGL unless the environment chose otherwise, and one drawing thread: before mujoco is imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer; parallel over episodes instead
    # After Mesa's first picture, the first import of triton (torch does it late) crashes the process: so it comes
    # before.
    with contextlib.suppress(ImportError):
        importlib.import_module("triton")


def check_gl() -> None:
    """Draw once in a child process (a broken driver may abort it). Raises RigError with the remedy."""
    prepare_gl()
    if (backend := os.environ["MUJOCO_GL"]) in _checked:
        return
    try:
        child = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        raise RigError(f"MuJoCo made no drawing context within 120 s (MUJOCO_GL={backend}); {_REMEDY}.") from None
    if child.returncode != 0:
        last = (child.stderr.strip().splitlines() or [f"exit status {child.returncode}"])[-1]
        raise RigError(
            f"The simulated rig cannot draw its pictures here (MUJOCO_GL={backend}: {last[:200]}); {_REMEDY}."
        )
    _checked.add(backend)


def open_scene(width: int, height: int) -> "Scene":
    """The scene, drawn in pictures of this size; `check_gl` comes first, once."""
    prepare_gl()
    from needle_rig.scene import Scene  # imports mujoco, which looks at MUJOCO_GL then

    return Scene(width, height)


def jpeg(picture: np.ndarray, quality: int = JPEG_QUALITY) -> bytes:
    """A picture as a JPEG file's bytes, as the camera host stores it."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def through_jpeg(picture: np.ndarray, quality: int = JPEG_QUALITY) -> np.ndarray:
    """A picture as it looks after storing: live pictures pass the same coding as recorded ones."""
    return np.asarray(Image.open(io.BytesIO(jpeg(picture, quality))))
