"""Shared by the tests of the episodes room: recorded datasets that are written once, and a shortcut to prepare one episode."""

from collections.abc import Callable
from pathlib import Path

import pytest
from raw_episodes import Raw

from vla_lib.episodes import Outcome, PreparedEpisode, load_prepared, make_jobs, run_jobs
from vla_lib.episodes.prepare import PrepareSettings


def prepare_all(root: Path, workers: int = 1, **settings) -> Outcome:
    """Prepare everything below a root, in this process."""
    options = {
        name: settings.pop(name) for name in ("window", "overwrite", "report_only", "output_root") if name in settings
    }
    return run_jobs(make_jobs(Path(root), settings=PrepareSettings(**settings), **options), workers, show=False)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., PreparedEpisode]:
    """Record one episode, prepare it, and open the result."""

    def run(raw: Raw, dataset: str = "White_silicone_white_circle", **settings) -> PreparedEpisode:
        path = raw.write(tmp_path / "root" / dataset)
        outcome = prepare_all(tmp_path / "root", **settings)
        assert [report.status for report in outcome.reports] == ["written"], outcome.reports
        return load_prepared(path)

    return run


@pytest.fixture(scope="session")
def mixed_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All four layouts under one root, one and two levels deep; prepared. Read only."""
    root = tmp_path_factory.mktemp("mixed")
    Raw("F0").write(root / "part1")
    Raw("F0", flat=True).write(root / "OCT_insertion", "Captures3")
    Raw("F1", right=True).write(root / "White_silicone_white_circle")
    Raw("F2").write(root / "New_dataset" / "Red_point")
    Raw("F3").write(root / "New_dataset3" / "Eye_trocar")
    (root / "notes").mkdir()
    (root / "notes" / "readme.csv").write_text("a,b\n1,2\n")
    prepare_all(root)
    return root
