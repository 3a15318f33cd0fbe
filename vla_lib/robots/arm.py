"""The arm: a Meca500 through mecademicpy 3 (its state by its own stamps, motions of one period, one stop), or its state
from the host that owns it.

Connecting moves nothing, and neither activates nor homes: a person does that on the arm's web page, and sets there what
the controller is to guard (torque limits, work zone). `begin` opens a run, `stop` ends it.
"""

import contextlib
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError, in_words
from vla_lib.robots.kinematics import Reach
from vla_lib.robots.settings import ArmSettings
from vla_lib.robots.streams import Meter, Row, Stream, Tap, needed

MONITORING_S = 0.005  # the controller's default is 16.7 ms
FOLLOW_S = 0.008  # how often the client's copy is read: rows come at about 100 Hz
WATCHDOG_S = 0.5  # without word from the control loop for this long the controller drops the connection and stops
STOP_S = 0.25  # longest wait for the controller's answer to a stop
FRAME_TOLERANCE = 0.01  # mm, degrees between robot.yaml's frames and the controller's
READ_BACK = (
    ("time scaling (%)", "GetTimeScaling"),
    ("torque limits", "GetTorqueLimitsCfg"),
    ("torque limits (%)", "GetTorqueLimits"),
    ("work zone", "GetWorkZoneCfg"),
    ("work zone limits (mm)", "GetWorkZoneLimits"),
    ("tool sphere (mm)", "GetToolSphere"),
)
STATE = struct.Struct("<ddf12f")


class RobotFault(RuntimeError):
    """The arm is in no state to be driven; the sentence says why."""


class Meca500:
    """A connection to the arm. Raises UserError where mecademicpy or the arm is missing."""

    def __init__(self, settings: ArmSettings, tap: Tap):
        mecademicpy = needed("mecademicpy.robot", "mecademicpy")
        self.settings, self.meter = settings, Meter("arm")
        self.reach = Reach(
            settings.wrf, settings.trf, settings.joint_margin_deg, settings.singularity_deg, settings.shoulder_mm
        )
        self._tap, self._period_s, self._driving = tap, 0.1, False
        self._newest: tuple[np.ndarray, float] | None = None
        self._fault = ""
        self._refresh = threading.Lock()
        self._stopper = ThreadPoolExecutor(2, "stop")  # a hanging send holds the client's lock, not our caller
        self.robot: Any = mecademicpy.Robot()
        try:
            # its default closes the connection at any exception of any call
            self.robot.Connect(settings.address, disconnect_on_exception=False, timeout=2.0)
        except Exception as error:
            raise UserError(
                f"The arm at {settings.address} cannot be reached ({error}); switch it on, close its other clients, "
                "or correct arm.address."
            ) from None
        info = self.robot.GetRobotInfo()
        self.version = info.version
        self.watches = info.version.is_at_least(10, 1)  # has a connection watchdog
        self.robot.SetMonitoringInterval(MONITORING_S)
        self.robot.SetRealTimeMonitoring("JointPos", "CartPos")
        self._open = True
        self._thread = threading.Thread(target=self._follow, name="arm", daemon=True)
        self._thread.start()

    def newest(self) -> tuple[np.ndarray, float] | None:
        """The measured state (12,) and its time by the arm's own stamp; None before the first."""
        return self._newest

    def check(self) -> None:
        """Tell the controller that the loop lives. Raises RobotFault where it is in error or may not move."""
        if self._driving and self._fault:
            raise RobotFault(self._fault)
        if self._driving and self.watches and self._refresh.acquire(blocking=False):
            try:
                self.robot.ConnectionWatchdog(WATCHDOG_S)
            finally:
                self._refresh.release()

    def begin(self, period_s: float) -> None:
        """Open the arm for motions of `period_s`. Raises UserError where it may not move, or its frames are others."""
        if self._fault:
            raise UserError(f"The arm cannot be driven: {self._fault}.")
        for name, told, holds in self.frames():
            if holds is not None and np.abs(np.subtract(told, holds)).max() > FRAME_TOLERANCE:
                raise UserError(
                    f"The controller's {name} is {holds}, but robot.yaml says {list(told)}; a policy moves in the "
                    "frame of its recordings: set the controller's."
                )
        self._period_s = period_s
        self.robot.ResumeMotion()
        self.robot.WaitMotionResumed(timeout=2.0)
        # shorter than a period would stop the arm between two ticks; scaled as every time of the controller is
        wanted_s = 1.5 * period_s * self.robot.GetTimeScaling(timeout=2.0) / 100.0
        self.robot.SetVelTimeout(wanted_s)
        until = time.monotonic() + 1.0
        while abs(self.robot.GetVelTimeout(timeout=2.0) - wanted_s) > 1e-3:
            if time.monotonic() > until:
                raise UserError(f"The controller did not take a velocity time-out of {wanted_s:.3f} s; restart it.")
            time.sleep(0.02)
        self._fault = ""
        self._driving = True

    def send_action(self, action: np.ndarray) -> None:
        """One period's motion as a velocity in the WRF: mm/s and degrees/s. Nothing once stopped."""
        if self._driving:
            self.robot.MoveLinVelWrf(*(np.asarray(action, float)[:6] / self._period_s).tolist())

    def stop(self) -> None:
        """Stop, pause, forget what waits. Raises RobotFault where the controller does not confirm it in time: then its
        velocity time-out and its connection watchdog stop it."""
        was_driving, self._driving = self._driving, False
        asked = self._stopper.submit(self._clear)
        try:
            asked.result(STOP_S + 0.1)
        except Exception as error:
            raise RobotFault(f"the arm did not confirm the stop ({in_words(error)})") from None
        if was_driving and self.watches and self._refresh.acquire(timeout=0.05):
            self.robot.ConnectionWatchdog(0)
            self._refresh.release()

    def _clear(self) -> None:
        self.robot.ClearMotion()
        self.robot.WaitMotionCleared(timeout=STOP_S)

    def frames(self) -> list[tuple[str, tuple[float, ...], list[float] | None]]:
        """(name, by robot.yaml, by the controller) of WRF and TRF; None where the firmware does not tell."""
        found: list[tuple[str, tuple[float, ...], list[float] | None]] = []
        for name, told in (("WRF", self.settings.wrf), ("TRF", self.settings.trf)):
            data = getattr(self.robot, f"GetRt{name.capitalize()}")(include_timestamp=True)
            found.append((name, told, list(data.data) if data.enabled and len(data.data) == 6 else None))
        return found

    def controller_facts(self) -> dict[str, str]:
        """What the controller guards by itself, read back; waits for its answers, and is not for a control loop."""
        facts = {"firmware": str(self.version)}
        for name, getter in READ_BACK:
            try:
                value = getattr(self.robot, getter)(timeout=0.5)
            except Exception:
                facts[name] = "not told by this firmware"
            else:
                parts = vars(value).items() if hasattr(value, "__dict__") else [("", value)]
                facts[name] = ", ".join(f"{part} {getattr(one, 'name', one)}".strip() for part, one in parts)
        return facts

    def close(self) -> None:
        """End the connection; a moving arm is stopped first."""
        self._open = False
        if self._driving:
            with contextlib.suppress(RobotFault):
                self.stop()
        self._thread.join(timeout=1.0)
        self._stopper.shutdown(wait=False)
        with contextlib.suppress(Exception):
            self.robot.Disconnect()

    def _follow(self) -> None:
        while self._open:
            try:
                data, status = self.robot.GetRobotRtData(), self.robot.GetStatusRobot()
                self._fault = self._why_not(status)
                self._take(data)
                if not self.robot.IsConnected() and self._open:
                    self._fault = "the connection to the arm is closed"
            except Exception as error:
                self._fault = f"the connection to the arm is gone ({in_words(error)})"
            time.sleep(FOLLOW_S)

    def _why_not(self, status: Any) -> str:
        if status.error_status:
            code = getattr(status, "error_code", None)
            return f"the arm is in error{f' {code}' if code else ''}; reset it on its web page"
        if not (status.activation_state and status.homing_state):
            return "the arm is not activated and homed (emergency stop?); do so on its web page"
        return "the arm's motion is paused" if self._driving and status.pause_motion_status else ""

    def _take(self, data: Any) -> None:
        joints, pose = data.rt_joint_pos, data.rt_cart_pos
        if not (joints.enabled and pose.enabled):  # firmware that measures nothing tells its targets
            joints, pose = data.rt_target_joint_pos, data.rt_target_cart_pos
        sent_s = pose.timestamp * 1e-6
        if not sent_s or (self._newest is not None and sent_s == self._sent_s):
            return
        self._sent_s, received_s = sent_s, time.time()
        self.meter.clock.arrived(received_s, sent_s)
        stamp_s = self.meter.clock.local(sent_s)
        values = np.array([*joints.data, *pose.data], float)
        self._newest = values, stamp_s
        self.meter.took(received_s, stamp_s)
        self._tap.give(Row(received_s, stamp_s, sent_s, values[:6], values[6:]))

    _sent_s = -1.0


