"""The rig as a policy meets it: actions at 10 Hz in; observations, and a judgement that no observation contains, out (gymnasium-style).

    rig = SimRig(seed=7)
    observation, info = rig.reset()                       # or reset(seed=8)
    observation, reward, terminated, truncated, info = rig.step(action)

Action (>= 6,): dx dy dz in mm, then a rotation vector in degrees, base frame, then gripper (ignored): the motion over one action period, as
in data.pkl. It shifts the arm's commanded pose, which the arm follows with its lag and speed limits.

Observation:
    pictures            {view key: (H, W, 3) uint8}, the newest of each view at or before now, JPEG-coded as recorded ones are
    picture_timestamps  {view key: float}
    state               (12,) float32: joints 1..6 (deg), pose x y z (mm) a b r (deg), as the controller last refreshed it
    state_timestamp     float
    sensor              (n, 1026) float32: the samples since the last step (65 at 10 Hz; at a reset those of the rest before it), force first
    sensor_timestamps   (n,) float64
    timestamp           float, now; instruction str (as prepared episodes of the task carry it)
All times are seconds on one clock that starts at `START_S` (UNIX-like), so they look as recorded ones do.
"""

import numpy as np

from needle_rig.arm import TICK_HZ, Arm, Motion, states
from needle_rig.judge import Judge
from needle_rig.render import PictureMaker, check_gl, through_jpeg
from needle_rig.tissue import Tissue
from needle_rig.world import DEFAULT_TASK, VIEWS, World, instruction_of, sample_world, stream
from vla_lib.core.errors import UserError

START_S = 1_700_000_000.0
POSE_REFRESH_HZ = 60.0


