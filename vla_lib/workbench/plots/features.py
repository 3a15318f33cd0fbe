"""Cached VL features: coverage, sizes, colours beneath pictures, similarity, and whether they locate the tool."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from vla_lib.episodes import PreparedEpisode
from vla_lib.features.cache import EpisodeFeatures
from vla_lib.workbench.plots.style import BLUE, COLOURS, SKY, Panels, diagonal, legend, nth, panels, picture, plot, say

PROBE_EPISODES = 40
Frames = Mapping[str, Sequence[np.ndarray | None]]
"""View -> one (H, W, 3) uint8 picture a shown tick, None where it is missing."""


@plot
def coverage(table: Sequence[Mapping[str, Any]], axes: Panels = None) -> Figure:
    """Episodes with fresh, stale and no features, a bar a dataset.

    table: `Preflight.table()` (dataset, covered, stale, missing, ticks, MB).
    """
    figure, (panel,) = panels(axes, (9, 1.3 + 0.45 * len(table)))
    left = np.zeros(len(table))
    for number, state in enumerate(("covered", "stale", "missing")):
        counts = np.array([row[state] for row in table], float)
        panel.barh(range(len(table)), counts, left=left, color=COLOURS[state], hatch=nth(number).hatch, label=state)
        left += counts
    for place, row in enumerate(table):
        panel.text(left[place], place, f"  {row['ticks']} ticks, {row['MB']:.1f} MB", va="center")
    panel.set_yticks(range(len(table)), [row["dataset"] for row in table])
    panel.set(xlabel="episodes", xlim=(0, 1.35 * max(left.max(), 1)), title="Episodes with features, by dataset")
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    legend(panel)
    return figure


@plot
def pooling_sizes(binding: Mapping[str, Any], ticks: int, token_grid: tuple[int, int], axes: Panels = None) -> Figure:
    """Size of the cache under each pooling option, the chosen one dark.

    binding: of the cache; ticks: of the whole dataset; token_grid: (rows, columns) of image tokens a picture.
    """
    options = {"mean": 1, "grid:2x3": 6, "grid:4x6": 24, "grid:8x12": 96, "tokens": token_grid[0] * token_grid[1]}
    chosen, views, hidden_size = binding["pooling"], len(binding["views"]), binding["hidden_size"]
    if chosen.startswith("grid:"):
        rows, columns = chosen.removeprefix("grid:").split("x")
        options[chosen] = int(rows) * int(columns)
    names = sorted(options, key=options.__getitem__)
    tokens = [views * options[name] + 1 for name in names]
    number_bytes = 4 if binding["dtype"] == "float32" else 2
    sizes_mb = [ticks * count * hidden_size * number_bytes / 1e6 for count in tokens]
    figure, (panel,) = panels(axes, (9, 1.1 + 0.4 * len(names)))
    said = [f"{name} (chosen)" if name == chosen else name for name in names]
    panel.barh(said, sizes_mb, color=[BLUE if name == chosen else SKY for name in names])
    for place, (size_mb, count) in enumerate(zip(sizes_mb, tokens, strict=True)):
        panel.text(size_mb, place, f"  {size_mb:,.1f} MB ({count} tokens a tick)", va="center")
    panel.set(xlabel="size of the whole cache (MB)", xscale="log", xlim=(min(sizes_mb) / 2, max(sizes_mb) * 30))
    panel.set_title(f"Size by pooling: {ticks} ticks, {views} views, {hidden_size} numbers a token")
    panel.invert_yaxis()
    panel.grid(axis="y", visible=False)
    return figure


@plot
def pca_maps(features: EpisodeFeatures, frames: Frames, ticks: Sequence[int], axes: Panels = None) -> Figure:
    """Each view's tokens as colours (first three principal components over the shown ticks) beneath its picture."""
    views = features.layout.views
    colours = _pca_colours(features, list(ticks))
    title = f"{features.key}\ntoken features: first three principal components as red, green, blue"
    size = (min(11, 1.0 + 2.1 * len(ticks)), 2.35 * len(views))
    figure, found = panels(axes, size, (2 * len(views), len(ticks)), title)
    grid = np.array(found, dtype=object).reshape(len(views), 2, len(ticks))
    for view, (above, below) in zip(views, grid, strict=True):  # (ticks,) panels each
        for column, frame in enumerate(frames[view]):
            picture(above[column], frame, "no picture")
            picture(below[column], None, "" if frame is not None else "masked")
            if frame is not None:
                extent = (0, frame.shape[1], frame.shape[0], 0)
                below[column].imshow(colours[view][column], extent=extent, interpolation="nearest")
        above[0].set_ylabel(view)
        below[0].set_ylabel("features")
    for panel, tick in zip(found, ticks, strict=False):
        panel.set_title(f"step {int(features.tick_step[tick])}")
    return figure


