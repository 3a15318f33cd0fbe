"""Measures and judges raw episodes, writes `data.pkl` and `sensor.npy` beside each, and says what was left out and why.

    python -m vla_lib.preprocess --dataset-root ROOT --action-hz 10
    python -m vla_lib.preprocess --dataset-dirs ROOT/White_silicone_white_circle ROOT/New_dataset
    python -m vla_lib.preprocess --dataset-root ROOT --report-only

Bound by the bytes of robot logs and sensor files. Unchanged episodes are skipped; it is safe to run it twice at once.
"""

import contextlib
import errno
import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vla_lib.core import frontdoor, pool
from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json
from vla_lib.core.progress import Progress
from vla_lib.episodes.clocks import CONFIRMED, FOUND, GIVEN, UNKNOWN, Clocks, Evidence, session_clocks, sessions
from vla_lib.episodes.data_pkl import drop_prepared, known_content
from vla_lib.episodes.datasets import DatasetTable, Marks
from vla_lib.episodes.episode import Episode
from vla_lib.episodes.findings import GOOD, NOT_JUDGED, REJECTED, keep_verdicts
from vla_lib.episodes.motion import evidence
from vla_lib.episodes.pictures import list_pictures
from vla_lib.episodes.prepare import EpisodeJob, Report, prepare_episode
from vla_lib.episodes.prepare import PreprocessSettings as Settings
from vla_lib.episodes.quality import verdict_table
from vla_lib.episodes.survey import Survey, survey
from vla_lib.workbench import slurm

EXIT_STRICT = 3
MOST_LINES = 30  # of one list on the screen: thousands of episodes would hide what matters
UNWRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}
FULL = {errno.ENOSPC, errno.EDQUOT}
# what fails for the machine's reasons is no verdict on a recording: exit 1, and another run makes up for it
INTERRUPTED = "interrupted"
MACHINE = (pool.WorkerDied, MemoryError)
MACHINES_OWN = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN}


def main(settings: Settings) -> dict[str, Any]:
    """Prepare (or only judge) all episodes; returns counts, verdicts, reasons and what was left out.

    Raises UserError where there is nothing to do or nothing can be written; SystemExit(1) where the machine failed
    (a killed worker), and SystemExit(3) under `strict` where anything was left out.
    """
    found = survey(settings.root, settings.dataset_dirs)
    every, copies = make_jobs(settings, found), make_jobs(settings, found, copies=True)
    jobs, excluded = [job for job in every if not job.left_out], [job for job in every if job.left_out]
    for job in () if settings.report_only else copies:
        drop_prepared(job.out)  # from before the copy was there: it must not be trained on beside the original
    reports = run_jobs(jobs, settings.workers)
    statuses = [report.status for report in reports]
    results: dict[str, Any] = {
        "episodes": len(reports),
        "written": statuses.count("written"),
        "unchanged": statuses.count("unchanged"),
        "rejected": statuses.count("rejected") + statuses.count("failed"),
        "interrupted": statuses.count(INTERRUPTED),
        "good": sum(report.verdict == GOOD for report in reports),
        "clocks": clock_rows(reports),
        "excluded": len(excluded),
        "left_out": left_out(reports)
        + [f"{job.key}: {job.left_out}" for job in excluded]
        + _same_recordings(found, settings.root),
        "no_episodes": [f"{_shown(path, settings.root)} {why}" for path, why in found.remarks],
        "unknown_datasets": found.unknown,
        "notes": list(dict.fromkeys(report.note for report in reports if report.note)),
        "reports": [vars(report) for report in reports],
    }
    if not settings.report_only:
        rows = {report.key: report.summary for report in reports if report.verdict != NOT_JUDGED}
        keys = None if settings.dataset_dirs else {job.key for job in (*every, *copies)}
        failed = keep_verdicts(settings.prepared_root, rows, keys)
        results["notes"] += [failed] if failed else []
    if settings.report is not None:
        write_json(settings.report, results)
    if not settings.quiet:
        _print(reports, results)
    if results["interrupted"]:
        again = "run the same command again, which prepares only these"
        print(f"{results['interrupted']} episodes could not be judged on this machine; {again}", file=sys.stderr)
        raise SystemExit(1)
    if settings.strict and results["left_out"]:
        raise SystemExit(EXIT_STRICT)
    return results