class StateStream(Stream):
    """The state where another host owns the arm: its ZMQ PUB stream. It can be watched and recorded, not driven.

    Topic `robot_state`, then `<ddf12f`, 68 bytes: origin time, send time, force (always 0), joints (deg), pose (mm,
    deg). Topic `episode_end`: the other host has ended an episode.
    """

    def __init__(self, address: str, tap: Tap):
        super().__init__(["robot state"], tap)
        self.episodes_ended = 0
        self._newest: tuple[np.ndarray, float] | None = None
        zmq = needed("zmq", "pyzmq")
        self._again = zmq.Again
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.RCVTIMEO, 200)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.subscribe(b"")
        self._socket.connect(address if "://" in address else f"tcp://{address}")
        self._release = self._socket.close
        self._thread.start()

    def newest(self) -> tuple[np.ndarray, float] | None:
        """The newest state (12,) and its time on this host's clock; None before the first."""
        return self._newest

    def begin(self, period_s: float) -> None:
        """Raises UserError: this arm is another host's."""
        raise UserError("Another host owns this arm (arm.source: state stream): it can be watched, not driven.")

    def send_action(self, action: np.ndarray) -> None:
        """As `begin`."""
        self.begin(0.0)

    def check(self) -> None:
        """Nothing: only its age tells whether the arm's host lives."""

    def stop(self) -> None:
        """Nothing: what was never driven needs no stop."""

    def _run(self) -> None:
        while self._open:
            with contextlib.suppress(self._again):
                self._understand(self._socket.recv_multipart(), time.time())

    def _understand(self, frames: list[bytes], received_s: float) -> None:
        if frames[0] == b"episode_end":
            self.episodes_ended += 1
        elif len(frames) != 2 or frames[0] != b"robot_state" or len(frames[1]) != STATE.size:
            self.meter.refused["messages of another form"] += 1
        else:
            origin, sent, _force, *state = STATE.unpack(frames[1])
            self.meter.clock.arrived(received_s, sent)
            values, origin_s = np.array(state), self.meter.clock.local(origin)
            self._newest = values, origin_s
            self.meter.took(received_s, origin_s)
            self._tap.give(Row(received_s, origin_s, sent, values[:6], values[6:]))
