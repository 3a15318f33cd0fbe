"""The figures say what the data say: labelled, masked where pictures are missing, and an honest probe."""

import numpy as np
import pytest
import torch

from vla_lib.features.binding import TokenLayout
from vla_lib.features.cache import EpisodeFeatures
from vla_lib.workbench.plots import features as plots

LAYOUT = TokenLayout(("a", "b"), 2, 3)


def episode(number, positions=None, ticks=12, noise=0.0):
    """Features that are a linear map of positions (ticks, 3), plus noise."""
    rng = np.random.default_rng(number)
    positions = np.cumsum(rng.normal(0, 1, (ticks, 3)), 0) if positions is None else positions
    mapping = np.random.default_rng(99).normal(0, 1, (3, 13 * 8))
    tokens = torch.from_numpy(positions @ mapping + noise * rng.normal(0, 1, (ticks, 104))).float().view(ticks, 13, 8)
    mask = torch.ones(ticks, 13, dtype=torch.bool)
    mask[0, LAYOUT.view_slice("b")] = False
    tokens[~mask] = 0
    return EpisodeFeatures(
        tokens, mask, torch.arange(0, 3 * ticks, 3), LAYOUT, f"part1/episode_{number}", {}
    ), positions


def test_the_probe_finds_a_linear_map_on_held_out_episodes():
    pairs = [episode(number) for number in range(8)]
    result = plots.fit_probe([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert result.median_error_mm < 0.05 < 1.0 < result.mean_predictor_mm
    assert set(result.episode.tolist()) == {3, 7} and (result.train_episodes, result.held_out_episodes) == (6, 2)
    assert len(result.truth_mm) == 2 * 11  # the tick without view b is left out


def test_the_probe_finds_nothing_where_there_is_nothing():
    pairs = [episode(number) for number in range(12)]
    strangers = [episode(number + 100)[1] for number in range(12)]
    result = plots.fit_probe([pair[0] for pair in pairs], strangers)
    assert result.median_error_mm > 0.5 * result.mean_predictor_mm


def test_a_probe_needs_episodes_to_hold_out():
    pairs = [episode(number) for number in range(3)]
    with pytest.raises(ValueError, match="four episodes"):
        plots.fit_probe([pair[0] for pair in pairs], [pair[1] for pair in pairs])


def test_every_figure_is_labelled_and_draws(tmp_path):
    pairs = [episode(number, noise=0.1) for number in range(5)]
    episodes = [pair[0] for pair in pairs]
    picture = np.zeros((18, 32, 3), np.uint8)
    frames = {"a": [picture, picture], "b": [None, picture]}
    table = [{"dataset": "part1", "covered": 3, "stale": 1, "missing": 1, "ticks": 40, "MB": 1.5}]
    binding = {"dtype": "float32", "views": ["a", "b"], "hidden_size": 8, "pooling": "grid:2x3"}
    figures = {
        "coverage": plots.coverage(table),
        "sizes": plots.pooling_sizes(binding, 40, (6, 11)),
        "maps": plots.pca_maps(episodes[0], frames, [0, 5]),
        "similarity": plots.similarity(episodes),
        "probe": plots.probe(plots.fit_probe(episodes, [pair[1] for pair in pairs])),
    }
    for name, figure in figures.items():
        figure.savefig(tmp_path / f"{name}.png")
    labels = {
        name: " ".join(axes.get_xlabel() + axes.get_ylabel() for axes in figure.axes)
        for name, figure in figures.items()
    }
    assert (
        "episodes" in labels["coverage"]
        and "MB" in labels["sizes"]
        and "action step" in labels["similarity"]
        and "(mm)" in labels["probe"]
    )
    texts = [text.get_text() for axes in figures["maps"].axes for text in axes.texts]
    assert texts == ["no picture", "masked"]


def test_colours_follow_the_features_and_not_the_masked_ticks():
    one, _ = episode(1)
    colours = plots._pca_colours(one, [0, 3, 7])
    assert colours["a"].shape == (3, 2, 3, 3) and (colours["b"][0] == 1).all()
    assert np.ptp(colours["b"][1:]) > 0.5 and colours["a"].min() >= 0 and colours["a"].max() <= 1
