"""Cached vision-language features in, figures out: coverage, sizes, PCA colours over the pictures, similarity, and a linear probe."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from vla_lib.features.cache import EpisodeFeatures
from vla_lib.features.pooling import TokenLayout
from vla_lib.workbench.plots.style import style

STATES = {"covered": "#3b7d4f", "stale": "#d99a2b", "missing": "#b6b6b6"}


def coverage(table: Sequence[Mapping[str, Any]]) -> Figure:
    """Episodes with fresh, stale and no features, a bar a dataset. table: `Preflight.table()` (dataset, covered, stale, missing, ticks, MB)."""
    with style():
        figure = Figure(figsize=(8, 0.9 + 0.45 * len(table)))
        axes = figure.add_subplot()
        left = np.zeros(len(table))
        for state, colour in STATES.items():
            counts = np.array([row[state] for row in table], float)
            axes.barh(range(len(table)), counts, left=left, color=colour, label=state)
            left += counts
        for place, row in enumerate(table):
            axes.text(left[place], place, f"  {row['ticks']} ticks, {row['MB']:.1f} MB", va="center")
        axes.set(
            yticks=range(len(table)),
            yticklabels=[row["dataset"] for row in table],
            xlabel="episodes",
            xlim=(0, 1.35 * max(left.max(), 1)),
        )
        axes.set_title("Episodes with features, by dataset")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        figure.legend(loc="outside right upper")
    return figure


def pooling_sizes(
    ticks: int, views: int, hidden_size: int, bytes_per_number: int, token_grid: tuple[int, int], chosen: str
) -> Figure:
    """Size of the cache under each pooling option. ticks: of the whole dataset; token_grid: (rows, columns) of image tokens a picture."""
    options = {"mean": 1, "grid:2x3": 6, "grid:4x6": 24, "grid:8x12": 96, "tokens": token_grid[0] * token_grid[1]}
    if chosen.startswith("grid:") and chosen not in options:
        rows, cols = chosen.removeprefix("grid:").split("x")
        options[chosen] = int(rows) * int(cols)
    names = sorted(options, key=options.__getitem__)
    sizes = [ticks * (views * options[name] + 1) * hidden_size * bytes_per_number / 1e6 for name in names]
    with style():
        figure = Figure(figsize=(8, 0.9 + 0.4 * len(names)))
        axes = figure.add_subplot()
        axes.barh(names, sizes, color=["#2f6db3" if name == chosen else "#a9bfd6" for name in names])
        for place, (name, size) in enumerate(zip(names, sizes, strict=True)):
            axes.text(size, place, f"  {size:,.1f} MB ({views * options[name] + 1} tokens a tick)", va="center")
        axes.set(xlabel="size of the whole cache (MB)", xscale="log", xlim=(min(sizes) / 2, max(sizes) * 30))
        axes.set_title(f"Size by pooling: {ticks} ticks, {views} views, {hidden_size} numbers a token (dark: chosen)")
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
    return figure


def pca_maps(
    features: EpisodeFeatures, frames: Mapping[str, Sequence[np.ndarray | None]], ticks: Sequence[int]
) -> Figure:
    """Each view's grid of tokens as colours (first three principal components over the shown ticks) beneath its picture.

    frames: view -> one (H, W, 3) uint8 picture a shown tick, None where it is missing; ticks: the shown ticks' numbers.
    """
    layout = features.layout
    colours = _pca_colours(features, list(ticks))
    with style():
        figure = Figure(figsize=(1.0 + 2.1 * len(ticks), 2.35 * len(layout.views)))
        grid = figure.subplots(2 * len(layout.views), len(ticks), squeeze=False)
        for axes in grid.flat:
            axes.set(xticks=[], yticks=[])
            axes.grid(visible=False)
            for spine in axes.spines.values():
                spine.set_visible(False)
        for row, view in enumerate(layout.views):
            for column, tick in enumerate(ticks):
                above, below = grid[2 * row, column], grid[2 * row + 1, column]
                frame = frames[view][column]
                if frame is None:
                    above.text(0.5, 0.5, "no picture", ha="center", va="center", transform=above.transAxes)
                    below.text(0.5, 0.5, "masked", ha="center", va="center", transform=below.transAxes)
                else:
                    extent = (0, frame.shape[1], frame.shape[0], 0)
                    above.imshow(frame, extent=extent)
                    below.imshow(colours[view][column], extent=extent, interpolation="nearest")
                if row == 0:
                    above.set_title(f"step {int(features.tick_step[tick])}")
            grid[2 * row, 0].set_ylabel(view)
            grid[2 * row + 1, 0].set_ylabel("features")
        figure.suptitle(f"{features.key}: token features, first three principal components as red, green, blue")
    return figure


def similarity(episodes: Sequence[EpisodeFeatures], views: Sequence[str] | None = None) -> Figure:
    """Cosine similarity of ticks (features centred over all shown), within each episode and against the others, over time in steps.

    Ticks that lack a picture which the episode has elsewhere are left out.
    """
    layout = episodes[0].layout
    chosen = np.concatenate([np.r_[layout.view_slice(view)] for view in (views or layout.views)])
    whole = [_whole(episode) for episode in episodes]
    vectors = [_flat(episode, chosen)[kept] for episode, kept in zip(episodes, whole, strict=True)]
    joined = np.concatenate(vectors)
    joined = joined - joined.mean(0)
    joined /= np.maximum(np.linalg.norm(joined, axis=1, keepdims=True), 1e-9)
    cosine = joined @ joined.T
    edges = np.cumsum([0, *(len(vector) for vector in vectors)])
    with style():
        figure = Figure(figsize=(11, 4.4))
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        shown = left.imshow(cosine, vmin=-1, vmax=1, cmap="RdBu_r", interpolation="nearest", aspect="auto")
        for edge in edges[1:-1]:
            left.axhline(edge - 0.5, color="black", lw=0.6)
            left.axvline(edge - 0.5, color="black", lw=0.6)
        names = [episode.key.rsplit("/", 1)[-1][-15:] for episode in episodes]
        centres = (edges[1:] + edges[:-1] - 1) / 2
        left.set(
            yticks=centres,
            yticklabels=names,
            xticks=centres,
            xticklabels=range(1, len(names) + 1),
            xlabel="episode (ticks in order)",
        )
        left.grid(visible=False)
        left.set_title("Similarity of all ticks")
        figure.colorbar(shown, ax=left, label="cosine of centred features", shrink=0.8)
        for number, episode in enumerate(episodes):
            steps = episode.tick_step.numpy()[whole[number]]
            inside = cosine[edges[number], edges[number] : edges[number + 1]]
            right.plot(steps, inside, marker=".", ms=3, label=f"{number + 1}: {names[number]}")
            others = np.delete(
                cosine[edges[number] : edges[number + 1]], np.r_[edges[number] : edges[number + 1]], axis=1
            )
            if others.size:
                right.plot(steps, others.mean(1), color=right.lines[-1].get_color(), ls=":", lw=1)
        right.set(
            xlabel="action step",
            ylabel="cosine",
            title="Line: to the episode's own first tick\nDotted: to the other episodes, mean",
        )
        right.legend(loc="best", fontsize=7)
    return figure


@dataclass(frozen=True)
class Probe:
    """A ridge regression from features to a position: (n, 3) mm truth and prediction on held-out episodes, and the mean-predictor's error."""

    truth_mm: np.ndarray
    predicted_mm: np.ndarray
    episode: np.ndarray
    median_error_mm: float
    p90_error_mm: float
    mean_predictor_mm: float
    train_episodes: int
    held_out_episodes: int
    strength: float