@plot
def similarity(episodes: Sequence[EpisodeFeatures], axes: Panels = None) -> Figure:
    """Cosine similarity of ticks (features centred over all shown): all with all, and over the steps of each episode.

    Ticks that lack a picture which the episode has elsewhere are left out.
    """
    whole = [_whole(episode) for episode in episodes]
    joined = np.concatenate([_flat(episode)[kept] for episode, kept in zip(episodes, whole, strict=True)])
    joined = joined - joined.mean(0)
    joined /= np.maximum(np.linalg.norm(joined, axis=1, keepdims=True), 1e-9)
    cosine = joined @ joined.T
    edges = np.cumsum([0, *(int(kept.sum()) for kept in whole)])
    figure, (matrix, lines) = panels(axes, (11, 4.4), "ab", width_ratios=(1, 1.15))
    _similarity_matrix(matrix, cosine, edges, [episode.key.rsplit("/", 1)[-1][-15:] for episode in episodes])
    for number, (episode, kept) in enumerate(zip(episodes, whole, strict=True)):
        own = slice(edges[number], edges[number + 1])
        steps = episode.tick_step.numpy()[kept]
        look: dict[str, Any] = {"color": nth(number).colour, "marker": nth(number).marker, "ms": 3.5}
        lines.plot(steps, cosine[own.start, own], label=f"episode {number + 1}", **look)
        others = np.delete(cosine[own], np.r_[own], axis=1)
        if others.size:
            lines.plot(steps, others.mean(1), ls=":", lw=1, **look)
    lines.set(xlabel="action step", ylabel="cosine")
    lines.set_title("Line: to the own first tick. Dotted: mean to other episodes")
    legend(lines)
    return figure


def _similarity_matrix(panel: Axes, cosine: np.ndarray, edges: np.ndarray, names: list[str]) -> None:
    shown = panel.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest", aspect="auto")
    for edge in edges[1:-1]:
        panel.axhline(edge - 0.5, color="black", lw=0.6)
        panel.axvline(edge - 0.5, color="black", lw=0.6)
    centres = (edges[1:] + edges[:-1] - 1) / 2
    panel.set_yticks(centres, [f"{number}: {name}" for number, name in enumerate(names, 1)])
    panel.set_xticks(centres, [str(number) for number in range(1, len(names) + 1)])
    panel.set(xlabel="episode (ticks in order)", title="Similarity of all ticks")
    panel.grid(visible=False)
    panel.figure.colorbar(shown, ax=panel, label="cosine of centred features", shrink=0.8)


@dataclass(frozen=True)
class Probe:
    """A ridge regression from features to a position, judged on held-out episodes."""

    truth_mm: np.ndarray  # (n, 3)
    predicted_mm: np.ndarray  # (n, 3)
    episode: np.ndarray  # (n,) number of the episode
    mean_predictor_mm: float  # median error of a predictor that always says the mean
    train_episodes: int
    held_out_episodes: int

    @property
    def errors_mm(self) -> np.ndarray:
        """(n,) distance between truth and prediction."""
        return np.linalg.norm(self.predicted_mm - self.truth_mm, axis=1)

    @property
    def median_error_mm(self) -> float:
        """Median of the errors."""
        return float(np.median(self.errors_mm))


