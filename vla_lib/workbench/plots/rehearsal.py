"""The moments of a rehearsal up to now in; one figure of views, sensor, actions, age of the features and latencies out."""

from collections.abc import Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from vla_lib.evaluation.rollout import Moment
from vla_lib.evaluation.sim_robot import BIN_MM
from vla_lib.runtime.run_log import Tick
from vla_lib.workbench.plots.closed_loop import MODES
from vla_lib.workbench.plots.style import style

SHOWN_S = 10.0


def moment(moments: Sequence[Moment], force_limit_mN: float) -> Figure:
    """The newest picture of every view; A-scans, force, actions and age of the VL features of the last 10 s; latencies of the whole run."""
    pictures: dict[str, np.ndarray] = {}
    for seen in moments:
        pictures |= seen.pictures
    ticks = [seen.tick for seen in moments]
    recent = [seen for seen in moments if seen.tick.t_s >= ticks[-1].t_s - SHOWN_S]
    views = sorted(pictures) or ["no picture"]
    with style():
        figure = plt.figure(figsize=(12, 7.2))
        upper, lower = figure.subfigures(2, 1, height_ratios=(1, 2.9))
        for axis, view in zip(np.atleast_1d(upper.subplots(1, len(views))), views, strict=True):
            if view in pictures:
                axis.imshow(pictures[view])
            axis.set(title=view, xticks=[], yticks=[])
            axis.grid(False)
        axes = lower.subplot_mosaic([["scan", "action", "late"], ["force", "age", "work"]], width_ratios=(1.3, 1.3, 1))
        _sensor(axes["scan"], axes["force"], recent, force_limit_mN)
        _ticks(axes["action"], axes["age"], [seen.tick for seen in recent])
        _latencies(axes["late"], axes["work"], ticks, 1000 * moments[-1].period_s)
        last = ticks[-1]
        figure.suptitle(f"{last.t_s:.1f} s: {last.mode}{', ' + last.reason if last.reason else ''}")
    plt.close(figure)
    return figure


def _sensor(scan: Any, force: Any, recent: Sequence[Moment], limit_mN: float) -> None:
    samples = np.concatenate([seen.sensor for seen in recent])
    t_s = np.concatenate([seen.sensor_t_s for seen in recent])
    scan.set(ylabel="distance from tip (mm)", title="OCT A-scans")
    scan.grid(False)
    if len(t_s):
        extent = (t_s[0], t_s[-1], (samples.shape[1] - 1) * BIN_MM, 0)
        scan.imshow(
            samples[:, 1::4].T, aspect="auto", extent=extent, cmap="magma", vmin=10, vmax=100, interpolation="nearest"
        )
        force.plot(t_s, samples[:, 0], color="#c58b00", lw=0.9)
    force.axhline(limit_mN, color="#b5122a", lw=1, ls="--", label="limit")
    force.set(xlabel="time (s)", ylabel="force (mN)")
    force.legend(loc="upper left")


def _ticks(action: Any, age: Any, ticks: Sequence[Tick]) -> None:
    t_s = np.array([tick.t_s for tick in ticks])
    sent = np.array([tick.action for tick in ticks])
    for k, (name, colour) in enumerate((("dx", "#0b6e99"), ("dy", "#c58b00"), ("dz", "#7a3fa0"))):
        action.step(t_s, sent[:, k], where="post", lw=1.2, color=colour, label=name)
    action.set(ylabel="sent (mm a step)", title="actions")
    action.legend(ncols=3, loc="upper left")
    ages = np.array([np.nan if tick.vl_age_s is None else 1000 * tick.vl_age_s for tick in ticks])
    modes = np.array([tick.mode for tick in ticks])
    for mode, colour in MODES.items():
        if (modes == mode).any():
            age.plot(t_s[modes == mode], np.nan_to_num(ages[modes == mode]), ".", ms=5, color=colour, label=mode)
    age.set(xlabel="time (s)", ylabel="age of VL features (ms)", ylim=(0, None))
    age.legend(ncols=3, loc="upper left")


def _latencies(late: Any, work: Any, ticks: Sequence[Tick], deadline_ms: float) -> None:
    late.hist([tick.lateness_ms for tick in ticks], bins=30, color="#0b6e99")
    late.set(xlabel="lateness of a tick (ms)", ylabel="ticks", title=f"{len(ticks)} ticks")
    expert: list[Any] = [tick.expert_ms for tick in ticks if tick.expert_ms is not None]
    work.hist(expert, bins=30, color="#2e7d32")
    work.axvline(deadline_ms, color="#b5122a", lw=1, ls="--", label="deadline")
    work.set(xlabel="duration of the expert (ms)", ylabel="ticks")
    work.legend()
