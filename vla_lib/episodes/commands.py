"""What a policy ordered during a rollout (`inference_results_*.json` in `async_inference_*`): a stream to look at.

A list of predictions, each with `timestamp` (UNIX seconds of the recorder) and `actions`: the chunk of which the first
action was sent. Units and frame are the policy's own and are not recorded. Nothing is trained on it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vla_lib.episodes.findings import Findings
from vla_lib.episodes.timeline import in_seconds

Array = np.ndarray[Any, Any]

ACTION_KEYS = ("actions", "action")
POLICY = "policy"
MOST_BYTES = 200_000_000  # an hour at 10 Hz has 20 MB


@dataclass(frozen=True)
class Commands:
    """The action that was sent at each prediction."""

    t_s: Array  # (K,) UNIX seconds of the robot's clock, rising
    action: Array  # (K, 6) float32: x y z and three angles, in the policy's units


def read_commands(paths: Sequence[Path], ahead_s: float, findings: Findings) -> Commands | None:
    """All predictions of an episode; None where there is none that can be read (said in `findings`).

    ahead_s: how far the recorder's clock is ahead of the robot's.
    """
    found: list[tuple[float, list[float]]] = []
    for path in paths:
        try:
            if path.stat().st_size > MOST_BYTES:
                raise ValueError(f"it has {path.stat().st_size / 1e6:.0f} MB")
            predictions = _predictions(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            findings.note(POLICY, f"{path.name} cannot be read as what a policy ordered ({error})")
            continue
        sent = [one for one in map(_sent, predictions) if one is not None]
        if len(sent) < len(predictions) or not sent:
            kept = f"{len(sent)} of its {len(predictions)} predictions have a time and an action"
            findings.note(POLICY, f"{path.name}: {kept}")
        found += sent
    if not found:
        return None
    t_s = in_seconds(np.array([time for time, _ in found]), POLICY, findings) - ahead_s
    order = np.argsort(t_s, kind="stable")
    return Commands(t_s[order], np.array([action for _, action in found], np.float32)[order])


def _predictions(content: Any) -> list[Any]:
    """The list of predictions: the file's value, or the longest list in it."""
    if isinstance(content, dict):
        content = max((value for value in content.values() if isinstance(value, list)), key=len, default=None)
    if not isinstance(content, list):
        raise ValueError("it holds no list of predictions")
    return content


def _sent(prediction: Any) -> tuple[float, list[float]] | None:
    """Time and first action of one prediction; None where it has none."""
    if not isinstance(prediction, dict):
        return None
    chunk = next((prediction[key] for key in ACTION_KEYS if key in prediction), None)
    try:
        time, first = float(prediction["timestamp"]), np.atleast_2d(np.asarray(chunk, np.float64))[0, :6]
    except (KeyError, TypeError, ValueError, IndexError):
        return None
    return (time, first.tolist()) if len(first) == 6 and np.isfinite([time, *first]).all() else None
