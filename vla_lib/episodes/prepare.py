"""One raw episode becomes `data.pkl` and `sensor.npy` beside it (or under an output root), and a report.

Files appear whole or not at all; a lock keeps two runs from writing the same episode; an unchanged episode is left
alone.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt, Le
from pydantic import Field

from vla_lib.core.errors import UserError
from vla_lib.core.files import NO_LOCKS_SENTENCE, atomic_path, file_checksum, file_lock, make_folder
from vla_lib.core.settings import ROOT_VARIABLE, Settings, named_root, settings
from vla_lib.episodes.clocks import Clocks, Evidence
from vla_lib.episodes.data_pkl import (
    DATA_NAME,
    SCHEMA,
    SENSOR_NAME,
    check_content,
    clear_way,
    known_content,
    write_pickle,
)
from vla_lib.episodes.datasets import MARKS_NAME, Mark
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.findings import FATAL, NO_NUMBERS, NOTE, REJECTED, Finding, Findings
from vla_lib.episodes.hdf5 import write_pictures
from vla_lib.episodes.layouts import CHANNELS, EpisodeFiles
from vla_lib.episodes.pictures import Listing, link_pictures, list_pictures
from vla_lib.episodes.quality import Rates, judge, measure, summary_row
from vla_lib.episodes.sensor_file import NpzFile, SensorFile
from vla_lib.episodes.sensor_log import SensorLog
from vla_lib.episodes.steps import Steps, build_steps, image_index, sensor_index, stream_gaps, window_full
from vla_lib.episodes.survey import file_id, recording_id

LOCK_NAME = ".data.pkl.lock"
CODE_VERSION = 3  # raised whenever the same inputs and settings give other values: part of the fingerprint
DIFFER = "differ between the windows that share them; the first window's stand"
"""End of the finding, beside NO_NUMBERS, that only reading every sample can make."""
UNKEPT = ("key", "status", "clocks", "note")  # of a report, in data.pkl


@settings
class PreprocessSettings(Settings):
    """Prepare raw episodes for training: measure, judge, write data.pkl. Nothing raw is changed or deleted."""

    unnamed = "check_pictures dataset_dirs output_root report report_only set_aside strict views"

    dataset_root: Path | None = None
    """Folder that holds the dataset folders. Default: that of the first of --dataset-dirs, else $VLA_DATASET_ROOT."""
    dataset_dirs: tuple[Path, ...] = ()
    """Only these dataset (or episode) folders; default: everything below --dataset-root."""
    action_hz: Annotated[float, Gt(0), Le(1000)] = 10.0  # Actions a second: step k lasts from k/hz to (k+1)/hz
    rotation: Annotated[str, Field(pattern="^(rotvec|euler)$")] = "rotvec"
    """rotvec: rotation vector in the base frame, degrees. euler: wrap-corrected Euler differences, only to compare."""
    sensor_clock_offset_ms: Annotated[float, Ge(-1e12), Le(1e12)] | None = None
    """How far the sensor's clock is ahead of the robot's, in ms. Default: from motion where that is clear, else 0."""
    views: tuple[str, ...] = ()  # View keys to keep, such as View1_left View5; default: all
    sensor_window_size: Annotated[int, Ge(1)] = 65  # Samples of a full sensor window; steps without one are counted
    overwrite: bool = False  # Prepare unchanged episodes again too
    set_aside: bool = False
    """Rename a data.pkl or sensor.npy that this library did not write to NAME.theirs; default: refuse, leave it."""
    report_only: bool = False  # Measure and judge only; write nothing beside the episodes
    check_pictures: bool = False  # Decode every picture, in place of its header and end alone: finds damage inside
    strict: bool = False  # Exit with status 3 where anything was left out
    workers: Annotated[int, Ge(0)] = 0  # Processes; 0: one per core
    output_root: Path | None = None
    """Write below this folder instead of beside the raw episodes (picture folders become links)."""
    report: Path | None = None  # Write all measurements and verdicts as JSON to this file
    quiet: bool = False  # Print the progress only, no line an episode

    def __post_init__(self) -> None:
        if self.dataset_root is None and not self.dataset_dirs and named_root() is None:
            ways = "name the folder of the datasets with --dataset-root, or datasets with --dataset-dirs"
            raise UserError(f"No data given: {ways}; or set {ROOT_VARIABLE}.")

    @property
    def root(self) -> Path:
        """The folder below which datasets are told apart."""
        given = self.dataset_dirs[0].resolve().parent if self.dataset_dirs else named_root()
        return self.dataset_root or given or Path()

    @property
    def prepared_root(self) -> Path:
        """The root that later steps are given: where data.pkl, marks and verdicts lie."""
        return self.output_root or self.root


@dataclass(frozen=True)
class EpisodeJob:
    """One raw episode to be prepared, as it is sent to a worker."""

    files: EpisodeFiles
    key: str  # episode path below the root
    out: Path
    instruction: str
    settings: PreprocessSettings
    inputs: str = ""  # `fingerprint` of the raw files and settings, where it was taken already
    evidence: Evidence | None = None  # for its clocks
    clocks: Clocks = Clocks()
    mark: Mark = Mark()
    left_out: str = ""  # why the marks leave it out

    def open(self, listing: Listing | None = None) -> Episode:
        """The opened episode. Raises UserError where it has no usable robot log."""
        return Episode.open(self.files, self.clocks, self.settings.views, self.settings.check_pictures, listing)

    def fingerprint(self, listing: Listing | None = None) -> str:
        """32 hex digits that change when the raw files or the settings do; what the session adds is not in them.

        Robot logs count by content, sensor files by the checksums that their directory holds, pictures by name and
        size: copying a dataset elsewhere changes nothing, and no large file has to be read. Raises OSError.
        """
        chosen = self.settings
        values = {
            "full_picture_check": chosen.check_pictures,
            "instruction": self.instruction,
            "dataset": self.files.dataset,
            "task": self.files.task,
        }
        values |= {k: getattr(chosen, k) for k in ("action_hz", "rotation", "sensor_clock_offset_ms", "views")}
        values |= {"trim": self.mark.trim} if self.mark.trim != Mark().trim else {}
        versions = [SCHEMA, CODE_VERSION, self.files.layout]
        digest = hashlib.sha256(json.dumps([*versions, values], sort_keys=True).encode())
        for log in (self.files.robot_log, *self.files.other_logs):
            if log is not None and self.files.layout != "F4":
                digest.update(log.name.encode() + hashlib.sha256(log.read_bytes()).digest())
        digest.update(self.sensor_signature().encode())
        digest.update(repr((listing or list_pictures(self.files.path)).rows).encode())
        return digest.hexdigest()[:32]

    def sensor_signature(self) -> str:
        """What identifies the sensor files' content without reading it."""
        parts = [file_id(self.files.robot_log)] if self.files.layout == "F4" and self.files.robot_log else []
        for path in self.files.sensor_files:
            try:
                parts.append(f"{path.name} {NpzFile(path).signature}")
            except UserError:
                parts.append(f"{path.name} unreadable, {path.stat().st_size} bytes")
        return "\n".join(parts)

    def failed(self, status: str, text: str, verdict: str = REJECTED) -> "Report":
        """The report of an episode that cannot be used at all, or could not be judged."""
        findings = Findings([Finding(FATAL, "episode", text)])
        summary = summary_row(self.key, self.files.layout, findings, None, None) | {"verdict": verdict}
        return Report(self.key, status, verdict, [text], [], summary, [])


