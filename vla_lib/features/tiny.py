"""The default VLM: a random Qwen-VL checkpoint of about a million weights, in the form of the published ones.

The folder holds config.json, model.safetensors, tokenizer files, a chat template and preprocessor_config.json, so
every line of code that loads a 3B checkpoint loads this one. The weights are random, yet carry what a policy needs: the
vision tower keeps each patch's colours and edges beside what its neighbours add, so a spatial grid of tokens tells
where things are (position by ridge regression).
"""

import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vla_lib.core.errors import UserError, needing_room

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, Qwen2Tokenizer

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
FORM = 2  # raise when the written checkpoint changes, so that an older one in a user's cache is not taken for it
HIDDEN = 128

PAIRS = [f"{name}_{edge}" for name in ("object_ref", "box", "quad", "vision") for edge in ("start", "end")]
SPECIAL_NAMES = ["endoftext", "im_start", "im_end", *PAIRS, "vision_pad", "image_pad", "video_pad"]
SPECIAL_TOKENS = [f"<|{name}|>" for name in SPECIAL_NAMES]

# The form of Qwen2.5-VL's own template, for messages whose content is a string or a list of texts and pictures.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n"
    "{% else %}{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content or 'image_url' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'video' or 'video' in content %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# What the byte-pair merges are learned from; any other text still has its bytes.
CORPUS = (
    "You are a helpful assistant. system user assistant",
    "Perform the insertion task. Perform Needle insertion task. Perform Eye trocar insertion task",
    "Insert into the white square silicone with a white circle sticker attached",
    "Insert the needle through the trocar into the eye phantom model",
    "View1_left: View2_left: View3_left: View4_left: View5: View1_right: View2_right: View3_right: View4_right:",
    "Insert the needle into the red target, the blue point, the green circle, "
    "the left, the right, the middle hole of the phantom",
    "The robot is to do this task: move the needle tip slowly along its axis and stop behind the membrane",
)


def tiny_checkpoint(family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """Folder of the tiny checkpoint below the user's cache folder, written when it is not there yet.

    `VLA_CACHE_DIR` names another place than `$XDG_CACHE_HOME/vla-workbench`. Several processes may ask at once: the
    folder appears whole or not at all. Raises UserError where it cannot be written.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("VLA_CACHE_DIR") or caches / "vla-workbench") / f"tiny-{family}-seed{seed}-form{FORM}"
    if (folder / "model.safetensors").is_file():
        return folder
    with needing_room(folder, "Set VLA_CACHE_DIR to a folder that can be."):
        folder.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.", ignore_cleanup_errors=True)
    with work as place:
        made = write_tiny_checkpoint(Path(place) / "checkpoint", family, seed)
        os.chmod(made, 0o755)
        try:
            os.replace(made, folder)
        except OSError:
            if not (folder / "model.safetensors").is_file():  # else another process was faster
                raise
    return folder


def write_tiny_checkpoint(folder: Path, family: str = "qwen2_5_vl", seed: int = 0) -> Path:
    """Write the tiny checkpoint of `family` into `folder` and return the folder.

    The same seed gives the same files. Raises UserError for an unknown family.
    """
    if family not in FAMILIES:
        raise UserError(f'There is no tiny checkpoint of family "{family}"; take one of {", ".join(FAMILIES)}.')
    import torch
    from transformers import AutoModelForImageTextToText
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    if family == "qwen3_vl":
        shown: dict[str, Any] = {"patch_size": 16, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        sizes = {"shortest_edge": 65536, "longest_edge": 16777216}
    else:
        shown, sizes = {}, {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 16384}
    Qwen2VLImageProcessorPil(**shown, size=sizes).save_pretrained(folder)
    ids = {name: tokenizer.get_vocab()[f"<|{name}|>"] for name in SPECIAL_NAMES}
    config = _config(family, len(tokenizer), ids)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        _initialise(model, seed)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def _tokenizer() -> "Qwen2Tokenizer":
    """Byte-level BPE with Qwen's special tokens and chat template; merges learned from CORPUS."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    trained = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated", invert=False)
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, level])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=480, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, eos_token="<|im_end|>", model_max_length=32768)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL_TOKENS})
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _config(family: str, vocabulary: int, ids: dict[str, int]) -> "PreTrainedConfig":
    from transformers import AutoConfig

    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1000000.0, "mrope_section": [4, 6, 6]}
    text: dict[str, Any] = {
        "vocab_size": -(-vocabulary // 16) * 16,
        "hidden_size": HIDDEN,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "rope_parameters": rope,
        "bos_token_id": ids["endoftext"],
        "eos_token_id": ids["im_end"],
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "intermediate_size": 128,
        "out_hidden_size": HIDDEN,
        "spatial_merge_size": 2,
    }
    if family == "qwen3_vl":
        text |= {"head_dim": 32, "rope_parameters": rope | {"mrope_interleaved": True}}
        vision |= {"patch_size": 16, "num_position_embeddings": 256, "deepstack_visual_indexes": [0]}
    else:
        vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [1]}
    tokens = {"image_token_id": ids["image_pad"], "video_token_id": ids["video_pad"]}
    tokens |= {f"vision_{edge}_token_id": ids[f"vision_{edge}"] for edge in ("start", "end")}
    return AutoConfig.for_model(family, text_config=text, vision_config=vision, tie_word_embeddings=False, **tokens)


def _initialise(model: "PreTrainedModel", seed: int) -> None:
    """Draw every matrix so that its output is about as large as its input, and each block adds little to the stream.

    With the usual 0.02 the patch embedding is too weak to be seen and all tokens look alike; with these scales a token
    is mostly its own patch, blended with its surroundings.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    small_additions = ("o_proj", "down_proj", "attn.proj", "linear_fc2")
    for name, weight in model.named_parameters():
        if weight.ndim < 2:
            continue
        fan_in, gain = weight[0].numel(), 1.0
        if any(part in name for part in small_additions) and "merger" not in name:
            gain = 0.3
        if "embed_tokens" in name or "pos_embed" in name:
            fan_in, gain = 1, 0.5 if "pos_embed" in name else 1.0
        torch.nn.init.normal_(weight, 0.0, gain / fan_in**0.5, generator)
