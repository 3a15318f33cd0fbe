"""The cached features of a dataset root, read memory-mapped; and the housekeeping of its caches. Needs no transformers.

On disk: `<root>/cache/qwen_vl_features/<binding id>/binding.json` and one `<dataset>__<task>__<episode>.pt` an episode,
opened with `weights_only=True, mmap=True`, so that an epoch of random access costs the pages it touches and no more.
"""

import contextlib
import hashlib
import os
import pickle
import shutil
import struct
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vla_lib.core.errors import UserError, first_line
from vla_lib.core.files import atomic_path, checksum, read_json
from vla_lib.episodes import PreparedEpisode, find_prepared, load_used
from vla_lib.features import binding as bindings
from vla_lib.features.binding import TokenLayout

BUILD_HINT = "Build it with `python -m vla_lib.build_vl_cache --dataset-root {root}`."
VISION = "vision"  # folder of the vision tower's tokens within a binding's, where a stage-2 run made them
HEADER = ("schema", "binding", "episode", "fingerprint", "instruction", "steps", "findings", "sha256")
# What a missing, cut off or foreign file raises when it is loaded and its entries are taken.
DAMAGES = (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError, pickle.UnpicklingError)


def cache_folder(root: str | Path) -> Path:
    """Where all bindings of a dataset root lie."""
    return Path(root) / "cache" / "qwen_vl_features"


def episode_key(root: str | Path, episode_dir: str | Path) -> str:
    """Path of an episode relative to the dataset root, with forward slashes. A linked episode has its link's path."""
    root, folder = Path(root).absolute(), Path(episode_dir).absolute()
    if root not in folder.parents:  # the same folders under another spelling
        root, folder = root.resolve(), folder.resolve()
    return folder.relative_to(root).as_posix()


def feature_file(folder: Path, key: str) -> Path:
    """The file of the episode `key` within a binding's folder."""
    return folder / (key.replace("/", "__") + ".pt")


@dataclass(frozen=True)
class EpisodeFeatures:
    """Features of one episode.

    tokens: (ticks, T, D), memory-mapped; mask: (ticks, T) bool, False where the view's picture was missing or corrupt
    (the tokens are zero there); tick_step: (ticks,) int64, the action step that each tick belongs to, ascending.
    """

    tokens: Tensor
    mask: Tensor
    tick_step: Tensor
    layout: TokenLayout
    key: str
    header: Mapping[str, Any]
    path: Path | None = None  # None: computed, in memory

    def tick(self, row: int) -> Tensor:
        """(T, D): the tokens of one tick. They alone are read: round a mapped one the system reads megabytes ahead."""
        size, absent = self.tokens[row].nbytes, (OSError, ValueError, zipfile.BadZipFile)
        with contextlib.suppress(*absent), open(self.path or "", "rb", buffering=0) as file:
            begin, inode = self._place
            if os.fstat(file.fileno()).st_ino == inode:  # another was not written in its place meanwhile
                file.seek(begin + row * size)
                if len(read := bytearray(file.read(size))) == size:
                    return torch.frombuffer(read, dtype=self.tokens.dtype).view(self.tokens.shape[1:])
        return self.tokens[row]

    @cached_property
    def _place(self) -> tuple[int, int]:
        """Where in the file the tokens begin, and which file it is: torch.save writes a zip archive, the first tensor
        uncompressed as `data/0`. Raises ValueError where what stands there is not what is mapped."""
        first = self.tokens[:1].contiguous().view(torch.uint8).numpy().tobytes()
        with open(self.path or "", "rb") as file, zipfile.ZipFile(file) as archive:
            (record,) = (one for one in archive.infolist() if one.filename.endswith("/data/0"))
            file.seek(record.header_offset + 26)
            begin = file.seek(sum(struct.unpack("<HH", file.read(4))), os.SEEK_CUR)  # behind its name and its padding
            if file.read(len(first)) != first:
                raise ValueError(f"{self.path} has its tokens elsewhere")
            return begin, os.fstat(file.fileno()).st_ino

    def check(self) -> None:
        """Read all and compare it with what was written. Raises UserError, naming the file, where it differs."""
        name = "xxh3" if self.header.get("xxh3") else "sha256"  # caches of earlier versions have SHA-256 alone
        if self.path is not None and digest(name, self.tokens, self.mask, self.tick_step) != self.header[name]:
            said = "its checksum is not that of what was written"
            raise UserError(f"{self.path} is damaged: {said}; remove it and build the cache again.")


