"""The settings of `vla_lib.build_vl_cache`: flags, notebook parameters and record at once. Imports nothing heavy."""

from dataclasses import field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Ge

from vla_lib.core.errors import UserError
from vla_lib.core.settings import Settings, named_root, settings
from vla_lib.episodes.datasets import DatasetTable
from vla_lib.features.binding import DEFAULT_POOLING, Pooling

RIGS_MANIFEST = "simulation.json"  # which the simulated rig leaves at the root of its recordings


@settings
class CacheSettings(Settings):
    """Compute vision-language features of every prepared episode under a dataset root, once, bound to what made them.

    Runs plain (`python -m vla_lib.build_vl_cache`) or on several GPUs (`torchrun --nproc_per_node=4 -m
    vla_lib.build_vl_cache`). An interrupted build goes on where it stopped.
    """

    unnamed = "device dtype preflight_only run_dir"

    dataset_root: Path = field(default_factory=lambda: named_root() or Path("dataset"))
    """Dataset root: dataset folders with prepared episodes (data.pkl) below them. Default: $VLA_DATASET_ROOT."""
    vl_model: str = ""
    """Qwen2.5-VL or Qwen3-VL: hub name, folder, `tiny` or `tiny-qwen3-vl` (random weights, made on the spot). Empty:
    `vl_model` in datasets.yaml; `tiny` for recordings of the simulated rig; on others it must be named."""
    vl_layer: Annotated[int, Ge(0)] = 0
    """Decoder layer whose hidden state is kept, counted from 1; those above are not computed. 0: half the depth."""
    vl_pooling: str = DEFAULT_POOLING
    """What is kept of a view: `grid:ROWSxCOLS` averaged tokens, `mean`, or all `tokens`. One text token is added."""
    vlm_reuse_count: Annotated[int, Ge(1)] = 3  # Action steps that share one VLM tick (3 at 10 Hz: 3.33 Hz)
    vl_stride: Annotated[int, Ge(0)] = 0
    """Action steps between cached ticks; 0: as --vlm-reuse-count. 1 caches every step."""
    image_resize_height: Annotated[int, Ge(1)] = 360  # Pictures are shrunk to fit this height (pixels); never enlarged
    image_resize_width: Annotated[int, Ge(1)] = 640  # Pictures are shrunk to fit this width (pixels); never enlarged
    views: tuple[str, ...] = ()
    """Views in order. Empty: View1_left, View2_left, View3_left, View4_left, View5, as far as there are any."""
    batch_size: Annotated[int, Ge(1)] = 8  # Ticks in one forward pass; halved by itself when memory runs out
    num_workers: Annotated[int, Ge(-1)] = -1
    """Processes that decode and resize pictures; 0: none, -1: by the number of CPU cores."""
    device: str = "auto"  # `auto` (this rank's GPU, else the CPU), `cpu`, or `cuda:N`
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number type of model and cache; `auto`: bfloat16 on a GPU, float32 on a CPU."""
    overwrite: bool = False  # Compute every episode again, also those whose features are up to date
    preflight_only: bool = False  # Stop after the preflight table; compute nothing
    run_dir: Path | None = None  # Folder for metrics.jsonl and results.json

    def __post_init__(self) -> None:
        Pooling.parse(self.vl_pooling)

    @property
    def model(self) -> str:
        """The VL model that is meant. Raises UserError where none is named and the recordings are no simulated ones."""
        named = self.vl_model or DatasetTable.load(self.dataset_root).vl_model
        if not named and not (self.dataset_root / RIGS_MANIFEST).is_file():
            raise UserError(
                "No VL model is named: give --vl-model Qwen/Qwen2.5-VL-3B-Instruct (any Qwen2.5-VL or Qwen3-VL), or a "
                "line `vl_model: NAME` in datasets.yaml at the root. `--vl-model tiny` has random weights: it tells "
                "whether everything runs, and is no model to train on real recordings with."
            )
        return named or "tiny"

    @property
    def tick_stride(self) -> int:
        """Action steps between two cached ticks."""
        return self.vl_stride or self.vlm_reuse_count
