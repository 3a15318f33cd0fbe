"""The lab's rig as one robot: arm, cameras and sensor of a `robot.yaml` behind the three methods of `RobotIO`."""

import contextlib
import time
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.robots.arm import Meca500, StateStream
from vla_lib.robots.cameras import open_cameras
from vla_lib.robots.settings import RobotSettings
from vla_lib.robots.streams import Meter, SensorStream, Tap
from vla_lib.runtime.robot_io import Observation


class LabRobot(contextlib.AbstractContextManager["LabRobot"]):
    """A `RobotIO`. Times are this host's UNIX time. Opening moves nothing; `begin` before the first action, `stop` at
    the end. Raises UserError where a part is missing."""

    moves = True

    def __init__(self, settings: RobotSettings):
        self.settings, self.tap = settings, Tap()
        with contextlib.ExitStack() as opened:  # what is open is closed where a later part is missing
            self.arm: Meca500 | StateStream
            if settings.arm.source == "meca500":
                self.arm = Meca500(settings.arm, self.tap)
            else:
                self.arm = StateStream(settings.arm.address, self.tap)
            opened.callback(self.arm.close)
            self.sensor = None
            if settings.sensor is not None:
                self.sensor = SensorStream(settings.sensor.host, settings.sensor.port, self.tap)
                opened.callback(self.sensor.close)
            self.cameras = open_cameras(settings.cameras, settings.zmq_port, self.tap)
            for source in self.cameras:
                opened.callback(source.close)
            self._opened = opened.pop_all()

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    def wait_ready(self, timeout_s: float = 10.0) -> None:
        """Until every stream has come. Raises UserError that names those which have not."""
        until = time.monotonic() + timeout_s
        while silent := [meter.name for meter in self.meters() if meter.newest_s is None]:
            if time.monotonic() > until:
                raise UserError(f"Nothing comes from {', '.join(silent)}: look at cables, hosts, names and ports.")
            time.sleep(0.02)

    def meters(self) -> list[Meter]:
        """What each stream did: arm, sensor, views."""
        sensor = [self.sensor.meter] if self.sensor else []
        return [self.arm.meter, *sensor, *(meter for source in self.cameras for meter in source.meters.values())]

    def streams(self) -> list[dict[str, Any]]:
        """One row a stream: rate, age, clock offset, what was refused."""
        return [meter.report() for meter in self.meters()]

    def read_observation(self) -> Observation:
        """The newest of everything. Raises RobotFault where a driven arm is in no state to move."""
        self.arm.check()
        newest = self.arm.newest()
        state, state_s = newest if newest is not None else (np.full(12, np.nan), 0.0)
        samples, times = self.sensor.take() if self.sensor else (np.empty((0, 1026), np.float32), np.empty(0))
        pictures = {view: seen for source in self.cameras for view, seen in source.newest().items()}
        return Observation(
            timestamp=time.time(),  # last: nothing that was read lies ahead of it
            state=state.astype(np.float32),
            state_timestamp=state_s,
            pictures={view: picture for view, (picture, _) in pictures.items()},
            picture_timestamps={view: t_s for view, (_, t_s) in pictures.items()},
            sensor=samples,
            sensor_timestamps=times,
            instruction=self.settings.instruction,
        )

    def begin(self, period_s: float) -> None:
        """Open the arm for one run. Raises UserError where it may not move."""
        self.arm.begin(period_s)

    def refuses(self, action: np.ndarray) -> str:
        """Why the arm could not carry out an action (7,) from where it is; "" where it could."""
        newest = self.arm.newest()
        known = newest is not None and isinstance(self.arm, Meca500)
        return self.arm.reach.refuses(newest[0][:6], action) if known else ""  # type: ignore[index, union-attr]

    def send_action(self, action: np.ndarray) -> None:
        """Begin one period's motion."""
        self.arm.send_action(action)

    def stop(self, reason: str) -> None:
        """Stand still; raises RobotFault where the controller does not confirm."""
        self.arm.stop()