@dataclass
class Report:
    """What happened to one episode; plain values, so that it crosses processes and goes into JSON."""

    key: str  # episode path below the root
    status: str  # `written`, `unchanged`, `reported`, `rejected` or `failed`
    verdict: str
    reasons: list[str]
    left_out: list[str]
    summary: dict[str, Any]  # the row of the table of all episodes
    rates: list[dict[str, Any]]  # one measured row per stream
    clocks: list[dict[str, Any]] = field(default_factory=list)  # its session's rows: see `Clocks.rows`
    note: str = ""  # what concerns the machine and not the recording


def prepare_episode(job: EpisodeJob) -> Report:
    """Prepare one episode into its folder `out`. Bad input becomes a report, never an exception.

    Raises OSError where `out` cannot be written: that concerns the whole run.
    """
    try:
        if job.settings.report_only:
            report = _Study(job, job.open(), "reported").report
        else:
            listing = None if job.inputs else list_pictures(job.files.path)
            job = replace(job, inputs=job.inputs or job.fingerprint(listing))
            fingerprint = hashlib.sha256(f"{job.inputs} {job.clocks.shifts()}".encode()).hexdigest()[:32]
            # first without the lock: a root that is read-only does not matter where nothing is to be written
            report = _unchanged(job, fingerprint) or _prepare(job, listing, fingerprint)
    except UserError as error:
        return job.failed("rejected", str(error))
    return replace(report, clocks=job.clocks.rows() if job.evidence else [])


def _unchanged(job: EpisodeJob, fingerprint: str) -> Report | None:
    """The report of an episode that is prepared already from the same inputs; None where there is something to do."""
    before = None if job.settings.overwrite else known_content(job.out)
    now = {"fingerprint": fingerprint, "sensor_window_size": job.settings.sensor_window_size}
    if before and now.items() <= before["metadata"].items() and _sensor_whole(job.out, before):
        known = before["metadata"]["report"]
        return Report(job.key, "unchanged", **known | {"summary": known["summary"] | {"episode": job.key}})
    return None