class FeatureCache:
    """All episodes' features under one binding. Files are opened when first asked for and stay mapped."""

    def __init__(self, root: str | Path, binding: Mapping[str, Any]):
        self.root, self.binding = Path(root), dict(binding)
        self.folder = cache_folder(root) / binding["id"]
        self.layout = TokenLayout.from_dict(binding["layout"])
        self._hint = BUILD_HINT.format(root=root)
        self._open: dict[str, EpisodeFeatures] = {}

    @classmethod
    def open(cls, dataset_root: str | Path, binding_id: str | None = None) -> "FeatureCache":
        """Open the binding `binding_id` (None: the only one there).

        Raises UserError where there is no such cache, or where there are several to choose from.
        """
        base = cache_folder(dataset_root)
        found = sorted(path.parent.name for path in base.glob("*/binding.json"))
        if not found:
            raise UserError(f"There are no cached features under {base}. {BUILD_HINT.format(root=dataset_root)}")
        if binding_id is None and len(found) > 1:
            raise UserError(f"There are {len(found)} caches under {base}; choose one by its id: {', '.join(found)}.")
        chosen = binding_id or found[0]
        if chosen not in found:
            raise UserError(f'There is no cache "{chosen}" under {base}; there are: {", ".join(found)}.')
        return cls(dataset_root, read_binding(base / chosen))

    def episode(self, episode: PreparedEpisode) -> EpisodeFeatures:
        """Features of an episode. Raises UserError where they are absent, unreadable, or were made from other data."""
        path = str(episode.path)
        if path not in self._open:
            self._open[path] = self.read(episode_key(self.root, path))
        features = self._open[path]
        if reason := stale_reason(features.header, episode):
            where = f'The features of {features.key} in cache "{self.binding["id"]}"'
            raise UserError(f"{where} are stale: {reason}. {self._hint}")
        return features

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # worker processes map the files anew

    def state(self, episode: PreparedEpisode) -> str:
        """`covered`, `stale` (from other data, or unreadable) or `missing` for one episode."""
        key = episode_key(self.root, episode.path)
        if not feature_file(self.folder, key).is_file():
            return "missing"
        try:
            return "stale" if stale_reason(self.read(key).header, episode) else "covered"
        except UserError:
            return "stale"

    def read(self, key: str) -> EpisodeFeatures:
        """Map one episode's file. Raises UserError where it is absent, unreadable, or of another episode or binding."""
        path, own = feature_file(self.folder, key), self.binding["id"]
        try:
            value = torch.load(path, weights_only=True, mmap=True, map_location="cpu")
            header = {name: value[name] for name in HEADER} | {"xxh3": value.get("xxh3")}
            tensors = value["tokens"], value["mask"], value["tick_step"]
        except FileNotFoundError:
            raise UserError(f'The episode {key} has no features in cache "{own}". {self._hint}') from None
        except DAMAGES as error:
            raise UserError(f"{path} is damaged ({first_line(error)}). {self._hint}") from None
        if (header["binding"], header["episode"]) != (own, key):
            found = f'"{header["episode"]}" of cache "{header["binding"]}"'
            raise UserError(f'{path} holds the features of {found}, asked for was "{key}" of "{own}". {self._hint}')
        return EpisodeFeatures(*tensors, self.layout, key, header, path)

    def write(
        self, episode: PreparedEpisode, tokens: Tensor, mask: Tensor, tick_step: Tensor, findings: list[str]
    ) -> int:
        """Write one episode's features atomically; returns the bytes.

        The content holds no time and no host, so equal features are equal files.
        """
        key = episode_key(self.root, episode.path)
        value = {
            "schema": bindings.SCHEMA,
            "binding": self.binding["id"],
            "episode": key,
            "fingerprint": episode.fingerprint,
            "instruction": episode.instruction,
            "steps": len(episode),
            "findings": findings,
            "sha256": digest("sha256", tokens, mask, tick_step),
            "xxh3": digest("xxh3", tokens, mask, tick_step),
            "tokens": tokens,
            "mask": mask,
            "tick_step": tick_step,
        }
        path = feature_file(self.folder, key)
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            torch.save(value, file)  # through a handle: by name, torch would write the temporary name into the file
        return path.stat().st_size


def read_binding(folder: Path) -> dict[str, Any]:
    """The binding of a cache folder. Raises UserError where it is none of ours or was altered."""
    binding: dict[str, Any] = read_json(folder / "binding.json")
    bindings.check_own(binding, str(folder / "binding.json"))
    if binding["id"] != folder.name:
        raise UserError(f'{folder} holds the binding "{binding["id"]}"; give the folder back its name.')
    return binding


