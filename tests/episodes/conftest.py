"""Shared by the tests of the episodes room: recordings that are written once, and one that is prepared."""

from collections.abc import Callable
from pathlib import Path

import pytest
from preparing import prepare_all
from raw_episodes import Raw

from vla_lib.episodes import PreparedEpisode, load_prepared


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
