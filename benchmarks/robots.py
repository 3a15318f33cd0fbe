"""Benchmark row of a rig's streams: the control loop beside five cameras at 1280x720 and the sensor at 650 Hz.

The hosts are a process of their own on loopback: cameras (ZMQ, 5 Hz each), sensor (UDP, batches), the arm's state (ZMQ,
100 Hz). The loop decodes every picture, runs an untrained policy with the tiny VLM, and sends nothing. The Meca500's
own client is not in it: nothing here could answer it.
"""

import contextlib
import io
import socket
import struct
import tempfile
import time
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import zmq
from PIL import Image

from benchmarks.rows import BenchRow
from benchmarks.runtime import LATENESS_MS, untrained
from needle_rig.world import VIEWS
from vla_lib.episodes.layouts import SERIALS
from vla_lib.evaluation.rehearsal import Pilot
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.settings import RobotSettings
from vla_lib.runtime.robot_io import DryRunIO, Observation
from vla_lib.runtime.run_log import RunLog, Tick
from vla_lib.training.settings import AsyncSettings

CAMERAS = (*(f"ZED_{serial}_left" for serial in SERIALS), "OAK")
POSE = (175.0, 0.0, 150.0, 180.0, 0.0, 0.0)


def rows(fast: bool = False, soak_s: float = 60.0) -> list[BenchRow]:
    """Soak for `soak_s` seconds of real time (3 s if `fast`)."""
    camera_port, sensor_port = free_port(socket.SOCK_STREAM), free_port(socket.SOCK_DGRAM)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = untrained(Path(folder) / "policy.pt", AsyncSettings())
        ours, theirs = get_context("spawn").Pipe()
        hosts = get_context("spawn").Process(target=run_hosts, args=(theirs, camera_port, sensor_port), daemon=True)
        hosts.start()
        try:
            log, used = soak(checkpoint, ours.recv(), camera_port, sensor_port, 3.0 if fast else soak_s)
        finally:
            hosts.kill()
    return [lateness_row(log, used)]


def soak(checkpoint: Path, port: int, cameras: int, sensor: int, seconds: float) -> tuple[RunLog, dict[str, Any]]:
    """The loop's log; streams' rows at the end, and memory (MB) at a tenth of the time and at its end."""
    box = [[value - 50, value + 50] for value in POSE[:3]]
    settings = RobotSettings.of_mapping(
        {
            "instruction": "insert",
            "arm": {"source": "state stream", "address": f"127.0.0.1:{port}"},
            "cameras": {view: {"source": "zmq"} for view in VIEWS},
            "zmq_port": cameras,
            "sensor": {"port": sensor, "host": "127.0.0.1"},
            # a soak goes on where other work on the machine delays the VLM; the row tells what was late
            "limits": {"workspace_mm": box, "vl_age_s": 5, "hold_s": 5, "sensor_age_s": 1},
        }
    )
    memory, me, load = [], psutil.Process(), psutil.getloadavg()[0]

    def watch(tick: Tick, _seen: Observation) -> None:
        if tick.step % 10 == 0:
            memory.append(me.memory_info().rss / 1e6)

    with LabRobot(settings) as robot, Pilot(RolloutSettings(checkpoint)) as pilot:
        robot.wait_ready(60.0)
        pilot.warm_up(robot.read_observation())
        log = pilot.run(DryRunIO(robot), settings.safety(), seconds, watch)
        return log, {"streams": robot.streams(), "memory_MB": (memory[len(memory) // 10], memory[-1]), "load": load}


def lateness_row(log: RunLog, used: dict[str, Any]) -> BenchRow:
    """99th percentile of the lateness of every tick, against the 5 ms that are allowed."""
    summary, (early, late_MB) = log.summary(), used["memory_MB"]
    late = summary["lateness_ms"]
    rates = ", ".join(f"{row['stream']} {row['rate_hz']:g} Hz" for row in used["streams"])
    faults = ", ".join(
        f"{row['stream']} {row['fault'] or row['refused']}" for row in used["streams"] if row["fault"] or row["refused"]
    )
    worst = int(log.column("lateness_ms").argmax())
    before = "; ".join(
        f"{name} {getattr(log.ticks[max(0, worst - 1)], name)}" for name in ("mode", "expert_ms", "vl_busy")
    )
    note = (
        f"real-time priority {'given' if log.real_time else 'refused'}; {summary['ticks']} ticks to "
        f"{summary['ended']}: median {late['median']:.2f}, max {late['max']:.2f} ms (tick {worst}; before "
        f"it {before}); "
        f"{summary['missed_deadlines']} missed deadlines, {summary['skipped_ticks']} skipped, "
        f"{summary['modes'].get('hold', 0)} held; memory {early:.0f} to {late_MB:.0f} MB; {rates}; refused or faulty: "
        f"{faults or 'nothing'}; load {used['load']:.1f} before; baseline: allowed"
    )
    return BenchRow("robots.soak lateness p99", late["p99"], LATENESS_MS, "ms", "< 5 ms, none missed", note, less=True)


def free_port(kind: socket.SocketKind) -> int:
    """A port that nobody holds now."""
    with socket.socket(socket.AF_INET, kind) as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def run_hosts(told: Any, camera_port: int, sensor_port: int) -> None:
    """The rig's hosts, until killed: one loop of 10 ms. Sends the port of the arm's state through `told`."""
    context, noise = zmq.Context.instance(), np.random.default_rng(0)
    state, push = context.socket(zmq.PUB), context.socket(zmq.PUSH)
    push.set_hwm(10)
    told.send(state.bind_to_random_port("tcp://127.0.0.1"))
    push.connect(f"tcp://127.0.0.1:{camera_port}")
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    pictures = [jpeg(noise) for _ in range(3)]
    alines = noise.normal(0, 1, (64, 1025)).astype("<f4")
    begun, sampled, tick = time.time(), 0, 0
    while True:
        now = time.time()
        state.send_multipart([b"robot_state", struct.pack("<ddf12f", now, now, 0.0, *([0.0] * 6), *POSE)])
        count, sampled = int((now - begun) * 650) - sampled, int((now - begun) * 650)
        records = [
            struct.pack("<ddf", begun + (sampled - count + k + 1) / 650, now, 10 + noise.normal(0, 0.1))
            + alines[(sampled + k) % 64].tobytes()
            for k in range(min(count, 15))
        ]
        if records:
            udp.sendto(struct.pack("<I", len(records)) + b"".join(records), ("127.0.0.1", sensor_port))
        if tick % 4 == 0:  # each camera in its turn: five of them, 5 Hz each
            name, picture = CAMERAS[tick // 4 % len(CAMERAS)], pictures[tick // 20 % len(pictures)]
            header = f'{{"camera": "{name}", "timestamp": {now}, "size": {len(picture)}}}'.encode()
            with contextlib.suppress(zmq.Again):
                push.send_multipart([header, picture], zmq.NOBLOCK)
        tick += 1
        time.sleep(max(0.0, begun + tick * 0.01 - time.time()))


def jpeg(noise: np.random.Generator) -> bytes:
    """A picture of 1280x720 with the detail of a photograph, quality 75."""
    small = Image.fromarray(noise.integers(0, 255, (90, 160, 3), np.uint8))
    stream = io.BytesIO()
    small.resize((1280, 720), Image.Resampling.BICUBIC).save(stream, "JPEG", quality=75)
    return stream.getvalue()
