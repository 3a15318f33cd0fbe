"""Which steps are made again after a mark: those whose data it changes, as changed recordings do."""

from pathlib import Path

import pytest

from tests.episodes.raw_episodes import Raw
from vla_lib import preprocess
from vla_lib.core.files import write_json
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench import runs
from vla_lib.workbench.parameters import notebook_path, resolve
from vla_lib.workbench.up_to_date import look

STEPS = ("01_inspect_episodes", "02_detect_hz", "04_train_async", "06_evaluate")


@pytest.fixture
def values(tmp_path) -> dict[str, dict]:
    """The parameters of each step, which was made once on two prepared episodes."""
    root, checkpoint = tmp_path / "data", tmp_path / "policy.pt"
    for number in range(2):
        Raw("F1", seconds=2.0 + number).write(root / "part1", f"recv_all_20251020_22401{number}")
    preprocess.main(preprocess.Settings(root, workers=1, quiet=True))
    checkpoint.touch()
    more = {"04_train_async": {"cache_id": "c"}, "06_evaluate": {"checkpoint": str(checkpoint)}}
    made = {}
    for name in STEPS:
        given = made[name] = resolve(notebook_path(name), {"dataset_root": str(root), **more.get(name, {})})
        before = look(name, given)
        assert (before.current, before.why) == (False, "no finished run on this dataset")
        run = RunFolder.create(name, given, data=runs.data_state(given), **before.noted)
        write_json(run.path / "results.json", {"cache": "c", "state": "done", "checkpoint": str(checkpoint)})
        run.finish("done")
    return made


def stale(values: dict[str, dict]) -> dict[str, str]:
    found = {name: look(name, given) for name, given in values.items()}
    return {name: one.why.partition(": ")[2] for name, one in found.items() if not one.current}


def test_a_mark_makes_the_steps_that_it_reaches_stale(values):
    root = Path(values[STEPS[0]]["dataset_root"])
    assert stale(values) == {}
    recordings, prepared = "the recordings have changed since", "the prepared data have changed since"
    (root / "marks.yaml").write_text("part1/recv_all_20251020_224010: {exclude: true}\n")
    assert stale(values) == dict(zip(STEPS, (recordings, recordings, prepared, prepared), strict=True))
    (root / "marks.yaml").write_text("part1/recv_all_20251020_224010: {note: look again}\n")
    assert stale(values) == {STEPS[0]: recordings}  # a note changes no data
    (root / "marks.yaml").write_text("part1/recv_all_20251020_224010: {start_s: 0.3}\n")
    assert set(stale(values)) >= {STEPS[0], STEPS[1]}  # until it is prepared again
    preprocess.main(preprocess.Settings(root, workers=1, quiet=True))
    assert set(stale(values)) == set(STEPS)
    (root / "marks.yaml").unlink()
    preprocess.main(preprocess.Settings(root, workers=1, quiet=True))
    assert stale(values) == dict.fromkeys(STEPS[2:], prepared)  # written anew