@plot
def probe(result: Probe | None, axes: Panels = None) -> Figure:
    """True against predicted tool position (mm) on held-out episodes, an axis a panel, and the errors' distribution."""
    if result is None:
        figure, (panel,) = panels(axes, (8, 1))
        panel.set_axis_off()
        say(panel, "A probe needs four episodes or more.")
        return figure
    title = f"Linear probe: features to tool position, trained on {result.train_episodes} episodes, "
    title += f"shown on {result.held_out_episodes} held out"
    figure, found = panels(axes, (11, 3.2), (1, 4), title)
    for panel, name, truth, predicted in zip(found, "xyz", result.truth_mm.T, result.predicted_mm.T, strict=False):
        panel.scatter(truth, predicted, s=6, color=COLOURS["data"], alpha=0.5)
        diagonal(panel, truth, predicted)
        r2 = 1 - ((truth - predicted) ** 2).sum() / max(((truth - truth.mean()) ** 2).sum(), 1e-12)
        panel.set(xlabel=f"true {name} (mm)", ylabel=f"predicted {name} (mm)", title=f"{name}: R2 {r2:.2f}")
    errors = found[3]
    errors.hist(result.errors_mm, bins=30, color=COLOURS["data"])
    errors.axvline(result.median_error_mm, color=COLOURS["recorded"], label=f"median {result.median_error_mm:.2f} mm")
    other = f"mean predictor {result.mean_predictor_mm:.2f} mm"
    errors.axvline(result.mean_predictor_mm, color=COLOURS["mean"], ls="--", label=other)
    errors.set(xlabel="error (mm)", ylabel="ticks", title=f"Error, p90 {np.quantile(result.errors_mm, 0.9):.2f} mm")
    legend(errors, 1)
    return figure


def position_probe(episodes: Sequence[PreparedEpisode], features: Sequence[EpisodeFeatures]) -> Probe | None:
    """A linear probe from features to the tool's position on held-out episodes; None with fewer than four episodes."""
    chosen = _spread(len(episodes), PROBE_EPISODES)
    if len(chosen) < 4:
        return None
    positions = [np.asarray(episodes[n].state)[features[n].tick_step.numpy(), 6:9] for n in chosen]
    return fit_probe([features[n] for n in chosen], positions)


def fit_probe(episodes: Sequence[EpisodeFeatures], positions_mm: Sequence[np.ndarray]) -> Probe:
    """Fit features -> position on three of four episodes and predict every fourth.

    positions_mm: per episode (ticks, 3), the tool's position at each tick. The ridge strength is chosen on a quarter of
    the training episodes, never on the held-out ones. Ticks that lack a picture are left out. Raises ValueError for
    fewer than four episodes.
    """
    if len(episodes) < 4:
        raise ValueError(f"a probe with held-out episodes needs four episodes or more, got {len(episodes)}")
    whole = [_whole(episode) for episode in episodes]
    x = np.concatenate([_flat(episode)[kept] for episode, kept in zip(episodes, whole, strict=True)])
    y = np.concatenate([np.asarray(p, np.float64)[kept, :3] for p, kept in zip(positions_mm, whole, strict=True)])
    owner = np.repeat(np.arange(len(episodes)), [kept.sum() for kept in whole])
    held_out = owner % 4 == 3
    trained = np.setdiff1d(np.arange(len(episodes)), owner[held_out])
    inner = np.isin(owner, trained[1::4])
    strengths = np.logspace(-4, 4, 9)
    tried = _ridge(x, y, ~held_out & ~inner, inner, strengths)
    scores = [np.median(np.linalg.norm(predicted - y[inner], axis=1)) for predicted in tried]
    (predicted,) = _ridge(x, y, ~held_out, held_out, strengths[[int(np.argmin(scores))]])
    baseline = np.median(np.linalg.norm(y[~held_out].mean(0) - y[held_out], axis=1))
    counts = len(trained), len(episodes) - len(trained)
    return Probe(y[held_out], predicted, owner[held_out], float(baseline), *counts)


