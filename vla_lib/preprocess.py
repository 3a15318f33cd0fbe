"""Measures and judges raw episodes and writes `data.pkl` and `sensor.npy` beside each; tells what was left out and why.

    python -m vla_lib.preprocess --dataset-root ROOT --action-hz 10
    python -m vla_lib.preprocess --dataset-dirs ROOT/White_silicone_white_circle ROOT/New_dataset
    python -m vla_lib.preprocess --dataset-root ROOT --report-only

Bound by the bytes of robot logs and sensor files; unchanged episodes are skipped, and it is safe to run it twice at once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_lib.core import frontdoor
from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json

if TYPE_CHECKING:
    from vla_lib.episodes.pipeline import Job

ROTATIONS = ("rotvec", "euler")
EXIT_STRICT = 3


@dataclass(frozen=True)
class Settings:
    """Prepare raw episodes for training: measure, judge, write data.pkl. Nothing raw is changed or deleted."""

    dataset_root: Path | None = None
    """Folder that holds the dataset folders. Default: the folder that holds the first of --dataset-dirs."""
    dataset_dirs: tuple[Path, ...] = ()
    """Only these dataset (or episode) folders; default: everything below --dataset-root."""
    action_hz: float = 10.0
    """Actions a second: step k lasts from start + k/hz to start + (k+1)/hz."""
    rotation: str = "rotvec"
    """rotvec: rotation vector in the base frame, degrees. euler: wrap-corrected Euler differences, for comparisons only."""
    sensor_clock_offset_ms: float | None = None
    """How far the sensor's clock is ahead of the robot's, in ms. Default: estimated where the data allow, else 0."""
    views: tuple[str, ...] = ()
    """View keys to keep, such as View1_left View5; default: all."""
    sensor_window_size: int = 65
    """Samples that a full sensor window has; steps without one are counted and known as such."""
    overwrite: bool = False
    """Prepare unchanged episodes again too."""
    report_only: bool = False
    """Measure and judge only; write nothing beside the episodes."""
    check_pictures: bool = False
    """Look at the end of every picture file, not only of suspiciously small ones."""
    strict: bool = False
    """Exit with status 3 where anything was left out."""
    workers: int = 0
    """Processes; 0: one per core."""
    output_root: Path | None = None
    """Write below this folder instead of beside the raw episodes (picture folders become links)."""
    report: Path | None = None
    """Write all measurements and verdicts as JSON to this file."""
    quiet: bool = False
    """Print the progress only, no line an episode."""

    def __post_init__(self) -> None:
        if self.dataset_root is None and not self.dataset_dirs:
            raise UserError(
                "No data given: name the folder of the datasets with --dataset-root, or datasets with --dataset-dirs."
            )
        if not 0 < self.action_hz <= 1000:
            raise UserError(f"--action-hz must lie between 0 and 1000 Hz, but it is {self.action_hz:g}.")
        if self.rotation not in ROTATIONS:
            raise UserError(f"--rotation must be one of {', '.join(ROTATIONS)}, but it is {self.rotation!r}.")
        if self.sensor_window_size < 1:
            raise UserError(f"--sensor-window-size must be at least 1, but it is {self.sensor_window_size}.")
        if self.workers < 0:
            raise UserError(f"--workers must be 0 (one per core) or more, but it is {self.workers}.")
        offset = self.sensor_clock_offset_ms
        if offset is not None and not abs(offset) < 1e12:
            raise UserError(f"--sensor-clock-offset-ms must be a number of milliseconds, but it is {offset}.")

    @property
    def root(self) -> Path:
        """The folder below which datasets are told apart."""
        return Path(self.dataset_root) if self.dataset_root is not None else Path(self.dataset_dirs[0]).resolve().parent


def main(settings: Settings) -> dict[str, Any]:
    """Prepare (or only judge) all episodes; returns counts, verdicts, reasons and what was left out.

    Raises UserError where there is nothing to do or nothing can be written; SystemExit(3) under `strict` where anything was left out.
    """
    from vla_lib.episodes.pipeline import run_jobs

    jobs = plan(settings)
    outcome = run_jobs(jobs, settings.workers)
    results = {
        "episodes": len(outcome.reports),
        "written": outcome.count("written"),
        "unchanged": outcome.count("unchanged"),
        "rejected": outcome.count("rejected", "failed"),
        "good": sum(report.verdict == "good" for report in outcome.reports),
        "left_out": outcome.left_out,
        "reports": [report.to_dict() for report in outcome.reports],
    }
    if settings.report is not None:
        write_json(settings.report, results)
    if not settings.quiet:
        _print(outcome, results)
    if settings.strict and outcome.left_out:
        raise SystemExit(EXIT_STRICT)
    return results


def plan(settings: Settings) -> "list[Job]":
    """One job a raw episode. Raises UserError where a folder is missing or holds no episode."""
    from vla_lib.episodes.pipeline import make_jobs
    from vla_lib.episodes.prepare import PrepareSettings

    jobs = make_jobs(
        settings.root,
        tuple(Path(folder) for folder in settings.dataset_dirs),
        Path(settings.output_root) if settings.output_root is not None else None,
        PrepareSettings(
            action_hz=float(settings.action_hz),
            rotation=settings.rotation,
            sensor_clock_offset_ms=settings.sensor_clock_offset_ms,
            views=tuple(settings.views),
            full_picture_check=settings.check_pictures,
        ),
        settings.sensor_window_size,
        settings.overwrite,
        settings.report_only,
    )
    if not jobs:
        places = ", ".join(str(folder) for folder in settings.dataset_dirs) or str(settings.root)
        raise UserError(
            f"No episode was found below {places}: an episode is a folder with a robot log (CSV with a clock and pose columns)."
        )
    return jobs


def _print(outcome: Any, results: dict[str, Any]) -> None:
    for row in outcome.table().to_dict("records"):
        numbers = f"{row['valid']}/{row['steps']} steps"
        print(f"{row['verdict']:<24} {row['episode']}  {numbers}  {row['reasons']}")
    print(
        f"{results['episodes']} episodes: {results['written']} written, {results['unchanged']} unchanged, "
        f"{results['rejected']} rejected; {results['good']} good"
    )
    if results["left_out"]:
        print("Left out:")
        for line in results["left_out"]:
            print(f"  {line}")


if __name__ == "__main__":
    frontdoor.start(Settings, main)