def stale_reason(header: Mapping[str, Any], episode: PreparedEpisode) -> str:
    """Why features with this header do not belong to `episode`, naming both sides; "" where they do."""
    if header["fingerprint"] != episode.fingerprint:
        return f"made from data.pkl {header['fingerprint'][:12]}, it is now {episode.fingerprint[:12]}"
    if header["instruction"] != episode.instruction:
        return f'made with the instruction "{header["instruction"]}", it is now "{episode.instruction}"'
    return ""


def digest(name: str, *tensors: Tensor) -> str:
    """XXH3 or SHA-256 over the tensors' bytes."""
    parts = [tensor.contiguous().view(torch.uint8).numpy().data for tensor in tensors]
    return checksum(parts) if name == "xxh3" else hashlib.sha256(b"".join(parts)).hexdigest()


# -------------------------------------------------------------------- housekeeping (`vla cache ls|verify|rm`)


def list_bindings(root: str | Path, runs: str | Path | None = None) -> list[dict[str, Any]]:
    """One row a binding: id, settings, bytes, age, coverage of the prepared episodes, and the runs that name it.

    `covered`: prepared episodes with fresh features; `stale`: with features from other data; `missing`: with none. A
    folder that is not ours or was altered is listed with its `problem`. runs: the folder of run folders (None: none).
    """
    episodes = list(load_used(root).values()) if find_prepared(root) else []
    names = ("model", "layer", "dtype", "pooling", "views", "tick_stride", "image_resize_height", "image_resize_width")
    rows = []
    for folder in sorted(path for path in cache_folder(root).glob("*") if path.is_dir()):
        files = sorted(folder.glob("*.pt"))
        newest = max((file.stat().st_mtime for file in files), default=folder.stat().st_mtime)
        size = sum(file.stat().st_size for file in folder.rglob("*.pt"))
        row = {"id": folder.name, "files": len(files), "bytes": size, "age_s": time.time() - newest, "problem": ""}
        rows.append(row)
        try:
            binding = read_binding(folder)
        except UserError as error:
            row["problem"] = str(error)
            continue
        cache = FeatureCache(root, binding)
        states = [cache.state(episode) for episode in episodes]
        row |= {name: binding[name] for name in names}
        row |= {state: states.count(state) for state in ("covered", "stale", "missing")}
        row |= {"episodes": len(episodes), "used_by": _users(folder.name, runs)}
    return rows


def verify(root: str | Path, binding_id: str) -> dict[str, Any]:
    """Read every file of a binding whole and compare its checksum: {"files", "bytes", "bad": [sentence, ...]}."""
    cache = FeatureCache.open(root, binding_id)
    files, bad = sorted(cache.folder.glob("*.pt")), []
    for path in files:
        try:
            key = torch.load(path, weights_only=True, mmap=True)["episode"]
            if feature_file(cache.folder, key) != path:
                bad.append(f"{path.name} holds the features of {key}")
                continue
            cache.read(key).check()
        except UserError as error:
            bad.append(str(error))
        except Exception as error:  # a damaged zip or pickle fails in many ways; each is a finding
            bad.append(f"{path.name} is damaged ({type(error).__name__}); remove it and build again")
    return {"files": len(files), "bytes": sum(path.stat().st_size for path in files), "bad": bad}


def remove(root: str | Path, binding_id: str) -> int:
    """Delete one binding; returns the bytes freed. Raises UserError where it is not ours or holds foreign files."""
    folder = cache_folder(root) / binding_id
    if folder.parent != cache_folder(root) or not (folder / "binding.json").is_file():
        raise UserError(f'There is no cache "{binding_id}" under {cache_folder(root)}; `vla cache ls` lists them.')
    read_binding(folder)
    names = sorted(path.name for path in folder.iterdir() if path.suffix not in (".pt", ".partial"))
    if foreign := [name for name in names if name not in ("binding.json", VISION)]:
        raise UserError(f"{folder} holds files that are not ours ({', '.join(foreign[:3])}); move them away first.")
    freed = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    shutil.rmtree(folder)
    return freed


def _users(binding_id: str, runs: str | Path | None) -> list[str]:
    """Names of the run folders whose records name this binding."""
    if runs is None:
        return []
    names = ("*/run.json", "*/results.json", "*/settings.json")
    files = [path for name in names for path in Path(runs).glob(name)]
    return sorted({p.parent.name for p in files if binding_id in p.read_text(encoding="utf-8", errors="replace")})
