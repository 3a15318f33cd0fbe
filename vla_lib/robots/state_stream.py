"""The robot's state where another host owns the arm: its ZMQ PUB stream. It can be watched and recorded, not driven.

Topic `robot_state`, then `<ddf12f`, 68 bytes: origin time, send time, force (always 0), joints (deg), pose (mm, deg).
Topic `episode_end`: the other host has ended an episode.
"""

import contextlib
import struct
import time

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.robots.streams import Row, Stream, Tap, needed

STATE = struct.Struct("<ddf12f")


class StateStream(Stream):
    """Receives in a thread; `newest` gives the state (12,) and its time on this host's clock, None before the first."""

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
        """The newest state."""
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
