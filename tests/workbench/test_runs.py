import base64
import io
import re

import numpy as np
import pandas as pd
import pytest
from nbformat import v4
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json, write_text
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench import picker as pickers
from vla_lib.workbench import runs, up_to_date
from vla_lib.workbench.pages import Section, write_report


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


def test_a_finished_run_whose_results_are_damaged_is_made_again_and_stops_nothing(tmp_path):
    values = {"dataset_root": str(tmp_path), "instants": 6}
    (tmp_path / "part1" / "recv_all_20250101_000001").mkdir(parents=True)
    run = RunFolder.create("01_inspect_episodes", values, inputs=up_to_date._inspected(values).inputs)
    run.finish("done")
    for content in ("{", "[]", "null", "\0"):
        write_json(run.path / "results.json", {"episodes": 1})
        assert up_to_date.look("01_inspect_episodes", values).current
        write_text(run.path / "results.json", content)
        found = up_to_date.look("01_inspect_episodes", values)
        assert not found.current and str(run.path / "results.json") in found.why
        assert "results.json" in runs.table().loc[0, "error"]


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


def test_checkpoints_are_picked_by_parameters_or_by_clicks(monkeypatch, tmp_path):
    files = ("qwen_vla_async.pt", "qwen_vla_async_best.pt", "qwen_vla_async_final.pt")
    for parameters in ({"sensor_enabled": True}, {"vl_enabled": False}):
        run = RunFolder.create("04_train_async", parameters)
        (run.path / "checkpoints").mkdir()
        for name in files:
            (run.path / "checkpoints" / name).touch()
    newest = runs.find_checkpoints()
    assert [path.name for path in newest[:3]] == [
        "qwen_vla_async_best.pt",
        "qwen_vla_async.pt",
        "qwen_vla_async_final.pt",
    ]
    assert len({runs.name_of(path) for path in newest}) == 6 and runs.name_of(newest[0]).startswith("async no VL ")
    elsewhere = tmp_path / "theirs.pt"
    elsewhere.touch()
    picker = pickers.CheckpointPicker("", [f"seen={newest[3]}", str(elsewhere)])
    assert (
        picker.chosen == (f"{runs.name_of(newest[0])}={newest[0]}", f"seen={newest[3]}", f"theirs={elsewhere}")
        and picker.first == newest[0]
    )
    monkeypatch.setattr(pickers, "interactive", lambda: True)
    picker = pickers.CheckpointPicker(str(elsewhere), [])
    picker._first.value = next(value for _, value in picker._first.options if value[1] == newest[4])
    picker._others.value = [value for _, value in picker._others.options if value[1] in newest[:2]]
    assert picker.first == newest[4] and [text.split("=", 1)[1] for text in picker.chosen] == [
        str(path) for path in (newest[4], *newest[:2])
    ]


def test_a_report_is_one_offline_page_below_5_mb_whatever_the_cameras_saw(tmp_path):
    """Twelve pictures of pure noise, the worst to compress, and one small plot that stays as it is."""
    rng = np.random.default_rng(0)

    def png(height: int, width: int, grey: bool = False) -> str:
        buffer = io.BytesIO()
        Image.fromarray(rng.integers(0, 255, (height, width) if grey else (height, width, 3), np.uint8)).save(
            buffer, "PNG"
        )
        return base64.b64encode(buffer.getvalue()).decode()

    plot = png(40, 60, grey=True)
    run = RunFolder.create("01_inspect_episodes", {})
    outputs = [
        v4.new_output("display_data", data={"image/png": data}) for data in (*(png(500, 800) for _ in range(12)), plot)
    ]
    widget = {"text/plain": "<Browser at 0x7f>", "application/vnd.jupyter.widget-view+json": {"model_id": "1"}}
    outputs.append(v4.new_output("display_data", data=widget))
    cells = [
        v4.new_code_cell("view", outputs=outputs, metadata={"tags": ["report"]}),
        v4.new_code_cell("more", outputs=[v4.new_output("stream", text="not shown")]),
    ]
    write_text(run.path / "notebook.ipynb", v4.writes(v4.new_notebook(cells=cells)))
    run.finish("done")
    write_report(
        tmp_path / "report.html",
        "T",
        [pd.DataFrame({"what": ["a"]}), pd.DataFrame({"step": ["b"]})],
        [Section(run.path, "same")],
    )
    page = (tmp_path / "report.html").read_text()
    assert len(page.encode()) < 5e6 and plot in page and "not shown" not in page and "not run again: same" in page
    assert "0x7f" not in page and "Run in JupyterLab" in page
    pictures = re.findall(r"<img [^>]*src='data:image/(png|jpeg);base64,([^']+)'", page)
    assert len(pictures) == 13
    for kind, data in pictures:
        assert Image.open(io.BytesIO(base64.b64decode(data))).format.lower() == kind
    fetched = [
        link for link in re.findall(r"""(?:src|href)\s*=\s*['"]([^'"]+)""", page) if not link.startswith("data:")
    ]
    assert len(fetched) == 1 and fetched[0].endswith("notebook.html") and not fetched[0].startswith("http")
    assert not re.search(r"<script|<link|@import|url\(", page)