def fit_probe(
    episodes: Sequence[EpisodeFeatures],
    positions_mm: Sequence[np.ndarray],
    held_out: Sequence[int] | None = None,
    strengths=None,
) -> Probe:
    """Fit features -> position on some episodes and predict the others.

    positions_mm: per episode (ticks, 3), the tool's position at each tick; held_out: numbers of the held-out episodes (default: every
    fourth). The ridge strength is chosen on a quarter of the training episodes, never on the held-out ones. Ticks that lack a picture
    are left out. Raises ValueError for fewer than four episodes.
    """
    if len(episodes) < 4:
        raise ValueError(f"a probe with held-out episodes needs four episodes or more, got {len(episodes)}")
    held = sorted(set(range(3, len(episodes), 4) if held_out is None else held_out))
    train = [number for number in range(len(episodes)) if number not in held]
    inner = set(train[1::4])
    tokens = np.arange(episodes[0].layout.tokens)
    whole = [_whole(episode) for episode in episodes]
    x = np.concatenate([_flat(episode, tokens)[kept] for episode, kept in zip(episodes, whole, strict=True)])
    y = np.concatenate(
        [np.asarray(position, np.float64)[kept, :3] for position, kept in zip(positions_mm, whole, strict=True)]
    )
    owner = np.repeat(np.arange(len(episodes)), [kept.sum() for kept in whole])
    strengths = np.logspace(-4, 4, 9) if strengths is None else strengths
    outer_train, inner_train = (
        np.isin(owner, train),
        np.isin(owner, [number for number in train if number not in inner]),
    )
    inner_test = np.isin(owner, list(inner))
    scores = [
        np.median(np.linalg.norm(p - y[inner_test], axis=1)) for p in _ridge(x, y, inner_train, inner_test, strengths)
    ]
    strength = float(strengths[int(np.argmin(scores))])
    test = np.isin(owner, held)
    (predicted,) = _ridge(x, y, outer_train, test, [strength])
    errors = np.linalg.norm(predicted - y[test], axis=1)
    baseline = np.median(np.linalg.norm(y[outer_train].mean(0) - y[test], axis=1))
    counts = (len(train), len(held))
    return Probe(
        y[test],
        predicted,
        owner[test],
        float(np.median(errors)),
        float(np.quantile(errors, 0.9)),
        float(baseline),
        *counts,
        strength,
    )


