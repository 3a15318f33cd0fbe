"""The one way to compute features, for the cache and on the robot: pictures and an instruction to tokens (T, D).

Each picture passes the vision tower once (`encode`); ticks of equal shape pass the language model together without
padding (`features`), so that what a tick gets does not depend on its batch.

Shapes: B ticks of equal shape, L tokens that the language model reads, T tokens that are kept, D hidden size.
"""

import os
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vla_lib.core.errors import UserError
from vla_lib.features import binding as bindings
from vla_lib.features.binding import Pooling, TokenLayout
from vla_lib.features.form import FeatureForm
from vla_lib.features.vlm import Vlm, add_adapter, fill_adapter, load_processor, load_vlm, open_checkpoint

Grid = tuple[int, int]  # rows and columns of image tokens


class EncodedPicture(NamedTuple):
    """What the vision tower makes of a picture: tokens (rows*cols, D), and each deepstack level of Qwen3-VL alike."""

    grid: Grid
    tokens: Tensor
    deep: list[Tensor]

    def to(self, device: torch.device) -> "EncodedPicture":
        return EncodedPicture(self.grid, self.tokens.to(device), [level.to(device) for level in self.deep])


class Prompt(NamedTuple):
    """A text with its pictures as the language model reads it: token ids (1, L), multimodal rotary positions (3, 1, L),
    each picture's place in it, and where the text behind the last one starts."""

    ids: Tensor
    positions: Tensor
    spans: list[slice]
    after: int


