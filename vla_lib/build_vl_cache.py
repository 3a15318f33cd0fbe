"""Computes the VL feature cache of prepared episodes, once for all trainings."""

import os
from typing import Any

from vla_lib.core import frontdoor
from vla_lib.core.owner import owned
from vla_lib.features.settings import CacheSettings as Settings


def main(settings: Settings) -> dict[str, Any]:
    """Build or finish the cache; returns counts, seconds by stage, findings and the binding's id."""
    from vla_lib.features.builder import build

    with owned(settings.run_dir if os.environ.get("RANK", "0") == "0" else None):
        return build(settings)


if __name__ == "__main__":
    frontdoor.start(Settings, main)
