"""The recorder: writes the planned episodes below a dataset root, in parallel, resumable and idempotent.

`ROOT/simulation.json` beside the dataset folders (never inside one, so no policy reads it) is the manifest: the plan,
and for each episode its seed, verdict, files and bytes. It holds no place of a target and no depth of a membrane: those
follow from the seed (`sample_world`). A root whose manifest holds the same plan is recognised: complete episodes are
kept, missing ones are recorded.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from tqdm import tqdm

from needle_rig.demonstrator import demonstrate
from needle_rig.layouts import EpisodeWriter
from needle_rig.render import check_gl, open_scene
from needle_rig.settings import PlannedEpisode, RecordSettings
from needle_rig.world import RigError

MANIFEST = "simulation.json"
PARTIAL = ".recording-"  # an episode being written: ROOT/.recording-<index>/, renamed into place when whole
FORMAT = 4  # raised when a change of the rig changes what a plan records
_TYPICAL_SECONDS = 15.0
_TRIES = 5


def record(settings: RecordSettings, show: bool = True) -> dict[str, Any]:
    """Record below `settings.dataset_root`; returns the manifest.

    Raises RigError where the root holds something else, the disk is too small, or EGL is missing.
    """
    root = settings.dataset_root
    manifest = _open_manifest(root, settings.plan())
    recorded = {entry["folder"]: entry for entry in manifest["episodes"]}
    kept = {folder: entry for folder, entry in recorded.items() if entry | _measure(root / folder) == entry}
    todo = [episode for episode in settings.episodes() if episode.folder not in kept]
    if not todo:
        return manifest
    check_gl()
    _check_disk(settings, todo)
    for episode in todo:
        folder = root / episode.folder
        if folder.exists() and episode.folder in recorded:  # raw data that somebody altered is not ours to overwrite
            raise RigError(
                f"{folder} is not as it was recorded (files are missing or altered); remove that folder and run again."
            )
        # without an entry it is this same plan's, interrupted between the renaming and the manifest
        shutil.rmtree(folder, ignore_errors=True)
    for left in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(left)

    def save(state: str) -> None:
        manifest.update(state=state, episodes=sorted(kept.values(), key=lambda entry: entry["index"]))
        _write_json(root / MANIFEST, manifest)

    save("recording")
    with tqdm(total=len(todo), desc="recording", unit=" episodes", mininterval=5.0, disable=not show) as bar:
        for entry in _record_all(settings, todo):
            kept[entry["folder"]] = entry
            save("recording")
            bar.update()
    save("done")
    return manifest


def _record_all(settings: RecordSettings, todo: list[PlannedEpisode]) -> Iterator[dict[str, Any]]:
    """The manifest's entries of the episodes, as they are finished by a pool of fresh processes."""
    context = multiprocessing.get_context("spawn")  # a GL context does not survive a fork
    with ProcessPoolExecutor(min(settings.workers, len(todo)), context, initializer=_follow_parent) as pool:
        longest_first = sorted(todo, key=lambda episode: episode.layout, reverse=True)  # F2 takes longest to write
        try:
            for future in as_completed([pool.submit(_record_one, settings, episode) for episode in longest_first]):
                yield future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _follow_parent() -> None:
    """A worker leaves Ctrl-C to its parent, and ends when the parent has ended, however that came."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


_scene = functools.cache(open_scene)  # one drawing context a process


def _record_one(settings: RecordSettings, episode: PlannedEpisode) -> dict[str, Any]:
    """Record one successful demonstration into its folder, whole or not at all; returns its manifest entry."""
    for seed in range(episode.seed, episode.seed + _TRIES):
        shown = demonstrate(settings.world(seed, episode.task), settings.disturbances, settings.idle_tail_s)
        if shown.verdict["success"]:
            break
    else:
        why = shown.verdict["reason"]
        raise RuntimeError(f"the demonstrator failed {_TRIES} times from seed {episode.seed}: {why}")
    final, partial = settings.dataset_root / episode.folder, settings.dataset_root / f"{PARTIAL}{episode.index}"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        scene = _scene(settings.picture_width, settings.picture_height)
        pictures = EpisodeWriter(partial / final.name, settings, episode, shown, scene).write()
        measured = _measure(partial / final.name)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / final.name, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "index": episode.index,
        "folder": episode.folder,
        "layout": episode.layout,
        "task": episode.task,
        "seed": seed,
        "seconds": shown.verdict["seconds"],
        "success": shown.verdict["success"],
        "peak_force_mN": shown.verdict["peak_force_mN"],
        "pictures": pictures,
    } | measured


def _measure(folder: Path) -> dict[str, Any]:
    """Tells whether an episode is as it was recorded: names and sizes, but not of what later stages wrote beside."""
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.suffix in (".jpg", ".csv", ".npz") or path.name == "metadata.json"
    }
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]
    return {"files": len(files), "bytes": sum(files.values()), "files_digest": digest}


def _open_manifest(root: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The manifest of an earlier recording of this plan, or a new one."""
    new = {"what": "recording of the simulated rig", "format": FORMAT, "plan": plan, "state": "new", "episodes": []}
    if root.exists() and not root.is_dir():
        raise RigError(f"The dataset root {root} is a file; name a folder.")
    if not root.is_dir() or not any(root.iterdir()):
        return new
    try:
        found = json.loads((root / MANIFEST).read_text())
    except FileNotFoundError:
        raise RigError(
            f"The dataset root {root} holds files that the simulated rig did not record; name an empty or a new folder."
        ) from None
    except ValueError as error:
        raise RigError(f"{root / MANIFEST} cannot be read as JSON ({error}); remove or restore it.") from error
    there = found.get("plan", {}) if isinstance(found, dict) else {}
    if there == plan and found["format"] == FORMAT:
        return found
    differing = [
        f"{name} {there.get(name)} there, {asked} asked" for name, asked in plan.items() if there.get(name) != asked
    ]
    told = "; ".join(differing) or "it was made by another version of the rig"
    raise RigError(f"The dataset root {root} holds another recording ({told}); name a new folder, or remove this one.")


def _check_disk(settings: RecordSettings, todo: list[PlannedEpisode]) -> None:
    seconds = _TYPICAL_SECONDS + settings.idle_tail_s
    picture = 0.25 * settings.picture_width * settings.picture_height + 2000
    second = {"F1": 650 * 1026 * 4, "F2": 5 * 650 * 1026 * 4}  # F2's windows hold each sample five times
    needed = sum(seconds * (settings.camera_hz * 5 * picture + second[episode.layout]) for episode in todo)
    root = settings.dataset_root.absolute()
    free = shutil.disk_usage(next(place for place in (root, *root.parents) if place.exists())).free
    if free < needed * 1.1:
        raise RigError(
            f"Recording {len(todo)} episodes needs about {needed / 1e9:.1f} GB below {settings.dataset_root}, and "
            f"{free / 1e9:.1f} GB are free; free some space, record fewer episodes, or name a folder on another disk."
        )


def _write_json(path: Path, value: dict[str, Any]) -> None:
    """Write whole or not at all: a killed recording leaves the last manifest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path)
