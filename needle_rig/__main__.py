"""Records demonstrations on the simulated rig as raw episodes, as the lab would.

    python -m needle_rig --dataset-root OUT --episodes-f1 30 --episodes-f2 10

Writes OUT/White_silicone_white_circle/recv_all_*, OUT/New_dataset/<Task>/episode_* and the manifest
OUT/simulation.json. The same command again recognises its recording and keeps it.
"""

import sys
import time

import tyro

from needle_rig.recorder import record
from needle_rig.settings import RecordSettings
from needle_rig.world import RigError


def main(settings: RecordSettings) -> None:
    """Record, and print what is there now. Raises RigError where EGL is missing or the root holds something else."""
    start = time.monotonic()
    episodes = record(settings)["episodes"]
    f1 = sum(entry["layout"] == "F1" for entry in episodes)
    minutes = sum(entry["seconds"] for entry in episodes) / 60
    gigabytes = sum(entry["bytes"] for entry in episodes) / 1e9
    print(
        f"{len(episodes)} episodes ({f1} F1, {len(episodes) - f1} F2), {minutes:.1f} min of motion, "
        f"{sum(entry['pictures'] for entry in episodes)} pictures, {gigabytes:.2f} GB in {settings.dataset_root}, "
        f"{time.monotonic() - start:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    try:
        main(tyro.cli(RecordSettings, description=RecordSettings.__doc__))
    except RigError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("cancelled", file=sys.stderr, flush=True)
        sys.exit(130)
