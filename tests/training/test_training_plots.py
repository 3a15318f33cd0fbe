"""What a training notebook shows before it trains, and that its plots compose."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from vla_lib.policy.policy import Policy
from vla_lib.training.data import prepare_data
from vla_lib.workbench.plots import style, training
from vla_lib.workbench.training_preflight import batch_table, model_table


@pytest.mark.parametrize("kind", ("async_settings", "diffusion_settings"))
def test_a_batch_and_the_model_are_explained_line_by_line(kind, request):
    settings = request.getfixturevalue(kind)()
    data = prepare_data(settings)
    batch = data.train.batch(np.arange(4))
    table = batch_table(data, 4)
    assert list(table["key"]) == list(batch) and all(table["meaning"])
    shown = dict(zip(table["key"], zip(table["shape"], table["dtype"], table["unit"], strict=True), strict=True))
    assert shown["action"] == (tuple(batch["action"].shape), "float32", "mm, deg")
    blocks = model_table(settings, data)
    counts = [int(text.replace(",", "")) for text in blocks["parameters"]]
    assert counts[-1] == sum(counts[:-1]) == Policy(data.policy_config(settings)).parameter_count()
    assert all(blocks["what it does"][:-1])


ROWS = [{"step": k, "train/loss_step": 1 / k, "train/lr": 1e-4, "train/vl_reuse_counts": [k, 1]} for k in range(1, 4)]


def test_plots_compose_and_leave_nothing_open():
    import matplotlib.pyplot as plt

    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert training.reuse_counts(ROWS, 10.0, axes=left) is figure
    assert training.timestep_counts([], 100, axes=right) is figure
    assert [bar.get_height() for bar in left.patches] == [6, 3] and "nothing counted" in right.texts[0].get_text()
    assert len(training.training_curves(ROWS).axes) == 4 and plt.get_fignums() == []


def test_the_first_step_is_seen():
    """As a dot: a line needs two."""
    for count, dot in ((1, "."), (3, "")):
        loss, _, rate, _ = training.training_curves(ROWS[:count]).axes
        assert [panel.lines[0].get_marker() for panel in (loss, rate)] == [dot, dot]


def test_korean_names_are_drawn_where_a_font_is_there(recwarn, tmp_path):
    if len(style._look()["font.family"]) == 1:
        pytest.skip("no Korean font is installed")
    rows = [{"dataset": "흰색 실리콘", "train_steps": 3, "weight": 1.0, "share": 1.0}]
    training.weights_share(rows).savefig(tmp_path / "shares.png")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
