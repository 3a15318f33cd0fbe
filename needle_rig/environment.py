"""The rig as a policy meets it: a gymnasium environment that acts at 10 Hz, judged by what no observation contains.

    rig = gymnasium.make("needle_rig/NeedleInsertion-v0", max_time_s=20)
    observation, info = rig.reset(seed=7)
    observation, reward, terminated, truncated, info = rig.step(action)

Action (7,): dx dy dz in mm, a rotation vector in degrees, both in the base frame, and the gripper (ignored): the motion
over one action period, as in data.pkl. It shifts the arm's commanded pose, which the arm follows with its lag and speed
limits; the box's bounds are the largest shift that these limits leave of one axis.

Observation:
    pictures            {view: (H, W, 3) uint8}, the newest of each view at or before now, JPEG-coded as recorded ones
    picture_timestamps  {view: () float64}
    state               (12,) float32: joints 1..6 (deg), then pose x y z (mm) a b r (deg, intrinsic XYZ), as the
                        controller last refreshed it
    state_timestamp     () float64
    sensor              (650, 1026) float32: the samples of the last second, the newest last; force (mN), then the
                        A-scan (counts, 1025 bins of 7.5 um). The last `ticks` of them are new since the step before
    sensor_timestamps   (650,) float64
    timestamp           () float64, now
All times are seconds on one clock that starts at `START_S` (UNIX-like), so they look as recorded ones do.

Reward: 1 at success, else 0. Terminated: judged (see judge.py); truncated: judged at the time limit. Info: the
judgement, `time_s`, `seed`, and the hidden `truth`; for evaluation, never for a policy.
"""

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict

from needle_rig.arm import POSE_REFRESH_HZ, SPEED_LIMIT_MM_S, TICK_HZ, TURN_LIMIT_DEG_S, Arm, Motion, states
from needle_rig.disturbances import disturbed
from needle_rig.judge import Judge
from needle_rig.render import check_gl, open_scene, through_jpeg
from needle_rig.tissue import CHANNELS, Tissue
from needle_rig.world import DEFAULT_TASK, VIEWS, RigError, World, latest, sample_world, stream, task_of

START_S = 1_700_000_000.0
WINDOW = 650  # sensor samples of an observation; at a reset the arm rests for as long, so that it is full


