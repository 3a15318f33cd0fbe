"""One raw episode and settings in; `data.pkl` and `sensor.npy` written beside it (or under an output root), and a report row out.

Files appear whole or not at all; a lock keeps two runs from writing the same episode; an unchanged episode is left alone.
"""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.core.files import atomic_path
from vla_lib.episodes.data_pkl import CHANNELS, DATA_NAME, SCHEMA, SENSOR_NAME, check_content, read_pickle, write_pickle
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.findings import EXCLUDED, NOTE, Finding
from vla_lib.episodes.fingerprint import fingerprint, sensor_signature
from vla_lib.episodes.layouts import EpisodeFiles
from vla_lib.episodes.pictures import Listing, list_pictures
from vla_lib.episodes.rates import Rates, measure
from vla_lib.episodes.sensor_log import SensorLog
from vla_lib.episodes.steps import Steps, build_steps, image_index, sensor_index, stream_gaps, window_full
from vla_lib.episodes.verdict import REJECTED, Verdict, judge, rejected, summary_row

Array = np.ndarray[Any, Any]

LOCK_NAME = ".data.pkl.lock"
# ends of the findings that only reading every sample can make
BYTES_FINDINGS = (
    "differ between the windows that share them; the first window's stand", "hold values that are no numbers",
)  # fmt: skip


@dataclass(frozen=True)
class PrepareSettings:
    """What decides the values in data.pkl."""

    action_hz: float = 10.0
    rotation: str = "rotvec"
    sensor_clock_offset_ms: float | None = None
    views: tuple[str, ...] = ()
    """View keys to keep; empty: all."""
    full_picture_check: bool = False


