"""Trains the diffusion policy: action chunks by DDPM.

`torchrun --nproc_per_node=4 -m vla_lib.train_diffusion --dataset_dir ROOT --training-stage stage1 ...`, or plain
`python -m vla_lib.train_diffusion` on one process. Prepared episodes and their VL cache in; checkpoints/,
metrics.jsonl, results.json out."""

from typing import Any

from vla_lib.core import frontdoor
from vla_lib.training.settings import DiffusionSettings as Settings


def main(settings: Settings) -> dict[str, Any]:
    """Train; returns what results.json holds."""
    from vla_lib.training.loop import train

    return train(settings)


if __name__ == "__main__":
    frontdoor.start(Settings, main)
