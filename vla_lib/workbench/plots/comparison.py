"""Several runs in one plot: learning curves, results with intervals, a sweep's spread over seeds, Optuna's plots."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure
from optuna.exceptions import ExperimentalWarning
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import TrialState
from optuna.visualization import matplotlib as drawn_by_optuna

from vla_lib.workbench.plots.style import SERIES, Panels, nth, panels, plot, say
from vla_lib.workbench.plots.training import LOSSES, smooth

Row = Mapping[str, Any]


@plot
def learning_curves(runs: Mapping[str, Sequence[Row]], by: str = "step", axes: Panels = None) -> Figure:
    """Training loss (running mean) and held-out error of each run, `by` step or time (minutes of training)."""
    figure, (loss, held_out) = panels(axes, (10, 4.2), (1, 2))
    scale = 1 / 60 if by == "time" else 1
    along = "elapsed_s" if by == "time" else "step"
    for number, (label, rows) in enumerate(runs.items()):
        colour, style, marker, _ = nth(number)
        steps = [row for row in rows if any(name in row for name in LOSSES)]
        if steps:
            name = next(name for name in LOSSES if name in steps[0])
            values = smooth(np.array([row[name] for row in steps]))
            look: dict[str, Any] = {
                "color": colour,
                "ls": style,
                "marker": marker,
                "markevery": max(1, len(values) // 6),
                "ms": 4,
            }
            loss.plot([row[along] * scale for row in steps], values, label=label, **look)
        when = {row["step"]: row["elapsed_s"] for row in steps}
        validations = [row for row in rows if "val/action_loss" in row]
        at = [(when.get(row["step"], 0.0) if by == "time" else row["step"]) * scale for row in validations]
        held_out.plot(at, [row["val/action_loss"] for row in validations], marker, ls=style, ms=3, color=colour)
    loss.set(ylabel="training loss (normalised units)", title="training loss, running mean")
    held_out.set(ylabel="action error (Huber, in std)", title="held-out episodes")
    for panel in (loss, held_out):
        panel.set_xlabel("time of training (min)" if by == "time" else "optimiser step")
        if not panel.lines:
            say(panel, "no run that trains is ticked")
    if loss.lines:
        loss.set_yscale("log")
        figure.legend(*loss.get_legend_handles_labels(), loc="outside lower left", ncols=2)
    return figure


@plot
def success(loops: Mapping[str, Row], axes: Panels = None) -> Figure:
    """Share of phantoms hit by each run, with its 95 % interval."""
    found = [(label, loop["summary"]) for label, loop in loops.items() if loop["summary"]["rollouts"]]
    figure, (panel,) = panels(axes, (8, 0.4 * max(len(found), 1) + 1.3))
    for place, (_, summary) in enumerate(found):
        low, high = summary["interval_95"]
        panel.plot([100 * low, 100 * high], [place, place], color=SERIES[0], lw=2)
        panel.plot(100 * summary["success_rate"], place, "o", color=SERIES[0])
    panel.set_yticks(range(len(found)), [f"{label} ({one['rollouts']} phantoms)" for label, one in found])
    panel.set(xlim=(0, 100), xlabel="phantoms hit (%), with 95 % interval", title="Closed loop")
    panel.invert_yaxis()
    if not found:
        panel.axis("off")
        say(panel, "no evaluation names a checkpoint of these runs")
    return figure


@plot
def seed_spread(entries: Sequence[Row], settings: pd.DataFrame, objective: str, axes: Panels = None) -> Figure:
    """The objective of every run of a sweep, a row a setting in the order of `settings` (see `comparison.settings`),
    with a bar at its mean."""
    figure, (panel,) = panels(axes, (8, 0.28 * max(len(settings), 1) + 1.4))
    places = {setting: place for place, setting in enumerate(settings["setting"])}
    ended = [one for one in entries if one["value"] is not None]
    panel.plot([one["value"] for one in ended], [places[one["setting"]] for one in ended], "o", ms=4, alpha=0.7)
    panel.plot(settings["mean"], list(places.values()), "|", ms=14, color=SERIES[4])
    panel.set_yticks(list(places.values()), list(places))
    panel.invert_yaxis()
    panel.set(xlabel=f"{objective}, a dot a run, a bar at the mean", title="Spread over seeds, best first")
    if not places:
        say(panel, "no run has ended with the objective yet")
    return figure


@plot
def of_study(study: optuna.Study, what: str, objective: str) -> Figure:
    """Optuna's own plot of a study: history, importances, parallel (coordinates) or slice."""
    drawers: dict[str, Callable[[], Any]] = {
        "history": lambda: drawn_by_optuna.plot_optimization_history(study, target_name=objective),
        "importances": lambda: drawn_by_optuna.plot_param_importances(study, evaluator=PedAnovaImportanceEvaluator()),
        "parallel": lambda: drawn_by_optuna.plot_parallel_coordinate(study, target_name=objective),
        "slice": lambda: drawn_by_optuna.plot_slice(study, target_name=objective),
    }
    ended = [one for one in study.get_trials(deepcopy=False) if one.state == TrialState.COMPLETE]
    values = {one.values[0] for one in ended if np.isfinite(one.values[0])}
    varied = {name for one in ended for name in one.params}
    if len(values) < 2 or (what != "history" and not varied):
        figure, (panel,) = panels(None, (8, 1.2))
        panel.axis("off")
        say(panel, f"{what}: two runs with different results are needed, and a parameter that varies")
        return figure
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        axes = np.ravel(drawers[what]())[0]
    figure = axes.get_figure()
    pyplot.close(figure)  # the notebook draws it once, as a cell's value
    for panel in figure.axes:  # Optuna brings a look of its own
        panel.set_facecolor("white")
        if what == "importances" and (legend := panel.get_legend()):
            legend.remove()
    figure.set_size_inches(min(10.0, 3.2 * max(2, len(figure.axes))), 4)
    return figure
