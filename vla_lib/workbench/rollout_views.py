"""Rollouts to look at: sliders over paths and frames, two variants side by side, and a rehearsal while it runs.

A rehearsal is a rollout in real time, in a process of its own: a live view with a Stop button, plain lines headless.
"""

import asyncio
import base64
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import anywidget
import ipywidgets
import numpy as np
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from vla_lib.core.errors import UserError
from vla_lib.evaluation.closed_loop import ClosedLoop, closed_loop
from vla_lib.evaluation.rehearsal import LoopProcess
from vla_lib.evaluation.rollout import Moment, rig_settings, trained_ages_s
from vla_lib.evaluation.settings import RolloutSettings
from vla_lib.evaluation.sim_robot import sim_limits
from vla_lib.runtime.safety import SafetyLimits
from vla_lib.training.checkpoint import read_checkpoint
from vla_lib.workbench.busy_kernel import answering
from vla_lib.workbench.jobs import JobCancelled
from vla_lib.workbench.markup import Html, Markup, joined, page
from vla_lib.workbench.notebook import interactive, shown
from vla_lib.workbench.plots import rollouts as plots
from vla_lib.workbench.plots.rehearsal import moment
from vla_lib.workbench.plots.style import drawn
from vla_lib.workbench.tables import sentence

Rollout = Mapping[str, Any]
Followed = tuple[dict[str, Any], list[Moment]]
ROBOTS = ("simulated rig", "dry run")
FORCE_MN = sim_limits()["force_mN"]  # the limit at which the runner draws the needle back
# at the least; drawing takes a fifth of the time at most: the cores are the control loop's and the VLM's
REDRAW_S = 0.7
LINE_EVERY_S = 2.0


def offline_slider(figures: Iterable[Figure], labels: Sequence[str]) -> HTML:
    """A range input over pictures of the figures: it works in a saved page without a kernel and without the network."""
    identifier = f"s{uuid.uuid4().hex[:8]}"
    images = []
    for number, (label, figure) in enumerate(zip(labels, figures, strict=True)):
        data = base64.b64encode(drawn(figure, "jpeg")).decode()
        image = "<img class='{}' alt='{}' style='max-width:100%;display:{}' src='data:image/jpeg;base64,{}'>"
        images.append(Markup(image).format(identifier, label, "none" if number else "block", data))
    script = Markup(
        "document.querySelectorAll('.{0}').forEach((e,n)=>e.style.display=n==this.value?'block':'none');"
        "document.getElementById('{0}').textContent=document.querySelectorAll('.{0}')[this.value].alt"
    )
    control = Markup(
        "<input type='range' min='0' max='{}' value='0' style='width:60%' aria-label='instant' oninput=\"{}\"> "
        "<span id='{}'>{}</span>"
    ).format(len(labels) - 1, script.format(identifier), identifier, labels[0])
    return page(Markup("<div>{}{}</div>").format(control, joined(images)))


def failures_first(loop: ClosedLoop, most: int) -> list[dict[str, Any]]:
    """At most `most` rollouts: failures of different reasons before more of the same, then successes."""
    seen: dict[str, int] = {}
    ranked = []
    for row in loop.rollouts:
        seen[row["reason"]] = seen.get(row["reason"], 0) + 1
        ranked.append((bool(row["success"]), seen[row["reason"]], row["seed"], row))
    return [row for *_, row in sorted(ranked, key=lambda entry: entry[:3])[:most]]


def verdict(row: Rollout) -> str:
    """Seed and what came of it."""
    return f"seed {row['seed']}: {'success' if row['success'] else row['reason']}"


def _slider(rows: Sequence[Rollout], draw: Callable[[Rollout], Figure]) -> HTML:
    if not rows:
        return sentence("There is no rollout to show frame by frame.")
    return offline_slider(map(draw, rows), [verdict(row) for row in rows])


def paths_slider(loop: ClosedLoop) -> HTML:
    """Six rollouts in space and time, failures first."""
    return _slider(failures_first(loop, 6), lambda row: plots.rollout(row, verdict(row)))


def with_frames(loop: ClosedLoop | None, count: int, workers: int) -> list[dict[str, Any]]:
    """`count` rollouts, failures first, run again with eight moments each: the same seeds give the same rollouts."""
    seeds = [row["seed"] for row in failures_first(loop, count)] if loop else []
    if loop is None or not seeds:
        return []
    return closed_loop({"again": loop.settings}, seeds, workers, frames=8)["again"].rollouts


def frames_slider(rows: Sequence[Rollout]) -> HTML:
    """Rollouts frame by frame: two views, A-scan, force and action."""

    def strip(row: Rollout) -> Figure:
        views = list(row["frames"][0].pictures)
        views = [view for view in ("View1_left", "View5") if view in views] or views[:2]
        return plots.frame_strip(row, views, verdict(row))

    return _slider(rows, strip)


