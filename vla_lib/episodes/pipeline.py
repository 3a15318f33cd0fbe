"""Many raw episodes in; all prepared in parallel, each for itself, and one `Outcome` with every report out."""

import errno
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.progress import Progress
from vla_lib.episodes.datasets import DatasetTable
from vla_lib.episodes.layouts import EpisodeFiles, find_episodes
from vla_lib.episodes.prepare import PrepareSettings, Report, inputs_of, prepare_episode
from vla_lib.episodes.verdict import REJECTED, verdict_table
from vla_lib.episodes.workers import run_all

UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT}


@dataclass(frozen=True)
class Job:
    """One call of `prepare_episode`, as it is sent to a worker."""

    files: EpisodeFiles
    key: str
    out: Path
    settings: PrepareSettings
    instruction: str
    window: int
    overwrite: bool
    report_only: bool


@dataclass
class Outcome:
    """All reports of one run, in the order of the episodes."""

    reports: list[Report] = field(default_factory=list)

    def count(self, *statuses: str) -> int:
        return sum(report.status in statuses for report in self.reports)

    @property
    def left_out(self) -> list[str]:
        """One sentence per episode or stream that is not used, with the reason."""
        lines = []
        for report in self.reports:
            if report.verdict == REJECTED or report.status == "failed":
                lines.append(f"{report.key}: {report.reasons[0] if report.reasons else 'no reason known'}")
            else:
                lines += [f"{report.key}: {text}" for text in report.left_out]
        return lines

    def table(self) -> pd.DataFrame:
        """The verdicts of all episodes, the ones to record again first."""
        return verdict_table(report.summary | {"status": report.status} for report in self.reports)


def make_jobs(
    root: Path,
    dataset_dirs: Sequence[Path] = (),
    output_root: Path | None = None,
    settings: PrepareSettings | None = None,
    window: int = 65,
    overwrite: bool = False,
    report_only: bool = False,
) -> list[Job]:
    """One job per raw episode below `root` (or the dataset folders). Raises UserError where a folder is missing."""
    table = DatasetTable.load(root)
    jobs = []
    for files in find_episodes(root, dataset_dirs):
        key = files.path.relative_to(root).as_posix() if root in files.path.parents else "/".join(_parts(files))
        out = output_root / "/".join(_parts(files)) if output_root is not None else files.path
        instruction = table.instruction(files.dataset, files.task)
        jobs.append(Job(files, key, out, settings or PrepareSettings(), instruction, window, overwrite, report_only))
    return jobs


def raw_state(jobs: Sequence[Job]) -> dict[str, str]:
    """Episode key -> fingerprint of its raw files and the settings: what its data.pkl carries where it is up to date."""

    def state(job: Job) -> str:
        try:
            return inputs_of(job.files, job.settings, job.instruction)
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    with ThreadPoolExecutor(8) as pool:  # bound by the disk
        return dict(zip([job.key for job in jobs], pool.map(state, jobs), strict=True))


def _parts(files: EpisodeFiles) -> list[str]:
    return [part for part in (files.dataset, files.task, files.name) if part]


def run_jobs(jobs: Sequence[Job], workers: int = 0, show: bool = True) -> Outcome:
    """Run all jobs on `workers` processes (0: one per core). One broken episode never stops the others.

    Raises UserError where the folders cannot be written at all or the disk is full.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), max(len(jobs), 1))
    reports: dict[str, Report] = {}
    label = "inspecting" if jobs and jobs[0].report_only else "preparing"
    with Progress(len(jobs), label, "episodes", show=show and bool(jobs)) as progress:
        for report in _serial(jobs) if workers == 1 else _parallel(jobs, workers):
            reports[report.key] = report
            progress.update(1, f"{report.key}: {report.status}")
    return Outcome([reports[job.key] for job in jobs if job.key in reports])


def _serial(jobs: Sequence[Job]) -> Iterator[Report]:
    for job in jobs:
        yield run_job(job)


def _parallel(jobs: Sequence[Job], workers: int) -> Iterator[Report]:
    for job, result in run_all(run_job, jobs, workers):
        if isinstance(result, UserError):
            raise result
        yield _broken(job, str(result)) if isinstance(result, BaseException) else result


def run_job(job: Job) -> Report:
    """One job in this process. Raises UserError only for what concerns every episode: nothing can be written."""
    try:
        return prepare_episode(
            job.files, job.key, job.out, job.settings, job.instruction, job.window, job.overwrite, job.report_only
        )
    except OSError as error:
        if error.errno in UNWRITABLE and not os.access(error.filename or job.out, os.R_OK):
            return _broken(job, f"{error.filename} cannot be read ({error.strerror})")
        if error.errno in UNWRITABLE:
            raise UserError(
                f"{job.out} cannot be written ({error.strerror}); give --output-root FOLDER to prepare into another place."
            ) from error
        if error.errno in FULL:
            raise UserError(
                f"The disk is full at {job.out} ({error.strerror}); free some space or give --output-root FOLDER."
            ) from error
        return _broken(job, f"{type(error).__name__}: {error}")
    except UserError as error:
        return _broken(job, str(error))
    except Exception as error:  # an episode nobody foresaw is reported like any other broken one
        return _broken(job, f"{type(error).__name__}: {error}")


def _broken(job: Job, text: str) -> Report:
    summary: dict[str, Any] = {
        "episode": job.key,
        "layout": job.files.layout,
        "verdict": REJECTED,
        "reasons": text,
        "steps": 0,
        "valid": 0,
    }
    return Report(job.key, "failed", REJECTED, [text], [], summary, [])
