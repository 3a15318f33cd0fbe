"""The contract of `data.pkl`: a dict of plain Python and numpy in, one pickle out, and back through an unpickler that admits nothing else.

`check_content` is what makes a file trustworthy: keys, shapes, dtypes, indices inside their streams, and paths inside the folder.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.core.errors import UserError
from vla_lib.core.files import atomic_path

DATA_NAME = "data.pkl"
SENSOR_NAME = "sensor.npy"
SCHEMA = 1
PROTOCOL = 4
"""Protocol 4 needs only numpy's `_reconstruct`, `ndarray` and `dtype` to come back."""
CHANNELS = 1026
KEYS = {
    "action",
    "timestamp",
    "valid",
    "state",
    "image",
    "image_timestamp",
    "image_index",
    "sensor_data",
    "instruction",
    "metadata",
}
_ADMITTED = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy.core.numeric", "_frombuffer"),
}
_RENAMED = {"numpy.core.multiarray": "numpy._core.multiarray", "numpy.core.numeric": "numpy._core.numeric"}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ADMITTED:
            raise pickle.UnpicklingError(
                f"it asks for {module}.{name}, and only plain Python and numpy values are admitted"
            )
        return super().find_class(_RENAMED.get(module, module), name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict of one data.pkl. Raises UserError where it is missing, damaged, or holds more than plain values."""
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"There is no {path}; run python -m vla_lib.preprocess on its dataset first.") from None
    except Exception as error:  # any bytes can stand in a file; whatever pickle makes of them is a refusal
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is refused: {said}; run python -m vla_lib.preprocess on its dataset again.") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{path} is refused: it holds a {type(content).__name__}, not a dict; preprocess its dataset again."
        )
    return content


def write_pickle(path: Path, content: dict[str, Any]) -> None:
    """Write one data.pkl atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(pickle.dumps(content, PROTOCOL))


def check_content(content: dict[str, Any], where: Path) -> None:
    """Raise UserError, naming the key, where a data.pkl does not keep its contract. `where` is the file, for the message."""
    try:
        _check(content)
    except (AssertionError, KeyError, TypeError, ValueError, AttributeError) as error:
        said = (
            f"the key {error} is missing"
            if isinstance(error, KeyError)
            else str(error) or "its values have the wrong form"
        )
        raise UserError(
            f"{where} is refused: {said}; run python -m vla_lib.preprocess on its dataset again."
        ) from error


def _require(condition: Any, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _array(value: Any, shape: tuple[int | None, ...], kind: str, name: str) -> Any:
    if type(value) is not np.ndarray:
        raise ValueError(f"{name} is no array")
    if len(value.shape) != len(shape) or any(
        want not in (None, have) for want, have in zip(shape, value.shape, strict=True)
    ):
        shown = "(" + ", ".join("n" if want is None else str(want) for want in shape) + ")"
        raise ValueError(f"{name} has shape {value.shape}, {shown} is needed")
    if value.dtype.kind not in kind:
        raise ValueError(f"{name} has dtype {value.dtype}")
    return value


def _check(content: dict[str, Any]) -> None:
    missing = KEYS - set(content)
    _require(not missing, f"the keys {', '.join(sorted(missing))} are missing")
    metadata = content["metadata"]
    _require(isinstance(metadata, dict), "metadata is no dict")
    _require(
        metadata["schema_version"] == SCHEMA,
        f"it has schema version {metadata['schema_version']}, this code reads {SCHEMA}",
    )
    _require(isinstance(content["instruction"], str), "instruction is no text")
    steps = len(_array(content["action"], (None, 7), "f", "action"))
    times = _array(content["timestamp"], (steps,), "f", "timestamp")
    _require(times.dtype == np.float64, "timestamp must be float64 (float32 cannot hold UNIX seconds)")
    _array(content["valid"], (steps,), "b", "valid")
    _array(content["state"], (steps, 12), "f", "state")
    images, image_times, indices = content["image"], content["image_timestamp"], content["image_index"]
    _require(
        set(images) == set(image_times) == set(indices), "image, image_timestamp and image_index differ in their views"
    )
    for view, paths in images.items():
        _require(isinstance(view, str) and type(paths) is list, f"image[{view!r}] is no list")
        check_paths(paths, view)
        _array(image_times[view], (len(paths),), "f", f"image_timestamp[{view!r}]")
        index = _array(indices[view], (steps,), "iu", f"image_index[{view!r}]")
        _require(
            not steps or (index.min() >= -1 and index.max() < len(paths)),
            f"image_index[{view!r}] points outside its list",
        )
    sensor = content["sensor_data"]
    if sensor is None:
        return
    _require(isinstance(sensor, dict), "sensor_data is neither None nor a dict")
    samples = len(_array(sensor["force"], (None,), "f", "sensor_data force"))
    _array(sensor["timestamp"], (samples,), "f", "sensor_data timestamp")
    index = _array(sensor["index"], (steps,), "iu", "sensor_data index")
    _require(not steps or (index.min() >= 0 and index.max() <= samples), "sensor_data index points outside the stream")
    check_paths([sensor["array"]], "sensor_data array")


def check_paths(paths: list[Any], name: str) -> None:
    """Raise ValueError where one of the paths is no text, absolute, or climbs out of the folder."""
    try:
        joined = "\n".join(paths)  # one pass in C over thousands of paths
    except TypeError:
        raise ValueError(f"{name} holds something that is no path") from None
    suspect = (
        ".." in joined
        or "\\" in joined
        or "\0" in joined
        or "\n/" in f"\n{joined}"
        or ":" in joined
        or joined.count("\n") >= max(len(paths), 1)
    )
    if not suspect and all(paths):
        return
    for path in paths:
        parts = path.replace("\\", "/").split("/")
        windows_drive = len(parts[0]) == 2 and parts[0].endswith(":")
        if not path or "\0" in path or "\n" in path or parts[0] == "" or ".." in parts or windows_drive:
            raise ValueError(f"{name} holds the path {path!r}, which leaves the episode folder")
