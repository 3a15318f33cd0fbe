"""Features equal the plain transformers processor and forward, whatever else is in the batch."""

import importlib.util
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vla_lib.core.errors import UserError
from vla_lib.features import vision_tower
from vla_lib.features.form import FeatureForm
from vla_lib.features.vlm import load_processor, open_checkpoint

INSTRUCTION = "Insert the needle through the trocar into the eye phantom model"
FAMILIES = ("tiny", "tiny-qwen3-vl")


@pytest.fixture(scope="module", params=FAMILIES)
def plain(request):
    """(name, the whole model with lm_head as transformers loads it, its processor)."""
    checkpoint = open_checkpoint(request.param)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint.folder, dtype=torch.float32).eval()
    return request.param, model, load_processor(checkpoint)


def pictures(count, size, seed=0):
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 255, (9, 16, 3), dtype=np.uint8)) for _ in range(count)]
    return [picture.resize(size, Image.Resampling.BICUBIC) for picture in small]


def by_hand(model, processor, form, views, images, layer, rows, cols):
    """hidden_states[layer] of the plain forward, averaged over each picture's grid; last row: the text behind them."""
    inputs = processor(text=[form.prompt(views, INSTRUCTION)], images=images, return_tensors="pt")
    with torch.no_grad():
        hidden = model(**inputs, output_hidden_states=True).hidden_states[layer][0]
    where = (inputs["input_ids"][0] == model.config.image_token_id).nonzero()[:, 0]
    pooled, start = [], 0
    for _, high, wide in (inputs["image_grid_thw"] // torch.tensor([1, 2, 2])).tolist():
        cells = hidden[where[start : start + high * wide]].reshape(high, wide, -1).permute(2, 0, 1)
        pooled.append(F.adaptive_avg_pool2d(cells, (rows, cols)).flatten(1).T)
        start += high * wide
    return torch.cat([*pooled, hidden[where[-1] + 1 :].mean(0, keepdim=True)])


@pytest.mark.parametrize(
    ("size", "count"), [((320, 180), 1), ((160, 90), 5), ((96, 120), 2), ((57, 43), 3), ((330, 190), 4)]
)
@pytest.mark.parametrize("layer", [1, 2, 4])
def test_equals_the_plain_processor_and_forward(extractor_for, plain, size, count, layer):
    name, model, processor = plain
    views = [f"View{number}_left" for number in range(1, count + 1)]
    extractor = extractor_for(name, views, layer=layer, pooling="grid:2x3")
    images = pictures(count, size)
    tokens, mask = extractor.extract(dict(zip(views, images, strict=True)), INSTRUCTION)
    expected = by_hand(model, processor, extractor.form, views, images, layer, 2, 3)
    assert mask.all()
    torch.testing.assert_close(tokens, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_features_do_not_depend_on_the_batch(extractor_for, name):
    """Pictures of two sizes and missing views in one batch: every tick as if it were alone."""
    extractor = extractor_for(name, ["a", "b", "c"])
    drawn = pictures(3, (160, 90), seed=1) + pictures(2, (96, 56), seed=2)
    tensors = [torch.from_numpy(extractor.recipe.prepare(picture)) for picture in drawn]
    ticks = [(0, 1, 2), (2, 1, 0), (0, -1, 3), (3, 4, -1), (-1, -1, -1), (0, 1, 2)]
    tokens, mask = extractor.forward(tensors, ticks, INSTRUCTION)
    for number, tick in enumerate(ticks):
        alone, alone_mask = extractor.extract(
            {v: drawn[i] for v, i in zip("abc", tick, strict=True) if i >= 0}, INSTRUCTION
        )
        torch.testing.assert_close(tokens[number], alone, atol=1e-5, rtol=0)
        assert torch.equal(mask[number], alone_mask)
    assert mask.sum(1).tolist() == [73, 73, 49, 49, 0, 73]
    assert not tokens[~mask].any()


def test_a_missing_view_is_masked_and_not_invented(extractor_for):
    extractor = extractor_for("tiny", ["a", "b"])
    (image,) = pictures(1, (96, 56))
    tokens, mask = extractor.extract({"b": image}, INSTRUCTION)
    assert not mask[extractor.layout.view_slice("a")].any() and mask[extractor.layout.view_slice("b")].all()
    alone = extractor_for("tiny", ["b"]).extract({"b": image}, INSTRUCTION)[0]
    torch.testing.assert_close(tokens[extractor.layout.view_slice("b")], alone[:-1], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_calls_our_attention_and_patch_embedding(extractor_for, name):
    """The attention is set by a private name of transformers: if it were ignored, features would be equal and slow."""
    visual = extractor_for(name, ["a"]).vlm.model.visual
    assert ALL_ATTENTION_FUNCTIONS[visual.config._attn_implementation] is vision_tower.windowed_attention
    assert isinstance(visual.patch_embed, vision_tower.LinearPatchEmbed)


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_29_no_lm_head_and_no_layers_above(extractor_for, name):
    extractor = extractor_for(name, ["a"], layer=2)
    names = [key for key, _ in extractor.vlm.model.named_parameters()]
    assert len(extractor.vlm.model.language_model.layers) == 2
    assert not any("lm_head" in key or "layers.2." in key for key in names if "visual" not in key)


@pytest.mark.parametrize("name", FAMILIES)
def test_trap_30_multimodal_positions_reach_the_model(extractor_for, name):
    """With one line of positions instead of the pictures' rows and columns the features would be others."""
    extractor = extractor_for(name, ["a"], layer=2)
    (image,) = pictures(1, (160, 90))
    tokens, _ = extractor.extract({"a": image}, INSTRUCTION)
    rotary = extractor.vlm.model.get_rope_index
    flat = []

    def without_types(ids, mm_token_type_ids=None, image_grid_thw=None):
        positions, deltas = rotary(ids, mm_token_type_ids=mm_token_type_ids, image_grid_thw=image_grid_thw)
        flat.append(positions)
        return torch.arange(ids.shape[1]).view(1, 1, -1).expand(3, 1, -1), deltas

    extractor.vlm.model.get_rope_index = without_types
    try:
        extractor.prompt.cache_clear()
        changed, _ = extractor.extract({"a": image}, INSTRUCTION)
    finally:
        del extractor.vlm.model.get_rope_index
        extractor.prompt.cache_clear()
    rows, cols = flat[0][1, 0], flat[0][2, 0]
    assert len(set((rows - cols).tolist())) > 3  # height and width positions differ within the picture
    assert (changed - tokens).abs().max() > 1e-2


def test_trap_16_prompt_names_views_and_instruction_once():
    processor = load_processor(open_checkpoint("tiny"))
    form = FeatureForm(processor, ["View1_left", "View5"], "mean", 360, 640)
    template, text = form.template(form.views), form.prompt(form.views, INSTRUCTION)
    assert template.count("{instruction}") == 1 and "View1_left" in template and "View5" in template
    assert text == template.replace("{instruction}", INSTRUCTION)
    with pytest.raises(UserError, match="special token"):
        form.prompt(form.views, "look <|image_pad|>")


@pytest.mark.parametrize("pooling", ["mean", "tokens", "grid:4x6"])
def test_pooling_options(extractor_for, pooling):
    extractor = extractor_for("tiny", ["a"], pooling=pooling, height=112, width=168)
    (image,) = pictures(1, (90, 60))
    tokens, mask = extractor.extract({"a": image}, INSTRUCTION)
    rows, cols = {"mean": (1, 1), "tokens": (4, 6), "grid:4x6": (4, 6)}[pooling]
    assert (extractor.layout.rows, extractor.layout.cols) == (rows, cols)
    assert tokens.shape == (rows * cols + 1, 128)
    assert mask.sum().item() == {"mean": 2, "tokens": 2 * 3 + 1, "grid:4x6": 25}[pooling]


def test_torch_without_the_variable_length_kernel_serves_too(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)  # as in torch 2.9
    spec = importlib.util.spec_from_file_location("another_vision_tower", vision_tower.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.varlen_attn is None and not module._takes_all_windows(torch.zeros(1, 2, 4, 8))
