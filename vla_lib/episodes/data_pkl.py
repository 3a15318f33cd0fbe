"""The contract of `data.pkl`: a dict of plain Python and numpy, read by an unpickler that admits nothing else.

action (N, 7) float32           motion over each step: mm, rotation vector in degrees (base frame), gripper
timestamp (N,) float64          start of each step, UNIX seconds
valid (N,) bool                 no stream has a gap across the step
state (N, 12) float32           joints (deg), pose (mm, deg)
image {view: [path]}            relative to the episode folder; image_timestamp {view: (n,) float64}
image_index {view: (N,) int32}  newest picture at or before each step, -1 where there is none
sensor_data                     None, or force (S,), timestamp (S,), index (N,) = one past the newest sample, array
instruction, metadata           text; rates, clocks, findings, fingerprint of the inputs
"""

import io
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge, Gt
from pydantic import BaseModel, Field, ValidationError

from vla_lib.core.errors import UserError
from vla_lib.core.files import atomic_path, checksum

DATA_NAME = "data.pkl"
SENSOR_NAME = "sensor.npy"
SCHEMA = 1
PROTOCOL = 4  # protocol 4 needs only numpy's `_reconstruct`, `ndarray` and `dtype` to come back
_ADMITTED = {
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy._core.numeric._frombuffer",
}
_LEAVES = re.compile(r"\n(?:[\n/\\]|.:[\n/\\])|[\n/\\]\.\.[\n/\\]|\0")
"""In paths that stand between line ends: an empty or absolute one, a Windows drive, a way up."""
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Metadata(BaseModel, strict=True):
    """What readers take from the metadata without asking; there is more, which they ask for."""

    dataset: str
    layout: str
    fingerprint: str
    action_hz: Annotated[_Finite, Gt(0.0)]
    sensor_hz: Annotated[_Finite, Ge(0.0)] | None
    verdict: str
    num_actions: Annotated[int, Ge(0)]
    duration_seconds: Annotated[_Finite, Ge(0.0)]


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        module = module.replace("numpy.core.", "numpy._core.")  # what numpy 1 called it
        if f"{module}.{name}" not in _ADMITTED:
            text = f"it asks for {module}.{name}, and only plain Python and numpy values are admitted"
            raise pickle.UnpicklingError(text)
        return super().find_class(module, name)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("it refers to objects outside the file")


def read_pickle(path: Path) -> dict[str, Any]:
    """The dict of one data.pkl. Raises UserError where it is missing, damaged, or holds more than plain values."""
    try:
        content = _PlainUnpickler(io.BytesIO(path.read_bytes())).load()
    except FileNotFoundError:
        raise UserError(f"There is no {path}; run python -m vla_lib.preprocess on its dataset first.") from None
    except Exception as error:  # any bytes can stand in a file; whatever pickle makes of them is a refusal
        raise _refused(path, " ".join(str(error).split()) or type(error).__name__) from error
    if not isinstance(content, dict):
        raise _refused(path, f"it holds a {type(content).__name__}, not a dict")
    return content


def is_ours(path: Path) -> bool:
    """Whether a data.pkl, whole or not, or a sensor.npy carries our mark. Raises OSError where it cannot be read.

    data.pkl: the names of its schema. sensor.npy: a header of version 2, which numpy itself writes only at need.
    """
    with open(path, "rb") as stream:
        head = stream.read(4096)
        if path.name == SENSOR_NAME:
            return head.startswith(b"\x93NUMPY\x02")
        content = head + stream.read()
    return b"schema_version" in content and b"fingerprint" in content


def drop_prepared(out: Path) -> None:
    """Remove what we prepared in a folder; files of others stay."""
    for path in (out / DATA_NAME, out / SENSOR_NAME):
        if path.exists() and is_ours(path):
            path.unlink()


def clear_way(out: Path, set_aside: bool) -> None:
    """Clear the way of what a killed run of ours left unfinished, and of files that we did not write, by another name.

    Raises UserError where it is not to be set aside, or where the other name is taken.
    """
    for name in (DATA_NAME, SENSOR_NAME):
        for left in out.glob(f".{name}.*.partial"):
            left.unlink(missing_ok=True)
    ours = {path: path.exists() and is_ours(path) for path in (out / DATA_NAME, out / SENSOR_NAME)}
    ours[out / SENSOR_NAME] |= ours[out / DATA_NAME]  # of before the mark: our data.pkl stands beside it
    for path in (path for path, mine in ours.items() if path.exists() and not mine):
        aside = path.with_name(path.name + ".theirs")
        if not set_aside:
            remedy = f"give --set-aside to rename it to {aside.name}, or --output-root FOLDER to prepare elsewhere"
            raise UserError(f"{path} was not written by this library and is left alone; {remedy}.")
        if aside.exists():
            raise UserError(f"{path} cannot be set aside, since {aside} exists; move one of them away.")
        path.rename(aside)


def write_pickle(path: Path, content: dict[str, Any]) -> None:
    """Write one data.pkl atomically, with the checksum of its content in its metadata."""
    content = content | {"metadata": content["metadata"] | {"checksum": content_checksum(content)}}
    with atomic_path(path) as temporary:
        temporary.write_bytes(pickle.dumps(content, PROTOCOL))


