"""Pictures of the scene: a world and a tool pose in, (H, W, 3) uint8 pictures of the views out. Draws without a display, through EGL."""

import contextlib
import io
import os
import subprocess
import sys
import threading

import numpy as np
from PIL import Image

from needle_rig.world import VIEWS, RigError, World

JPEG_QUALITY = 90
_REMEDY = (
    "install Mesa's EGL (Debian, Ubuntu: `apt-get install libegl1 libgl1-mesa-dri`) or an NVIDIA driver with EGL, "
    "or set MUJOCO_GL=osmesa where OSMesa is installed"
)
_PROBE = "import mujoco; c = mujoco.GLContext(16, 16); c.make_current(); r = mujoco.MjrContext(mujoco.MjModel.from_xml_string('<mujoco/>'), 50); c.free()"
_checked: set[str] = set()


def prepare_gl() -> None:
    """Choose EGL unless the environment chose otherwise, and one drawing thread a process. Must come before mujoco is imported."""
    os.environ.setdefault("MUJOCO_GL", "egl")
    os.environ.setdefault("LP_NUM_THREADS", "1")  # Mesa's software renderer; parallel over episodes instead
    # After Mesa's first picture, the first import of triton (torch does it late) crashes the process: so it comes before.
    with contextlib.suppress(ImportError):
        import triton  # noqa: F401


def check_gl() -> None:
    """Try to make a drawing context in a child process (a broken driver may abort it). Raises RigError with the remedy."""
    prepare_gl()
    backend = os.environ["MUJOCO_GL"]
    if backend in _checked:
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


class PictureMaker:
    """Draws the views of one world at a time. A GL context belongs to the thread that made it, so each thread gets its own."""

    def __init__(self, width: int = 320, height: int = 180, views: tuple[str, ...] = VIEWS):
        unknown = [view for view in views if view not in VIEWS]
        if unknown:
            raise RigError(f"The rig has no view {unknown[0]!r}; its views are {', '.join(VIEWS)}.")
        self.width, self.height, self.views = width, height, tuple(views)
        self._world: World | None = None
        self._local = threading.local()

    def show(self, world: World) -> None:
        """Draw this world from now on."""
        self._world = world

    def picture(self, view: str, position_mm: np.ndarray, rotvec_deg: np.ndarray) -> np.ndarray:
        """One (H, W, 3) uint8 picture with the tip at (3,) mm, rotation vector (3,) degrees."""
        scene, renderer = self._stage()
        scene.place_tool(position_mm, rotvec_deg)
        renderer.update_scene(scene.data, camera=view)
        return renderer.render()

    def pictures(self, position_mm: np.ndarray, rotvec_deg: np.ndarray) -> dict[str, np.ndarray]:
        """All views at once."""
        return {view: self.picture(view, position_mm, rotvec_deg) for view in self.views}

    def close(self) -> None:
        """Free the calling thread's GL context."""
        renderer = self._local.__dict__.pop("renderer", None)
        if renderer is not None:
            renderer.close()
        self._local.__dict__.clear()

    def _stage(self):
        local = self._local
        if getattr(local, "renderer", None) is None:
            prepare_gl()
            import mujoco

            from needle_rig.scene import Scene

            local.scene = Scene()
            local.renderer = mujoco.Renderer(local.scene.model, self.height, self.width)
            local.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SHADOW] = 0
            local.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_REFLECTION] = 0
            local.renderer.scene.flags[mujoco.mjtRndFlag.mjRND_SKYBOX] = 0
            local.world = None
        if self._world is None:
            raise RuntimeError("PictureMaker.show(world) comes before drawing")
        if local.world is not self._world:
            local.scene.show(self._world)
            local.world = self._world
        return local.scene, local.renderer


def jpeg(picture: np.ndarray, quality: int = JPEG_QUALITY) -> bytes:
    """A picture as a JPEG file's bytes, as the camera host stores it."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def through_jpeg(picture: np.ndarray, quality: int = JPEG_QUALITY) -> np.ndarray:
    """A picture as it looks after storing: live pictures pass the same coding as recorded ones."""
    return np.asarray(Image.open(io.BytesIO(jpeg(picture, quality))))
