"""The draws and waits of an epoch's steps in; the counts that its row in metrics.jsonl tells, also across a resumption, out."""

from typing import Any

import numpy as np

T_BINS = 10  # of the diffusion timestep histogram


class Tally:
    """Counts since the last validation, of all processes' draws: VL ages below `ages` (steps), diffusion timesteps below `timesteps` (0: none)."""

    def __init__(self, ages: int, timesteps: int = 0):
        self._timesteps = timesteps
        self._counts = {"ages": np.zeros(ages, np.int64), "timesteps": np.zeros(T_BINS if timesteps else 0, np.int64)}
        self._waited_s = self._took_s = 0.0

    def add(self, ages: np.ndarray, timesteps: np.ndarray | None, waited_s: float, took_s: float) -> None:
        """Take in one optimiser step."""
        self._counts["ages"] += np.bincount(ages, minlength=len(self._counts["ages"]))
        if timesteps is not None:
            self._counts["timesteps"] += np.histogram(timesteps, T_BINS, (0, self._timesteps))[0]
        self._waited_s += waited_s
        self._took_s += took_s

    @property
    def wait_share(self) -> float:
        """Share of the time that was waited for data, 0..1."""
        return self._waited_s / max(self._took_s, 1e-9)

    def row(self) -> dict[str, Any]:
        """What stands beside a validation's figures."""
        row = {"train/loader_wait_share": self.wait_share, "train/vl_reuse_counts": self._counts["ages"].tolist()}
        return row | ({"train/diffusion_t_counts": self._counts["timesteps"].tolist()} if self._timesteps else {})

    def state(self) -> dict[str, Any]:
        """Plain values, for a checkpoint."""
        counts = {name: values.tolist() for name, values in self._counts.items()}
        return {"counts": counts, "waited_s": self._waited_s, "took_s": self._took_s}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` told."""
        self._counts = {name: np.array(values, np.int64) for name, values in state["counts"].items()}
        self._waited_s, self._took_s = state["waited_s"], state["took_s"]
