"""What made a set of features in, a short id out; two bindings in, the sentence that tells how they differ out. Imports no torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from vla_lib.core.errors import UserError

SCHEMA = 1

# Every field here changes the features, or which of them exist. `source` (where the model was found) is told beside
# them but is not part of the id.
FIELDS = (
    "schema",
    "model",
    "weights_sha256",
    "family",
    "layer",
    "depth",
    "hidden_size",
    "pooling",
    "image_resize_height",
    "image_resize_width",
    "image_backend",
    "views",
    "prompt",
    "text_tokens",
    "tick_stride",
    "dtype",
    "transformers",
    "layout",
)


def make_binding(**fields: Any) -> dict[str, Any]:
    """The binding as a plain dict, its `id` included. Every name of FIELDS but `schema` must be given; `source` may be."""
    binding = {"schema": SCHEMA, **fields}
    missing = set(FIELDS) - set(binding)
    unknown = set(binding) - set(FIELDS) - {"source"}
    if missing or unknown:
        raise ValueError(f"binding fields missing {sorted(missing)}, unknown {sorted(unknown)}")
    binding = json.loads(json.dumps(binding))  # tuples become the lists that a reader will see
    return {"id": binding_id(binding), **binding}


def binding_id(binding: Mapping[str, Any]) -> str:
    """Readable and unique: `tiny-L2-grid4x6-s3-1a2b3c4d5e`; the last part is a hash over every field of FIELDS."""
    content = json.dumps({name: binding[name] for name in FIELDS}, sort_keys=True)
    model = re.sub(r"[^A-Za-z0-9._]+", "-", str(binding["model"]).rsplit("/", 1)[-1])[:40]
    pooling = str(binding["pooling"]).replace(":", "")
    return f"{model}-L{binding['layer']}-{pooling}-s{binding['tick_stride']}-{hashlib.sha256(content.encode()).hexdigest()[:10]}"


def differences(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """One phrase for every field of `wanted` that `found` holds otherwise."""
    phrases = []
    for name in FIELDS:
        if name in wanted and found.get(name) != json.loads(json.dumps(wanted[name])):
            phrases.append(f"{name}: {_short(found.get(name))} against {_short(wanted[name])}")
    return phrases


def check(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str) -> None:
    """Raise UserError naming both sides where `found` (the cache's) is not what `wanted` (the reader's; some fields or all) asks for."""
    if phrases := differences(found, wanted):
        raise UserError(
            f"{where} was made otherwise than asked (cache against here): {'; '.join(phrases)}. Build anew with build_vl_cache."
        )


def check_own(binding: Any, where: str) -> None:
    """Raise UserError unless `binding` is a whole binding of this schema whose id is the hash of its fields."""
    if not isinstance(binding, dict) or "id" not in binding or any(name not in binding for name in FIELDS):
        raise UserError(f"{where} is no binding of this workbench; point to another cache folder, or remove this one.")
    if binding["schema"] != SCHEMA:
        raise UserError(
            f"{where} has schema {binding['schema']}, this workbench reads schema {SCHEMA}; build the cache anew."
        )
    if (expected := binding_id(binding)) != binding["id"]:
        raise UserError(
            f'{where} was altered: its fields belong to "{expected}", its id says "{binding["id"]}"; build the cache anew.'
        )


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({hashlib.sha256(text.encode()).hexdigest()[:8]})"
