"""A Qwen-VL checkpoint by its name: looked at without loading, then loaded up to the layer that is needed.

Of the model the vision tower and the first decoder layers are kept, without `lm_head`; stage 2 puts LoRA weights on
the latter (Hu et al. 2021: beside the frozen matrix W of a projection stands B A of a low rank; B starts at zero, so
nothing changes at first).
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vla_lib.core.errors import UserError, first_line
from vla_lib.features.binding import TINY
from vla_lib.features.tiny import FAMILIES, tiny_checkpoint

HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt"]
# The `pil` and `torchvision` backends of transformers' image processors differ slightly: one for all, in the binding.
IMAGE_BACKEND = "pil"
# Beside the weights, what decides the features.
SMALL_FILES = [f"{name}.json" for name in ("config", "preprocessor_config", "tokenizer", "tokenizer_config", "vocab")]
SMALL_FILES += ["merges.txt", "chat_template.json", "chat_template.jinja"]


@dataclass
class Vlm:
    """A frozen model in eval mode, and its checkpoint, of whose decoder layers the first `layer` are kept."""

    model: Any
    processor: Any
    checkpoint: "Checkpoint"
    layer: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, known by its content: `sha256` covers configuration, processors and weights.

    `source` opens it again (`tiny`, hub name or folder); `name` is the same without the folders above.
    """

    source: str
    name: str
    folder: Path
    family: str
    depth: int
    hidden_size: int
    sha256: str


def resolve_folder(name: str) -> Path:
    """The folder of `tiny`, `tiny-qwen3-vl`, a folder, or a hub name (downloaded, or found in the hub's cache).

    Raises UserError where there is no such checkpoint or the hub cannot be reached.
    """
    if name in TINY:
        with quiet_transformers():
            return tiny_checkpoint(TINY[name])
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve()
    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(
            f'--vl-model "{name}" is neither a folder nor a hub name such as Qwen/Qwen2.5-VL-3B-Instruct nor tiny.'
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except RepositoryNotFoundError:
        raise UserError(f'The hub has no model "{name}" (or it needs a token); check --vl-model.') from None
    except Exception as error:  # a broken network shows as an error of httpx, of the hub's library or of the system
        raise UserError(
            f'The hub cannot be reached for "{name}" ({type(error).__name__}), and no whole copy is in its cache; on a '
            f'connected machine run "hf download {name} --local-dir FOLDER" and give --vl-model FOLDER.'
        ) from None


def open_checkpoint(name: str) -> Checkpoint:
    """Look at a checkpoint without loading it. Raises UserError for another family, text-only models, missing files."""
    folder = resolve_folder(name)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        said = f"holds no readable config.json ({type(error).__name__})"
        raise UserError(f"{folder} {said}; give --vl-model the folder of a checkpoint.") from None
    family = config.get("model_type", "unknown")
    if family not in FAMILIES:
        kind = "a text-only model" if "vision_config" not in config else "a model of another family"
        raise UserError(
            f'{folder} is {kind} (model_type "{family}"); features need a checkpoint of {" or ".join(FAMILIES)}.'
        )
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UserError(f"{folder} holds no *.safetensors weights; download the checkpoint anew.")
    digest = hashlib.sha256()  # about a second per 2 GB of weights
    for path in [*(folder / file for file in SMALL_FILES if (folder / file).is_file()), *weights]:
        with open(path, "rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    from transformers import AutoConfig

    with quiet_transformers():
        text = AutoConfig.from_pretrained(folder).get_text_config()
    local = name not in TINY and Path(name).expanduser().is_dir()
    source, short = (str(folder), folder.name) if local else (name, name)
    size = int(text.num_hidden_layers), int(text.hidden_size)
    return Checkpoint(source, short, folder, family, *size, digest.hexdigest())


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's processor (tokenizer, chat template), its image processor in the workbench's one backend.

    Raises UserError where one of them is missing or not of Qwen-VL's kind.
    """
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    unusable = f"The checkpoint {checkpoint.folder} has no usable tokenizer or image processor"
    with quiet_transformers():
        try:
            processor = AutoProcessor.from_pretrained(checkpoint.folder)
            processor.image_processor = AutoImageProcessor.from_pretrained(checkpoint.folder, backend=IMAGE_BACKEND)
            image_token_id = AutoConfig.from_pretrained(checkpoint.folder).image_token_id
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise UserError(f"{unusable}: {first_line(error)}") from error
    if processor.tokenizer.convert_tokens_to_ids(processor.image_token) != image_token_id:
        raise UserError(f"{unusable}: its picture token is unknown.")
    if not isinstance(processor.image_processor, Qwen2VLImageProcessorPil):
        kind = type(processor.image_processor).__name__
        raise UserError(f"The checkpoint's image processor {kind} is not one of Qwen-VL.")
    return processor


def load_vlm(checkpoint: Checkpoint, processor: Any, layer: int, device: str = "cpu", dtype: str = "float32") -> Vlm:
    """Load the vision tower and the first `layer` decoder layers; the weights above are never read.

    dtype: "float32", "bfloat16" or "float16". Raises UserError where weights are missing or do not fit.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel
    from transformers.utils.import_utils import is_flash_attn_2_available

    from vla_lib.features.vision_tower import speed_up

    flash = device.startswith("cuda") and dtype != "float32" and is_flash_attn_2_available()
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(checkpoint.folder)
            text = config.get_text_config()
            text.num_hidden_layers = layer
            if getattr(text, "layer_types", None):
                text.layer_types = text.layer_types[:layer]
            model, info = AutoModel.from_pretrained(
                checkpoint.folder,
                config=config,
                dtype=getattr(torch, dtype),
                attn_implementation="flash_attention_2" if flash else "sdpa",
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"The checkpoint {checkpoint.folder} cannot be loaded: {first_line(error)}") from error
    if absent := sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]):
        lacks = f"lacks {len(absent)} weights (such as {absent[0]})"
        raise UserError(f"The checkpoint {checkpoint.folder} {lacks}; download it anew.")
    speed_up(model)
    model.eval().requires_grad_(False).to(device)
    return Vlm(model, processor, checkpoint, layer)


