"""Records what a robot sees as a raw episode (layout F3) while it runs: every picture, sample and row, as they come.

    with Recording(root / "rollouts", robot, about) as recording:
        log = pilot.run(..., watch=recording.watch)
    judge(recording.folder, success=True, note="clean", by="Kim")

Streams hand their items over; one thread writes them, so the control loop waits for no disk. Samples are appended to a
raw file. A process of its own waits for the end of this one, however it comes, and makes the `.npz` of them: what was
recorded is a whole episode after a crash, too. All times are this host's. Beside F3 lie `ordered.jsonl` (every tick:
what the policy ordered, what was sent, why not) and `rollout.json` (what ran, how it ended, a person's judgement).
"""

import contextlib
import fcntl
import io
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_lib.core.errors import UserError, in_words, needing_room
from vla_lib.core.files import append_jsonl, atomic_path, make_folder, read_json, write_json, write_text
from vla_lib.episodes.datasets import TABLE_NAME, DatasetTable
from vla_lib.episodes.layouts import SERIALS
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.streams import Frame, Row, Samples
from vla_lib.runtime.robot_io import Observation
from vla_lib.runtime.run_log import RunLog, Tick

RAW = np.dtype([("t_s", "<f8"), ("sent_s", "<f8"), ("sample", "<f4", 1026)])
COLUMNS = (
    *("recv_timestamp", "origin_timestamp", "send_timestamp", "force_placeholder"),
    *(f"joint_{number}" for number in range(1, 7)),
    *(f"pose_{axis}" for axis in "xyzabr"),
)
RECORD, ORDERED = "rollout.json", "ordered.jsonl"
WAITING = 4000  # items at most that wait for the disk; beyond, they are dropped and counted
JPEG_QUALITY = 90  # of pictures that do not come as JPEG
OURS = "# Written by the workbench: weights and instructions of its recordings. Edit it as you like.\n"


class Recording(contextlib.AbstractContextManager["Recording"]):
    """One episode being written below `dataset`. `about`: what ran, for rollout.json. `folder`: where it lies."""

    def __init__(self, dataset: Path, robot: LabRobot, about: Mapping[str, Any]):
        finish_left(dataset)
        self.robot, self.dropped, self.failure = robot, Counter[str](), ""
        self.folder = _new_folder(dataset)
        session = self.folder.name.removeprefix("data_collection_")
        record = {"schema": 1, "started_s": time.time(), "complete": False, **about}
        with needing_room(self.folder, "Make room, or record elsewhere."):
            write_json(self.folder / RECORD, record | {"robot": robot.settings.record(), "outcome": None})
            self._files = contextlib.ExitStack()
            log, raw = self.folder / f"robot_state_{session}.csv", self.folder / f"sensor_data_{session}.raw"
            self._log = self._files.enter_context(log.open("ab", buffering=0))
            self._log.write((",".join(COLUMNS) + "\n").encode())
            self._raw = self._files.enter_context(raw.open("ab", buffering=0))
        fcntl.flock(self._raw, fcntl.LOCK_EX)  # ours while we live
        # it waits until this process closes its stdin, by its end at the latest
        code = "import pathlib, sys; from vla_lib.robots.recording import finish; "
        code += "sys.stdin.read(); finish(pathlib.Path(sys.argv[1]))"
        self._closer = subprocess.Popen(
            [sys.executable, "-c", code, str(self.folder)], stdin=subprocess.PIPE, start_new_session=True
        )
        self._items: queue.Queue[Any] = queue.Queue(WAITING)
        self._writer = threading.Thread(target=self._write_all, name="recording", daemon=True)
        self._writer.start()
        robot.tap.listen(self.take)

    def take(self, item: Frame | Samples | Row | dict[str, Any]) -> None:
        """Have an item written; returns at once."""
        try:
            self._items.put_nowait(item)
        except queue.Full:
            self.dropped[type(item).__name__] += 1

    def watch(self, tick: Tick, observation: Observation) -> None:
        """The runner's `watch`: what was ordered, at this host's time."""
        self.take({"timestamp": observation.timestamp, **asdict(tick)})

    def close(self, log: RunLog | None = None, ended: str = "") -> None:
        """Write what waits, the run's end, and the samples' `.npz`. Raises UserError where something is missing."""
        self.robot.tap.listen(None)
        self._items.put(None)
        self._writer.join()
        found = {"ended": log.ended if log else ended, "ended_s": time.time(), "streams": self.robot.streams()}
        if log is not None:
            found |= {"runner": log.summary(), "events": log.events}
        found |= {"dropped": dict(self.dropped), "failure": self.failure, "complete": True}
        self._files.close()
        write_json(self.folder / RECORD, read_json(self.folder / RECORD) | found)
        self._closer.communicate()
        if self.failure or self.dropped:
            lost = ", ".join(f"{count} of {kind}" for kind, count in self.dropped.items())
            raise UserError(f"{self.folder} is not whole: {self.failure or f'the disk was too slow for {lost}'}.")

    def __exit__(self, kind: Any, error: Any, _trace: Any) -> None:
        if not self._log.closed:
            with contextlib.suppress(UserError) if error else contextlib.nullcontext():
                self.close(ended=in_words(error) if error else "closed")

    def _write_all(self) -> None:
        while (item := self._items.get()) is not None:
            if not self.failure:
                try:
                    self._write(item)
                except (OSError, ValueError) as error:  # the run goes on; its end tells
                    self.failure = in_words(error)

    def _write(self, item: Frame | Samples | Row | dict[str, Any]) -> None:
        if isinstance(item, Row):
            values = (item.received_s, item.origin_s, item.sent_s, 0.0, *item.joints, *item.pose)
            self._log.write((",".join(f"{value:.6f}" for value in values) + "\n").encode())
        elif isinstance(item, Samples):
            records = np.empty(len(item.t_s), RAW)
            records["t_s"], records["sent_s"], records["sample"] = item.t_s, item.sent_s, item.samples
            self._raw.write(records.tobytes())
        elif isinstance(item, Frame):
            path = self.folder / picture_name(item.view, item.t_s)
            path.parent.mkdir(exist_ok=True)
            written = path.with_name(f".{path.name}.partial")
            written.write_bytes(item.jpeg if item.jpeg is not None else _packed(item.rgb))
            os.replace(written, path)
        else:
            append_jsonl(self.folder / ORDERED, item)