def sensor_slider(rows: Sequence[Rollout]) -> HTML:
    """A-scans and force of rollouts over time."""
    return _slider(rows, lambda row: plots.sensor(row["sensor"], row["sensor_t_s"]))


class PairView:
    """Two variants on the same phantoms, chosen in JupyterLab; headless the first two (one alone with itself)."""

    def __init__(self, found: Mapping[str, ClosedLoop]):
        self.found = found
        names = list(found)
        self.names = names[0], names[min(1, len(names) - 1)]

    def draw(self) -> Figure:
        """The figure of the two that are chosen."""
        one, other = self.names
        return plots.paired(self.found[one], self.found[other], self.names)

    def _ipython_display_(self) -> None:
        if not interactive():
            display(self.draw())
            return
        one, other = (ipywidgets.Dropdown(options=list(self.found), value=name) for name in self.names)
        picture = ipywidgets.Image(value=drawn(self.draw()), format="png", layout={"max_width": "1000px"})

        def redraw(_change: Any) -> None:
            self.names = one.value, other.value
            picture.value = drawn(self.draw())

        one.observe(redraw, "value")
        other.observe(redraw, "value")
        display(ipywidgets.VBox([ipywidgets.HBox([one, Html("against"), other]), picture]))


# ---- a rehearsal


def prepare(
    checkpoint: Path, dataset_root: Path | None, robot: str, **how: Any
) -> tuple[RolloutSettings, pd.DataFrame]:
    """RolloutSettings of a rehearsal, and a table of what will run and which limits hold.

    Raises UserError for an unknown robot or checkpoint.
    """
    if robot not in ROBOTS:
        raise UserError(f"There is no robot {robot!r}; choose {' or '.join(ROBOTS)}.")
    settings = replace(rig_settings(checkpoint, dataset_root, judge=False), **how)
    limits, content = SafetyLimits(**sim_limits()), read_checkpoint(checkpoint)
    youngest, oldest = trained_ages_s(content["policy_config"], content["settings"])
    rows = {
        "checkpoint": shown(checkpoint),
        "robot": robot,
        "pictures": f"{settings.picture_width}x{settings.picture_height} at {settings.camera_hz:g} Hz",
        "execution": settings.execution,
        "age of VL features in training": f"{1000 * youngest:.0f} to {1000 * oldest:.0f} ms",
        "speed": f"{limits.speed_mm_s:g} mm/s, {limits.turn_deg_s:g} deg/s",
        "workspace x, y, z": ", ".join(f"{low:g} to {high:g} mm" for low, high in limits.workspace_mm),
        "force": f"{limits.force_mN:g} mN, then a retreat of {limits.retreat_mm:g} mm",
        "oldest VL features": f"{limits.vl_age_s:g} s",
        "oldest pictures, sensor": f"{limits.picture_age_s:g} s, {limits.sensor_age_s:g} s",
        "hold before a stop": f"{limits.hold_s:g} s",
    }
    return settings, pd.DataFrame(rows.items(), columns=["what", "value"])


async def follow(process: LoopProcess, key: bool = False, force_mN: float = FORCE_MN) -> Followed:
    """Follow a run to its end; returns its record and all moments: `record, moments = await follow(process)`.

    `key`: with the hold-to-run field; `force_mN`: the limit that the view draws.

    Raises JobCancelled where the cell is interrupted (the robot is stopped first), else as `RehearsalProcess.result`.
    """
    view = RehearsalView(process, key, force_mN) if interactive() else PlainView()
    moments: list[Moment] = []
    try:
        with answering():
            while process.running:
                moments += process.poll()
                await view.tick(moments)
                await asyncio.sleep(0.05)
        record = process.result()
    except (asyncio.CancelledError, KeyboardInterrupt):
        process.stop()
        time.sleep(0.5)  # a robot stops within a tick
        raise JobCancelled("the cell was interrupted; the robot is stopped") from None
    finally:
        process.close()
        view.close(moments)
    return record, moments


class HoldKey(anywidget.AnyWidget):
    """A field that calls `held` ten times a second while a person holds its space bar, or a button of a gamepad."""

    _esm = Path(__file__).parent / "browser" / "hold.js"

    def __init__(self, held: Callable[[], None]):
        super().__init__()
        self.on_msg(lambda _widget, _said, _buffers: held())


class PlainView:
    """One line every few seconds."""

    def __init__(self) -> None:
        self._last_s = time.monotonic()
        print("loading the policy and its VLM", flush=True)

    async def tick(self, moments: Sequence[Moment]) -> None:
        """Print what the newest tick says, now and then."""
        if moments and time.monotonic() - self._last_s >= LINE_EVERY_S:
            self._last_s = time.monotonic()
            print(in_words(moments[-1]), flush=True)

    def close(self, moments: Sequence[Moment]) -> None:
        """The last line."""
        if moments:
            print(in_words(moments[-1]), flush=True)


