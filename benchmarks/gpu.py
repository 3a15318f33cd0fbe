"""Benchmark rows of the feature cache on a GPU: a model of Qwen2.5-VL-3B's sizes, and its share of the GPU's peak.

Its weights are random, so nothing is downloaded.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.features import INSTRUCTION, VIEWS, build_row, make_dataset
from benchmarks.rows import BenchRow, seconds
from vla_lib.core.errors import UserError

H200_PEAK_TFLOPS = 989.0  # dense bf16 of H100 and H200, NVIDIA's data sheet


def rows(fast: bool = False, views: int = 5) -> list[BenchRow]:
    """Forward throughput as a share of the peak, and the whole build against the plain way.

    Needs about 20 GB of a GPU's memory. Raises UserError where there is no GPU.
    """
    import torch

    if not torch.cuda.is_available():
        raise UserError("The benchmark `gpu` needs a CUDA GPU, and torch finds none here; `vla doctor` says more.")
    checkpoint, processor, config = large_checkpoint()
    used, batch_size = VIEWS[:views], 2 if fast else 8
    pictures = [torch.randint(0, 255, (3, 360, 640), dtype=torch.uint8) for _ in range(views * batch_size)]
    ticks = [tuple(range(tick * views, tick * views + views)) for tick in range(batch_size)]
    peak = matmul_tflops()
    extractor = large_extractor(checkpoint, processor, config, used)
    shown = [torch.from_numpy(extractor.recipe.prepare(picture.permute(1, 2, 0).numpy())) for picture in pictures]
    took = float(np.median(seconds(partial(extractor.forward, shown, ticks, INSTRUCTION), 6, warm=3)))
    flop = flop_per_tick(config, extractor, used) * batch_size
    rate = flop / took / 1e12
    note = (
        f"{batch_size} ticks of {views} views at 640x360 in {took * 1e3:.0f} ms, "
        f"{flop / batch_size / 1e12:.1f} TFLOP a tick; of a large matmul here ({peak:.0f} TFLOP/s): "
        f"{100 * rate / peak:.0f} %; memory {torch.cuda.max_memory_allocated() / 2**30:.0f} GiB"
    )
    result = [BenchRow("features.mfu", rate, H200_PEAK_TFLOPS, "TFLOP/s", "0.5 of the data sheet's peak", note)]
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder), episodes=3, steps=150, size=(1280, 720), views=used)
        plain = large_plain(checkpoint, config)
        return [*result, build_row(Path(folder), "3B sizes", 8, extractor, plain)[0]]


def large_checkpoint() -> tuple[Any, Any, dict[str, Any]]:
    """The tiny checkpoint and its processor, and Qwen2.5-VL-3B's published sizes with its token ids."""
    from vla_lib.features.vlm import load_processor, open_checkpoint

    checkpoint = open_checkpoint("tiny")
    ids = json.loads((checkpoint.folder / "config.json").read_text())
    rope = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [16, 24, 24]}
    text = {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008}
    text |= {"num_hidden_layers": 36, "num_attention_heads": 16}
    text |= {"num_key_value_heads": 2, "max_position_embeddings": 128000, "rope_parameters": rope}
    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    vision |= {"out_hidden_size": 2048, "patch_size": 14}
    vision |= {"spatial_merge_size": 2, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    config = {
        "text_config": text,
        "vision_config": vision,
        "tie_word_embeddings": True,
        **{name: ids[name] for name in names},
    }
    return checkpoint, load_processor(checkpoint), config


def large_extractor(checkpoint: Any, processor: Any, config: dict[str, Any], views: tuple[str, ...]) -> Any:
    """A 3B-sized extractor with random weights on the GPU: 18 of 36 layers, bfloat16, 4x6 tokens a view."""
    import torch
    from transformers import AutoConfig, AutoModel

    from vla_lib.features.extractor import FeatureExtractor
    from vla_lib.features.form import FeatureForm
    from vla_lib.features.vision_tower import speed_up
    from vla_lib.features.vlm import Vlm

    half = {**config, "text_config": {**config["text_config"], "num_hidden_layers": 18}}
    with torch.device("cuda:0"):
        model = AutoModel.from_config(
            AutoConfig.for_model("qwen2_5_vl", **half), dtype=torch.bfloat16, attn_implementation="sdpa"
        )
    speed_up(model)
    vlm = Vlm(model.eval().requires_grad_(False), processor, "qwen2_5_vl", 36, 18, config["text_config"]["hidden_size"])
    return FeatureExtractor(vlm, FeatureForm(processor, views, "grid:4x6", 360, 640))


def large_plain(checkpoint: Any, config: dict[str, Any]) -> Any:
    """The whole 3B-sized model with lm_head, as transformers runs it by default."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    with torch.device("cuda:0"):
        model = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model("qwen2_5_vl", **config), dtype=torch.bfloat16
        )
    return model.eval()


def flop_per_tick(config: dict[str, Any], extractor: Any, views: tuple[str, ...]) -> float:
    """Floating-point operations of one tick of 640x360 pictures: two a weight and token, and attention."""
    text, vision = config["text_config"], config["vision_config"]
    rows_, cols = extractor.recipe.token_grid(360, 640)
    patches, tokens = 4 * rows_ * cols, rows_ * cols
    d, f = vision["hidden_size"], vision["intermediate_size"]
    full = len(vision["fullatt_block_indexes"])
    window = (vision["window_size"] // vision["patch_size"]) ** 2
    tower = (
        vision["depth"] * (4 * d * d + 3 * d * f)
        + 3 * 2 * 14 * 14 * d
        + (4 * d * 4 * d + 4 * d * vision["out_hidden_size"]) / 4
    )
    seen = 2 * patches * tower + 4 * patches * d * (full * patches + (vision["depth"] - full) * window)
    ids = extractor.prompt(views, ((rows_, cols),) * len(views), INSTRUCTION).ids
    length = ids.shape[1]
    h, g = text["hidden_size"], text["intermediate_size"]
    keys = h * text["num_key_value_heads"] // text["num_attention_heads"]
    layer = 2 * length * (2 * h * h + 2 * h * keys + 3 * h * g) + 2 * length * length * h  # causal: half of 4 L L h
    assert length > tokens * len(views)
    return len(views) * seen + extractor.vlm.layer * layer


def matmul_tflops(size: int = 8192) -> float:
    """TFLOP/s of one large bfloat16 matrix product on this GPU."""
    import torch

    a, b = (torch.randn(size, size, device="cuda:0", dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / float(np.median(seconds(lambda: a @ b, 20, warm=5))) / 1e12