def content_checksum(content: dict[str, Any]) -> str:
    """Of all values but itself, whatever their order."""
    return checksum(_parts(content | {"metadata": content["metadata"] | {"checksum": None}}))


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for key in sorted(value):
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype.str}{value.shape}".encode()
        yield value.tobytes()
    else:
        yield repr(value).encode()


def read_checked(path: Path) -> dict[str, Any]:
    """The dict of one data.pkl that keeps its contract. Raises UserError as `read_pickle` and `check_content` do."""
    content = read_pickle(path)
    check_content(content, path)
    stated = content["metadata"].get("checksum")  # a data.pkl of earlier versions has none
    if stated is not None and stated != content_checksum(content):
        raise _refused(path, "its content is not what was written: it was damaged or altered")
    return content


def known_content(out: Path) -> dict[str, Any] | None:
    """What the folder's data.pkl holds; None where there is none that can be trusted."""
    try:
        return read_checked(out / DATA_NAME)
    except UserError:
        return None


def check_content(content: dict[str, Any], where: Path) -> None:
    """Raise UserError, naming the key, where the contract is broken. `where` is the file, for the message."""
    try:
        _check(content)
    except KeyError as error:
        raise _refused(where, f"the key {error} is missing") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise _refused(where, str(error) or "its values have the wrong form") from error


def _refused(path: Path, why: str) -> UserError:
    return UserError(f"{path} is refused: {why}; run python -m vla_lib.preprocess on its dataset again.")


def _require(condition: Any, text: str) -> None:
    if not condition:
        raise ValueError(text)


def _array(value: Any, shape: tuple[int | None, ...], kind: str, name: str) -> Any:
    _require(type(value) is np.ndarray, f"{name} is no array")
    if len(value.shape) != len(shape) or any(n not in (None, m) for n, m in zip(shape, value.shape, strict=True)):
        shown = "(" + ", ".join("n" if n is None else str(n) for n in shape) + ")"
        raise ValueError(f"{name} has shape {value.shape}, {shown} is needed")
    if value.dtype.kind not in kind:  # no `_require`: to name a dtype takes longer than to check it
        raise ValueError(f"{name} has dtype {value.dtype}")
    return value


def _index(value: Any, steps: int, least: int, most: int, name: str) -> None:
    index = _array(value, (steps,), "iu", name)
    _require(not steps or (index.min() >= least and index.max() <= most), f"{name} points outside its stream")


def _check(content: dict[str, Any]) -> None:
    metadata = content["metadata"]
    _require(isinstance(metadata, dict), "metadata is no dict")
    version = metadata["schema_version"]
    _require(version == SCHEMA, f"it has schema version {version}, this code reads {SCHEMA}")
    try:
        _Metadata.model_validate(metadata)
    except ValidationError as error:
        odd = [f"metadata {'.'.join(map(str, one['loc'][:1]))}: {one['msg']}" for one in error.errors()]
        raise ValueError("; ".join(odd)) from None
    _require(isinstance(content["instruction"], str), "instruction is no text")
    steps = len(_array(content["action"], (None, 7), "f", "action"))
    times = _array(content["timestamp"], (steps,), "f", "timestamp")
    _require(times.dtype == np.float64, "timestamp must be float64 (float32 cannot hold UNIX seconds)")
    _require(np.isfinite(times).all() and (np.diff(times) > 0).all(), "timestamp does not go forward")
    valid = _array(content["valid"], (steps,), "b", "valid")
    state = _array(content["state"], (steps, 12), "f", "state")
    for name, values in (("action", content["action"]), ("state", state)):
        _require(np.isfinite(values[valid]).all(), f"{name} holds no numbers at valid steps")
    images, image_times, indices = content["image"], content["image_timestamp"], content["image_index"]
    same = set(images) == set(image_times) == set(indices)
    _require(same, "image, image_timestamp and image_index differ in their views")
    for view, paths in images.items():
        _require(isinstance(view, str) and type(paths) is list, f"image[{view!r}] is no list")
        _check_paths(paths, view)
        _array(image_times[view], (len(paths),), "f", f"image_timestamp[{view!r}]")
        _index(indices[view], steps, -1, len(paths) - 1, f"image_index[{view!r}]")
    sensor = content["sensor_data"]
    if sensor is not None:
        _require(isinstance(sensor, dict), "sensor_data is neither None nor a dict")
        samples = len(_array(sensor["force"], (None,), "f", "sensor_data force"))
        times = _array(sensor["timestamp"], (samples,), "f", "sensor_data timestamp")
        _require(np.isfinite(times).all() and (np.diff(times) >= 0).all(), "sensor_data timestamp does not go forward")
        _require(metadata["sensor_hz"], "metadata sensor_hz is no rate, but there is a sensor")
        _index(sensor["index"], steps, 0, samples, "sensor_data index")
        _check_paths([sensor["array"]], "sensor_data array")


def _check_paths(paths: list[Any], name: str) -> None:
    _require(set(map(type, paths)) <= {str}, f"{name} holds something that is no path")
    joined = "\n".join(["", *paths, ""])  # one search over thousands of paths, and a quick one before it
    suspect = any(mark in joined for mark in ("..", "\n\n", "\n/", "\\", "\0", ":"))
    if suspect and _LEAVES.search(joined) or joined.count("\n") > len(paths) + 1:
        raise ValueError(f"{name} holds a path that leaves the episode folder, or is none")
