"""What made a set of features: how a view is pooled, where each token comes from, and the binding that records it all.

A reader compares the binding of a cache with what it relies on, field by field, before it reads anything. No torch.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError

SCHEMA = 1

# Every field here changes the features, or which of them exist. `source` (where the model was found) is kept beside
# them, but is not part of the id: the same checkpoint may lie elsewhere tomorrow.
COMPUTED_BY = ("model", "weights_sha256", "family", "layer", "depth", "hidden_size", "dtype", "transformers")
SHOWN = ("views", "prompt", "image_resize_height", "image_resize_width", "image_backend", "tick_stride")
FIELDS = ("schema", *COMPUTED_BY, *SHOWN, "pooling", "text_tokens", "layout")

DEFAULT_POOLING = "grid:6x11"
TINY = {"tiny": "qwen2_5_vl", "tiny-qwen3-vl": "qwen3_vl"}  # models of random weights, made on the spot: name -> family
# Measured by `python -m benchmarks.pooling --scenes 600` (simulated rig, tiny model, layer 2, 320x180; median error of
# a ridge regression on 120 held-out scenes, offset needle to target in mm):
#             mean   2x3   3x4   4x6   6x11 (all tokens)
#   5 views   5.42  2.41  1.98  1.77  1.80
#   3 views   5.81  2.93  2.21  1.83  1.84
# To a ridge regression finer than 4x6 buys nothing, and the mean loses the place; keypoints, which the policy reads
# (policy.goal), gain from a finer grid.


@dataclass(frozen=True)
class TokenLayout:
    """Where each of the T tokens of a tick comes from: `views` in order, each `rows` x `cols`, then one text token."""

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
        return np.append(values, [-1] * self.text).astype(np.int64)

    @classmethod
    def from_dict(cls, value: Mapping[str, Any]) -> "TokenLayout":
        """The layout that a binding holds."""
        return cls(tuple(value["views"]), int(value["rows"]), int(value["cols"]), bool(value["text"]))


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
        if not (match := re.fullmatch(r"grid:([1-9]\d*)x([1-9]\d*)", text)):
            raise UserError(f'--vl-pooling "{text}" is not known; take grid:ROWSxCOLS, mean or tokens.')
        return cls("grid", int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"grid:{self.rows}x{self.cols}" if self.kind == "grid" else self.kind

    def layout(self, views: Sequence[str], height: int, width: int, factor: int) -> TokenLayout:
        """The layout of tokens pooled so.

        `tokens` has as many rows and columns as the largest allowed picture (`height` x `width` pixels, one token a
        `factor` x `factor` square); a smaller picture fills its top left corner and the rest is masked.
        """
        if self.kind == "tokens":
            return TokenLayout(tuple(views), max(1, round(height / factor)), max(1, round(width / factor)))
        return TokenLayout(tuple(views), self.rows, self.cols)


def make_binding(**fields: Any) -> dict[str, Any]:
    """The binding as a plain dict, its `id` included. All of FIELDS but `schema` must be given; `source` may be."""
    binding = json.loads(json.dumps({"schema": SCHEMA, **fields}))  # tuples become the lists that a reader will find
    if odd := (binding.keys() - {"source"}) ^ set(FIELDS):
        raise ValueError(f"binding fields missing or unknown: {sorted(odd)}")
    return {"id": binding_id(binding), **binding}


def binding_id(binding: Mapping[str, Any]) -> str:
    """Readable and unique: `tiny-L2-grid4x6-s3-1a2b3c4d5e`; the last part is a hash over every field of FIELDS."""
    content = json.dumps({name: binding[name] for name in FIELDS}, sort_keys=True)
    model = re.sub(r"[^A-Za-z0-9._]+", "-", str(binding["model"]).rsplit("/", 1)[-1])[:40]
    name = f"{model}-L{binding['layer']}-{str(binding['pooling']).replace(':', '')}-s{binding['tick_stride']}"
    return f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def model_words(binding: Mapping[str, Any]) -> str:
    """The model's name, and that it has random weights where it has."""
    random = str(binding.get("source") or binding["model"]) in TINY
    return f"{binding['model']} (random weights: no model for real recordings)" if random else str(binding["model"])


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase for every field of `wanted` that `found` holds otherwise."""
    wanted = json.loads(json.dumps({name: wanted[name] for name in FIELDS if name in wanted}))
    return [
        f"{name}: {_short(found.get(name))} against {_short(value)}"
        for name, value in wanted.items()
        if found.get(name) != value
    ]


def check(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raise UserError where `found` (the cache's) is not what `wanted` (the reader's fields, some or all) asks for."""
    if phrases := differences(found, wanted):
        otherwise = f"was made otherwise than asked (cache against here): {'; '.join(phrases)}"
        raise UserError(f"{where} {otherwise}. Build anew with build_vl_cache.")


def check_own(binding: Any, where: str) -> None:
    """Raise UserError unless `binding` is a whole binding of this schema whose id is the hash of its fields."""
    if not isinstance(binding, dict) or {"id", *FIELDS} - binding.keys():
        raise UserError(f"{where} is no binding of this workbench; point to another cache folder, or remove this one.")
    if binding["schema"] != SCHEMA:
        raise UserError(f"{where} has schema {binding['schema']}, this code reads {SCHEMA}; build the cache anew.")
    if (expected := binding_id(binding)) != binding["id"]:
        said = f'its fields belong to "{expected}", its id says "{binding["id"]}"'
        raise UserError(f"{where} was altered: {said}; build the cache anew.")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