def probe(result: Probe) -> Figure:
    """True against predicted tool position (mm) on held-out episodes, an axis a panel, and the errors' distribution."""
    with style():
        figure = Figure(figsize=(12, 3.4))
        panels = figure.subplots(1, 4)
        for axis, (panel, name) in enumerate(zip(panels, "xyz", strict=False)):
            truth, predicted = result.truth_mm[:, axis], result.predicted_mm[:, axis]
            panel.scatter(truth, predicted, s=6, c=result.episode, cmap="tab20", alpha=0.7)
            low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
            panel.plot([low, high], [low, high], color="black", lw=0.8)
            r2 = 1 - ((truth - predicted) ** 2).sum() / max(((truth - truth.mean()) ** 2).sum(), 1e-12)
            panel.set(xlabel=f"true {name} (mm)", ylabel=f"predicted {name} (mm)", title=f"{name}: R2 {r2:.2f}")
        errors = np.linalg.norm(result.predicted_mm - result.truth_mm, axis=1)
        panels[3].hist(errors, bins=30, color="#2f6db3")
        panels[3].axvline(result.median_error_mm, color="black", label=f"median {result.median_error_mm:.2f} mm")
        panels[3].axvline(
            result.mean_predictor_mm,
            color="#b03a2e",
            ls="--",
            label=f"mean predictor {result.mean_predictor_mm:.2f} mm",
        )
        panels[3].set(xlabel="error (mm)", ylabel="ticks", title=f"Error, p90 {result.p90_error_mm:.2f} mm")
        panels[3].legend(fontsize=7)
        figure.suptitle(
            f"Linear probe: features to tool position, trained on {result.train_episodes} episodes, shown on {result.held_out_episodes} held out"
        )
    return figure


def _whole(episode: EpisodeFeatures) -> np.ndarray:
    """(ticks,) bool: ticks with every picture that the episode has at any tick."""
    known = episode.raw_mask.sum(1)
    return known == known.max()


def _flat(episode: EpisodeFeatures, tokens: np.ndarray) -> np.ndarray:
    """(ticks, len(tokens) * D) float64."""
    return episode.tokens[:, tokens].float().flatten(1).numpy().astype(np.float64)


def _ridge(x, y, train, test, strengths):
    """Predictions on `test` for each strength, by the dual form (fewer rows than columns); columns centred, one common scale."""
    mean, target = x[train].mean(0), y[train].mean(0)
    a, b = x[train] - mean, x[test] - mean
    kernel = a @ a.T
    scale = np.trace(kernel) / len(kernel)
    values, vectors = np.linalg.eigh(kernel / scale)
    projected, across = vectors.T @ (y[train] - target), (b @ a.T / scale) @ vectors
    return [across @ (projected / (np.maximum(values, 0) + strength)[:, None]) + target for strength in strengths]


def _pca_colours(features: EpisodeFeatures, ticks: list[int]) -> dict[str, np.ndarray]:
    """View -> (ticks, rows, cols, 3) in 0..1; components over the known tokens of the shown ticks, scaled to their 2nd..98th percentile."""
    layout: TokenLayout = features.layout
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
    return {
        view: shade[:, layout.view_slice(view)].reshape(len(ticks), layout.rows, layout.cols, 3)
        for view in layout.views
    }
