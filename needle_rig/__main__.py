"""Records demonstrations on the simulated rig as raw episodes, as the lab would.

    python -m needle_rig --dataset-root OUT --episodes-f1 30 --episodes-f2 10

In: counts, a seed and the cameras' settings. Out: OUT/White_silicone_white_circle/recv_all_*, OUT/New_dataset/<Task>/episode_* and the
manifest OUT/simulation.json. The same command again recognises its recording and keeps it.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from needle_rig.world import RigError
from vla_lib.core import frontdoor


@dataclass(frozen=True)
class Settings:
    """Record demonstrations on the simulated rig (MuJoCo, EGL) as raw F1 and F2 episodes."""

    dataset_root: Path = Path("data/simulated")
    """Dataset root to write: an empty or new folder, or one that already holds exactly this recording (then it is kept)."""
    episodes_f1: int = 30
    """Number of F1 episodes (White_silicone_white_circle)."""
    episodes_f2: int = 10
    """Number of F2 episodes (New_dataset/<task>)."""
    task: str = "Silicone_block"
    """Task folder of the F2 episodes."""
    seed: int = 0
    """Seed of the whole recording: the same seed and settings give the same episodes."""
    workers: int = 2
    """Processes that record in parallel."""
    picture_width: int = 320
    """Width of the pictures, pixels."""
    picture_height: int = 180
    """Height of the pictures, pixels."""
    camera_hz: float = 5.0
    """Pictures a second and view."""
    idle_tail_s: float = 3.0
    """Seconds for which cameras and sensor go on after the robot's log ended."""
    sensor_clock_offset_ms: float = 0.0
    """How far the sensor host's clock is ahead of the robot's."""
    disturbances: bool = True
    """Inject pushes, so that recoveries are in the data."""

    def __post_init__(self):
        if self.episodes_f1 < 0 or self.episodes_f2 < 0 or self.episodes_f1 + self.episodes_f2 == 0:
            raise RigError(
                f"Nothing to record: --episodes-f1 {self.episodes_f1} and --episodes-f2 {self.episodes_f2}; ask for one episode or more."
            )
        if self.workers < 1:
            raise RigError(f"--workers {self.workers} is not a number of processes; give 1 or more.")
        if not (16 <= self.picture_width <= 2048 and 16 <= self.picture_height <= 1536):
            raise RigError(
                f"Pictures of {self.picture_width}x{self.picture_height} cannot be drawn; stay within 16x16 and 2048x1536."
            )
        if not 0.5 <= self.camera_hz <= 60:
            raise RigError(f"--camera-hz {self.camera_hz:g} is not a camera's rate; give 0.5 to 60.")
        if not 0 <= self.idle_tail_s <= 120:
            raise RigError(f"--idle-tail-s {self.idle_tail_s:g} is out of range; give 0 to 120 seconds.")
        if self.seed < 0:
            raise RigError(f"--seed {self.seed} is negative; give 0 or more.")


def main(settings: Settings) -> dict:
    """Record; returns counts, sizes and times. Raises RigError where EGL is missing or the root holds something else."""
    from needle_rig.recorder import MANIFEST, Plan, record
    from needle_rig.render import check_gl
    from needle_rig.world import task_of

    check_gl()
    task_of(settings.task)
    plan = Plan(
        episodes_f1=settings.episodes_f1,
        episodes_f2=settings.episodes_f2,
        task_f2=settings.task,
        seed=settings.seed,
        picture_width=settings.picture_width,
        picture_height=settings.picture_height,
        camera_hz=settings.camera_hz,
        idle_tail_s=settings.idle_tail_s,
        sensor_clock_offset_ms=settings.sensor_clock_offset_ms,
        pushes=settings.disturbances,
    )
    start = time.monotonic()
    manifest = record(settings.dataset_root, plan, settings.workers)
    took_s = time.monotonic() - start
    episodes = manifest["episodes"]
    results = {
        "dataset_root": str(settings.dataset_root),
        "manifest": str(settings.dataset_root / MANIFEST),
        "episodes": len(episodes),
        "episodes_f1": sum(entry["layout"] == "F1" for entry in episodes),
        "episodes_f2": sum(entry["layout"] == "F2" for entry in episodes),
        "pictures": sum(entry["pictures"] for entry in episodes),
        "motion_s": sum(entry["seconds"] for entry in episodes),
        "recorded_s": sum(entry["seconds"] + plan.idle_tail_s for entry in episodes),
        "gigabytes": sum(entry["bytes"] for entry in episodes) / 1e9,
        "took_s": took_s,
    }
    print(
        f"{results['episodes']} episodes ({results['episodes_f1']} F1, {results['episodes_f2']} F2), {results['motion_s'] / 60:.1f} min of motion, "
        f"{results['pictures']} pictures, {results['gigabytes']:.2f} GB in {settings.dataset_root}, {took_s:.1f} s",
        flush=True,
    )
    return results


if __name__ == "__main__":
    import sys

    try:
        main(frontdoor.parse(Settings))
    except RigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        raise SystemExit(2) from None
