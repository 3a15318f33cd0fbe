"""A Meca500 on TCP, for tests and for `benchmarks.wire`: the text protocol that mecademicpy speaks with firmware 10.2,
velocity motions, faults.

Written from mecademicpy's messages and the arm's Denavit-Hartenberg table. Motion is integrated exactly between the
moments of commands and reports, so that it does not depend on how often its thread gets to run.
"""

import contextlib
import itertools
import json
import os
import re
import socket
import threading
import time

import numpy as np
from scipy.optimize import least_squares
from scipy.spatial.transform import Rotation

# alpha (deg), a (mm), d (mm), offset of theta (deg): Denavit-Hartenberg, each row Rz(theta) Tz(d) Tx(a) Rx(alpha)
DH = ((-90, 0, 135, 0), (0, 135, 0, -90), (-90, 38, 0, 0), (90, 0, 120, 0), (-90, 0, 0, 0), (0, 0, 70, 180))
OWN = itertools.count(1)  # the arms of this process
SAID = {"ResumeMotion": 2043, "PauseMotion": 2042, "ResetError": 2005}


def flange(joints) -> np.ndarray:
    """(4, 4) of joints in degrees."""
    pose = np.eye(4)
    for angle, (alpha, a, d, offset) in zip(joints, DH, strict=True):
        (c, s), (ca, sa) = ((np.cos(x), np.sin(x)) for x in np.radians((angle + offset, alpha)))
        pose = pose @ [[c, -s * ca, s * sa, a * c], [s, c * ca, -c * sa, a * s], [0, sa, ca, d], [0, 0, 0, 1]]
    return pose


def euler(turn: np.ndarray) -> list[float]:
    """Mobile XYZ angles (deg) of a rotation matrix."""
    a, g = np.arctan2(-turn[1, 2], turn[2, 2]), np.arctan2(-turn[0, 1], turn[0, 0])
    return np.degrees([a, np.arcsin(np.clip(turn[0, 2], -1, 1)), g]).tolist()


def turned(vector_deg) -> np.ndarray:
    """Rodrigues' formula."""
    vector = np.radians(vector_deg)
    angle = np.linalg.norm(vector)
    if angle < 1e-12:
        return np.eye(3)
    x, y, z = vector / angle
    skew = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * skew + (1 - np.cos(angle)) * skew @ skew


