"""The recorder: a plan (tasks, counts, seed) in, raw episodes below a dataset root out, in parallel, resumable and idempotent.

`ROOT/simulation.json` beside the dataset folders (never inside one, so no policy reads it) is the manifest: the plan, and for each
episode its seed, verdict, files and bytes. It holds no place of a target and no depth of a membrane: those follow from the seed
(`sample_world`). A root whose manifest holds the same plan is recognised: complete episodes are kept, missing ones are recorded.
"""

import hashlib
import json
import multiprocessing
import os
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path

from needle_rig.demonstration import demonstrate
from needle_rig.layouts import Recording, episode_folder, write_episode
from needle_rig.render import PictureMaker, check_gl, prepare_gl
from needle_rig.world import DEFAULT_TASK, RigError, sample_world, stream
from vla_lib.core.files import read_json, write_json
from vla_lib.core.processes import follow_parent
from vla_lib.core.progress import Progress

MANIFEST = "simulation.json"
PARTIAL = ".recording-"  # an episode being written: ROOT/.recording-<index>/, renamed into place when whole
FORMAT = 4  # raised when a change of the rig changes what a plan records
EPOCH_S = 1_761_000_000.0
_EPISODE_SPACING_S = 120.0
_TYPICAL_SECONDS = 15.0
_TRIES = 5


@dataclass(frozen=True)
class Plan:
    """What is recorded; everything that changes the data and nothing else."""

    episodes_f1: int
    episodes_f2: int
    task_f2: str = "Silicone_block"
    seed: int = 0
    picture_width: int = 320
    picture_height: int = 180
    camera_hz: float = 5.0
    idle_tail_s: float = 3.0
    sensor_clock_offset_ms: float = 0.0
    pushes: bool = True

    @property
    def total(self) -> int:
        """Number of episodes."""
        return self.episodes_f1 + self.episodes_f2

    def disk_bytes(self) -> int:
        """Rough size of the whole recording."""
        seconds = _TYPICAL_SECONDS + self.idle_tail_s
        pictures = seconds * self.camera_hz * 5 * (0.25 * self.picture_width * self.picture_height + 2000)
        return int(self.total * pictures + seconds * 650 * 1026 * 4 * (self.episodes_f1 + 5 * self.episodes_f2))


@dataclass(frozen=True)
class Job:
    """One episode of a plan."""

    index: int
    layout: str
    task: str
    seed: int
    start_s: float
    relative: str  # folder below the root


def jobs_of(plan: Plan) -> list[Job]:
    """The episodes of a plan, F1 and F2 interleaved in time as far as they go; deterministic."""
    layouts = ["F1"] * plan.episodes_f1 + ["F2"] * plan.episodes_f2
    rng = stream(plan.seed, "plan")
    jobs = []
    for index, layout in enumerate(layouts):
        task = DEFAULT_TASK if layout == "F1" else plan.task_f2
        start_s = EPOCH_S + 86_400 * (plan.seed % 3650) + _EPISODE_SPACING_S * index + float(rng.uniform(0, 30))
        start_s = round(start_s, 6)
        seed = int(rng.integers(1 << 62))
        jobs.append(Job(index, layout, task, seed, start_s, episode_folder(layout, task, start_s).as_posix()))
    return jobs


def record(root: Path, plan: Plan, workers: int = 2, show: bool = True) -> dict:
    """Record `plan` below `root`; returns the manifest. Raises RigError where the root holds something else, or the disk is too small."""
    root = Path(root)
    manifest = _open_manifest(root, plan)
    jobs = jobs_of(plan)
    kept = {entry["folder"]: entry for entry in manifest["episodes"] if _intact(root, entry)}
    todo = [job for job in jobs if job.relative not in kept]
    if not todo:
        return manifest
    check_gl()
    _check_disk(root, plan, len(todo))
    for job in todo:  # a folder of ours that is not intact would be altered raw data: say so rather than write over it
        if (root / job.relative).exists():
            if job.relative in {entry["folder"] for entry in manifest["episodes"]}:
                raise RigError(
                    f"{root / job.relative} is not as it was recorded (files are missing or altered); remove that folder and run again."
                )
            shutil.rmtree(
                root / job.relative
            )  # our rename had happened, our entry had not: an interrupted recording of this same plan
    root.mkdir(parents=True, exist_ok=True)
    for left in root.glob(f"{PARTIAL}*"):
        shutil.rmtree(left)
    manifest = manifest | {"state": "recording", "episodes": sorted(kept.values(), key=lambda entry: entry["index"])}
    write_json(root / MANIFEST, manifest)
    with Progress(len(todo), "recording", "episodes", show=show) as progress:
        for entry in _run(root, plan, todo, workers):
            kept[entry["folder"]] = entry
            manifest["episodes"] = sorted(kept.values(), key=lambda entry: entry["index"])
            write_json(root / MANIFEST, manifest)
            progress.update(1, note=f"{entry['pictures']} pictures, {entry['seconds']:.1f} s")
    manifest["state"] = "done"
    write_json(root / MANIFEST, manifest)
    return manifest


