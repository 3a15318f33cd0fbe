"""Which checkpoints are taken, and the sentence for each that is not."""

import json
import shutil

import pytest
from PIL import Image

from vla_lib.build_vl_cache import Settings
from vla_lib.core.errors import UserError
from vla_lib.features import preflight
from vla_lib.features.binding import model_words
from vla_lib.features.tiny import FAMILIES, SPECIAL_TOKENS, tiny_checkpoint, write_tiny_checkpoint
from vla_lib.features.vlm import load_processor, load_vlm, open_checkpoint, resolve_layer


@pytest.fixture
def copy(tmp_path):
    """A copy of the tiny checkpoint to spoil."""
    return shutil.copytree(open_checkpoint("tiny").folder, tmp_path / "checkpoint")


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tiny_checkpoint_has_the_ordinary_form(family, tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = write_tiny_checkpoint(tmp_path / "one", family)
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert 0.5e6 < sum(weight.numel() for weight in model.parameters()) < 2e6
    processor = AutoProcessor.from_pretrained(folder)
    assert all(len(processor.tokenizer.encode(token)) == 1 for token in SPECIAL_TOKENS)
    text = "Insert the needle ¡ üñ 바늘!"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text
    message = [
        {
            "role": "user",
            "content": [{"type": "image", "image": Image.new("RGB", (96, 56))}, {"type": "text", "text": "Go"}],
        }
    ]
    inputs = processor.apply_chat_template(
        message, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
    )
    assert model(**inputs).logits.isfinite().all()


def test_one_seed_one_checkpoint(tmp_path):
    folders = [write_tiny_checkpoint(tmp_path / str(number), seed=seed) for number, seed in enumerate((0, 0, 1))]
    weights = [(folder / "model.safetensors").read_bytes() for folder in folders]
    assert weights[0] == weights[1] != weights[2]
    assert (
        open_checkpoint(str(folders[0])).sha256
        == open_checkpoint(str(folders[1])).sha256
        == open_checkpoint("tiny").sha256
    )
    assert tiny_checkpoint() == open_checkpoint("tiny").folder


def test_unknown_family_of_tiny_is_refused(tmp_path):
    with pytest.raises(UserError, match="qwen2_5_vl, qwen3_vl"):
        write_tiny_checkpoint(tmp_path, "llava")


@pytest.mark.parametrize("name", ["nowhere", "./nowhere", "/nowhere/at/all", "a/b/c"])
def test_no_such_model(name):
    with pytest.raises(UserError, match="neither a folder nor a hub name"):
        open_checkpoint(name)


def test_a_hub_that_cannot_be_reached_names_the_remedy(monkeypatch, tmp_path):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match=r"cannot be reached .* --vl-model FOLDER"):
        open_checkpoint("Qwen/Qwen2.5-VL-3B-Instruct")


def test_a_text_only_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", "hidden_size": 8}))
    with pytest.raises(UserError, match=r'text-only model \(model_type "qwen2"\)'):
        open_checkpoint(str(tmp_path))


def test_a_model_of_another_family(copy):
    change_config(copy, model_type="llava_next")
    with pytest.raises(UserError, match="another family"):
        open_checkpoint(str(copy))


def test_an_empty_folder_and_one_without_weights(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"no readable config\.json"):
        open_checkpoint(str(tmp_path / "empty"))
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match="no \\*.safetensors"):
        open_checkpoint(str(copy))


def test_missing_weights_are_never_left_random(copy):
    from safetensors.torch import load_file, save_file

    weights = load_file(copy / "model.safetensors")
    gone = next(name for name in sorted(weights) if "layers.0" in name)
    del weights[gone]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    checkpoint = open_checkpoint(str(copy))
    with pytest.raises(UserError, match="lacks 1 weights"):
        load_vlm(checkpoint, load_processor(checkpoint), 2)


def test_cut_off_weights(copy):
    raw = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(raw[: len(raw) // 2])
    checkpoint = open_checkpoint(str(copy))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_vlm(checkpoint, load_processor(checkpoint), 2)


def test_a_checkpoint_without_tokenizer(copy):
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UserError, match="tokenizer or image processor"):
        load_processor(open_checkpoint(str(copy)))


@pytest.mark.parametrize(("asked", "kept"), [(0, 18), (1, 1), (36, 36)])
def test_layers(asked, kept):
    assert resolve_layer(asked, 36) == kept
    assert resolve_layer(0, 1) == 1
    with pytest.raises(UserError, match="layers 1 to 36"):
        resolve_layer(37, 36)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"batch_size": 0}, "--batch-size is 0"),
        ({"vl_stride": -1}, "--vl-stride is -1"),
        ({"vl_pooling": "max"}, "--vl-pooling"),
        ({"image_resize_height": 0}, "--image-resize-height is 0"),
    ],
)
def test_bad_settings_are_refused_at_once(tmp_path, change, sentence):
    with pytest.raises(UserError, match=sentence):
        Settings(dataset_root=tmp_path, **change)


def test_bad_views_device_and_root(dataset, tmp_path):
    with pytest.raises(UserError, match="No episode has a view View9"):
        preflight.plan(Settings(dataset_root=dataset, vl_model="tiny", views=("View1_left", "View9")))
    with pytest.raises(UserError, match="different views"):
        preflight.plan(Settings(dataset_root=dataset, vl_model="tiny", views=("View1_left", "View1_left")))
    with pytest.raises(UserError, match="no prepared episodes"):
        preflight.plan(Settings(dataset_root=_empty(tmp_path)))


def _empty(folder):
    (folder / "empty").mkdir()
    return folder / "empty"


def test_settings_and_episodes_need_no_torch():
    import subprocess
    import sys

    code = "import sys, vla_lib.build_vl_cache as b; b.Settings(dataset_root='x'); "
    code += "sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_the_vl_model_of_real_recordings_is_named(tmp_path):
    """`tiny` has random weights: someone who follows the guide would cache noise."""
    with pytest.raises(UserError, match="No VL model is named: .*datasets.yaml.* random weights"):
        Settings(dataset_root=tmp_path).model  # noqa: B018
    (tmp_path / "datasets.yaml").write_text("vl_model: Qwen/Qwen3-VL-4B\npart1: {weight: 2}\n")
    assert Settings(dataset_root=tmp_path).model == "Qwen/Qwen3-VL-4B"
    assert Settings(dataset_root=tmp_path, vl_model="tiny").model == "tiny"
    (tmp_path / "datasets.yaml").unlink()
    (tmp_path / "simulation.json").write_text("{}")
    assert Settings(dataset_root=tmp_path).model == "tiny"
    assert "random weights" in model_words({"model": "tiny", "source": "tiny"})
    assert model_words({"model": "tiny-of-ours", "source": "/models/tiny-of-ours"}) == "tiny-of-ours"
