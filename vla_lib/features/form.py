"""What a VLM is shown, and how features are made of it: picture preprocessing, prompt, pooling. Loads no weights.

The same FeatureForm serves the cache builder and live use, so the two cannot differ. A picture is prepared in two
steps, so that worker processes send bytes and not floats: `prepare` (decode, shrink, resize to whole patches; uint8)
and `patchify` (normalise and cut, on the model's device). Together they equal the checkpoint's image processor, `pil`
backend, on the shrunk picture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.features.binding import Pooling, make_binding
from vla_lib.features.vlm import IMAGE_BACKEND, Checkpoint

if TYPE_CHECKING:  # transformers takes seconds to import, which a run that only reads caches need not wait for
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

SLOT = "{instruction}"
REQUEST = "The robot is to do this task: "
TEXT_TOKENS = "mean over the tokens after the last picture"


@dataclass(frozen=True)
class PixelRecipe:
    """How pictures are prepared: shrunk into `height` x `width` (pixels), then by a checkpoint's image processor."""

    processor: "Qwen2VLImageProcessorPil"
    height: int
    width: int

    @property
    def factor(self) -> int:
        """Pixels that one token is wide and high."""
        return self.processor.patch_size * self.processor.merge_size

    def fitted_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after shrinking into `self.height` x `self.width`, the aspect kept; never larger."""
        ratio = min(1.0, self.height / height, self.width / width)
        return max(1, round(height * ratio)), max(1, round(width * ratio))

    def patch_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that the model sees for a picture of this size."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        limits = self.processor.size
        size = self.fitted_size(height, width)
        return smart_resize(*size, self.factor, limits["shortest_edge"], limits["longest_edge"])

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of image tokens for a picture of this size."""
        high, wide = self.patch_size(height, width)
        return high // self.factor, wide // self.factor

    def shrink(self, picture: Image.Image) -> Image.Image:
        """The picture as RGB, shrunk to fit (bicubic, antialiased), never enlarged."""
        picture = picture.convert("RGB")
        high, wide = self.fitted_size(picture.height, picture.width)
        return picture.resize((wide, high), Image.Resampling.BICUBIC)

    def prepare(self, picture: Image.Image | np.ndarray | str | Path) -> np.ndarray:
        """(3, H, W) uint8, H and W whole tokens, of a file, a PIL picture or an (H, W, 3) uint8 array.

        Raises OSError or ValueError where the file is missing, cut off or no picture.
        """
        if isinstance(picture, str | Path):
            with Image.open(picture) as opened:
                picture = self.shrink(opened)
        else:
            picture = self.shrink(Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture)
        high, wide = self.patch_size(picture.height, picture.width)
        picture = picture.resize((wide, high), Image.Resampling(self.processor.resample))
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def patchify(self, pictures: torch.Tensor, frames: int) -> tuple[torch.Tensor, tuple[int, int]]:
        """Patches of equal-sized pictures.

        pictures: (n, 3, H, W) uint8 on any device; frames: how often each is repeated in time. Returns (patches
        (n*gh*gw, 3*frames*p*p) float32, grid (gh, gw)) in the order of Qwen-VL: merge blocks row by row.
        """
        n, channels, height, width = pictures.shape
        p, m = self.processor.patch_size, self.processor.merge_size
        gh, gw = height // p, width // p
        mean, std, scale = self.processor.image_mean, self.processor.image_std, self.processor.rescale_factor
        gain = torch.tensor([scale / s for s in std], device=pictures.device)
        offset = torch.tensor([-middle / s for middle, s in zip(mean, std, strict=True)], device=pictures.device)
        values = pictures.float().mul_(gain.view(1, 3, 1, 1)).add_(offset.view(1, 3, 1, 1))
        values = values.reshape(n, channels, gh // m, m, p, gw // m, m, p)
        values = values.permute(0, 2, 5, 3, 6, 1, 4, 7)  # (n, gh/m, gw/m, m, m, C, p, p)
        values = values.unsqueeze(6).expand(*values.shape[:6], frames, p, p)
        return values.reshape(n * gh * gw, channels * frames * p * p), (gh, gw)


class FeatureForm:
    """The form of one binding's features: `views` in order, `recipe` for their pictures, `pooling` and its `layout`."""

    def __init__(self, processor: Any, views: Sequence[str], pooling: str, height: int, width: int):
        if not views or len(set(views)) != len(views):
            raise UserError(f"--views needs one or more different views, got {list(views)}.")
        self.processor, self.views, self.pooling = processor, tuple(views), Pooling.parse(pooling)
        self.recipe = PixelRecipe(processor.image_processor, height, width)
        self.layout = self.pooling.layout(self.views, height, width, self.recipe.factor)

    @classmethod
    def of(cls, processor: Any, binding: Mapping[str, Any]) -> "FeatureForm":
        """The form that a binding describes."""
        names = ("views", "pooling", "image_resize_height", "image_resize_width")
        return cls(processor, *(binding[name] for name in names))

    def binding(self, checkpoint: Checkpoint, layer: int, tick_stride: int, dtype: str) -> dict[str, Any]:
        """The binding of features in this form: `layer` decoder layers, one tick every `tick_stride` action steps."""
        import transformers

        return make_binding(
            source=checkpoint.source,
            model=checkpoint.name,
            weights_sha256=checkpoint.sha256,
            family=checkpoint.family,
            layer=layer,
            depth=checkpoint.depth,
            hidden_size=checkpoint.hidden_size,
            pooling=str(self.pooling),
            image_resize_height=self.recipe.height,
            image_resize_width=self.recipe.width,
            image_backend=IMAGE_BACKEND,
            views=self.views,
            prompt=self.template(self.views),
            text_tokens=TEXT_TOKENS,
            tick_stride=tick_stride,
            dtype=dtype,
            transformers=transformers.__version__,
            layout=asdict(self.layout),
        )

    def template(self, views: Sequence[str]) -> str:
        """Text for `views` with `{instruction}` and an image token a view. UserError where the template loses any."""
        content: list[dict[str, str]] = []
        for view in views:
            content += [{"type": "text", "text": f"{view}: "}, {"type": "image"}, {"type": "text", "text": "\n"}]
        message = {"role": "user", "content": [*content, {"type": "text", "text": REQUEST + SLOT}]}
        text = self.processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)
        if text.count(SLOT) != 1 or text.count(self.processor.image_token) != len(views):
            loses = "does not keep the pictures and the text of a message"
            raise UserError(f"The checkpoint's chat template {loses}; take a Qwen-VL checkpoint.")
        return text

    def prompt(self, views: Sequence[str], instruction: str, image_tokens: Sequence[int] | None = None) -> str:
        """The text for these views and this instruction, each picture's image token repeated `image_tokens[i]` times.

        None: once each, as transformers' own processor takes it. Raises UserError where the instruction holds a special
        token, which would be read as a picture or as the end.
        """
        if "<|" in instruction:
            special = 'holds "<|", which the model reads as a special token'
            raise UserError(f'The instruction "{instruction}" {special}; reword it in datasets.yaml.')
        first, *rest = self.template(views).replace(SLOT, instruction).split(self.processor.image_token)
        counts = image_tokens or [1] * len(views)
        return first + "".join(self.processor.image_token * n + text for n, text in zip(counts, rest, strict=True))
