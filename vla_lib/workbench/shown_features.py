"""Cached features and their episodes in; what notebook 03 shows of them out: pictures at ticks, a position probe."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from vla_lib.episodes import PreparedEpisode
from vla_lib.features.cache import EpisodeFeatures
from vla_lib.workbench.plots import features as plots
from vla_lib.workbench.plots.features import Probe, fit_probe

PROBE_EPISODES = 40


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` numbers (fewer where there are fewer) evenly over 0..count-1."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()


def seen_ticks(features: EpisodeFeatures, wanted: int) -> list[int]:
    """`wanted` ticks, evenly over those at which some view was seen (the first picture may come after the first step)."""
    seen = np.flatnonzero(features.mask[:, features.layout.view_id >= 0].any(1).numpy())
    return seen[spread(len(seen), wanted)].tolist() if len(seen) else [0]


def pooling_sizes(
    binding: dict[str, Any], ticks: int, form: Any, episode: PreparedEpisode, features: EpisodeFeatures
) -> Figure:
    """The size of this cache under each pooling option, from the pictures' own size."""
    first = next(
        picture
        for pictures in frames(episode, features, seen_ticks(features, 1)).values()
        for picture in pictures
        if picture is not None
    )
    width = 4 if binding["dtype"] == "float32" else 2
    views, grid = len(binding["views"]), form.recipe.token_grid(*first.shape[:2])
    return plots.pooling_sizes(ticks, views, binding["hidden_size"], width, grid, binding["pooling"])


def frames(
    episode: PreparedEpisode, features: EpisodeFeatures, ticks: Sequence[int]
) -> dict[str, list[np.ndarray | None]]:
    """View -> the picture (H, W, 3) uint8 of each tick, None where there is none or it cannot be read."""
    steps = [int(features.tick_step[tick]) for tick in ticks]
    return {view: [_picture(episode, view, step) for step in steps] for view in features.layout.views}


def position_probe(episodes: Sequence[PreparedEpisode], features: Sequence[EpisodeFeatures]) -> Probe | None:
    """A linear probe from the features to the tool's position (mm) on held-out episodes; None with fewer than four episodes."""
    chosen = spread(len(episodes), PROBE_EPISODES)
    if len(chosen) < 4:
        return None
    positions = [np.asarray(episodes[n].state)[features[n].tick_step.numpy(), 6:9] for n in chosen]
    return fit_probe([features[n] for n in chosen], positions)


def _picture(episode: PreparedEpisode, view: str, step: int) -> Any:
    path = episode.picture_path(view, step) if view in episode.views else None
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except OSError:
        return None
