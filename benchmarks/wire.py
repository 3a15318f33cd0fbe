"""The closed loop through the whole wire: a checkpoint drives the simulated rig as it would drive the lab's.

    python -m benchmarks.wire --checkpoint PATH --seeds 10

The rig's pictures come from a camera host (ZMQ), its samples from a sensor host (UDP), and its arm stands behind a fake
Meca500 that the real mecademicpy drives. The policy runs in the task stage of `vla_lib.deploy`, in processes of its
own, and every rollout is recorded. Each phantom is also tried as `vla_lib.evaluate` does, and both judgements are shown
side by side. It takes real time: up to half a minute a phantom, on a machine with nothing else to do.
"""

import contextlib
import json
import socket
import struct
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import yaml
import zmq
from annotated_types import Gt
from scipy.spatial.transform import Rotation

from benchmarks.__main__ import machine
from benchmarks.fake_arm import FakeArm
from benchmarks.robots import CAMERAS, free_port
from needle_rig.render import jpeg
from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json, write_text
from vla_lib.core.settings import Settings, settings
from vla_lib.evaluation.closed_loop import FIRST_SEED, TUNING_SEED, closed_loop, unseen_seeds
from vla_lib.evaluation.deployment import DeploySettings, run_stage
from vla_lib.evaluation.rehearsal import LoopProcess
from vla_lib.evaluation.rollout import dataset_of, expert_of, judged, rig_of, rig_settings
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.evaluation.sim_robot import VIEWS, NeedleInsertion, instruction_of, make_rig, prepare_gl, sim_limits
from vla_lib.training.checkpoint import load_policy

HOSTS = dict(zip(VIEWS, CAMERAS, strict=True))  # view -> what its camera's host calls it
TOOL_MM = 40.0  # the rig's needle, from the flange
LOADING_S = 300.0  # the rig rests for at most this long until the policy moves
# hosts, arm and phantom share this machine with the loop: they may be later than hosts of their own
LIMITS = sim_limits() | {"sensor_age_s": 1.0, "picture_age_s": 2.0, "hold_s": 2.0}
BATCH, BATCH_HZ = 13, 50.0  # samples in a datagram, datagrams a second
Reset = tuple[dict[str, Any], dict[str, Any]]  # observation, info
COLUMNS = ("success", "reason", "lateral_mm", "depth_error_mm", "peak_force_mN", "time_s")


@settings
class WireSettings(Settings):
    """Try a checkpoint on unseen phantoms through sockets, and as an evaluation does."""

    checkpoint: Path  # the policy; how it was judged lies beside it and holds, as in deployment
    seeds: Annotated[int, Gt(0)] = 5  # unseen phantoms: the first of those that an evaluation tries
    tuning: bool = False  # take seeds that are kept for choosing between variants: the reported ones stay unseen
    device: str = "cpu"  # cpu or cuda
    rollouts_root: Path | None = None  # where the rollouts are recorded; default: nowhere that stays
    output: Path | None = None  # write both judgements of each phantom as JSON to this file

    def __post_init__(self) -> None:
        if not self.checkpoint.is_file():
            raise UserError(f"There is no checkpoint {self.checkpoint}; give the path of its .pt file.")