def seen_ticks(features: EpisodeFeatures, wanted: int) -> list[int]:
    """`wanted` ticks, evenly over those at which some view was seen: the first pictures come after the first step."""
    seen = np.flatnonzero(features.mask[:, features.layout.view_id >= 0].any(1).numpy())
    return seen[_spread(len(seen), wanted)].tolist() if len(seen) else [0]


def frames(episode: PreparedEpisode, features: EpisodeFeatures, ticks: Iterable[int]) -> Frames:
    """The pictures of some ticks; None where there is none, or where it cannot be read."""
    steps = [int(features.tick_step[tick]) for tick in ticks]
    return {view: [_picture(episode, view, step) for step in steps] for view in features.layout.views}


def picture_size(frames: Frames) -> tuple[int, int]:
    """Height and width of the first picture that is there."""
    found = [picture for pictures in frames.values() for picture in pictures if picture is not None]
    return found[0].shape[0], found[0].shape[1]


def _picture(episode: PreparedEpisode, view: str, step: int) -> np.ndarray | None:
    path = episode.picture_path(view, step) if view in episode.views else None
    if path is None:
        return None
    try:
        with Image.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except OSError:
        return None


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` numbers (fewer where there are fewer) evenly over 0..count-1."""
    return np.unique(np.linspace(0, count - 1, min(wanted, count)).round().astype(int)).tolist()


def _whole(episode: EpisodeFeatures) -> np.ndarray:
    """(ticks,) bool: ticks with every picture that the episode has at any tick."""
    known = episode.mask.numpy().sum(1)
    return known == known.max()


def _flat(episode: EpisodeFeatures) -> np.ndarray:
    """(ticks, T * D) float64."""
    return episode.tokens.float().flatten(1).numpy().astype(np.float64)


def _ridge(
    x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, strengths: np.ndarray
) -> list[np.ndarray]:
    """Predictions on `test` for each strength; by the dual form, for there are fewer rows than columns."""
    mean, target = x[train].mean(0), y[train].mean(0)
    a, b = x[train] - mean, x[test] - mean
    kernel = a @ a.T
    scale = np.trace(kernel) / len(kernel)
    ridges = (kernel + strength * scale * np.eye(len(kernel)) for strength in strengths)
    return [b @ a.T @ np.linalg.solve(ridge, y[train] - target) + target for ridge in ridges]


def _pca_colours(features: EpisodeFeatures, ticks: list[int]) -> dict[str, np.ndarray]:
    """View -> (ticks, rows, cols, 3) in 0..1, scaled to the 2nd..98th percentile of the known tokens."""
    layout = features.layout
    images = layout.view_id >= 0
    tokens = features.tokens[ticks][:, images].float().numpy().astype(np.float64)
    known = features.mask[ticks][:, images].numpy()
    if not known.any():
        return {view: np.ones((len(ticks), layout.rows, layout.cols, 3)) for view in layout.views}
    centre = tokens[known].mean(0)
    _, _, directions = np.linalg.svd(tokens[known] - centre, full_matrices=False)
    parts = (tokens - centre) @ directions[:3].T
    parts = np.pad(parts, [(0, 0), (0, 0), (0, 3 - parts.shape[-1])])
    low, high = np.percentile(parts[known], [2, 98], axis=0)
    shade = np.where(known[..., None], np.clip((parts - low) / np.maximum(high - low, 1e-9), 0, 1), 1.0)
    shape = (len(ticks), layout.rows, layout.cols, 3)
    return {view: shade[:, layout.view_slice(view)].reshape(shape) for view in layout.views}
