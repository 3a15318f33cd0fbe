"""A shortcut of the episodes room's tests: prepare everything below a root, in this process."""

from pathlib import Path

from vla_lib.episodes.prepare import Report
from vla_lib.preprocess import Settings, make_jobs, run_jobs


def prepare_all(root: Path, workers: int = 1, **settings) -> list[Report]:
    """Prepare everything below a root, in this process."""
    return run_jobs(make_jobs(Settings(root, **settings)), workers, show=False)
