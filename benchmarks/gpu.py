"""Benchmark rows of a GPU: a VL model of Qwen2.5-VL-3B's sizes in the feature cache and in stage 2, the action expert.

Its weights are random, so nothing is downloaded.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.features import INSTRUCTION, VIEWS, build_row, make_dataset
from benchmarks.rows import BenchRow, seconds
from benchmarks.training import training_steps
from vla_lib.core.errors import UserError
from vla_lib.core.files import read_jsonl

H200_PEAK_TFLOPS = 989.0  # dense bf16 of H100 and H200, NVIDIA's data sheet


def rows(fast: bool = False, views: int = 5) -> Iterator[BenchRow]:
    """Forward throughput as a share of the peak, the whole build against the plain way, the expert, and stage 2.

    Needs about 20 GB of a GPU's memory, and 8 GB of disk. Raises UserError where there is no GPU.
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
    yield BenchRow("features.mfu", rate, H200_PEAK_TFLOPS, "TFLOP/s", "0.5 of the data sheet's peak", note)
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(Path(folder), episodes=3, steps=150, size=(1280, 720), views=used)
        plain = large_plain(checkpoint, config)
        yield build_row(Path(folder), "3B sizes", 8, extractor, plain)[0]
    del extractor, plain
    torch.cuda.empty_cache()
    for head in ("regression", "diffusion"):
        yield from expert_rows(head, config["text_config"]["hidden_size"], 20 if fast else 100)
    with tempfile.TemporaryDirectory() as folder:
        yield stage2_row(Path(folder), checkpoint, config, 8 if fast else 40)


def expert_rows(head: str, token_dim: int, times: int, batch_size: int = 64) -> list[BenchRow]:
    """A prediction on the GPU, against one on the CPU with one thread; a compiled training step, against a plain one.

    Five views of 6x11 tokens.
    """
    import torch

    from vla_lib.policy.config import HEADS, PolicyConfig
    from vla_lib.policy.policy import Policy

    layout = np.indices((len(VIEWS), 6, 11)).reshape(3, -1).tolist()
    window = 65 if head == "regression" else 650
    config = PolicyConfig(
        HEADS[HEADS.index(head)], VIEWS, token_dim, *map(tuple, layout), sensor_window_size=window, ddim_steps=10
    )
    policy = Policy(config)

    def batch(count: int, device: str) -> dict[str, Any]:
        shapes = {"vl_tokens": (config.tokens, token_dim), "vl_state": (12,), "state": (12,)}
        shapes |= {"sensor": (window, 1026), "action": (config.horizon, 7), "goal": (3,)}
        made = {name: torch.randn(count, *shape, device=device) for name, shape in shapes.items()}
        made["vl_mask"] = torch.ones(count, config.tokens, dtype=torch.bool, device=device)
        return made | {"sensor_mask": torch.ones(count, dtype=torch.bool, device=device)}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    cpu_s = seconds(partial(policy.eval().predict, batch(1, "cpu")), max(5, times // 5), warm=3)
    torch.set_num_threads(threads)
    policy.cuda()
    gpu_s = seconds(partial(policy.predict, batch(1, "cuda")), times, warm=10)
    note = f"{policy.parameter_count() / 1e6:.1f} M parameters; 99th percentile {np.quantile(gpu_s, 0.99) * 1e3:.1f} ms"
    ours, plain = (1e3 * float(np.median(taken)) for taken in (gpu_s, cpu_s))
    latency = BenchRow(f"expert.latency ({head})", ours, plain, "ms", "< 100 ms", note, less=True)
    policy.train()
    full, optimiser = batch(batch_size, "cuda"), torch.optim.AdamW(policy.parameters(), fused=True)
    draws = {name: drawn.cuda() for name, drawn in policy.draw(batch_size, torch.Generator().manual_seed(0)).items()}

    def step(forward: Any) -> None:
        optimiser.zero_grad(set_to_none=True)
        with torch.autocast("cuda", torch.bfloat16):
            forward(full, draws).mean().backward()
        optimiser.step()

    eager, compiled = (
        float(np.median(seconds(partial(step, f), times, warm=5))) for f in (policy, torch.compile(policy))
    )
    note = f"batches of {batch_size}, bfloat16, data on the GPU"
    return [latency, BenchRow(f"expert.compiled training step ({head})", 1 / compiled, 1 / eager, "steps/s", "", note)]


def stage2_row(root: Path, checkpoint: Any, config: dict[str, Any], steps: int, batch_size: int = 8) -> BenchRow:
    """Training steps a second of stage 2, LoRA in a 3B-sized VLM, against stage 1 from its cache; by the front doors.

    The pictures are of 640x360, as the lab's are read.
    """
    model, data = large_folder(root / "3B-sizes", checkpoint, config), root / "data"
    run = [sys.executable, "-m"]
    size = ["--picture-width", "640", "--picture-height", "360", "--episodes-f1", "4", "--episodes-f2", "0"]
    for words in (
        ["needle_rig", "--dataset-root", str(data), *size],
        ["vla_lib.preprocess", "--dataset-root", str(data)],
        ["vla_lib.build_vl_cache", "--dataset-root", str(data), "--vl-model", str(model)],
    ):
        subprocess.run([*run, *words], check=True, stdout=subprocess.DEVNULL)
    batch = ("--batch-size", str(batch_size))
    cached = training_steps(run, data, root / "stage1", 4 * steps, *batch)
    first = root / "stage1" / "checkpoints" / "qwen_vla_async_final.pt"
    stage = ("--training-stage", "stage2", "--stage1-checkpoint", str(first))
    live = training_steps(run, data, root / "stage2", steps, *stage, *batch)
    memory = max(row.get("train/gpu_memory_gib", 0.0) for row in read_jsonl(root / "stage2" / "metrics.jsonl"))
    note = f"batches of {batch_size}, five views, 18 of 36 layers; greatest memory {memory:.0f} GiB; baseline: stage 1"
    return BenchRow("training.stage 2", live, cached, "steps/s", "", note)


def large_folder(folder: Path, checkpoint: Any, config: dict[str, Any]) -> Path:
    """A checkpoint of Qwen2.5-VL-3B's sizes with random weights, in the form of the published one."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    shutil.copytree(checkpoint.folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    with torch.device("cuda:0"):
        made = AutoModelForImageTextToText.from_config(
            AutoConfig.for_model("qwen2_5_vl", **config), dtype=torch.bfloat16
        )
    made.save_pretrained(folder)
    return folder


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
    large = replace(checkpoint, depth=36, hidden_size=config["text_config"]["hidden_size"])
    vlm = Vlm(model.eval().requires_grad_(False), processor, large, 18)
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