class FeatureExtractor:
    """A loaded model and the form of its features. `layout` tells the T tokens, `hidden_size` is D."""

    def __init__(self, vlm: Vlm, form: FeatureForm):
        self.vlm, self.form = vlm, form
        self.views, self.layout, self.recipe = form.views, form.layout, form.recipe
        self.hidden_size = vlm.checkpoint.hidden_size
        self.device: torch.device = vlm.model.device
        self.dtype: torch.dtype = vlm.model.dtype
        self.prompt = lru_cache(maxsize=256)(self._make_prompt)
        if vlm.layer < vlm.checkpoint.depth:
            # what transformers calls hidden_states[layer] comes before the final norm, which the last layer alone has
            vlm.model.language_model.norm = torch.nn.Identity()

    @classmethod
    def from_binding(
        cls, binding: Mapping[str, Any], device: str | None = None, adapter: Mapping[str, Any] | None = None
    ) -> "FeatureExtractor":
        """The extractor that makes a cache, or made it; with the LoRA weights of a stage-2 checkpoint's `adapter`.

        Raises UserError naming both sides where the model at hand, transformers or the prompt is not what the binding
        says.
        """
        bindings.check_own(dict(binding), "the binding of the cache")
        checkpoint = open_checkpoint(binding["source"])
        processor = load_processor(checkpoint)
        form = FeatureForm.of(processor, binding)
        here = form.binding(checkpoint, binding["layer"], binding["tick_stride"], binding["dtype"])
        bindings.check(binding, {**here, "model": binding["model"]}, f'The cache "{binding["id"]}"')
        vlm = load_vlm(checkpoint, processor, binding["layer"], device or default_device(), binding["dtype"])
        if adapter is not None:
            fill_adapter(add_adapter(vlm, adapter["rank"], adapter["alpha"]), adapter)
        return cls(vlm, form)

    def extract(self, pictures: Mapping[str, Any], instruction: str) -> tuple[Tensor, Tensor]:
        """Features of one moment, live.

        pictures: view -> PIL picture, (H, W, 3) uint8 array or file; a view that is absent or None is masked.
        Returns (tokens (T, D), mask (T,) bool) on the CPU, in the type that the cache stores.
        """
        present = [view for view in self.views if pictures.get(view) is not None]
        prepared = [torch.from_numpy(self.recipe.prepare(pictures[view])) for view in present]
        tick = [present.index(view) if view in present else -1 for view in self.views]
        tokens, mask = self.forward(prepared, [tick], instruction)
        return tokens[0], mask[0]

    @torch.inference_mode()
    def forward(
        self, pictures: Sequence[Tensor], ticks: Sequence[Sequence[int]], instruction: str
    ) -> tuple[Tensor, Tensor]:
        """Features of a batch of ticks.

        pictures: (3, H, W) uint8 tensors as `PixelRecipe.prepare` makes them; ticks: per tick, per view, the number of
        its picture or -1. Returns (tokens (ticks, T, D) in the model's type, mask (ticks, T) bool), both on the CPU;
        masked tokens are zero.
        """
        tokens, mask = self.features(self.encode(pictures), ticks, [instruction] * len(ticks))
        return tokens.cpu(), mask

    def encode(self, pictures: Sequence[Tensor]) -> list[EncodedPicture]:
        """The vision tower over each picture, (3, H, W) uint8 as `PixelRecipe.prepare` makes it."""
        found: dict[int, EncodedPicture] = {}
        by_shape: dict[torch.Size, list[int]] = {}
        for number, picture in enumerate(pictures):
            by_shape.setdefault(picture.shape, []).append(number)
        merge = self.recipe.processor.merge_size
        for numbers in by_shape.values():
            stacked = torch.stack([pictures[number] for number in numbers]).to(self.device, non_blocking=True)
            patches, (gh, gw) = self.recipe.patchify(stacked, self.vlm.model.visual.patch_embed.frames)
            grids = torch.tensor([[1, gh, gw]] * len(numbers), device=self.device)
            output = self.vlm.model.get_image_features(patches.to(self.dtype), grids)
            levels = getattr(output, "deepstack_features", None) or []
            for place, number in enumerate(numbers):
                deep = [level[place] for level in levels]
                found[number] = EncodedPicture((gh // merge, gw // merge), output.pooler_output[place], deep)
        return [found[number] for number in range(len(pictures))]

    def features(
        self, pictures: Sequence[EncodedPicture], ticks: Sequence[Sequence[int]], instructions: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """Features of ticks whose pictures are encoded; gradients flow to what is trained in the language model.

        ticks: per tick, per view, the number of its picture or -1; instructions: one a tick. Equal ticks are computed
        once. Returns (tokens (ticks, T, D) in the model's type on its device, mask (ticks, T) bool on the CPU).
        """
        asked = [(tuple(tick), text) for tick, text in zip(ticks, instructions, strict=True)]
        place = {one: number for number, one in enumerate(dict.fromkeys(asked))}
        tokens = torch.zeros(len(place), self.layout.tokens, self.hidden_size, dtype=self.dtype, device=self.device)
        mask = torch.zeros(len(place), self.layout.tokens, dtype=torch.bool)
        groups: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        for tick, text in place:
            views = tuple(view for view, number in zip(self.views, tick, strict=True) if number >= 0)
            grids = tuple(pictures[number].grid for number in tick if number >= 0)
            if views:
                groups.setdefault((views, grids, text), []).append(tick)
        for (views, grids, text), group in groups.items():
            prompt = self.prompt(views, grids, text)
            hidden = self._hidden(prompt, [[pictures[number] for number in tick if number >= 0] for tick in group])
            rows = [place[tick, text] for tick in group]
            for view, grid, span in zip(views, grids, prompt.spans, strict=True):
                cells = self.layout.view_slice(view)
                pooled, known = pool(hidden[:, span], grid, self.form.pooling, self.layout)
                tokens[rows, cells], mask[rows, cells] = pooled.to(self.dtype), known
            if self.layout.text:
                tokens[rows, -1], mask[rows, -1] = hidden[:, prompt.after :].float().mean(1).to(self.dtype), True
        order = [place[one] for one in asked]
        return tokens[order], mask[order]

    def _hidden(self, prompt: Prompt, ticks: list[list[EncodedPicture]]) -> Tensor:
        """The language model's hidden state (B, L, D) at the kept layer, for B ticks that share a prompt's shape."""
        pictures = [picture for tick in ticks for picture in tick]
        # Level i is added after layer i + 1; hidden_states[layer] is what that layer itself puts out.
        levels = range(min(len(pictures[0].deep), self.vlm.layer - 1))
        encoded = SimpleNamespace(
            pooler_output=[picture.tokens for picture in pictures],
            deepstack_features=[[picture.deep[level] for picture in pictures] for level in levels],
        )
        output = self.vlm.model(
            input_ids=prompt.ids.expand(len(ticks), -1),
            position_ids=prompt.positions.expand(-1, len(ticks), -1),
            mm_encoder_outputs={"image": encoded},
            use_cache=False,
        )
        return output.last_hidden_state

    @torch.inference_mode(False)  # what is kept here serves training too
    def _make_prompt(self, views: tuple[str, ...], grids: tuple[Grid, ...], instruction: str) -> Prompt:
        processor, model = self.vlm.processor, self.vlm.model
        counts = [rows * cols for rows, cols in grids]
        ids = processor.tokenizer(self.form.prompt(views, instruction, counts), return_tensors="pt")["input_ids"]
        image = ids == model.config.image_token_id
        where = image[0].nonzero()[:, 0].tolist()
        if len(where) != sum(counts):
            raise UserError("The checkpoint's tokenizer does not keep image tokens whole; take a Qwen-VL checkpoint.")
        merge = self.recipe.processor.merge_size
        thw = torch.tensor([[1, rows * merge, cols * merge] for rows, cols in grids])
        # The types tell the model where the pictures are; without them it would number all tokens in one line.
        positions, _ = model.get_rope_index(ids, mm_token_type_ids=image.int(), image_grid_thw=thw)
        starts = [where[sum(counts[:number])] for number in range(len(counts))]
        spans = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return Prompt(ids.to(self.device), positions.to(self.device), spans, where[-1] + 1)


def pool(tokens: Tensor, grid: Grid, pooling: Pooling, layout: TokenLayout) -> tuple[Tensor, Tensor]:
    """Pool one view's tokens (B, h*w, D), `grid` = (h, w), to (B, rows*cols, D) float32 and mask (rows*cols,) bool.

    Averages run over the cells that torch's adaptive_avg_pool2d takes: all tokens fall into a cell, cells overlap where
    h < rows. Raises UserError where a picture has more tokens than `tokens` pooling has room for.
    """
    image = tokens.float().transpose(1, 2).unflatten(2, grid)  # (B, D, h, w)
    known = torch.ones(layout.rows, layout.cols, dtype=torch.bool)
    if pooling.kind != "tokens":
        image = F.adaptive_avg_pool2d(image, (layout.rows, layout.cols))
    else:
        below, right = layout.rows - grid[0], layout.cols - grid[1]
        if below < 0 or right < 0:
            room = f"where the cache has room for {layout.rows}x{layout.cols}"
            raise UserError(f"A picture has {grid[0]}x{grid[1]} tokens {room}; raise --image-resize-height/width.")
        image = F.pad(image, (0, right, 0, below))
        known[grid[0] :], known[:, grid[1] :] = False, False
    return image.flatten(2).transpose(1, 2), known.flatten()


def default_device() -> str:
    """This process's own GPU (torchrun's LOCAL_RANK), or the CPU."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