def resolve_layer(layer: int, depth: int) -> int:
    """The number of decoder layers kept: `layer`, or half of `depth` for 0. Raises UserError for a layer too many."""
    if not 0 <= layer <= depth:
        raise UserError(f"--vl-layer {layer} does not exist: the model has layers 1 to {depth} (0: half the depth).")
    return layer or max(1, depth // 2)


def add_adapter(vlm: Vlm, rank: int, alpha: int) -> dict[str, nn.Parameter]:
    """Put LoRA of `rank`, scaled by alpha / rank, beside every projection of the decoder layers that were loaded.

    Returns the new weights by name, float32 whatever the model's type; nothing else of the model is trained.
    """
    from peft import LoraConfig, inject_adapter_in_model

    language = vlm.model.language_model
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear"), language)
    vlm.model.eval()
    weights = {name.replace(".default", ""): w for name, w in language.named_parameters() if w.requires_grad}
    for weight in weights.values():
        weight.data = weight.data.float()
    return weights


@torch.no_grad()
def fill_adapter(weights: Mapping[str, nn.Parameter], record: Mapping[str, Any]) -> None:
    """Copy the weights of a checkpoint's record into a model's. Raises UserError where names or shapes do not fit."""
    given = record["weights"]
    odd = sorted(given.keys() ^ weights.keys()) or [n for n in weights if given[n].shape != weights[n].shape]
    if odd:
        differ = f"{odd[0]} ({len(odd)} differ)"
        raise UserError(f"The LoRA weights do not fit the VLM: {differ}; take a checkpoint of this VLM.")
    for name, weight in weights.items():
        weight.copy_(given[name])


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Hold transformers' log at errors and its progress bars off; callers check and report themselves."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
