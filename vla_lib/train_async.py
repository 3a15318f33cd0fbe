"""Trains the async policy: action chunks by regression (VLM 3.33 Hz, actions 10 Hz).

`torchrun --nproc_per_node=4 -m vla_lib.train_async --batch-size 4 --grad-accum-steps 8 --lr 1e-4 ...`, or plain
`python -m vla_lib.train_async` on one process. Prepared episodes and their VL cache in; checkpoints/, metrics.jsonl,
results.json out."""

from typing import Any

from vla_lib.core import frontdoor
from vla_lib.training.settings import AsyncSettings as Settings


def main(settings: Settings) -> dict[str, Any]:
    """Train; returns what results.json holds."""
    from vla_lib.training.loop import train

    return train(settings)


if __name__ == "__main__":
    frontdoor.start(Settings, main)
