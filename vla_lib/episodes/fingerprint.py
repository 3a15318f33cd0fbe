"""An episode's raw files and the settings in; one hex string out that changes when anything that data.pkl depends on does.

Robot log and metadata count by content, sensor files by the checksums that their .npz directory holds, pictures by name and
size: copying a dataset elsewhere changes nothing, and no large file has to be read.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from vla_lib.core.errors import UserError
from vla_lib.episodes.data_pkl import SCHEMA
from vla_lib.episodes.layouts import EpisodeFiles
from vla_lib.episodes.npz_stream import NpzFile
from vla_lib.episodes.pictures import Listing, list_pictures

CODE_VERSION = 1
"""Raised whenever the same inputs and settings give other values."""


def fingerprint(files: EpisodeFiles, settings: Mapping[str, Any], listing: Listing | None = None) -> str:
    """The fingerprint (32 hex digits) of one episode under the given settings (JSON-able)."""
    digest = hashlib.sha256(json.dumps([SCHEMA, CODE_VERSION, files.layout, dict(settings)], sort_keys=True).encode())
    for log in (files.robot_log, *files.other_logs):
        if log is not None:
            digest.update(log.name.encode() + hashlib.sha256(log.read_bytes()).digest())
    digest.update(sensor_signature(files).encode())
    digest.update(repr((listing or list_pictures(files.path)).rows).encode())
    return digest.hexdigest()[:32]


def sensor_signature(files: EpisodeFiles) -> str:
    """What identifies the sensor files' content without reading it."""
    parts = []
    for path in files.sensor_files:
        try:
            members = NpzFile(path).members.values()
            parts.append(f"{path.name} {sorted(member.signature for member in members)}")
        except UserError:
            parts.append(f"{path.name} unreadable, {path.stat().st_size} bytes")
    return "\n".join(parts)
