"""Shared by the tests of the episodes room: recordings that are written once, and a shortcut to prepare one."""

from collections.abc import Callable
from pathlib import Path

import pytest
from raw_episodes import Raw

from vla_lib.episodes import PreparedEpisode, load_prepared
from vla_lib.episodes.prepare import Report
from vla_lib.preprocess import Settings, make_jobs, run_jobs


def prepare_all(root: Path, workers: int = 1, **settings) -> list[Report]:
    """Prepare everything below a root, in this process."""
    return run_jobs(make_jobs(Settings(root, **settings)), workers, show=False)


@pytest.fixture
def prepare(tmp_path: Path) -> Callable[..., PreparedEpisode]:
    """Record one episode, prepare it, and open the result."""

    def run(raw: Raw, dataset: str = "White_silicone_white_circle", **settings) -> PreparedEpisode:
        path = raw.write(tmp_path / "root" / dataset)
        reports = prepare_all(tmp_path / "root", **settings)
        assert [report.status for report in reports] == ["written"], reports
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