class RigBehindSockets:
    """A rig that follows a fake arm, and sends what it sees as the lab's hosts would: a period of the rig is one batch.

    `reset`: what the rig's reset gave; `arm` must stand where the rig does, and has its lag from here on.
    """

    def __init__(self, rig: NeedleInsertion, reset: Reset, arm: FakeArm, camera_port: int, sensor_port: int):
        first, self.info = reset
        self.rig, self.arm, self.done = rig, arm, False
        self.arm.lag_s, self.rig.arm.lag_s = rig.arm.lag_s, 1e-3  # what the arm reports is where the needle is
        self._sent: dict[str, float] = {}
        self._push = zmq.Context.instance().socket(zmq.PUSH)
        self._push.setsockopt(zmq.LINGER, 0)
        self._push.connect(f"tcp://127.0.0.1:{camera_port}")
        self._udp, self._to = socket.socket(socket.AF_INET, socket.SOCK_DGRAM), ("127.0.0.1", sensor_port)
        self._zero_s = time.time() - float(first["timestamp"])  # of the rig's clock: its samples come evenly
        self._begun = -1.0  # s of the rig, when the arm was allowed to move
        self._send(first)

    def go(self, while_: Callable[[], bool], max_s: float) -> None:
        """Until the rollout is judged, at the latest `max_s` after the arm was allowed to move, or while `while_()`.

        In the thread that made the rig: its drawing context belongs to that one.
        """
        due = time.monotonic()
        while while_() and not self.done:
            due += 1 / self.rig.action_hz
            time.sleep(max(0.0, due - time.monotonic()))
            self._step(max_s)

    def over(self) -> str:
        """Why the rollout is over, "" while it goes on."""
        return "success" if self.done and self.info["success"] else self.info["reason"] if self.done else ""

    def _step(self, max_s: float) -> None:
        place, turn = self.arm.pose()
        command = self.rig.arm.command
        turned = Rotation.from_matrix(turn) * Rotation.from_rotvec(command[3:], degrees=True).inv()
        action = np.concatenate([place - command[:3], turned.as_rotvec(degrees=True)])
        seen, _, terminated, truncated, self.info = self.rig.step(action)
        now_s = self.info["time_s"]
        if self._begun < 0 and not self.arm.paused:
            self._begun = now_s
        self.info["time_s"] = now_s - max(self._begun, 0.0)
        if 0 <= self._begun <= now_s - max_s:
            self.rig.judge.time_out()
            truncated, self.info = True, self.info | self.rig.judge.to_dict()
        self.done = terminated or truncated
        self._send(seen)

    def _send(self, seen: dict[str, Any]) -> None:
        now = time.time()
        for view, picture in seen["pictures"].items():
            if (stamp := float(seen["picture_timestamps"][view])) > self._sent.get(view, 0.0):
                self._sent[view], packed = stamp, jpeg(picture)
                told = {"camera": HOSTS[view], "timestamp": self._zero_s + stamp, "size": len(packed)}
                with contextlib.suppress(zmq.Again):  # a full queue drops pictures, as the lab's hosts do
                    self._push.send_multipart([json.dumps(told).encode(), packed], zmq.NOBLOCK)
        count = self.rig.ticks
        new, times = seen["sensor"][-count:].astype("<f4"), self._zero_s + seen["sensor_timestamps"][-count:]
        records = [struct.pack("<dd", t_s, now) + sample.tobytes() for t_s, sample in zip(times, new, strict=True)]
        for first in range(0, count, BATCH):
            batch = records[first : first + BATCH]
            self._udp.sendto(struct.pack("<I", len(batch)) + b"".join(batch), self._to)

    def close(self) -> None:
        """Close the hosts' sockets."""
        self._push.close()
        self._udp.close()


def through_the_wire(given: DeploySettings, rig: NeedleInsertion, how: RolloutSettings, seed: int) -> dict[str, Any]:
    """One rollout of the task stage on the phantom of `seed`; the record of `evaluation.rollout.judged`."""
    reset = rig.reset(seed=seed)
    ports = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    with FakeArm(reset[0]["state"][:6], TOOL_MM, up=True) as arm, contextlib.ExitStack() as opened:
        content = {
            "instruction": how.instruction or instruction_of(how.task),
            "arm": {"address": arm.address, "trf": arm.trf},
            "cameras": {view: {"source": "zmq"} for view in rig.views},
            "zmq_port": ports[0],
            "sensor": {"port": ports[1], "host": "127.0.0.1"},
            "limits": LIMITS | {"workspace_mm": [list(side) for side in LIMITS["workspace_mm"]]},
        }
        write_text(given.robot, yaml.safe_dump(content))
        process = opened.enter_context(contextlib.closing(LoopProcess(run_stage, given, "task", {})))
        wire = opened.enter_context(contextlib.closing(RigBehindSockets(rig, reset, arm, *ports)))

        def runs() -> bool:
            process.poll()
            return process.running

        wire.go(runs, how.max_time_s)
        process.stop()  # a person ends a task: here the rig does, once it has judged
        while runs():
            time.sleep(0.05)
        record = process.result()
    return judged(wire, record["log"])