class NeedleInsertion(gymnasium.Env[dict[str, Any], np.ndarray]):
    """One arm, one phantom. Deterministic by seed and actions; `reset` draws a new phantom.

    `task` names the family of phantoms. `max_time_s` counts from the reset's end. `views=()` leaves the cameras out (no
    EGL needed). Raises RigError where a value is bad or EGL is missing.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(
        self,
        task: str = DEFAULT_TASK,
        action_hz: float = 10.0,
        picture_width: int = 320,
        picture_height: int = 180,
        views: tuple[str, ...] = VIEWS,
        camera_hz: float = 5.0,
        max_time_s: float = 30.0,
        render_mode: str | None = None,
    ):
        self.task, self.action_hz, self.camera_hz, self.max_time_s = task, action_hz, camera_hz, max_time_s
        self.views, self.render_mode = tuple(views), render_mode
        self.ticks = round(TICK_HZ / action_hz)
        if abs(self.ticks * action_hz - TICK_HZ) > 1e-6 or not 1 <= self.ticks <= WINDOW:
            told = f"The rig samples at 650 Hz and cannot act at {action_hz:g} Hz"
            raise RigError(f"{told}; choose a rate that divides 650, such as 10.")
        if camera_hz <= 0 or max_time_s <= 0:
            told = f"camera_hz {camera_hz:g}, max_time_s {max_time_s:g}"
            raise RigError(f"The rig cannot run with {told}; both must be above 0.")
        task_of(task)
        if unknown := set(self.views) - set(VIEWS):
            raise RigError(f"The rig has no view {unknown.pop()!r}; its views are {', '.join(VIEWS)}.")
        if self.views:
            check_gl()
        self._scene = open_scene(picture_width, picture_height) if self.views else None
        self.action_space, self.observation_space = self._spaces(picture_width, picture_height)
        self.steps = -1  # until the first reset

    def _spaces(self, width: int, height: int) -> tuple[Box, Dict]:
        reach = np.repeat([SPEED_LIMIT_MM_S, TURN_LIMIT_DEG_S, 0.0], (3, 3, 1)) / self.action_hz
        action = Box((-reach).astype(np.float32), (reach + np.eye(7)[6]).astype(np.float32))
        picture = Box(0, 255, (height, width, 3), np.uint8)
        pose = np.repeat([180.0, 1000.0, 180.0], (6, 3, 3)).astype(np.float32)
        # bounds of the times and the sensor are no physics: wide enough for any rollout, and finite as gymnasium asks
        time = Box(0.0, 1e10, (), np.float64)
        parts = {
            "pictures": Dict({view: picture for view in self.views}),
            "picture_timestamps": Dict({view: time for view in self.views}),
            "state": Box(-pose, pose),
            "state_timestamp": time,
            "sensor": Box(-1e6, 1e6, (WINDOW, CHANNELS), np.float32),
            "sensor_timestamps": Box(0.0, 1e10, (WINDOW,), np.float64),
            "timestamp": time,
        }
        return action, Dict(parts)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Put the needle over the phantom of `seed`; returns (observation, info).

        Without a seed the phantom is drawn from the generator that the last seed began: the same sequence after the
        same seed. `options={"world": World}` puts another world in the place of the seed's, `{"disturbance": name}`
        changes it by one of disturbances.CHANGES.
        """
        super().reset(seed=seed)
        self.seed = int(self.np_random.integers(1 << 31)) if seed is None else seed
        self.world: World = (options or {}).get("world") or sample_world(self.seed, self.task)
        self.world = disturbed(self.world, (options or {}).get("disturbance", ""))
        self.arm = Arm(self.world.start_mm, self.world.start_rotvec_deg, self.world.arm_lag_s)
        self.tissue, self.judge = Tissue(self.world), Judge(self.world)
        self.steps = 0
        rng = stream(self.seed, "rig")
        self._camera_phase_s = {view: rng.uniform(0, 1 / self.camera_hz) for view in self.views}
        self._refresh_phase_s = rng.uniform(0, 1 / POSE_REFRESH_HZ)
        self._pictures: dict[str, np.ndarray] = {}
        self._picture_t_s: dict[str, float] = {}
        self._path: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._sensor = np.empty((0, CHANNELS), np.float32)
        if self._scene:
            self._scene.show(self.world)
        observation = self._observe(self.arm.move_to(self.arm.command, WINDOW))
        return observation, self._info()

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Run one action period. Returns observation, reward, terminated, truncated, info.

        Raises RigError for an action that is not finite or too short: a rig must never move on one.
        """
        if self.steps < 0:
            raise RigError("The rig has no phantom yet; call reset() before step().")
        action = np.asarray(action, float)
        if action.ndim != 1 or action.size < 6 or not np.isfinite(action[:6]).all():
            told = f"The rig cannot move on the action {action}"
            raise RigError(f"{told}; give 6 or 7 finite numbers (mm, degrees, gripper).")
        self.steps += 1
        observation = self._observe(self.arm.move_by(action, self.ticks))
        time_out = self.steps / self.action_hz >= self.max_time_s - 1e-9
        if time_out:
            self.judge.time_out()
        terminated = self.judge.success or (bool(self.judge.reason) and not time_out)
        return observation, float(self.judge.success), terminated, time_out and not terminated, self._info()

    def render(self) -> np.ndarray | None:
        """The newest pictures of all views side by side, (H, views * W, 3) uint8; None without `render_mode`."""
        if self.render_mode is None or not self.views:
            return None
        return np.concatenate([self._pictures[view] for view in self.views], axis=1)

    def close(self) -> None:
        """Free the drawing context."""
        if self._scene:
            self._scene.close()

    def path(self) -> dict[str, np.ndarray]:
        """What happened since the reset, at 650 Hz: t_s (n,), position_mm (n, 3), force_mN (n,) true."""
        t_s, position_mm, force_mN = (np.concatenate(part) for part in zip(*self._path, strict=True))
        return {"t_s": t_s, "position_mm": position_mm, "force_mN": force_mN}

    def _observe(self, motion: Motion) -> dict[str, Any]:
        force, punctured = self.tissue.sense(motion)
        self.judge.watch(motion, self.tissue)
        self._path.append((motion.t_s, motion.position_mm, force))
        samples = self.tissue.measure(motion.position_mm[:, 2], force, punctured)
        self._sensor = np.concatenate([self._sensor, samples])[-WINDOW:]
        now = float(motion.t_s[-1])
        k = _tick_of(motion, latest(now, POSE_REFRESH_HZ, self._refresh_phase_s))
        self._take_pictures(motion, now)
        return {
            "pictures": {view: picture.copy() for view, picture in self._pictures.items()},  # not shared between steps
            "picture_timestamps": {view: np.array(START_S + t) for view, t in self._picture_t_s.items()},
            "state": states(motion.position_mm[k : k + 1], motion.rotvec_deg[k : k + 1])[0].astype(np.float32),
            "state_timestamp": np.array(START_S + motion.t_s[k]),
            "sensor": self._sensor,
            "sensor_timestamps": START_S + (self.arm.tick + np.arange(1 - WINDOW, 1)) / TICK_HZ,
            "timestamp": np.array(START_S + now),
        }

    def _take_pictures(self, motion: Motion, now: float) -> None:
        for view in self.views:
            # a first picture from before the reset would show the needle at rest as well
            newest = max(latest(now, self.camera_hz, self._camera_phase_s[view]), 0.0)
            if self._scene and newest > self._picture_t_s.get(view, -1.0) + 1e-9:
                k = _tick_of(motion, newest)
                picture = self._scene.picture(view, motion.position_mm[k], motion.rotvec_deg[k])
                picture = picture * (view not in self.world.looks.covered)
                self._pictures[view], self._picture_t_s[view] = through_jpeg(picture), newest

    def _info(self) -> dict[str, Any]:
        judgement = self.judge.to_dict() | {"time_s": self.steps / self.action_hz, "seed": self.seed}
        return judgement | {"truth": self.world.to_dict()}


def _tick_of(motion: Motion, t_s: float) -> int:
    return int(np.clip(np.searchsorted(motion.t_s, t_s), 0, len(motion.t_s) - 1))