def make_jobs(settings: Settings, found: Survey | None = None, copies: bool = False) -> list[EpisodeJob]:
    """One job a recording, also those that the marks leave out; `copies`: for those that are there twice instead.
    `found`: the survey, where made already.

    Raises UserError where a folder is missing or holds no episode.
    """
    root, output_root = settings.root, settings.output_root
    found = found or survey(root, settings.dataset_dirs)
    table, marks = DatasetTable.load(root), Marks.load(settings.prepared_root)
    jobs = []
    for files in found.episodes:
        if (files.path in found.copies) != copies:
            continue
        place = "/".join(part for part in (files.dataset, files.task, files.name) if part)
        key = _shown(files.path, root) if root in files.path.parents else place
        out = files.path if output_root is None else output_root / (key if "/" in key else place)
        mark = marks.of(key)
        files = replace(files, task=mark.task or files.task)
        sentence = table.instruction(files.dataset, files.task)
        jobs.append(EpisodeJob(files, key, out, sentence, settings, mark=mark, left_out=marks.left_out(key)))
    if not found.episodes:
        places = ", ".join(str(folder) for folder in settings.dataset_dirs) or str(root)
        meant = "an episode is a folder with a robot log (CSV with a clock and pose columns)"
        seen = "".join(f"; {path} {why}" for path, why in found.remarks[:5])
        raise UserError(f"No episode was found below {places}: {meant}{seen}.")
    return jobs


