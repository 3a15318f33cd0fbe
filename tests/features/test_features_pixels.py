"""Picture preprocessing equals the checkpoint's image processor; pooling and layout tell which token is where."""

from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from vla_lib.core.errors import UserError
from vla_lib.features.binding import Pooling, TokenLayout
from vla_lib.features.extractor import pool
from vla_lib.features.form import PixelRecipe
from vla_lib.features.vision_tower import LinearPatchEmbed, windowed_attention
from vla_lib.features.vlm import load_processor, open_checkpoint


@pytest.fixture(scope="module", params=["tiny", "tiny-qwen3-vl"])
def image_processor(request):
    return load_processor(open_checkpoint(request.param)).image_processor


@pytest.mark.parametrize("size", [(320, 180), (640, 360), (57, 43), (1280, 720), (200, 300)])
def test_equals_the_image_processor_on_the_shrunk_picture(image_processor, size):
    recipe = PixelRecipe(image_processor, 360, 640)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))
    plain = image_processor(images=[recipe.shrink(picture)], return_tensors="pt")
    patches, grid = recipe.patchify(
        torch.from_numpy(recipe.prepare(picture))[None], image_processor.temporal_patch_size
    )
    assert plain["image_grid_thw"].tolist() == [[1, *grid]]
    torch.testing.assert_close(patches, plain["pixel_values"], atol=2e-6, rtol=0)
    assert recipe.token_grid(size[1], size[0]) == (grid[0] // 2, grid[1] // 2)


@given(st.integers(1, 2500), st.integers(1, 2500))
@settings(max_examples=100, deadline=None)
def test_shrinks_to_fit_and_never_enlarges(height, width):
    recipe = PixelRecipe(None, 360, 640)
    high, wide = recipe.fitted_size(height, width)
    assert 1 <= high <= min(360, height) and 1 <= wide <= min(640, width)
    if height <= 360 and width <= 640:
        assert (high, wide) == (height, width)
    elif min(high, wide) > 20:
        assert abs(wide / high - width / height) / (width / height) < 0.06


def test_file_array_and_picture_give_the_same_bytes(image_processor, tmp_path):
    recipe = PixelRecipe(image_processor, 90, 160)
    array = np.random.default_rng(1).integers(0, 255, (180, 320, 3), dtype=np.uint8)
    Image.fromarray(array).save(tmp_path / "a.png")
    one, two, three = (recipe.prepare(source) for source in (tmp_path / "a.png", array, Image.fromarray(array)))
    assert np.array_equal(one, two) and np.array_equal(two, three) and one.dtype == np.uint8


@pytest.mark.parametrize("bias", [False, True])
def test_patch_embedding_equals_the_convolution(bias):
    conv = torch.nn.Conv3d(3, 8, kernel_size=(2, 4, 4), stride=(2, 4, 4), bias=bias)
    frame = torch.randn(5, 3, 1, 4, 4)
    expected = conv(frame.expand(-1, -1, 2, -1, -1)).flatten(1)
    torch.testing.assert_close(LinearPatchEmbed(conv)(frame.flatten(1)), expected, atol=1e-5, rtol=0)
    short = LinearPatchEmbed(conv.to(torch.bfloat16))
    assert short.frames == 2 and short.weight.shape == (8, 96)


def test_windowed_attention_equals_one_call_a_window():
    q, k, v = torch.randn(3, 1, 2, 30, 8).unbind(0)
    bounds = torch.tensor([0, 8, 16, 20, 28, 30], dtype=torch.int32)
    found, _ = windowed_attention(None, q, k, v, None, scaling=8**-0.5, cu_seq_lens_q=bounds, max_length_q=8)
    for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        part = torch.nn.functional.scaled_dot_product_attention(*(x[:, :, start:end] for x in (q, k, v)))
        torch.testing.assert_close(found[:, start:end], part.transpose(1, 2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("text", ["", "grid", "grid:0x3", "grid:4", "max", "grid:4x-1", "mean "])
def test_unknown_pooling_is_refused(text):
    with pytest.raises(UserError, match="--vl-pooling"):
        Pooling.parse(text)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
@settings(max_examples=60, deadline=None)
def test_pooling_keeps_place_and_constants(rows, cols, high, wide):
    """A constant picture stays constant; with whole cells, the mean of the cells is the picture's mean."""
    pooling = Pooling("grid", rows, cols)
    layout = pooling.layout(("a",), 360, 640, 28)
    tokens = torch.arange(high * wide, dtype=torch.float32).view(1, -1, 1)
    pooled, mask = pool(torch.cat([tokens, torch.ones_like(tokens)], -1), (high, wide), pooling, layout)
    assert pooled.shape == (1, rows * cols, 2) and mask.all() and (pooled[..., 1] == 1).all()
    grid = pooled[0, :, 0].view(rows, cols)
    assert (grid.diff(dim=0) >= 0).all() and (grid.diff(dim=1) >= 0).all()  # row-major order is kept
    if high % rows == 0 and wide % cols == 0:
        assert abs(grid.mean() - tokens.mean()) < 1e-4


def test_layout_tells_view_row_and_column_of_every_token():
    layout = TokenLayout(("a", "b"), 2, 3)
    assert layout.tokens == 13
    assert layout.view_id.tolist() == [0] * 6 + [1] * 6 + [-1]
    assert layout.row.tolist() == [0, 0, 0, 1, 1, 1] * 2 + [-1]
    assert layout.col.tolist() == [0, 1, 2] * 4 + [-1]
    assert layout.view_slice("b") == slice(6, 12)
    assert TokenLayout.from_dict(asdict(layout)) == layout


def test_tokens_pooling_refuses_a_picture_larger_than_its_room():
    pooling = Pooling("tokens")
    with pytest.raises(UserError, match="room for 2x2"):
        pool(torch.zeros(1, 12, 4), (3, 4), pooling, TokenLayout(("a",), 2, 2))
