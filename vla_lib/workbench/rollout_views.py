"""Rollouts on the simulated rig in; sliders over their paths and film strips, and a choice of two variants to compare, out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from IPython.display import HTML

from vla_lib.evaluation.closed_loop import ClosedLoop
from vla_lib.workbench.notebook import interactive
from vla_lib.workbench.plots import closed_loop as plots
from vla_lib.workbench.plots import sim as sim_plots
from vla_lib.workbench.widgets import drawn, offline_slider


def failures_first(loop: ClosedLoop, most: int) -> list[dict[str, Any]]:
    """At most `most` rollouts: failures of different reasons before more of the same, then successes."""
    seen: dict[str, int] = {}
    ranked = []
    for row in loop.rollouts:
        seen[row["reason"]] = seen.get(row["reason"], 0) + 1
        ranked.append((bool(row["success"]), seen[row["reason"]], row["seed"], row))
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:3])[:most]]


def verdict(row: Mapping[str, Any]) -> str:
    """Seed and what came of it."""
    return f"seed {row['seed']}: {'success' if row['success'] else row['reason']}"


def paths_slider(loop: ClosedLoop, most: int = 6) -> HTML:
    """Paths in 3-D and from above with target and membrane, depth and force over time; failures first."""
    rows = failures_first(loop, most)
    return offline_slider(
        (sim_plots.rollout(row["path"], row["truth"], verdict(row)) for row in rows), [verdict(row) for row in rows]
    )


def from_above(loop: ClosedLoop) -> Any:
    """All rollouts about their targets (a Figure)."""
    rows = loop.rollouts
    paths = [np.asarray(row["path"]["position_mm"]) for row in rows]
    return sim_plots.rollouts_from_above(paths, [row["truth"] for row in rows], [bool(row["success"]) for row in rows])


def films_slider(films: Sequence[Mapping[str, Any]]) -> HTML:
    """Film strips of filmed rollouts: pictures, A-scan, force and action."""
    views = [view for view in ("View1_left", "View5") if view in films[0]["frames"][0].pictures] or list(
        films[0]["frames"][0].pictures
    )[:2]
    return offline_slider((plots.film_strip(film, views) for film in films), [verdict(film) for film in films])


def sensor_slider(films: Sequence[Mapping[str, Any]]) -> HTML:
    """A-scans and force over the time of filmed rollouts."""
    return offline_slider(
        (sim_plots.sensor_m_mode(film["sensor"], film["sensor_t_s"]) for film in films),
        [verdict(film) for film in films],
    )


class PairView:
    """Two variants on the same phantoms, chosen in JupyterLab; headless the first two (the first with itself where there is only one)."""

    def __init__(self, found: Mapping[str, ClosedLoop]):
        self.found = found
        names = list(found)
        self.names = names[0], names[min(1, len(names) - 1)]

    def draw(self) -> Any:
        """The figure of the two that are chosen."""
        return plots.paired(*(self.found[name] for name in self.names), self.names)

    def _ipython_display_(self) -> None:
        from IPython.display import display

        if not interactive():
            display(self.draw())
            return
        import ipywidgets

        one, other = (ipywidgets.Dropdown(options=list(self.found), value=name) for name in self.names)
        picture = ipywidgets.Image(value=drawn(self.draw()), format="png", layout={"max_width": "1000px"})

        def redraw(_change: Any) -> None:
            self.names = one.value, other.value
            picture.value = drawn(self.draw())

        one.observe(redraw, "value")
        other.observe(redraw, "value")
        display(ipywidgets.VBox([ipywidgets.HBox([one, ipywidgets.HTML("against"), other]), picture]))