def main(settings: WireSettings) -> dict[str, Any]:
    """Try each phantom through the wire, then as an evaluation does; prints and returns both judgements."""
    prepare_gl()
    with tempfile.TemporaryDirectory() as folder:
        root = settings.rollouts_root or Path(folder) / "rollouts"
        how = rig_settings(settings.checkpoint)
        task = {"device": settings.device, "rollouts_root": root, "max_time_s": how.max_time_s + 5.0}
        given = DeploySettings(Path(folder) / "robot.yaml", settings.checkpoint, operator="benchmarks.wire", **task)
        deployed = given.rollout()
        how = replace(how, **{name: getattr(deployed, name) for name in ("execution", "chunk_steps", "ddim_steps")})
        seeds = unseen_seeds(
            settings.seeds, [dataset_of(settings.checkpoint)], TUNING_SEED if settings.tuning else FIRST_SEED
        )
        asked = rig_of(how, expert_of(how, *load_policy(settings.checkpoint))[1])
        asked |= {"action_hz": BATCH_HZ, "max_time_s": how.max_time_s + LOADING_S}
        wired = []
        with contextlib.closing(make_rig(**asked)) as rig:
            for seed in seeds:
                wired.append(through_the_wire(given, rig, how, seed))
                print(f"{seed} through the wire: {in_words(wired[-1])}", flush=True)
    plain = closed_loop({"as evaluated": how}, seeds)["as evaluated"].rollouts
    return report(settings, wired, plain)


def in_words(row: dict[str, Any]) -> str:
    """The judgement of a rollout, and what its loop missed."""
    runner = row["runner"]
    late = (runner["lateness_ms"] or {}).get("p99", np.nan)
    return (
        f"{row['reason'] or 'success'}, {row['lateral_mm']:.2f} mm beside, {row['depth_error_mm']:+.2f} mm deep, "
        f"{row['peak_force_mN']:.0f} mN, {row['time_s']:.1f} s; {runner['missed_deadlines']} missed deadlines, "
        f"{runner['modes'].get('hold', 0)} held of {runner['ticks']} ticks, p99 {late:.1f} ms late"
    )


def report(settings: WireSettings, wired: list[dict[str, Any]], plain: list[dict[str, Any]]) -> dict[str, Any]:
    """Prints both judgements of each phantom side by side, and in how many they agree; returns and writes them."""
    rows = []
    for one, other in zip(wired, plain, strict=True):
        rows += [{"seed": one["seed"], "way": "wire"} | {name: one[name] for name in COLUMNS}]
        rows += [{"seed": "", "way": "evaluation"} | {name: other[name] for name in COLUMNS}]
    print(pd.DataFrame(rows).to_string(index=False, float_format="{:.2f}".format))
    same = sum(one["success"] == other["success"] for one, other in zip(wired, plain, strict=True))
    counts = [sum(row["success"] for row in ways) for ways in (wired, plain)]
    print(
        f"success: {counts[0]} of {len(wired)} through the wire, {counts[1]} as evaluated; "
        f"the same judgement on {same} of {len(wired)}"
    )
    left_out = ("path", "events", "truth")
    kept = [[{k: v for k, v in row.items() if k not in left_out} for row in ways] for ways in (wired, plain)]
    results = {"machine": machine(), "checkpoint": str(settings.checkpoint), "wire": kept[0], "evaluation": kept[1]}
    if settings.output is not None:
        write_json(settings.output, results)
    return results


if __name__ == "__main__":
    frontdoor.start(WireSettings, main)