def picture_name(view: str, t_s: float) -> str:
    """Where a picture of a view key lies in an episode of layout F3."""
    folder, _, side = view.partition("_")
    serials = {f"View{number}": serial for serial, number in SERIALS.items()}
    camera = f"ZED_{serials[folder]}_{side or 'left'}" if folder in serials else "OAK"
    return f"{folder}/{camera}_{t_s:.3f}.jpg"


def _packed(rgb: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(rgb).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()


def _new_folder(dataset: Path) -> Path:
    while True:
        folder = dataset / time.strftime("data_collection_%Y%m%d_%H%M%S")
        try:
            make_folder(dataset)
            folder.mkdir()
        except FileExistsError:
            time.sleep(0.2)
        except OSError as error:
            raise UserError(f"{dataset} cannot be written ({in_words(error)}); record elsewhere.") from None
        else:
            return folder


# ---------------------------------------------------------------- the end of an episode


def finish(folder: Path) -> bool:
    """Make the `.npz` of the raw samples, unless somebody still records; returns whether the episode is finished."""
    for path in folder.glob("sensor_data_*.raw"):
        with open(path, "r+b") as raw:
            try:
                fcntl.flock(raw, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            except OSError:
                pass  # a mount without locks: the closer comes after the recorder's end
            if count := path.stat().st_size // RAW.itemsize:
                records = np.memmap(path, RAW, "r", shape=(count,))
                sample = records["sample"]
                with atomic_path(path.with_suffix(".npz")) as temporary, open(temporary, "wb") as file:
                    np.savez(
                        file,
                        timestamps=records["t_s"],
                        send_timestamps=records["sent_s"],
                        forces=sample[:, 0],
                        alines=sample[:, 1:],
                    )
            path.unlink()
    record = folder / RECORD
    if record.exists() and not (found := read_json(record)).get("complete"):
        ended = "the recording process ended before its recording"
        write_json(record, found | {"ended": ended, "complete": True})
    return True


def finish_left(dataset: Path) -> list[Path]:
    """Finish what a crash of the machine left open below `dataset`; returns those folders."""
    left = [path.parent for path in dataset.glob("data_collection_*/sensor_data_*.raw")]
    return [folder for folder in left if finish(folder)]


def judge(folder: Path, success: bool | None, note: str, by: str) -> Path:
    """Keep a person's judgement of an episode. A failure moves to the dataset `<name>_failed` beside its own, so that a
    policy does not learn from it unless somebody gives that dataset's folder a place. Returns where it lies then."""
    record = read_json(folder / RECORD)
    outcome = {"success": success, "note": note, "by": by, "judged_s": time.time()}
    write_json(folder / RECORD, record | {"outcome": outcome})
    if success is not False or folder.parent.name.endswith("_failed"):
        return folder
    place = folder.parent.with_name(f"{folder.parent.name}_failed") / folder.name
    make_folder(place.parent)
    os.replace(folder, place)
    return place


def enter(root: Path, dataset: str, instruction: str) -> str:
    """Give a dataset of recordings its row in `<root>/datasets.yaml`; a sentence where a person has to, else ""."""
    path, row = root / TABLE_NAME, f"{dataset}: {{weight: 1, instruction: {instruction!r}}}\n"
    if DatasetTable.load(root).knows(dataset):
        return ""
    text = path.read_text(encoding="utf-8") if path.exists() else OURS
    if not text.startswith(OURS):
        return f"{path} does not know the dataset {dataset}; add the row: {row.strip()}"
    rows = row + row.replace(f"{dataset}:", f"{dataset}_failed:", 1).replace("weight: 1", "weight: 0.1")
    with needing_room(path, "Make room."):
        write_text(path, text.rstrip("\n") + "\n" + rows)
    return ""
