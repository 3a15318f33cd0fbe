import pytest

from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench import runs


def test_the_table_shows_states_parameters_and_results():
    first = RunFolder.create("04_train_async", {"lr": 1e-4})
    write_json(first.path / "results.json", {"val_mae_mm": 0.2, "curve": [1, 2]})
    first.finish("done")
    RunFolder.create("06_evaluate", {}).finish("cancelled")
    frame = runs.table()
    assert list(frame["state"]) == ["done", "cancelled"]
    assert frame.loc[0, "p.lr"] == 1e-4
    assert frame.loc[0, "r.val_mae_mm"] == 0.2
    assert "r.curve" not in frame
    assert list(runs.table("06_evaluate")["state"]) == ["cancelled"]


def test_an_empty_lab_book_is_an_empty_table():
    assert runs.table().empty


def test_the_newest_checkpoint_is_found_or_missed_in_words():
    with pytest.raises(UserError, match="train one first"):
        runs.newest_checkpoint("qwen_vla_async_best.pt")
    for _ in range(2):
        run = RunFolder.create("04_train_async", {})
        (run.path / "checkpoints").mkdir()
        (run.path / "checkpoints" / "qwen_vla_async_best.pt").touch()
    RunFolder.create("04_train_async", {})  # newer, but without a checkpoint
    assert runs.newest_checkpoint("qwen_vla_async_best.pt").parent.parent == run.path