class SimRig:
    """One arm, one phantom. Deterministic by seed and actions; `reset` draws a new phantom.

    `max_time_s` counts from the reset's end. `pictures=False` leaves the cameras out (no EGL needed). `idle_s` is the rest before the first
    observation: 1 s fills a 650-sample window. `instruction`: default, the built-in one of the task.
    Raises UserError where the settings are bad or EGL is missing.
    """

    def __init__(
        self,
        seed: int = 0,
        task: str = DEFAULT_TASK,
        action_hz: float = 10.0,
        picture_width: int = 320,
        picture_height: int = 180,
        views: tuple[str, ...] = VIEWS,
        camera_hz: float = 5.0,
        pictures: bool = True,
        max_time_s: float = 30.0,
        idle_s: float = 1.0,
        instruction: str = "",
    ):
        self.seed, self.task, self.action_hz = seed, task, action_hz
        self.ticks = round(TICK_HZ / action_hz)
        if abs(self.ticks * action_hz - TICK_HZ) > 1e-6 or self.ticks < 1:
            raise UserError(
                f"The rig samples at 650 Hz and cannot act at {action_hz:g} Hz; choose a rate that divides 650, such as 10."
            )
        if camera_hz <= 0 or idle_s < 1 / TICK_HZ or max_time_s <= 0:
            raise UserError(
                f"The rig cannot run with camera_hz {camera_hz:g}, idle_s {idle_s:g}, max_time_s {max_time_s:g}; all must be above 0."
            )
        self.camera_hz, self.max_time_s, self.idle_s = camera_hz, max_time_s, idle_s
        self.instruction: str = instruction or instruction_of(task)
        if pictures:
            check_gl()
        self._maker = PictureMaker(picture_width, picture_height, views) if pictures else None
        self.world: World | None = None

    @property
    def views(self) -> tuple[str, ...]:
        """View keys of the pictures."""
        return self._maker.views if self._maker else ()

    def reset(self, seed: int | None = None) -> tuple[dict, dict]:
        """A new phantom and a needle above it; returns (observation, info). Without a seed, the seed last used counts up."""
        self.seed = self.seed + (self.world is not None) if seed is None else seed
        self.world = sample_world(self.seed, self.task)
        self.arm = Arm(self.world.start_mm, self.world.start_rotvec_deg)
        self.tissue, self.judge = Tissue(self.world), Judge(self.world)
        self.steps = 0
        rng = stream(self.seed, "rig")
        self._camera_phase_s = {view: rng.uniform(0, 1 / self.camera_hz) for view in self.views}
        self._refresh_phase_s = rng.uniform(0, 1 / POSE_REFRESH_HZ)
        self._pictures: dict[str, np.ndarray] = {}
        self._picture_t_s: dict[str, float] = {}
        self._parts: list[dict] = []
        if self._maker:
            self._maker.show(self.world)
        observation = self._observe(self.arm.move_to(self.arm.command, round(self.idle_s * TICK_HZ)))
        return observation, self._info()

    def step(self, action) -> tuple[dict, float, bool, bool, dict]:
        """Run one action period. Returns observation, reward (1.0 at success), terminated, truncated, info.

        Raises UserError for an action that is not finite or too short: a rig must never move on one.
        """
        if self.world is None:
            raise UserError("The rig has no phantom yet; call reset() before step().")
        action = np.asarray(action, float)
        if action.ndim != 1 or action.size < 6 or not np.isfinite(action[:6]).all():
            raise UserError(
                f"The rig cannot move on the action {action}; give 6 or 7 finite numbers (mm, degrees, gripper)."
            )
        self.steps += 1
        observation = self._observe(self.arm.move_by(action, self.ticks))
        time_out = self.steps / self.action_hz >= self.max_time_s - 1e-9
        if time_out:
            self.judge.time_out()
        terminated = self.judge.success or (bool(self.judge.reason) and not time_out)
        return observation, float(self.judge.success), terminated, time_out and not terminated, self._info()

    def close(self) -> None:
        """Free the drawing context of this thread."""
        if self._maker:
            self._maker.close()

    def path(self) -> dict[str, np.ndarray]:
        """What happened since the reset, at 650 Hz: t_s (n,), position_mm (n, 3), force_mN (n,) true. For plots and film strips."""
        return {
            name: np.concatenate([part[name] for part in self._parts]) for name in ("t_s", "position_mm", "force_mN")
        }

    def _observe(self, motion: Motion) -> dict:
        force, punctured = self.tissue.sense(motion)
        self.judge.watch(motion, self.tissue)
        self._parts.append({"t_s": motion.t_s, "position_mm": motion.position_mm, "force_mN": force})
        samples = self.tissue.measure(motion.position_mm[:, 2], force, punctured)
        now = float(motion.t_s[-1])
        refreshed = np.floor((now - self._refresh_phase_s) * POSE_REFRESH_HZ) / POSE_REFRESH_HZ + self._refresh_phase_s
        k = int(np.clip(np.searchsorted(motion.t_s, refreshed), 0, len(motion.t_s) - 1))
        self._take_pictures(motion, now)
        return {
            "pictures": dict(self._pictures),
            "picture_timestamps": {view: START_S + t for view, t in self._picture_t_s.items()},
            "state": states(motion.position_mm[k : k + 1], motion.rotvec_deg[k : k + 1])[0].astype(np.float32),
            "state_timestamp": START_S + float(motion.t_s[k]),
            "sensor": samples,
            "sensor_timestamps": START_S + motion.t_s,
            "timestamp": START_S + now,
            "instruction": self.instruction,
        }

    def _take_pictures(self, motion: Motion, now: float) -> None:
        for view in self.views:
            phase = self._camera_phase_s[view]
            newest = np.floor((now - phase) * self.camera_hz) / self.camera_hz + phase
            taken = self._picture_t_s.get(view)
            if taken is not None and newest <= taken + 1e-9:
                continue
            if newest < motion.t_s[0]:  # before the first frame: the needle is at rest
                newest = max(newest, 0.0)
            k = int(np.clip(np.searchsorted(motion.t_s, newest), 0, len(motion.t_s) - 1))
            picture = self._maker.picture(view, motion.position_mm[k], motion.rotvec_deg[k])
            self._pictures[view] = through_jpeg(picture)
            self._picture_t_s[view] = float(newest)

    def _info(self) -> dict:
        """Judgement and hidden truth: for evaluation, never for a policy."""
        return self.judge.to_dict() | {
            "time_s": self.steps / self.action_hz,
            "seed": self.seed,
            "truth": self.world.to_dict(),
        }
