"""Pictures and an instruction in, vision-language tokens (T, D) out: the one way to compute features, for the cache and on the robot.

FeatureExtractor.forward takes a batch of ticks that share pictures: each picture passes the vision tower once (`look`), ticks of equal shape
pass the language model together without padding (`read`), so that a tick's features do not depend on its batch.
"""

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from vla_lib.core.errors import UserError
from vla_lib.features import binding as bindings
from vla_lib.features.adapter import load_adapter
from vla_lib.features.form import FeatureForm
from vla_lib.features.pooling import pool
from vla_lib.features.vlm import Vlm, load_processor, load_vlm, open_checkpoint


class Seen(NamedTuple):
    """What the vision tower makes of one picture: grid (rows, cols), tokens (rows*cols, D), and the deepstack levels of Qwen3-VL, each alike."""

    grid: tuple[int, int]
    tokens: torch.Tensor
    deep: list[torch.Tensor]


class FeatureExtractor:
    """A loaded model and the form of its features. `layout` tells the T tokens, `hidden_size` is D, `recipe` prepares pictures."""

    def __init__(self, vlm: Vlm, form: FeatureForm):
        self.vlm, self.form = vlm, form
        self.views, self.layout, self.recipe, self.prompt = form.views, form.layout, form.recipe, form.prompt
        self.hidden_size = vlm.hidden_size
        self.image_token_id = vlm.processor.tokenizer.convert_tokens_to_ids(vlm.processor.image_token)
        self.device = next(vlm.model.parameters()).device
        self.dtype = next(vlm.model.parameters()).dtype
        self._sequence = lru_cache(maxsize=256)(self._make_sequence)
        self._kept: torch.Tensor | None = None
        if (
            vlm.layer < vlm.depth
        ):  # what transformers calls hidden_states[layer]: before the final norm, which only the last layer has
            vlm.model.language_model.layers[-1].register_forward_hook(self._keep)
            vlm.model.language_model.norm = torch.nn.Identity()

    @classmethod
    def from_binding(
        cls, binding: Mapping[str, Any], device: str | None = None, adapter: Mapping[str, Any] | None = None
    ) -> "FeatureExtractor":
        """The extractor that made a cache, for live use; with the LoRA weights of a stage-2 checkpoint where it has an `adapter`.

        Raises UserError naming both sides where the model at hand, transformers or the prompt is not what the binding says.
        """
        bindings.check_own(dict(binding), "the binding of the cache")
        checkpoint = open_checkpoint(binding["source"])
        processor = load_processor(checkpoint)
        form = FeatureForm(
            processor,
            binding["views"],
            binding["pooling"],
            binding["image_resize_height"],
            binding["image_resize_width"],
        )
        here = form.binding(checkpoint, binding["layer"], binding["tick_stride"], binding["dtype"])
        bindings.check(binding, {**here, "model": binding["model"]}, f'The cache "{binding["id"]}"')
        vlm = load_vlm(checkpoint, processor, binding["layer"], device or default_device(), binding["dtype"])
        if adapter is not None:
            load_adapter(vlm, adapter)
        return cls(vlm, form)

    # ---------------------------------------------------------------- one tick, live

    def extract(self, pictures: Mapping[str, Any], instruction: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of one moment.

        pictures: view -> PIL picture, (H, W, 3) uint8 array or file; a view that is absent or None is masked.
        Returns (tokens (T, D), mask (T,) bool) on the CPU, in the type that the cache stores.
        """
        prepared = [self.recipe.prepare(pictures[view]) for view in self.views if pictures.get(view) is not None]
        numbers = iter(range(len(prepared)))
        tick = [next(numbers) if pictures.get(view) is not None else -1 for view in self.views]
        tokens, mask = self.forward([torch.from_numpy(picture) for picture in prepared], [tick], instruction)
        return tokens[0], mask[0]

    # ---------------------------------------------------------------- a batch of ticks

    @torch.inference_mode()
    def forward(
        self, pictures: Sequence[torch.Tensor], ticks: Sequence[Sequence[int]], instruction: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of a batch of ticks.

        pictures: (3, H, W) uint8 tensors as `PixelRecipe.prepare` makes them; ticks: per tick, per view, the number of its picture or
        -1. Returns (tokens (ticks, T, D) in the model's type, mask (ticks, T) bool), both on the CPU; masked tokens are zero.
        """
        tokens, mask = self.read(self.look(pictures), ticks, [instruction] * len(ticks))
        return tokens.cpu(), mask

    def read(
        self, seen: Sequence[Seen], ticks: Sequence[Sequence[int]], instructions: Sequence[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Features of ticks whose pictures have been looked at; gradients flow to what is trained in the language model.

        ticks: per tick, per view, the number of its picture in `seen` or -1; instructions: one a tick. Returns (tokens (ticks, T, D) in
        the model's type on its device, mask (ticks, T) bool on the CPU).
        """
        tokens = torch.zeros(len(ticks), self.layout.tokens, self.vlm.hidden_size, dtype=self.dtype, device=self.device)
        mask = torch.zeros(len(ticks), self.layout.tokens, dtype=torch.bool)
        groups: dict[tuple, list[int]] = {}
        for number, (tick, instruction) in enumerate(zip(ticks, instructions, strict=True)):
            present = tuple(view for view, index in enumerate(tick) if index >= 0)
            if present:
                grids = tuple(seen[tick[view]].grid for view in present)
                groups.setdefault((present, grids, instruction), []).append(number)
        for (present, grids, instruction), numbers in groups.items():
            rows = [[seen[ticks[number][view]] for view in present] for number in numbers]
            hidden, spans, after = self._read(rows, present, grids, instruction)
            pooled, known = self._pool(hidden, present, grids, spans, after)
            tokens[numbers] = pooled.to(self.dtype)
            mask[numbers] = known
        return tokens, mask

    def look(self, pictures: Sequence[torch.Tensor]) -> list[Seen]:
        """The vision tower over each picture, (3, H, W) uint8 as `PixelRecipe.prepare` makes it."""
        found: list[Any] = [None] * len(pictures)
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for number, picture in enumerate(pictures):
            by_shape.setdefault(tuple(picture.shape), []).append(number)
        merge = self.recipe.merge
        for numbers in by_shape.values():
            stacked = torch.stack([pictures[number] for number in numbers]).to(self.device, non_blocking=True)
            patches, (gh, gw) = self.recipe.patchify(stacked, self.vlm.model.visual.patch_embed.frames)
            grid = torch.tensor([[1, gh, gw]] * len(numbers))
            output = self.vlm.model.get_image_features(patches.to(self.dtype), grid.to(self.device))
            images = output.pooler_output if hasattr(output, "pooler_output") else output[0]
            deep = getattr(output, "deepstack_features", None) or []
            for place, number in enumerate(numbers):
                found[number] = Seen((gh // merge, gw // merge), images[place], [level[place] for level in deep])
        return found

    def _read(self, rows, present, grids, instruction):
        """The language model over ticks of equal shape: hidden state (B, L, D), each view's span, where the text after them starts."""
        ids, positions, spans, after = self._sequence(present, grids, instruction)
        model = self.vlm.model
        embeds = model.get_input_embeddings()(ids).expand(len(rows), -1, -1).clone()  # (B, L, D)
        image = ids[0] == self.image_token_id
        embeds[:, image] = torch.stack([torch.cat([part.tokens for part in row]) for row in rows]).to(embeds.dtype)
        extra = {}
        if deep := rows[0][0].deep:
            levels = range(len(deep))
            extra["visual_pos_masks"] = image.expand(len(rows), -1)
            extra["deepstack_visual_embeds"] = [
                torch.cat([part.deep[level] for row in rows for part in row]) for level in levels
            ]
        output = model.language_model(
            inputs_embeds=embeds,
            position_ids=positions.expand(-1, len(rows), -1),
            attention_mask=None,
            use_cache=False,
            **extra,
        )
        hidden, self._kept = (output.last_hidden_state if self._kept is None else self._kept), None
        return hidden, spans, after

    @torch.inference_mode(False)  # what is kept here serves training too
    def _make_sequence(self, present: tuple[int, ...], grids: tuple[tuple[int, int], ...], instruction: str):
        """Token ids (1, L), multimodal rotary positions (3, 1, L), spans of the views and the start of the text behind them."""
        counts = [rows * cols for rows, cols in grids]
        text = self.prompt.expand([self.views[view] for view in present], instruction, counts)
        ids = self.vlm.processor.tokenizer(text, return_tensors="pt")["input_ids"]
        image = ids == self.image_token_id
        if int(image.sum()) != sum(counts):
            raise UserError("The checkpoint's tokenizer does not keep image tokens whole; take a Qwen-VL checkpoint.")
        thw = torch.tensor([[1, rows * self.recipe.merge, cols * self.recipe.merge] for rows, cols in grids])
        # The types tell the model where the pictures are; without them it would number all tokens in one line.
        positions, _ = self.vlm.model.get_rope_index(ids, mm_token_type_ids=image.int(), image_grid_thw=thw)
        where = image[0].nonzero()[:, 0].tolist()
        spans, start = [], 0
        for count in counts:
            spans.append(slice(where[start], where[start] + count))
            start += count
        return ids.to(self.device), positions.to(self.device), spans, where[-1] + 1

    def _pool(self, hidden, present, grids, spans, after):
        batch, device = hidden.shape[0], hidden.device
        pooled = torch.zeros(batch, self.layout.tokens, hidden.shape[-1], dtype=torch.float32, device=device)
        known = torch.zeros(self.layout.tokens, dtype=torch.bool)
        for view, grid, span in zip(present, grids, spans, strict=True):
            cells = self.layout.view_slice(self.views[view])
            pooled[:, cells], known[cells] = pool(hidden[:, span], grid, self.form.pooling, self.layout)
        if self.layout.text:
            pooled[:, -1], known[-1] = hidden[:, after:].float().mean(1), True
        return pooled, known

    def _keep(self, _module, _inputs, output) -> None:
        self._kept = output[0] if isinstance(output, tuple) else output


def default_device() -> str:
    """This process's own GPU (torchrun's LOCAL_RANK), or the CPU."""
    import os

    return (
        f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % torch.cuda.device_count()}"
        if torch.cuda.is_available()
        else "cpu"
    )


def default_dtype(device: str) -> str:
    """bfloat16 on a GPU, float32 on a CPU."""
    return "bfloat16" if device.startswith("cuda") else "float32"