def _prepare(job: EpisodeJob, listing: Listing | None, fingerprint: str) -> Report:
    make_folder(job.out)
    with file_lock(job.out / LOCK_NAME) as locked:
        report = _unchanged(job, fingerprint)  # by another run, while this one waited
        if report is None:
            clear_way(job.out, job.settings.set_aside)
            before = None if job.settings.overwrite else known_content(job.out)
            try:
                report = _write(job, job.open(listing), fingerprint, before)
            except UserError:
                (job.out / DATA_NAME).unlink(missing_ok=True)  # made from other inputs: it must not stand for these
                raise
        return replace(report, note="" if locked else NO_LOCKS_SENTENCE)


def _sensor_whole(out: Path, content: dict[str, Any]) -> bool:
    """Whether sensor.npy is there as a data.pkl's content expects it."""
    if content["sensor_data"] is None:
        return True
    try:
        stream = np.load(out / SENSOR_NAME, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return bool(stream.shape == (len(content["sensor_data"]["force"]), CHANNELS))


class _Study:
    """All that is derived from an opened episode before anything is written."""

    def __init__(self, job: EpisodeJob, episode: Episode, status: str):
        self.job, self.episode, self.status = job, episode, status
        gaps = stream_gaps(episode)
        euler = job.settings.rotation == "euler"
        self.steps: Steps = build_steps(episode, job.settings.action_hz, euler, gaps, job.mark.trim)
        self.rates: Rates = measure(episode, gaps)
        self.judge()

    def judge(self) -> None:
        """Findings and report, of what is known by now."""
        window, steps, sensor = self.job.settings.sensor_window_size, self.steps, self.episode.sensor
        full = np.zeros(len(steps), bool)
        begin_s, end_s = self.job.mark.trim
        cut = f"only {begin_s:g} s to {min(end_s, self.episode.duration_s):.4g} s are used ({MARKS_NAME})"
        extra = [Finding(NOTE, "episode", cut)] if self.job.mark.trim != Mark().trim else []
        if sensor is not None:
            ends = sensor_index(sensor.t_s, steps.t_s)
            full = window_full(ends, sensor.t_s, steps.t_s, window, sensor.hz, steps.gaps.get("sensor", []))
            if not full.all():
                text = f"steps have no full window of {window} samples behind them"
                extra.append(Finding(NOTE, "sensor", f"{(~full).sum()} of {len(steps)} {text}"))
        self.findings = judge(self.episode, steps, self.rates, extra)
        duration_s = self.episode.duration_s
        summary = summary_row(self.job.key, self.episode.layout, self.findings, self.rates, steps, duration_s)
        self.report = Report(
            key=self.job.key,
            status=self.status,
            verdict=self.findings.verdict,
            reasons=self.findings.reasons,
            left_out=self.findings.left_out,
            summary=summary | {"full_windows": int(full.sum())},
            rates=[dict(vars(row)) for row in self.rates.values()],
        )


def _write(job: EpisodeJob, episode: Episode, fingerprint: str, before: dict[str, Any] | None) -> Report:
    out = job.out
    study = _Study(job, episode, "written")
    if study.report.verdict == REJECTED:
        study.report.status = "rejected"
        (out / DATA_NAME).unlink(missing_ok=True)
        return study.report
    force = _known_force(job, episode, before)
    checksum = before["sensor_data"]["checksum"] if before and force is not None else None
    if episode.sensor is not None and force is None:
        known = len(episode.findings)
        try:
            with atomic_path(out / SENSOR_NAME) as partial:
                force = _write_sensor(partial, episode.sensor, episode.findings)
                checksum = file_checksum(partial)
                (out / DATA_NAME).unlink(missing_ok=True)  # never an old data.pkl beside a new sensor.npy
        except UserError as error:
            episode.sensor = None
            episode.findings.exclude("sensor", f"the stream is not used: {error}", left_out=True)
            study = _Study(job, episode, "written")
        if len(episode.findings) > known:  # the bytes showed something that the times did not
            study.judge()
    content = _content(study, fingerprint, force, checksum)
    check_content(content, out / DATA_NAME)
    if episode.layout == "F4" and episode.files.robot_log is not None:
        names = [name for one in episode.pictures.values() for name in one.paths]
        write_pictures(episode.files.robot_log, names, out)
    elif episode.path.resolve() != out.resolve():
        link_pictures(episode.path, episode.pictures, out)
    write_pickle(out / DATA_NAME, content)
    if episode.sensor is None:
        (out / SENSOR_NAME).unlink(missing_ok=True)
    return study.report


def _known_force(job: EpisodeJob, episode: Episode, before: dict[str, Any] | None) -> np.ndarray | None:
    """The force (S,) of a sensor.npy that was already made from these very files; None where it must be written."""
    if not before or not (before["sensor_data"] or {}).get("checksum") or not _sensor_whole(job.out, before):
        return None
    metadata, force = before["metadata"], before["sensor_data"]["force"]
    if metadata.get("sensor_signature") != job.sensor_signature() or metadata.get("sensor_bytes_findings", True):
        return None
    return force if episode.sensor is not None and len(force) == len(episode.sensor) else None


def _write_sensor(path: Path, sensor: SensorLog, findings: Findings) -> np.ndarray:
    """Stream all samples into an .npy file; returns their force (S,). Raises UserError where the files break off."""
    for file in sensor.files:
        if isinstance(file, SensorFile):  # HDF5 has checksums of its own, where it was written with any
            file.check(file.keys.body)
    force = np.empty(len(sensor), np.float32)
    done = differ = holes = 0
    with open(path, "wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(sensor), CHANNELS)}
        np.lib.format.write_array_header_2_0(stream, header)  # version 2: the mark that it is ours
        for block, disagree in sensor.blocks():
            if done + len(block) > len(sensor):
                raise UserError("the sensor files hold more samples than their times")
            force[done : done + len(block)] = block[:, 0]
            differ += disagree
            with np.errstate(all="ignore"):  # one sum tells whether a block has to be looked at
                holes += 0 if np.isfinite(block.sum()) else int((~np.isfinite(block)).any(axis=1).sum())
            stream.write(np.ascontiguousarray(block, "<f4").data)
            done += len(block)
    if done != len(sensor):
        raise UserError(f"the sensor files end after {done} of {len(sensor)} samples")
    for count, text in ((differ, DIFFER), (holes, NO_NUMBERS)):
        if count:
            findings.exclude("sensor", f"{count} samples {text}")
    return force


def _content(study: _Study, fingerprint: str, force: np.ndarray | None, checksum: str | None) -> dict[str, Any]:
    job, episode, steps, rates, report = study.job, study.episode, study.steps, study.rates, study.report
    sensor, pictures = episode.sensor, episode.pictures
    metadata = {
        "schema_version": SCHEMA,
        "fingerprint": fingerprint,
        "recording": recording_id(episode.files),
        "episode_name": episode.name,
        "dataset": episode.files.dataset,
        "task": episode.files.task,
        "trim": list(job.mark.trim),
        "layout": episode.layout,
        "robot_hz": rates["robot"].hz,
        "robot_pose_hz": rates["robot"].distinct_hz,
        "action_hz": job.settings.action_hz,
        "rotation": job.settings.rotation,
        "num_actions": len(steps),
        "num_valid": int(steps.valid.sum()),
        "num_robot_states": len(episode.robot.t_s),
        "duration_seconds": episode.duration_s,
        "has_sensor": sensor is not None,
        "sensor_hz": sensor.hz if sensor is not None else None,
        "sensor_times_reconstructed": sensor is not None and sensor.reconstructed,
        "camera_hz": {view: rates[view].hz for view in pictures},
        "clock_offsets": {
            **asdict(episode.clocks),
            "sentences": [episode.clocks.sensor.sentence(), episode.clocks.cameras.sentence()],
            "robot_receive_lag_s": episode.robot.clock_lag_s,
        },
        "evidence": asdict(job.evidence) if job.evidence else None,
        "inputs": job.inputs if job.evidence else "",
        "gaps": {stream: [list(span) for span in spans] for stream, spans in steps.gaps.items()},
        "sensor_bytes_findings": any(finding.text.endswith((DIFFER, NO_NUMBERS)) for finding in study.findings),
        "verdict": report.verdict,
        "findings": [asdict(finding) for finding in study.findings],
        "sensor_window_size": job.settings.sensor_window_size,
        "report": {name: value for name, value in vars(report).items() if name not in UNKEPT},
        "num_full_windows": report.summary["full_windows"],
        "sensor_signature": job.sensor_signature(),
    }
    sensor_data: dict[str, Any] | None = None
    if sensor is not None:
        sensor_data = {"force": force, "timestamp": sensor.t_s, "index": sensor_index(sensor.t_s, steps.t_s)}
        sensor_data |= {"array": SENSOR_NAME, "checksum": checksum}
    return {
        "metadata": metadata,  # first: also a file that is cut off shows whose it is
        "action": steps.action,
        "timestamp": steps.t_s,
        "valid": steps.valid,
        "state": steps.state,
        "image": {view: one.paths for view, one in pictures.items()},
        "image_timestamp": {view: one.t_s for view, one in pictures.items()},
        "image_index": {view: image_index(one, steps.t_s) for view, one in pictures.items()},
        "sensor_data": sensor_data,
        "instruction": job.instruction,
    }