def _run(root: Path, plan: Plan, todo: list[Job], workers: int):
    if workers <= 1 or len(todo) == 1:
        maker = PictureMaker(plan.picture_width, plan.picture_height)
        try:
            for job in todo:
                yield _record_one(root, plan, job, maker)
        finally:
            maker.close()
        return
    context = multiprocessing.get_context("spawn")  # a GL context does not survive a fork
    prepare_gl()
    with ProcessPoolExecutor(min(workers, len(todo)), context, initializer=follow_parent) as pool:
        # F2 first: its episodes take longest to write
        futures = [
            pool.submit(_record_in_worker, root, plan, job)
            for job in sorted(todo, key=lambda job: job.layout, reverse=True)
        ]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            for future in futures:
                future.cancel()
            raise


_worker_maker: PictureMaker | None = None


def _record_in_worker(root: Path, plan: Plan, job: Job) -> dict:
    global _worker_maker
    if _worker_maker is None:
        _worker_maker = PictureMaker(plan.picture_width, plan.picture_height)
    return _record_one(root, plan, job, _worker_maker)


def _record_one(root: Path, plan: Plan, job: Job, maker: PictureMaker) -> dict:
    """Record one successful demonstration into its folder, whole or not at all; returns its manifest entry."""
    for retry in range(_TRIES):
        seed = job.seed + retry
        shown = demonstrate(sample_world(seed, job.task), plan.pushes, plan.idle_tail_s)
        if shown.verdict["success"]:
            break
    else:
        raise RuntimeError(f"the demonstrator failed {_TRIES} times from seed {job.seed}: {shown.verdict['reason']}")
    final = root / job.relative
    partial = root / f"{PARTIAL}{job.index}"
    shutil.rmtree(partial, ignore_errors=True)
    how = Recording(job.layout, plan.camera_hz, plan.idle_tail_s, plan.sensor_clock_offset_ms)
    try:
        pictures = write_episode(partial / final.name, how, shown, job.start_s, maker)
        files, size = _measure(partial / final.name)
        final.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial / final.name, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return {
        "index": job.index,
        "folder": job.relative,
        "layout": job.layout,
        "task": job.task,
        "seed": seed,
        "seconds": shown.verdict["seconds"],
        "success": shown.verdict["success"],
        "peak_force_mN": shown.verdict["peak_force_mN"],
        "pictures": pictures,
        "files": len(files),
        "bytes": size,
        "files_digest": _digest(files),
    }


def _measure(folder: Path) -> tuple[dict[str, int], int]:
    files = {
        path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()
    }
    return files, sum(files.values())


def _digest(files: dict[str, int]) -> str:
    """Digest of names and sizes."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


def _intact(root: Path, entry: dict) -> bool:
    """Whether an episode's raw files are as recorded, by name and size; what later stages wrote beside them is left out of account."""
    folder = root / entry["folder"]
    if not folder.is_dir():
        return False
    files, _ = _measure(folder)
    raw = {
        name: size for name, size in files.items() if name.endswith((".jpg", ".csv", ".npz")) or name == "metadata.json"
    }
    return len(raw) == entry["files"] and _digest(raw) == entry["files_digest"]


def _open_manifest(root: Path, plan: Plan) -> dict:
    wanted = {
        "what": "recording of the simulated rig",
        "format": FORMAT,
        "plan": asdict(plan),
        "state": "new",
        "episodes": [],
    }
    if root.exists() and not root.is_dir():
        raise RigError(f"The dataset root {root} is a file; name a folder.")
    if not root.is_dir() or not any(root.iterdir()):
        return wanted
    if not (root / MANIFEST).is_file():
        raise RigError(
            f"The dataset root {root} holds files that the simulated rig did not record; name an empty or a new folder."
        )
    found = read_json(root / MANIFEST)
    if not isinstance(found, dict) or found.get("plan") != wanted["plan"] or found.get("format") != FORMAT:
        other = found.get("plan", {}) if isinstance(found, dict) else {}
        differing = [
            f"{key} {other.get(key)} there, {value} asked"
            for key, value in wanted["plan"].items()
            if other.get(key) != value
        ]
        differing = differing or ["it was made by another version of the rig"]
        raise RigError(
            f"The dataset root {root} holds another recording ({'; '.join(differing)}); name a new folder, or remove this one."
        )
    return found


def _check_disk(root: Path, plan: Plan, episodes: int) -> None:
    needed = plan.disk_bytes() * episodes / max(plan.total, 1)
    place = root
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed * 1.1:
        raise RigError(
            f"Recording {episodes} episodes needs about {needed / 1e9:.1f} GB below {root}, and {free / 1e9:.1f} GB are free; "
            "free some space, record fewer episodes, or name a folder on another disk."
        )