def _shown(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if root in path.parents else str(path)


def _same_recordings(found: Survey, root: Path) -> list[str]:
    pairs = [(_shown(copy, root), _shown(kept, root)) for copy, kept in found.copies.items()]
    return [f"{copy}: the same recording as {kept}; only that one is used" for copy, kept in pairs]


def raw_state(jobs: Sequence[EpisodeJob]) -> dict[str, str]:
    """Episode key -> fingerprint of its raw files and the settings: `inputs` in its data.pkl if it is up to date."""

    def state(job: EpisodeJob) -> str:
        try:
            return job.fingerprint()
        except OSError as error:
            return f"cannot be read ({error.strerror})"

    with ThreadPoolExecutor(8) as threads:  # bound by the disk
        return dict(zip([job.key for job in jobs], threads.map(state, jobs), strict=True))


def run_jobs(jobs: Sequence[EpisodeJob], workers: int = 0, show: bool = True) -> list[Report]:
    """Prepare all episodes on `workers` processes (0: one per core); reports in the order of the jobs.

    First the motion of each is asked for its clocks, which a session pools; then each is prepared for itself: one
    broken episode never stops the others. Raises UserError where the folders cannot be written or the disk is full.
    """
    workers = min(workers or len(os.sched_getaffinity(0)), len(jobs))
    asked: dict[str, EpisodeJob] = {}
    reports: dict[str, Report] = {}
    for job, found in _each(ask_job, jobs, workers, "comparing clocks", show):
        asked[job.key] = job if isinstance(found, BaseException) else found
        if isinstance(found, MACHINE):
            reports[job.key] = job.failed(INTERRUPTED, str(found), NOT_JUDGED)
    order, jobs = jobs, with_clocks([asked[job.key] for job in jobs if job.key not in reports])
    label = "inspecting" if jobs and jobs[0].settings.report_only else "preparing"
    for job, result in _each(run_job, jobs, workers, label, show):
        if isinstance(result, UserError):
            raise result
        if isinstance(result, MACHINE):
            result = job.failed(INTERRUPTED, str(result), NOT_JUDGED)
        reports[job.key] = job.failed("failed", str(result)) if isinstance(result, BaseException) else result
    return [reports[job.key] for job in order]


def _each(
    work: Callable[[EpisodeJob], Any], jobs: Sequence[EpisodeJob], workers: int, label: str, show: bool
) -> Generator[tuple[EpisodeJob, Any], None, None]:
    first = slurm.share(len(jobs))  # machines of one Slurm job begin apart, and skip what is done
    jobs = [*jobs[first:], *jobs[:first]]
    results: Generator[tuple[EpisodeJob, Any], None, None] = ((job, work(job)) for job in jobs)
    if workers > 1:
        results = pool.run_jobs(work, jobs, workers)
    # closed also where a caller raises: then the workers end at once
    with contextlib.closing(results), Progress(len(jobs), label, "episodes", show=show) as progress:
        for job, result in results:
            yield job, result
            progress.update(1, f"{job.key}: {getattr(result, 'status', 'done')}")


def with_clocks(jobs: Sequence[EpisodeJob]) -> list[EpisodeJob]:
    """The jobs with the clocks that the evidence of their sessions gives; without evidence, times stand as recorded."""
    known = [(job, job.evidence) for job in jobs if job.evidence is not None]
    clocks: dict[str, Clocks] = {}
    # F4 has a recorder of its own, whose times are rebuilt
    kinds = [f"{job.files.dataset}{' (F4)' * (job.files.layout == 'F4')}" for job, _ in known]
    for numbers in sessions(kinds, [told.start_s for _, told in known]):
        members, kind = [known[number] for number in numbers], kinds[numbers[0]]
        given_ms = members[0][0].settings.sensor_clock_offset_ms
        pooled = session_clocks(kind, [told for _, told in members], given_ms, members[0][0].files.layout == "F4")
        clocks |= {job.key: one for (job, _), one in zip(members, pooled, strict=True)}
    return [replace(job, clocks=clocks.get(job.key, job.clocks)) for job in jobs]


def clock_rows(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """One row a session, stream and offset: what was taken off, what motion says (ms), how, for how many episodes."""
    counts = Counter(tuple(row.items()) for report in reports for row in report.clocks)
    return [dict(row) | {"episodes": count} for row, count in counts.items()]


def ask_job(job: EpisodeJob) -> EpisodeJob:
    """The job with its `inputs` and what its motion says of its clocks, from data.pkl where that is up to date.

    As it was where the episode cannot be read: `run_job` reports that.
    """
    try:
        listing = list_pictures(job.files.path)
        inputs = job.fingerprint(listing)
        before = known_content(job.out)
        if before and before["metadata"].get("inputs") == inputs:
            return replace(job, inputs=inputs, evidence=Evidence(**before["metadata"]["evidence"]))

        def find() -> dict[str, Any]:
            return asdict(evidence(Episode.open(job.files, full_picture_check=None, listing=listing)))

        return replace(job, inputs=inputs, evidence=Evidence(**slurm.found_once(inputs, find)))
    except Exception:  # whatever is wrong with the episode
        return job


def run_job(job: EpisodeJob) -> Report:
    """One job in this process. Raises UserError only for what concerns every episode: nothing can be written."""
    try:
        return prepare_episode(job)
    except OSError as error:
        name, why = error.filename or job.out, error.strerror
        if error.errno in FULL:
            remedy = "free some space or give --output-root FOLDER"
            raise UserError(f"The disk is full at {job.out} ({why}); {remedy}.") from error
        if error.errno in UNWRITABLE - {errno.EROFS} and not os.access(name, os.R_OK):
            return job.failed("failed", f"{name} cannot be read ({why})")
        if error.errno in UNWRITABLE:
            remedy = "give --output-root FOLDER to prepare into another place"
            raise UserError(f"{job.out} cannot be written ({why}); {remedy}.") from error
        if error.errno in MACHINES_OWN:
            return job.failed(INTERRUPTED, f"{name}: {why}", NOT_JUDGED)
        return job.failed("failed", f"{type(error).__name__}: {error}")
    except MemoryError as error:
        return job.failed(INTERRUPTED, f"out of memory: {error}", NOT_JUDGED)
    except Exception as error:  # an episode nobody foresaw is reported like any other broken one
        return job.failed("failed", f"{type(error).__name__}: {error}")


def left_out(reports: Sequence[Report]) -> list[str]:
    """One sentence per episode or stream that is not used, with the reason."""
    lines = []
    for report in reports:
        sentences = report.reasons[:1] if report.verdict in (REJECTED, NOT_JUDGED) else report.left_out
        lines += [f"{report.key}: {text}" for text in sentences]
    return lines


def _print(reports: Sequence[Report], results: dict[str, Any]) -> None:
    for line in (*results["unknown_datasets"], *results["notes"]):
        print(line)
    rows = verdict_table(report.summary for report in reports).to_dict("records")  # worst first
    line = "{verdict:<24} {episode}  {valid}/{steps} steps  {reasons}"
    print(*_some([line.format_map(row) for row in rows]), sep="\n")
    print(*_clock_lines(results["clocks"]), sep="\n")
    counts = f"{results['written']} written, {results['unchanged']} unchanged, {results['rejected']} rejected"
    counts += f", {results['excluded']} more excluded by marks" if results["excluded"] else ""
    print(f"{results['episodes']} episodes: {counts}; {results['good']} good")
    if results["left_out"]:
        print("Left out:", *_some(results["left_out"]), sep="\n  ")
    if results["no_episodes"]:
        print("No episodes:", *_some(results["no_episodes"]), sep="\n  ")


def _some(lines: Sequence[str]) -> list[str]:
    more = len(lines) - MOST_LINES
    return [*lines[:MOST_LINES], *([f"and {more} more (--report FILE lists all)"] if more > 0 else [])]


def _clock_lines(rows: Sequence[dict[str, Any]]) -> list[str]:
    """What was taken off, session by session, and in how many the times stand as recorded."""
    lines = []
    for stream, how in itertools.product(("sensor", "cameras"), (FOUND, GIVEN, CONFIRMED, UNKNOWN)):
        of = [row for row in rows if (row["stream"], row["how"]) == (stream, how)]
        shown = [f"{row['taken_off_ms']:+g} ms in {row['session']}" for row in of if row["taken_off_ms"]]
        more = f", and {len(shown) - 5} more" if len(shown) > 5 else ""
        told = ": " + ", ".join(shown[:5]) + more if shown else "; times stand as recorded"
        if of:
            lines.append(f"Clock of the {stream} against the robot's: {how} in {len(of)} session(s){told}")
    return lines


if __name__ == "__main__":
    frontdoor.start(Settings, main)
