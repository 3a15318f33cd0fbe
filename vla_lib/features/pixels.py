"""A picture file or array in, the patches that a Qwen-VL vision tower takes out. The only picture preprocessing of caching and of live use.

Two steps, so that worker processes send bytes and not floats: `prepare` (decode, shrink, resize to whole patches; uint8) and `patchify`
(normalise and cut; on the model's device). Together they equal the checkpoint's image processor, `pil` backend, on the shrunk picture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vla_lib.core.errors import UserError

IMAGE_BACKEND = "pil"


@dataclass(frozen=True)
class PixelRecipe:
    """The numbers of one checkpoint's image processor, and the size that pictures are shrunk to first (pixels)."""

    height: int
    width: int
    patch: int
    merge: int
    temporal: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    scale: float
    resample: int

    @classmethod
    def of(cls, processor: Any, height: int, width: int) -> "PixelRecipe":
        """Read an image processor of transformers. Raises UserError where it is not of Qwen-VL's kind."""
        try:
            return cls(
                height=height,
                width=width,
                patch=int(processor.patch_size),
                merge=int(processor.merge_size),
                temporal=int(processor.temporal_patch_size),
                min_pixels=int(processor.size["shortest_edge"]),
                max_pixels=int(processor.size["longest_edge"]),
                mean=tuple(float(value) for value in processor.image_mean),
                std=tuple(float(value) for value in processor.image_std),
                scale=float(processor.rescale_factor),
                resample=int(processor.resample),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise UserError(
                f"The checkpoint's image processor {type(processor).__name__} is not one of Qwen-VL ({error})."
            ) from None

    @property
    def factor(self) -> int:
        """Pixels that one token is wide and high."""
        return self.patch * self.merge

    def fitted_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) after shrinking into `self.height` x `self.width`, the aspect kept; never larger than the picture."""
        ratio = min(1.0, self.height / height, self.width / width)
        return max(1, round(height * ratio)), max(1, round(width * ratio))

    def patch_size(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) in pixels that the model sees for a picture of this size."""
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

        return smart_resize(*self.fitted_size(height, width), self.factor, self.min_pixels, self.max_pixels)

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """(rows, columns) of image tokens for a picture of this size."""
        high, wide = self.patch_size(height, width)
        return high // self.factor, wide // self.factor

    def shrink(self, picture: Image.Image) -> Image.Image:
        """The picture as RGB, shrunk to fit (bicubic, antialiased), never enlarged."""
        picture = picture.convert("RGB")
        high, wide = self.fitted_size(picture.height, picture.width)
        return (
            picture
            if (high, wide) == (picture.height, picture.width)
            else picture.resize((wide, high), Image.Resampling.BICUBIC)
        )

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
        if (high, wide) != (picture.height, picture.width):
            picture = picture.resize((wide, high), Image.Resampling(self.resample))
        return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))

    def patchify(self, pictures, frames: int | None = None):
        """Patches of equal-sized pictures.

        pictures: (n, 3, H, W) uint8 tensor on any device; frames: how often the picture is repeated in time (default: as the checkpoint
        asks). Returns (patches (n*gh*gw, 3*frames*patch*patch) float32, grid (gh, gw)), in the order of transformers'
        Qwen2VLImageProcessor: merge blocks row by row.
        """
        import torch

        n, channels, height, width = pictures.shape
        gh, gw, m, p = height // self.patch, width // self.patch, self.merge, self.patch
        frames = self.temporal if frames is None else frames
        gain = torch.tensor([self.scale / std for std in self.std], device=pictures.device).view(1, 3, 1, 1)
        offset = torch.tensor(
            [-mean / std for mean, std in zip(self.mean, self.std, strict=True)], device=pictures.device
        ).view(1, 3, 1, 1)
        values = pictures.float().mul_(gain).add_(offset)
        values = values.reshape(n, channels, gh // m, m, p, gw // m, m, p).permute(
            0, 2, 5, 3, 6, 1, 4, 7
        )  # (n, gh/m, gw/m, m, m, C, p, p)
        values = values.unsqueeze(6).expand(*values.shape[:6], frames, p, p)
        return values.reshape(n * gh * gw, channels * frames * p * p), (gh, gw)