class RehearsalView:
    """Widgets of one run: the newest moment redrawn about once a second, its tick in words, a Stop button; asked for,
    a field that tells the robot's process, ten times a second, that its key is held."""

    def __init__(self, process: LoopProcess, key: bool = False, force_mN: float = FORCE_MN):
        self.process, self.force_mN = process, force_mN
        self._due_s = 0.0
        self._drawing = threading.Lock()  # one at a time: a figure's look is matplotlib's global state
        self._stop = ipywidgets.Button(
            description="Stop", icon="stop", button_style="danger", tooltip="stop the robot now"
        )
        self._stop.on_click(self._stop_clicked)
        self._state = Html(Markup("<b>loading the policy and its VLM</b>"))
        self._picture = ipywidgets.Image(format="jpeg", layout={"max_width": "1100px", "visibility": "hidden"})
        buttons = [self._stop, *([HoldKey(process.hold)] if key else []), self._state]
        display(ipywidgets.VBox([ipywidgets.HBox(buttons), self._picture]))

    async def tick(self, moments: Sequence[Moment]) -> None:
        """Show the newest tick; redraw now and then, in a thread: Stop and the key are heard meanwhile."""
        if moments:
            self._state.value = in_words(moments[-1])
        begun_s = time.monotonic()
        if moments and begun_s >= self._due_s:
            self._show(await asyncio.to_thread(self.draw, moments))
            drawn_s = time.monotonic()
            self._due_s = drawn_s + max(REDRAW_S, 4 * (drawn_s - begun_s))

    def draw(self, moments: Sequence[Moment]) -> bytes:
        """The figure of the newest moment, a JPEG."""
        with self._drawing:
            return drawn(moment(moments, self.force_mN), "jpeg")

    def _show(self, picture: bytes) -> None:
        self._picture.value = picture
        self._picture.layout.visibility = "visible"

    def close(self, moments: Sequence[Moment]) -> None:
        """The last moment stays; the button is dead."""
        self._stop.disabled = True
        if moments:
            self._show(self.draw(moments))
            self._state.value = Markup("<b>over</b>: {}").format(in_words(moments[-1]))

    def _stop_clicked(self, _button: Any) -> None:
        self._state.value = Markup("<b>stopping</b>")
        self.process.stop()


def in_words(seen: Moment) -> str:
    """A tick as a line of text."""
    tick = seen.tick
    why = f", {tick.reason}" if tick.reason else ""
    age = "no VL features yet" if tick.vl_age_s is None else f"VL features {1000 * tick.vl_age_s:.0f} ms old"
    force = "" if tick.force_mN is None else f", {tick.force_mN:.0f} mN"
    return f"{tick.t_s:5.1f} s  {tick.mode}{why}; {age}{force}; tick {tick.lateness_ms:.1f} ms late"


def moments_slider(moments: Sequence[Moment]) -> HTML:
    """The static twin of the live view: four instants, evenly over the run, the last included."""
    if not moments:
        return sentence("There was no tick: the rehearsal ended before its first one.")
    ends = [int(k) for k in np.unique(np.linspace(1, len(moments), 5).round())[1:]]
    figures = (moment(moments[:k], FORCE_MN) for k in ends)
    return offline_slider(figures, [f"{moments[k - 1].tick.t_s:.1f} s" for k in ends])


def outcome(record: Mapping[str, Any]) -> pd.DataFrame:
    """How the rehearsal ended, and how the runner did: one row a figure."""
    runner = record["runner"]
    rows = ({"verdict": verdict(record)} if "seed" in record else {}) | {"ended by": runner["ended"]}
    counts = ("ticks", "failed_stops", "missed_deadlines", "skipped_ticks", "expert_calls", "expert_while_vlm_busy")
    rows |= {name: str(runner[name]) for name in counts}
    for name in ("lateness_ms", "expert_ms", "vlm_ms", "vl_age_s"):
        if found := runner[name]:
            what, unit = name.rsplit("_", 1)
            rows[f"{what} median / p99 / max ({unit})"] = "{median:.3g} / {p99:.3g} / {max:.3g}".format(**found)
    for name in ("modes", "limited", "reasons"):
        rows[name] = ", ".join(f"{key} {count}" for key, count in runner[name].items()) or "none"
    return pd.DataFrame([(name.replace("_", " "), value) for name, value in rows.items()], columns=["what", "value"])


def some_pictures(moments: Sequence[Moment]) -> Figure | HTML:
    """All views at the start, in the middle and at the end, with their times; a sentence where no picture came."""
    seen = [one for one in moments if one.pictures]
    if not seen:
        return sentence("No picture came before the rehearsal ended.")
    chosen = [seen[k] for k in sorted({0, len(seen) // 2, len(seen) - 1})]
    return plots.montage([one.pictures for one in chosen], [f"{one.tick.t_s:.1f} s" for one in chosen])
