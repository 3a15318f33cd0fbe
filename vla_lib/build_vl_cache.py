"""Computes the VL feature cache of prepared episodes, once for all trainings."""

from typing import Any

from vla_lib.core import frontdoor
from vla_lib.features.settings import CacheSettings as Settings

__all__ = ["Settings", "main"]


def main(settings: Settings) -> dict[str, Any]:
    """Build or finish the cache; returns counts, seconds by stage, findings and the binding's id."""
    from vla_lib.features.builder import build

    return build(settings)


if __name__ == "__main__":
    frontdoor.start(Settings, main)
