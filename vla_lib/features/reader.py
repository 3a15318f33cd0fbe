"""Planned ticks in, decoded and resized pictures out, batch by batch, prepared by worker processes ahead of the model."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from vla_lib.features.pixels import PixelRecipe


@dataclass(frozen=True)
class BatchPlan:
    """Ticks of one episode that go through the model together. files: every picture once; ticks: per tick and view its number or -1."""

    episode: int
    first: int
    files: tuple[Path, ...]
    ticks: tuple[tuple[int, ...], ...]


@dataclass
class Batch:
    """A read BatchPlan: all pictures in one flat uint8 tensor, cut by `shapes`; `seconds` spent reading and `failures` to report."""

    episode: int
    first: int
    pixels: torch.Tensor
    shapes: list[tuple[int, int, int]]
    ticks: list[tuple[int, ...]]
    seconds: float = 0.0
    failures: list[str] = field(default_factory=list)

    def pictures(self, device: torch.device) -> list[torch.Tensor]:
        """(3, H, W) uint8 tensors on `device`, moved there in one copy."""
        flat = self.pixels.to(device, non_blocking=True)
        sizes = [c * h * w for c, h, w in self.shapes]
        return [part.view(shape) for part, shape in zip(flat.split(sizes), self.shapes, strict=True)]

    def pin_memory(self) -> "Batch":
        """Called by the DataLoader before a copy to the GPU."""
        self.pixels = self.pixels.pin_memory()
        return self


def plan_batches(
    number: int, episode: Any, steps: Sequence[int], views: Sequence[str], batch_size: int
) -> list[BatchPlan]:
    """Cut an episode's ticks into batches of nearly equal size, at most `batch_size`; a batch never spans two episodes.

    So what a tick is computed with depends on its episode alone, whichever rank or run computes it.
    """
    count = -(-len(steps) // batch_size)
    cuts = [len(steps) * i // count for i in range(count + 1)] if count else []
    plans = []
    for first, last in zip(cuts, cuts[1:], strict=False):
        numbers: dict[Path, int] = {}
        ticks = []
        for step in steps[first:last]:
            paths = [episode.picture_path(view, step) if view in episode.views else None for view in views]
            ticks.append(tuple(-1 if path is None else numbers.setdefault(Path(path), len(numbers)) for path in paths))
        plans.append(BatchPlan(number, first, tuple(numbers), tuple(ticks)))
    return plans


class BatchReader(Dataset):
    """Reads BatchPlans; a picture that cannot be read is told in `failures` and its view masked at those ticks."""

    def __init__(self, plans: Sequence[BatchPlan], recipe: PixelRecipe, root: Path):
        self.plans, self.recipe, self.root = list(plans), recipe, root

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, index: int) -> Batch:
        plan, start = self.plans[index], time.perf_counter()
        arrays, places, failures = [], {-1: -1}, []
        for number, file in enumerate(plan.files):
            try:
                arrays.append(self.recipe.prepare(file))
                places[number] = len(arrays) - 1
            except (
                OSError,
                ValueError,
                SyntaxError,
            ) as error:  # PIL's ways to say that a file is cut off or no picture
                places[number] = -1
                failures.append(f"{_relative(file, self.root)}: {_reason(error)}")
        pixels = (
            torch.cat([torch.from_numpy(array).flatten() for array in arrays])
            if arrays
            else torch.empty(0, dtype=torch.uint8)
        )
        ticks = [tuple(places[number] for number in tick) for tick in plan.ticks]
        return Batch(
            plan.episode,
            plan.first,
            pixels,
            [array.shape for array in arrays],
            ticks,
            time.perf_counter() - start,
            failures,
        )


def read_ahead(plans: Sequence[BatchPlan], recipe: PixelRecipe, root: Path, workers: int, pin: bool) -> Iterator[Batch]:
    """The batches in order; `workers` processes (0: none) keep two batches each ready."""
    loader = DataLoader(
        BatchReader(plans, recipe, root),
        batch_size=None,
        shuffle=False,
        num_workers=min(workers, len(plans)),
        collate_fn=_as_it_is,
        pin_memory=pin,
        prefetch_factor=2 if min(workers, len(plans)) else None,
        worker_init_fn=_one_thread if workers else None,
        persistent_workers=False,
    )
    return iter(loader)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def _relative(file: Path, root: Path) -> str:
    try:
        return file.resolve().relative_to(root.resolve()).as_posix()
    except ValueError:
        return str(file)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "missing"
    if isinstance(error, PermissionError):
        return "not readable"
    return "corrupt or cut off" if not isinstance(error, OSError) or error.errno is None else str(error.strerror)
