"""Image tokens of one view (B, h*w, D) in, a fixed number of pooled tokens (B, rows*cols, D) out; and the layout that tells which is which."""

import re
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError

DEFAULT_POOLING = "grid:4x6"
# Chosen by `python -m benchmarks.pooling --scenes 600` (simulated rig, tiny model, layer 2, 320x180; median error of a ridge
# regression on 120 held-out scenes, offset needle to target in mm):
#             mean   2x3   3x4   4x6   6x11 (all tokens)
#   5 views   5.42  2.41  1.98  1.77  1.80
#   3 views   5.81  2.93  2.21  1.83  1.84
# Finer than 4x6 buys nothing; the mean loses the place.


@dataclass(frozen=True)
class Pooling:
    """`grid:RxC` (averages over an R x C grid), `mean` (one average a view) or `tokens` (every image token)."""

    kind: str
    rows: int = 1
    cols: int = 1

    @classmethod
    def parse(cls, text: str) -> "Pooling":
        """Read `grid:4x6`, `mean` or `tokens`. Raises UserError for anything else."""
        if text in ("mean", "tokens"):
            return cls(text)
        match = re.fullmatch(r"grid:([1-9]\d*)x([1-9]\d*)", text)
        if not match:
            raise UserError(
                f'--vl-pooling "{text}" is not known; take grid:ROWSxCOLS (such as {DEFAULT_POOLING}), mean or tokens.'
            )
        return cls("grid", int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"grid:{self.rows}x{self.cols}" if self.kind == "grid" else self.kind


@dataclass(frozen=True)
class TokenLayout:
    """Where each of the T tokens of a tick comes from: `views` in order, each `rows` x `cols` row by row, then one text token if `text`."""

    views: tuple[str, ...]
    rows: int
    cols: int
    text: bool = True

    @property
    def tokens(self) -> int:
        """T, the number of tokens a tick."""
        return len(self.views) * self.rows * self.cols + int(self.text)

    @property
    def view_id(self) -> np.ndarray:
        """(T,) int64: index into `views`, -1 for the text token."""
        return self._with_text(np.repeat(np.arange(len(self.views)), self.rows * self.cols))

    @property
    def row(self) -> np.ndarray:
        """(T,) int64: grid row from the top, -1 for the text token."""
        return self._with_text(np.tile(np.repeat(np.arange(self.rows), self.cols), len(self.views)))

    @property
    def col(self) -> np.ndarray:
        """(T,) int64: grid column from the left, -1 for the text token."""
        return self._with_text(np.tile(np.arange(self.cols), len(self.views) * self.rows))

    def view_slice(self, view: str) -> slice:
        """The tokens of one view."""
        start = self.views.index(view) * self.rows * self.cols
        return slice(start, start + self.rows * self.cols)

    def _with_text(self, values: np.ndarray) -> np.ndarray:
        return np.append(values, -1).astype(np.int64) if self.text else values.astype(np.int64)

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {"views": list(self.views), "rows": self.rows, "cols": self.cols, "text": self.text}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> "TokenLayout":
        """The inverse of `to_dict`."""
        return cls(tuple(value["views"]), int(value["rows"]), int(value["cols"]), bool(value["text"]))


def layout_for(pooling: Pooling, views: tuple[str, ...], height: int, width: int, factor: int) -> TokenLayout:
    """The layout of one binding.

    `tokens` has as many rows and columns as the largest allowed picture (`height` x `width` pixels, one token a `factor` x `factor`
    square); a smaller picture fills its top left corner and the rest is masked.
    """
    if pooling.kind == "tokens":
        return TokenLayout(views, max(1, round(height / factor)), max(1, round(width / factor)))
    return TokenLayout(views, pooling.rows, pooling.cols)


def pool(tokens, grid: tuple[int, int], pooling: Pooling, layout: TokenLayout):
    """Pool one view's tokens.

    tokens: (B, h*w, D) torch tensor, `grid` = (h, w). Returns (pooled (B, rows*cols, D) float32, mask (rows*cols,) bool).
    Averages run over the cells that torch's adaptive_avg_pool2d takes: all tokens fall into a cell, cells overlap where h < rows.
    """
    import torch
    import torch.nn.functional as F

    batch, _, width = tokens.shape
    h, w = grid
    tokens = tokens.float()
    if pooling.kind != "tokens":
        image = tokens.transpose(1, 2).reshape(batch, width, h, w)
        pooled = F.adaptive_avg_pool2d(image, (layout.rows, layout.cols))
        return pooled.flatten(2).transpose(1, 2), torch.ones(layout.rows * layout.cols, dtype=torch.bool)
    if h > layout.rows or w > layout.cols:
        raise UserError(
            f"A picture has {h}x{w} tokens where the cache has room for {layout.rows}x{layout.cols}; raise --image-resize-height/width."
        )
    full = tokens.new_zeros(batch, layout.rows, layout.cols, width)
    full[:, :h, :w] = tokens.reshape(batch, h, w, width)
    mask = torch.zeros(layout.rows, layout.cols, dtype=torch.bool)
    mask[:h, :w] = True
    return full.flatten(1, 2), mask.flatten()