class FakeArm:
    """Start it with `with`; it listens at `address`. `log`: (monotonic time, command), without the client's own.

    With a version of 11.1.5 or later it listens on the client's own port, of a loopback address of its own: there alone
    the client asks for JSON, in which the arm's status comes from then on.
    """

    def __init__(self, joints=(0, 0, 0, 0, 60, 0), tool_mm=0.0, version="10.2.4.9876", wrf=(0,) * 6, up=False):
        self.joints, self.tool_mm, self.version, self.wrf = np.array(joints, float), tool_mm, version, wrf
        self.up = up  # the tool's z axis points from its tip to the flange, as in the recordings
        pose = self._tip(self.joints)
        self.place, self.turn = pose[:3, 3], pose[:3, :3]  # as measured
        self.target, self.lag_s = (self.place, self.turn), 0.0  # as commanded, and the time constant of what follows it
        self.activated = self.homed = True
        self.error, self.json = 0, False
        self.paused, self.silent, self.stuck, self.deaf = True, False, False, False
        self.velocity, self.until_s, self.timeout_s = np.zeros(6), 0.0, 0.05
        self.interval_s, self.watchdog_s, self.jump_us = 0.0167, 0.0, 0
        self.log: list[tuple[float, str]] = []
        self.way: list[tuple[float, np.ndarray]] = []  # (monotonic time, place) at every report
        self._moved_s, self._zero_s = time.monotonic(), time.monotonic() - 100.0
        self._solved = (self.place.copy(), self.turn.copy())
        self._client: socket.socket | None = None
        self._lock = threading.RLock()

    def _tip(self, joints) -> np.ndarray:
        tool = np.eye(4)
        tool[2, 3] = self.tool_mm
        if self.up:
            tool[:3, :3] = np.diag([-1, 1, -1])
        return flange(joints) @ tool

    @property
    def trf(self) -> list[float]:
        """The tool frame as the controller tells it."""
        return [0, 0, self.tool_mm, *((180, 0, 180) if self.up else (0, 0, 0))]

    def __enter__(self):
        own = f"127.{os.getpid() >> 8 & 255}.{os.getpid() & 255}.{next(OWN)}"
        place = (own, 10000) if tuple(map(int, self.version.split(".")[:3])) >= (11, 1, 5) else ("127.0.0.1", 0)
        self._server = socket.create_server(place)
        self.address = "{}:{}".format(*self._server.getsockname())
        self._runs = True
        for target in (self._serve, self._report):
            threading.Thread(target=target, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._runs = False
        self._server.close()
        self.drop()

    # ---- faults

    def fail(self, code=3005):
        with self._lock:
            self._advance()
            self.error, self.paused, self.velocity = code, True, np.zeros(6)
            self._say(code, "Error of motion.")
            self._status()

    def press_estop(self):
        with self._lock:
            self._advance()
            self.activated = self.homed = False
            self.paused, self.velocity = True, np.zeros(6)
            self._say(3070, "1")
            self._status()

    def drop(self):
        with self._lock:
            self._advance()
            client, self._client = self._client, None
            self.velocity, self.paused, self.watchdog_s = np.zeros(6), True, 0.0
        if client:
            with contextlib.suppress(OSError):
                client.shutdown(socket.SHUT_RDWR)
            client.close()

    # ---- motion

    def pose(self) -> tuple[np.ndarray, np.ndarray]:
        """Where the tool is now: place (3,) mm, and its rotation matrix (3, 3)."""
        with self._lock:
            self._advance()
            return self.place.copy(), self.turn.copy()

    def _advance(self) -> None:
        now = time.monotonic()
        span = max(0.0, min(now, self.until_s) - self._moved_s)
        if not self.stuck and not self.paused:
            place, turn = self.target
            self.target = place + self.velocity[:3] * span, turned(self.velocity[3:] * span) @ turn
        place, turn = self.target
        if self.lag_s:
            share = 1 - np.exp(-(now - self._moved_s) / self.lag_s)
            behind = Rotation.from_matrix(turn @ self.turn.T).as_rotvec(degrees=True)
            place, turn = self.place + share * (place - self.place), turned(share * behind) @ self.turn
        self.place, self.turn = place, turn
        self._moved_s = now

    def _solve(self) -> np.ndarray:
        """Joints of the pose, from those before."""
        if not (np.array_equal(self._solved[0], self.place) and np.array_equal(self._solved[1], self.turn)):

            def off(joints):
                pose = self._tip(joints)
                return np.concatenate([pose[:3, 3] - self.place, 100.0 * (pose[:3, :3] - self.turn).ravel()])

            self.joints = least_squares(off, self.joints, method="lm", max_nfev=40).x
            self._solved = (self.place.copy(), self.turn.copy())
        return self.joints

    # ---- wire

    def _say(self, code, text="") -> None:
        self._send(f"[{code}][{text}]")

    def _send(self, message: str | dict) -> None:
        if self._client is not None and not self.silent:
            with contextlib.suppress(OSError):
                text = message if isinstance(message, str) else json.dumps(message)
                self._client.sendall(f"{text}\0".encode())

    def _status(self) -> None:
        still = int(not self.velocity.any())
        if self.json:
            state = 7 if self.homed else 4 if self.activated else 2  # as the client counts them
            status = {"state": state, "simMode": 0, "errorCode": self.error, "errorMsg": "", "brakesEngaged": False}
            motion = {"paused": self.paused, "cleared": self.paused, "eob": bool(still), "eom": bool(still)}
            return self._send({"code": 2007, "data": {"robotStatus": status, "motionStatus": motion}})
        flags = (self.activated, self.homed, 0, bool(self.error), self.paused, still, still)
        self._say(2007, ",".join(str(int(flag)) for flag in flags))

    def _serve(self) -> None:
        while self._runs:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._client, self._told, self.json = client, False, False
                self._say(3000, f"Connected to Meca500 R4 v{self.version.rsplit('.', 1)[0]}")
            rest = b""
            with contextlib.suppress(OSError):
                while part := client.recv(4096):
                    while self.deaf:
                        time.sleep(0.01)
                    *commands, rest = re.split(rb"[\0\n]", rest + part)
                    for command in commands:
                        with self._lock:
                            self._do(command.decode())
            if self._client is client:
                self.drop()

    def _do(self, text: str) -> None:
        name, _, raw = text.lstrip("-").partition("(")
        values = raw.rstrip(")").split(",") if raw else []
        if not name:
            return None
        told = {
            "GetRobotSerial": (2083, "m500-0001"),
            "GetFwVersionFull": (2082, self.version),
            "GetRealTimeMonitoring": (2117, ""),
            "GetMonitoringInterval": (2116, f"{self.interval_s}"),
            "GetVelTimeout": (2151, f"{self.timeout_s}"),
            "GetTimeScaling": (2015, "100.0"),
            "GetTorqueLimitsCfg": (2160, "4,1"),
            "GetTorqueLimits": (2161, "10,10,10,10,10,10"),
            "GetWorkZoneCfg": (2163, "4,1"),
            "GetWorkZoneLimits": (2165, "100,-100,50,300,100,300"),
            "GetToolSphere": (2167, "0,0,0,0"),
        }
        if name == "SyncCmdQueue":
            return self._say(2097, values[0])
        if name in told:
            return self._say(*told[name])
        if name == "EnableJsonMode":
            self.json = True
            return self._status()
        if name == "GetStatusRobot":
            return self._status()
        if name == "SetCtrlPortMonitoring":
            self._status()
            stamp = self._stamp()
            self._say(2228, f"{stamp},{','.join(map(str, self.wrf))}")
            self._say(2229, f"{stamp},{','.join(map(str, self.trf))}")
            self._told = True
            return None
        if name == "SetMonitoringInterval":
            self.interval_s = float(values[0])
            return self._say(2116, values[0])
        if name == "ConnectionWatchdog":
            seconds = float(values[0])
            self.watchdog_s = time.monotonic() + seconds if seconds else 0.0
            return self._say(2177, str(int(seconds > 0)))
        if name.startswith(("Set", "Enable", "Log")) and name != "SetVelTimeout":
            return None
        self.log.append((time.monotonic(), text))
        self._advance()
        if name == "ClearMotion":
            self.paused, self.velocity = True, np.zeros(6)
            self._say(2044, "")
            return self._status()
        if self.error or not self.activated:
            return self._say(1011 if self.error else 1005, "Not now.")
        if name in SAID:
            self.paused = name == "PauseMotion"
            self._say(SAID[name], "")
            return self._status()
        if name == "SetVelTimeout":
            self.timeout_s = float(values[0])
        elif name == "MoveLinVelWrf":
            self.velocity = np.array(values, float)
            self.until_s = time.monotonic() + self.timeout_s
        else:
            self._say(1001, f"{text} is not known.")
        return None

    def _stamp(self) -> int:
        return int((time.monotonic() - self._zero_s) * 1e6) + self.jump_us

    def _report(self) -> None:
        while self._runs:
            time.sleep(self.interval_s)
            if self.watchdog_s and time.monotonic() > self.watchdog_s:
                self.drop()
            with self._lock:
                self._advance()
                self.way.append((self._moved_s, self.place))
                if self._client is None or self.silent or not self._told:
                    continue
                stamp, joints = self._stamp(), ",".join(f"{value:.6f}" for value in self._solve())
                pose = ",".join(f"{value:.6f}" for value in [*self.place, *euler(self.turn)])
                for code, values in ((2200, joints), (2201, pose), (2210, joints), (2211, pose)):
                    self._say(code, f"{stamp},{values}")
                self._say(2230, f"{stamp}")