@dataclass
class Report:
    """What happened to one episode; plain values, so that it crosses processes and goes into JSON."""

    key: str  # episode path below the root
    status: str  # written, unchanged, reported, rejected or failed
    verdict: str
    reasons: list[str]
    left_out: list[str]
    summary: dict[str, Any]
    """The row of the table of all episodes."""
    rates: list[dict[str, Any]]
    """One measured row per stream."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def prepare_episode(
    files: EpisodeFiles,
    key: str,
    out: Path,
    settings: PrepareSettings,
    instruction: str,
    window: int = 65,
    overwrite: bool = False,
    report_only: bool = False,
) -> Report:
    """Prepare one episode into the folder `out`. Bad input becomes a report, never an exception.

    Raises OSError where `out` cannot be written: that concerns the whole run.
    """
    if report_only:
        return _inspect(files, key, settings, window)
    with folder_lock(out):
        _sweep(out)
        listing = list_pictures(files.path)
        print_of = inputs_of(files, settings, instruction, listing)
        if not overwrite:
            kept = _unchanged(out, print_of, window)
            if kept is not None:
                return Report(
                    key,
                    "unchanged",
                    kept["verdict"],
                    kept["reasons"],
                    kept["left_out"],
                    kept["summary"] | {"episode": key},
                    kept["rates"],
                )
        try:
            episode = _open(files, settings, listing)
            return _write(episode, key, out, settings, instruction, window, print_of, overwrite)
        except UserError as error:
            (out / DATA_NAME).unlink(missing_ok=True)  # what was prepared from other inputs must not stand for these
            return _failed(files, key, str(error))


def inputs_of(files: EpisodeFiles, settings: PrepareSettings, instruction: str, listing: Listing | None = None) -> str:
    """The fingerprint that a data.pkl of these raw files and settings carries."""
    return fingerprint(
        files, asdict(settings) | {"instruction": instruction, "dataset": files.dataset, "task": files.task}, listing
    )


def _failed(files: EpisodeFiles, key: str, text: str) -> Report:
    verdict = rejected(text)
    summary = summary_row(key, files.layout, verdict, None, None, float("nan"))
    return Report(key, "rejected", verdict.level, [text], [], summary, [])


def _open(files: EpisodeFiles, settings: PrepareSettings, listing: Listing | None = None) -> Episode:
    return Episode.open(files, settings.sensor_clock_offset_ms, settings.views, settings.full_picture_check, listing)


def _inspect(files: EpisodeFiles, key: str, settings: PrepareSettings, window: int) -> Report:
    try:
        return _study(_open(files, settings), key, "reported", settings, window).report
    except UserError as error:
        return _failed(files, key, str(error))


@dataclass
class _Study:
    """All that is derived from an opened episode before anything is written."""

    episode: Episode
    steps: Steps
    rates: Rates
    verdict: Verdict
    report: Report


def _study(episode: Episode, key: str, status: str, settings: PrepareSettings, window: int) -> _Study:
    gaps = stream_gaps(episode)
    steps = build_steps(episode, settings.action_hz, settings.rotation == "euler", gaps)
    rates = measure(episode, gaps)
    return _judged(episode, key, status, steps, rates, window)


def _judged(episode: Episode, key: str, status: str, steps: Steps, rates: Rates, window: int) -> _Study:
    full = _full(episode, steps, window)
    extra = []
    if episode.sensor is not None and not full.all():
        extra.append(
            Finding(
                NOTE,
                "sensor",
                f"{int((~full).sum())} of {len(steps)} steps have no full window of {window} samples behind them",
            )
        )
    verdict = judge(episode, steps, rates, extra)
    summary = summary_row(key, episode.layout, verdict, rates, steps, episode.duration_s)
    summary["full_windows"] = int(full.sum())
    report = Report(
        key, status, verdict.level, verdict.reasons, verdict.left_out, summary, [row.to_dict() for row in rates.streams]
    )
    return _Study(episode, steps, rates, verdict, report)


def _full(episode: Episode, steps: Steps, window: int) -> Array:
    sensor = episode.sensor
    if sensor is None:
        return np.zeros(len(steps), bool)
    return window_full(
        sensor_index(sensor.t_s, steps.t_s), sensor.t_s, steps.t_s, window, sensor.hz, steps.gaps.get("sensor", [])
    )


def _unchanged(out: Path, print_of: str, window: int) -> dict[str, Any] | None:
    """The stored report of an episode that need not be prepared again."""
    try:
        content = read_pickle(out / DATA_NAME)
        check_content(content, out / DATA_NAME)
    except UserError:
        return None
    metadata = content["metadata"]
    if metadata.get("fingerprint") != print_of or metadata.get("sensor_window_size") != window:
        return None
    if content["sensor_data"] is not None and not _sensor_stands(
        out / SENSOR_NAME, len(content["sensor_data"]["force"])
    ):
        return None
    return metadata.get("report")


def _sensor_stands(path: Path, samples: int) -> bool:
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False).shape == (samples, CHANNELS)
    except (OSError, ValueError, EOFError):
        return False


def _write(
    episode: Episode,
    key: str,
    out: Path,
    settings: PrepareSettings,
    instruction: str,
    window: int,
    print_of: str,
    overwrite: bool,
) -> Report:
    study = _study(episode, key, "written", settings, window)
    if study.verdict.level == REJECTED:
        study.report.status = "rejected"
        (out / DATA_NAME).unlink(missing_ok=True)
        return study.report
    signature = sensor_signature(episode.files)
    force = None if overwrite or episode.sensor is None else _old_force(out, signature, len(episode.sensor))
    with contextlib.ExitStack() as stack:
        if episode.sensor is not None and force is None:
            known = len(episode.findings)
            try:
                force = _write_sensor(stack.enter_context(_sensor_file(out)), episode)
            except UserError as error:
                stack.pop_all()
                _sweep(out)
                episode.sensor = None
                episode.findings.append(Finding(EXCLUDED, "sensor", f"the stream is not used: {error}", left_out=True))
                study = _study(episode, key, "written", settings, window)
            if len(episode.findings) > known:  # the bytes told something that the times did not
                study = _judged(episode, key, "written", study.steps, study.rates, window)
        content = _content(study, settings, instruction, force)
        content["metadata"] |= {"fingerprint": print_of, "sensor_window_size": window, "report": _stored(study.report)}
        content["metadata"] |= {"num_full_windows": study.report.summary["full_windows"], "sensor_signature": signature}
        check_content(content, out / DATA_NAME)
        (out / DATA_NAME).unlink(missing_ok=True)  # never an old data.pkl beside a new sensor.npy
    if episode.path.resolve() != out.resolve():
        _link_pictures(episode, out)
    write_pickle(out / DATA_NAME, content)
    if episode.sensor is None:
        (out / SENSOR_NAME).unlink(missing_ok=True)
    return study.report


def _stored(report: Report) -> dict[str, Any]:
    stored = report.to_dict()
    del stored["key"], stored["status"]
    return stored


@contextlib.contextmanager
def _sensor_file(out: Path) -> Iterator[Path]:
    with atomic_path(out / SENSOR_NAME) as temporary:
        yield temporary


def _write_sensor(path: Path, episode: Episode) -> Array:
    """Stream all samples into an .npy file; returns their force (S,). Raises UserError where the sensor files break off."""
    sensor = episode.sensor
    assert sensor is not None
    force = np.empty(len(sensor), np.float32)
    done = differ = holes = 0
    with open(path, "wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(sensor), CHANNELS)}
        np.lib.format.write_array_header_1_0(stream, header)
        for block, disagree in sensor.blocks():
            if done + len(block) > len(sensor):
                raise UserError("the sensor files hold more samples than their times")
            force[done : done + len(block)] = block[:, 0]
            differ += disagree
            with np.errstate(all="ignore"):
                if not np.isfinite(block.sum()):
                    holes += int((~np.isfinite(block)).any(axis=1).sum())
            stream.write(memoryview(np.ascontiguousarray(block, "<f4")).cast("B"))
            done += len(block)
    if done != len(sensor):
        raise UserError(f"the sensor files end after {done} of {len(sensor)} samples")
    _sensor_findings(episode, differ, holes)
    return force


def _sensor_findings(episode: Episode, differ: int, holes: int) -> None:
    if differ:
        text = f"{differ} samples {BYTES_FINDINGS[0]}"
        episode.findings.append(Finding(EXCLUDED, "sensor", text))
    if holes:
        episode.findings.append(Finding(EXCLUDED, "sensor", f"{holes} samples {BYTES_FINDINGS[1]}"))


def _old_force(out: Path, signature: str, samples: int) -> Array | None:
    """The force (S,) of a sensor.npy that was already made from these very files; None where it must be written."""
    try:
        content = read_pickle(out / DATA_NAME)
        check_content(content, out / DATA_NAME)
    except UserError:
        return None
    sensor, metadata = content["sensor_data"], content["metadata"]
    if sensor is None or metadata.get("sensor_signature") != signature or metadata.get("sensor_bytes_findings", True):
        return None
    force: Array = sensor["force"]
    return force if len(force) == samples and _sensor_stands(out / SENSOR_NAME, samples) else None


def _content(study: _Study, settings: PrepareSettings, instruction: str, force: Array | None) -> dict[str, Any]:
    episode, steps, rates, verdict = study.episode, study.steps, study.rates, study.verdict
    sensor: SensorLog | None = episode.sensor
    clock = episode.sensor_clock
    return {
        "action": steps.action,
        "timestamp": steps.t_s,
        "valid": steps.valid,
        "state": steps.state,
        "image": {view: list(pictures.paths) for view, pictures in episode.pictures.items()},
        "image_timestamp": {view: pictures.t_s for view, pictures in episode.pictures.items()},
        "image_index": {view: image_index(pictures, steps.t_s) for view, pictures in episode.pictures.items()},
        "sensor_data": None
        if sensor is None
        else {
            "force": force,
            "timestamp": sensor.t_s,
            "index": sensor_index(sensor.t_s, steps.t_s),
            "array": SENSOR_NAME,
        },
        "instruction": instruction,
        "metadata": {
            "episode_name": episode.name,
            "dataset": episode.files.dataset,
            "task": episode.files.task,
            "layout": episode.layout,
            "robot_hz": rates["robot"].hz,
            "robot_pose_hz": rates["robot"].distinct_hz,
            "action_hz": settings.action_hz,
            "rotation": settings.rotation,
            "num_actions": len(steps),
            "num_valid": int(steps.valid.sum()),
            "num_robot_states": len(episode.robot.t_s),
            "duration_seconds": episode.duration_s,
            "has_sensor": sensor is not None,
            "sensor_hz": sensor.hz if sensor is not None else None,
            "sensor_times_reconstructed": bool(sensor is not None and sensor.reconstructed),
            "camera_hz": {view: rates[view].hz for view in episode.pictures},
            "clock_offsets": {
                "sensor": asdict(clock) | {"sentence": clock.sentence()},
                "robot_receive_lag_s": episode.robot.clock_lag_s,
            },
            "gaps": {stream: [[float(b), float(e)] for b, e in spans] for stream, spans in steps.gaps.items()},
            "sensor_bytes_findings": any(finding.text.endswith(BYTES_FINDINGS) for finding in verdict.findings),
            "verdict": verdict.level,
            "findings": [finding.to_dict() for finding in verdict.findings],
            "schema_version": SCHEMA,
        },
    }


def _link_pictures(episode: Episode, out: Path) -> None:
    """Below an output root the picture folders are links to the raw ones, so that relative paths hold there too."""
    folders = {path.split("/")[0] for pictures in episode.pictures.values() for path in pictures.paths}
    for folder in sorted(folders):
        link, target = out / folder, (episode.path / folder).resolve()
        if link.is_symlink():
            if link.resolve() == target:
                continue
            link.unlink()
        if link.exists():
            raise UserError(
                f"{link} is in the way: below an output root it must be a link to {target}; remove it or choose another root."
            )
        os.symlink(target, link, target_is_directory=True)


def _sweep(out: Path) -> None:
    """Remove what a killed run left unfinished (only while the lock is held)."""
    for name in (DATA_NAME, SENSOR_NAME):
        for left in out.glob(f".{name}.*.partial"):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock: one run at a time prepares an episode; a killed run's lock is free at once."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / LOCK_NAME
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.fstat(handle).st_ino == os.stat(path).st_ino:
                    break
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # another run removed this lock file while we waited for it
    try:
        yield
    finally:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        os.close(handle)
