"""Statistics of a LeRobot dataset, as its loader expects them: min, max, mean, std, count, and five quantiles.

The definitions are those of LeRobot 0.4.4 (`lerobot/datasets/compute_stats.py`): quantiles of an episode come from a
histogram of 5,000 bins, those of all episodes are the means of the episodes' own, weighted by their counts. Sums are
made in float64, so that a small motion far from zero keeps its spread.
"""

from collections.abc import Iterable

import numpy as np

Stats = dict[str, np.ndarray]  # name of the statistic -> (width,), of a video (3, 1, 1); `count`: (1,)

QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}
BINS = 5000
EDGE = 1e-10
LEVELS = np.arange(256.0)


def table_stats(values: np.ndarray) -> Stats:
    """The statistics of one episode's column (n,) or (n, width)."""
    columns = np.asarray(values, float).reshape(len(values), -1)
    each = [_weighted(column, np.ones(len(column))) for column in columns.T]
    found = {name: np.array([one[name] for one in each]) for name in each[0]}
    if len(values) < 2:  # no histogram of one value
        found |= {name: found["mean"].copy() for name in QUANTILES}
    return found | {"count": np.array([len(values)])}


class VideoStats:
    """The statistics of one episode's video, from some of its frames: per colour, levels scaled to 0..1."""

    def __init__(self, frames: int):
        """`frames`: of the episode. Some of them are asked for, as LeRobot chooses them."""
        count = max(min(frames, 100), min(int(frames**0.75), 10_000))
        self.wanted = set(np.round(np.linspace(0, frames - 1, count)).astype(int).tolist())
        self._count = count
        self._levels = np.zeros((3, 256))

    def add(self, frame: int, pixels: np.ndarray) -> None:
        """Pixels (height, width, 3) uint8 of a frame; those that are not wanted are passed over."""
        if frame in self.wanted:
            height, width = pixels.shape[:2]
            thinned = max(height, width) >= 300
            every = int(width / 150) if width > height else int(height / 150)
            few = pixels[::every, ::every] if thinned else pixels
            self._levels += [np.bincount(few[..., colour].reshape(-1), minlength=256) for colour in range(3)]

    def stats(self) -> Stats:
        each = [_weighted(LEVELS[levels > 0], levels[levels > 0]) for levels in self._levels]
        found = {name: np.array([one[name] for one in each]).reshape(3, 1, 1) / 255 for name in each[0]}
        return found | {"count": np.array([self._count])}


def _weighted(values: np.ndarray, weights: np.ndarray) -> dict[str, float]:
    total = weights.sum()
    mean = float((values * weights).sum() / total)
    std = float(np.sqrt((np.square(values - mean) * weights).sum() / total))
    least, most = float(values.min()), float(values.max())
    edges = np.linspace(least - EDGE, most + EDGE, BINS + 1)
    reached = np.cumsum(np.histogram(values, edges, weights=weights)[0])
    found = {"min": least, "max": most, "mean": mean, "std": std}
    for name, part in QUANTILES.items():
        place = int(np.searchsorted(reached, part * total))
        before = reached[place - 1] if place else 0.0
        within = (part * total - before) / (reached[place] - before) if place else 0.0
        found[name] = float(edges[place] + within * (edges[place + 1] - edges[place]))
    return found


def combine(episodes: Iterable[Stats]) -> Stats:
    """The statistics of all episodes' frames from those of each. Raises ValueError without any."""
    each = list(episodes)
    counts = np.array([one["count"][0] for one in each], float)

    def mean(values: list[np.ndarray]) -> np.ndarray:
        return np.asarray(np.average(np.stack(values), axis=0, weights=counts))

    middle = mean([one["mean"] for one in each])
    spread = mean([np.square(one["std"]) + np.square(one["mean"] - middle) for one in each])
    found = {"min": np.min([one["min"] for one in each], axis=0), "max": np.max([one["max"] for one in each], axis=0)}
    found |= {"mean": middle, "std": np.sqrt(spread), "count": np.array([int(counts.sum())])}
    return found | {name: mean([one[name] for one in each]) for name in QUANTILES}
