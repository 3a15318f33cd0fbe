"""Ticks of episodes planned in batches, and their pictures read by worker processes ahead of the model."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from vla_lib.core.errors import UserError
from vla_lib.episodes import PreparedEpisode
from vla_lib.features.form import PixelRecipe

P = ParamSpec("P")
R = TypeVar("R")


class BatchPlan(NamedTuple):
    """Ticks of one episode. files: every picture once; ticks: per tick and view the number of its picture, or -1."""

    episode: int
    files: tuple[Path, ...]
    ticks: tuple[tuple[int, ...], ...]


class Batch(NamedTuple):
    """A read BatchPlan: all pictures in one flat uint8 tensor, cut by `shapes`; a tick's view is -1 where its picture
    could not be read, which `findings` tell. `seconds` were spent reading.

    One tensor, because each that goes from a worker to the model needs an open file.
    """

    plan: BatchPlan
    pixels: Tensor
    shapes: list[tuple[int, ...]]
    ticks: list[tuple[int, ...]]
    findings: list[str]
    seconds: float

    def pictures(self, device: torch.device) -> list[Tensor]:
        """(3, H, W) uint8 tensors on `device`, moved there in one copy."""
        flat = self.pixels.to(device, non_blocking=True)
        sizes = [c * h * w for c, h, w in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]


def tick_steps(episode: PreparedEpisode, stride: int) -> range:
    """The action steps of an episode's ticks: 0, stride, 2 stride, ..."""
    return range(0, len(episode), stride)


def plan_batches(
    number: int, episode: PreparedEpisode, steps: Sequence[int], views: Sequence[str], batch_size: int
) -> list[BatchPlan]:
    """Cut an episode's ticks into batches of nearly equal size, at most `batch_size`; a batch never spans two episodes.

    So what a tick is computed with depends on its episode alone, whichever rank or run computes it.
    """
    count = -(-len(steps) // batch_size)
    plans = []
    for first, last in ((len(steps) * i // count, len(steps) * (i + 1) // count) for i in range(count)):
        files: dict[Path, int] = {}
        ticks = []
        for step in steps[first:last]:
            paths = [episode.picture_path(view, step) for view in views]
            ticks.append(tuple(-1 if path is None else files.setdefault(path, len(files)) for path in paths))
        plans.append(BatchPlan(number, tuple(files), tuple(ticks)))
    return plans


def read_batch(plan: BatchPlan, recipe: PixelRecipe, root: Path) -> Batch:
    """Decode and resize a plan's pictures; `root` is what the files of findings are named from."""
    start, pixels, places = time.perf_counter(), [torch.empty(0, dtype=torch.uint8)], {-1: -1}
    shapes: list[tuple[int, ...]] = []
    findings: list[str] = []
    for number, file in enumerate(plan.files):
        try:
            picture = recipe.prepare(file)
        except (OSError, ValueError, SyntaxError) as error:  # PIL's ways to say that a file is cut off or no picture
            places[number] = -1
            name = file.relative_to(root) if file.is_relative_to(root) else file
            findings.append(f"{name.as_posix()}: {_reason(error)}")
        else:
            places[number] = len(shapes)
            pixels.append(torch.from_numpy(picture).flatten())
            shapes.append(picture.shape)
    ticks = [tuple(places[number] for number in tick) for tick in plan.ticks]
    return Batch(plan, torch.cat(pixels), shapes, ticks, findings, time.perf_counter() - start)


def backing_off(function: Callable[Concatenate[int, P], R], batch_size: int) -> Callable[P, R]:
    """`function` without its first argument, the batch size: `batch_size` at first, and half as many for good whenever
    memory runs out. Raises UserError where a batch of one does not fit."""
    from accelerate.utils import find_executable_batch_size

    halves = iter([batch_size >> k for k in range(1, batch_size.bit_length() + 1)])
    found: Callable[P, R] = find_executable_batch_size(function, batch_size, lambda: next(halves))

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return found(*args, **kwargs)
        except RuntimeError as error:
            if "No executable batch size found" not in str(error):
                raise
            raise UserError(
                "One tick alone does not fit into the GPU's memory; take smaller pictures "
                "(--image-resize-height/width), fewer --views, a lower --vl-layer, or free the GPU."
            ) from None

    return call


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, PermissionError):
        return "not readable"
    return "corrupt or cut off" if not isinstance(error, OSError) or error.errno is None else str(error.strerror)
