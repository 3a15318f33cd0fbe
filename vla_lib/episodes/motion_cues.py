"""What moves in the streams beside the robot log: layers of the A-scan, and the pictures. Times in seconds."""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter1d

Array = np.ndarray[Any, Any]

GROUP_S = 0.02  # A-scans are averaged over this span: a layer moves less than a few bins in it
MOST_SHIFT = 60  # depth bins that a layer may move between two groups (22 mm/s); more is a mismatch
SMALL = (80, 45)  # pixels, in which pictures are compared


def picture_change(paths: Sequence[Path]) -> Array:
    """(n - 1,) mean change of grey level (0..255) from each of n pictures to the next; NaN where one is broken."""
    change, before = np.full(max(len(paths) - 1, 0), np.nan), None
    for number, path in enumerate(paths):
        now = None
        with contextlib.suppress(OSError, ValueError, SyntaxError), Image.open(path) as picture:
            picture.draft("L", (SMALL[0] * 2, SMALL[1] * 2))  # the JPEG decoder's own shrinking
            now = np.asarray(picture.convert("L").resize(SMALL, Image.Resampling.BILINEAR), np.float32)
        if before is not None and now is not None:
            change[number - 1] = np.abs(now - before).mean()
        before = now
    return change


def layer_speed(t_s: Array, blocks: Iterable[Array], hz: float) -> tuple[Array, Array, Array] | None:
    """How fast the layers of the A-scan move: times (M,), depth bins a second (M,), and whether a shift is sound (M,).

    t_s (S,): of the samples that are looked at; blocks: (n, 1025) A-scans in order, at `hz`. The shift between
    successive groups of scans is the peak of their cross-correlation, between bins by a parabola.
    """
    count = max(1, round(GROUP_S * hz))
    groups = len(t_s) // count
    if groups < 20:
        return None
    scans = np.concatenate(list(_means(blocks, count, groups)))[:groups]
    groups = len(scans)
    at_s = t_s[: groups * count].reshape(groups, count)
    edges = np.diff(gaussian_filter1d(scans, 1.5, axis=1), axis=1)  # brightness drifts; edges stay
    edges -= edges.mean(axis=1, keepdims=True)
    spectrum = np.fft.rfft(edges, 2048, axis=1)
    match = np.fft.irfft(spectrum[1:] * spectrum[:-1].conj(), axis=1)
    match = np.concatenate([match[:, -MOST_SHIFT:], match[:, : MOST_SHIFT + 1]], axis=1)
    rows, best = np.arange(groups - 1), np.clip(match.argmax(axis=1), 1, 2 * MOST_SHIFT - 1)
    left, peak, right = (match[rows, best + k] for k in (-1, 0, 1))
    curvature = left - 2 * peak + right
    shift = best - MOST_SHIFT + np.where(curvature < 0, (left - right) / np.where(curvature < 0, 2 * curvature, 1), 0.0)
    energy = (edges**2).sum(axis=1)
    alike = peak / np.maximum(np.sqrt(energy[1:] * energy[:-1]), 1e-12)
    centre = at_s.mean(axis=1)
    speed = shift / np.maximum(np.diff(centre), 1e-6)
    whole = np.ptp(at_s, axis=1) < 2 * GROUP_S  # no gap of the stream inside
    sound = (alike > 0.5) & whole[1:] & whole[:-1]
    if sound.sum() < 20:
        return None
    middle = np.median(speed[sound])
    sound &= np.abs(speed - middle) < 12 * (np.median(np.abs(speed[sound] - middle)) + 1.0)
    return (centre[1:] + centre[:-1]) / 2, speed, sound


def _means(blocks: Iterable[Array], count: int, groups: int) -> Iterable[Array]:
    """Means of every `count` rows, whatever blocks they come in, until there are `groups`."""
    rest: Array | None = None
    for block in blocks:
        rows = block if rest is None else np.concatenate([rest, block])
        whole = len(rows) // count
        if whole:
            yield rows[: whole * count].reshape(whole, count, -1).mean(axis=1, dtype=np.float32)
        rest = rows[whole * count :].copy()  # a block is only valid until the next
        groups -= whole
        if groups <= 0:
            return
