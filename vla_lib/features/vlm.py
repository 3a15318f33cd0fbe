"""A checkpoint's name in, a loaded Qwen-VL model cut to the layers that are needed out (vision tower, first k decoder layers, no lm_head)."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.features.quiet import quiet_transformers

FAMILIES = ("qwen2_5_vl", "qwen3_vl")
TINY = {"tiny": "qwen2_5_vl", "tiny-qwen3-vl": "qwen3_vl"}
HUB_FILES = ("*.json", "*.safetensors", "*.jinja", "*.txt")


@dataclass
class Vlm:
    """A frozen model in eval mode and what belongs to it. `depth`: decoder layers of the checkpoint, `layer`: how many are kept."""

    model: Any
    processor: Any
    family: str
    depth: int
    layer: int
    hidden_size: int


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, known by its content: `sha256` covers configuration, tokenizer, image processor and weights.

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
        from vla_lib.features.tiny import tiny_checkpoint

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
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except RepositoryNotFoundError:
        raise UserError(f'The hub has no model "{name}" (or it needs a token); check --vl-model.') from None
    except Exception as error:
        raise UserError(
            f'The hub cannot be reached for "{name}" ({type(error).__name__}), and no whole copy is in its cache; on a connected machine run '
            f'"hf download {name} --local-dir FOLDER" and give --vl-model FOLDER.'
        ) from None


def open_checkpoint(name: str) -> Checkpoint:
    """Look at a checkpoint without loading it. Raises UserError for another family, a text-only model, or missing files."""
    folder = resolve_folder(name)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} holds no readable config.json ({type(error).__name__}); give --vl-model the folder of a checkpoint."
        ) from None
    family = config.get("model_type", "unknown")
    if family not in FAMILIES:
        kind = "a text-only model" if "vision_config" not in config else "a model of another family"
        raise UserError(
            f'{folder} is {kind} (model_type "{family}"); features need a checkpoint of {" or ".join(FAMILIES)}.'
        )
    if not _weight_files(folder):
        raise UserError(f"{folder} holds no *.safetensors weights; download the checkpoint anew.")
    from transformers import AutoConfig

    with quiet_transformers():
        text = AutoConfig.from_pretrained(folder).get_text_config()
    local = name not in TINY and Path(name).expanduser().is_dir()
    return Checkpoint(
        str(folder) if local else name,
        folder.name if local else name,
        folder,
        family,
        int(text.num_hidden_layers),
        int(text.hidden_size),
        _identity(folder),
    )


def load_processor(checkpoint: Checkpoint) -> Any:
    """The checkpoint's processor (tokenizer, chat template), its image processor in the one backend that the workbench uses."""
    from transformers import AutoConfig, AutoImageProcessor, AutoProcessor

    from vla_lib.features.pixels import IMAGE_BACKEND

    with quiet_transformers():
        try:
            processor = AutoProcessor.from_pretrained(checkpoint.folder)
            processor.image_processor = AutoImageProcessor.from_pretrained(checkpoint.folder, backend=IMAGE_BACKEND)
            image_token_id = AutoConfig.from_pretrained(checkpoint.folder).image_token_id
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise UserError(
                f"The checkpoint {checkpoint.folder} has no usable tokenizer or image processor: {_first_line(error)}"
            ) from error
    if processor.tokenizer.convert_tokens_to_ids(processor.image_token) != image_token_id:
        raise UserError(
            f"The checkpoint {checkpoint.folder} has no usable tokenizer or image processor: its picture token is unknown."
        )
    return processor


def load_vlm(
    checkpoint: Checkpoint,
    processor: Any,
    layer: int,
    device: str = "cpu",
    dtype: str = "float32",
    compiled: bool = False,
) -> Vlm:
    """Load the vision tower and the first `layer` decoder layers; the weights above are never read.

    dtype: "float32", "bfloat16" or "float16". Raises UserError where weights are missing or do not fit.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel

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
                attn_implementation=_attention(device, dtype),
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
            raise UserError(f"The checkpoint {checkpoint.folder} cannot be loaded: {_first_line(error)}") from error
    absent = [
        *info["missing_keys"],
        *(str(key[0] if isinstance(key, tuple) else key) for key in info["mismatched_keys"]),
    ]
    if absent:
        raise UserError(
            f"The checkpoint {checkpoint.folder} lacks {len(absent)} weights (such as {sorted(absent)[0]}); download it anew."
        )
    return Vlm(
        speed_up(model, device, compiled), processor, checkpoint.family, checkpoint.depth, layer, checkpoint.hidden_size
    )


def speed_up(model: Any, device: str, compiled: bool = False) -> Any:
    """Swap parts of a loaded inner model for faster ones of the same result, freeze it and move it to `device`.

    The vision tower's windows share calls, the patch embedding becomes a matrix product, and the RMS norms are one kernel each.
    compiled: fuse the blocks with torch.compile too (a GPU; about a minute at the first batch).
    """
    import torch

    from vla_lib.features import attention
    from vla_lib.features.patch_embed import LinearPatchEmbed

    if "flash" not in (model.visual.config._attn_implementation or ""):
        model.visual.config._attn_implementation = attention.register()

    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                norm = torch.nn.RMSNorm(
                    child.weight.shape[0],
                    eps=child.variance_epsilon,
                    device=child.weight.device,
                    dtype=child.weight.dtype,
                )
                norm.weight = child.weight
                setattr(module, name, norm)
    model.visual.patch_embed = LinearPatchEmbed(model.visual.patch_embed.proj)
    model.eval().requires_grad_(False).to(device)
    if compiled:
        for block in [*model.visual.blocks, *model.language_model.layers]:
            block.forward = torch.compile(block.forward, dynamic=True)  # hooks stay outside
    return model


def resolve_layer(layer: int, depth: int) -> int:
    """The number of decoder layers kept: `layer`, or half of `depth` for 0. Raises UserError where there are not so many."""
    if not 0 <= layer <= depth:
        raise UserError(
            f"--vl-layer {layer} does not exist: the model has layers 1 to {depth} (0 means half the depth)."
        )
    return layer or max(1, depth // 2)


def _attention(device: str, dtype: str) -> str:
    from transformers.utils import is_flash_attn_2_available

    return (
        "flash_attention_2"
        if device.startswith("cuda") and dtype != "float32" and is_flash_attn_2_available()
        else "sdpa"
    )


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _identity(folder: Path) -> str:
    """SHA-256 over the files that decide the features, in order of their names (about a second per 2 GB of weights)."""
    digest = hashlib.sha256()
    small = (
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
        "merges.txt",
    )
    small += ("chat_template.json", "chat_template.jinja")
    for path in [*(folder / name for name in small if (folder / name).is_file()), *_weight_files(folder)]:
        with open(path, "rb") as file:
            digest.update(f"{path.name}\0{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
