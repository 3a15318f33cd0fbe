"""Deployment to look at and to press: the streams live, the preflight's lines, a person's ticks, stages, outcomes.

In JupyterLab with widgets; headless and on a terminal the same as plain lines.
"""

import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets
import pandas as pd
from IPython.display import HTML, display
from matplotlib.figure import Figure

from vla_lib.core.errors import UserError
from vla_lib.evaluation.deployment import STAGES, Deployment, DeploySettings, Stage
from vla_lib.evaluation.preflight import PERSON, Check, look
from vla_lib.evaluation.rollout import Moment
from vla_lib.robots.lab_robot import LabRobot
from vla_lib.robots.recording import judge
from vla_lib.runtime.robot_io import Observation
from vla_lib.workbench import tables
from vla_lib.workbench.busy_kernel import answering
from vla_lib.workbench.markup import Html, Markup
from vla_lib.workbench.notebook import interactive, shown
from vla_lib.workbench.plots.rehearsal import rig
from vla_lib.workbench.plots.style import drawn
from vla_lib.workbench.record import ask_outcome, stream_table
from vla_lib.workbench.rollout_views import follow, outcome

REDRAW_S = 1.0
MARKS = {True: "passed", False: "FAILED", None: "look"}


def look_at(session: Deployment) -> Figure:
    """The first stage: look for `look_s` seconds, with the rig live while nothing moves (pictures, A-scan, force, pose,
    the streams' table); the last moment as a figure. Raises UserError where a stream is silent."""
    picture, table = ipywidgets.Image(format="jpeg", layout={"max_width": "1100px"}), Html()
    box = ipywidgets.VBox([picture, table])
    due_s = 0.0

    def show(observation: Observation, rows: list[dict[str, Any]]) -> None:
        nonlocal due_s
        if time.monotonic() < due_s:
            return
        due_s = time.monotonic() + REDRAW_S
        if interactive():
            table.value = Markup("<pre>{}</pre>").format(stream_table(rows).to_string(index=False))
            picture.value = drawn(rig(observation), "jpeg")
            return
        rates = ", ".join(f"{row['stream']} {row['rate_hz']:g} Hz" for row in rows)
        print(f"{rates}; pose {observation.state[6:].round(2).tolist()}", flush=True)

    if interactive():
        display(box)
    with answering(), LabRobot(session.robot) as robot:
        seen = look(robot, session.settings.look_s, show)
    box.close()  # the last moment's figure takes its place
    session.end("look", {"seen": seen})
    return rig(seen.newest)


def streams(session: Deployment) -> pd.DataFrame:
    """The streams' table of the look."""
    assert session.seen is not None
    return stream_table(session.seen.streams[-1])


def check_table(checks: Sequence[Check]) -> pd.DataFrame:
    """One row a line of the preflight, with its evidence."""
    rows = [(check.what, MARKS[check.passed], check.evidence) for check in checks]
    return pd.DataFrame(rows, columns=["what", "", "evidence"])


async def run_stage(session: Deployment, stage: Stage) -> list[Moment] | HTML:
    """Run a stage with its live view and Stop; its moments, or a sentence where it was not asked for. Raises UserError
    where it is not open."""
    if STAGES.index(stage) > STAGES.index(session.settings.until):
        return tables.sentence(f"This session was asked for until {session.settings.until}.")
    process = session.start(stage)
    key = session.settings.hold_to_run and stage in ("first motion", "task")
    record, moments = await follow(process, key, session.robot.safety().force_mN)
    session.last = record
    passed = session.end(stage, record)
    print(f"{stage}: {'passed' if passed else 'NOT passed'}, ended by {record['log'].ended}", flush=True)
    for line in record.get("notes", ()):
        print(line, flush=True)
    if "folder" in record:
        print(f"recorded: {shown(record['folder'])}", flush=True)
    return moments


def stage_table(session: Deployment) -> Any:
    """How the newest stage went: one row a figure."""
    if not session.last:
        return tables.sentence("No stage has run.")
    return tables.fit(outcome({"runner": session.last["log"].summary()}))


class PersonList:
    """What a person has to check: in JupyterLab boxes to tick and a name; elsewhere `ticked` of the settings counts."""

    def __init__(self, session: Deployment):
        self.session = session
        if session.settings.ticked and session.settings.operator:
            session.tick(session.settings.ticked, session.settings.operator)
        self.name = ipywidgets.Text(session.settings.operator, description="name")
        self.boxes = {
            name: ipywidgets.Checkbox(name in session.ticked, description=text, indent=False, layout={"width": "60em"})
            for name, text in PERSON.items()
        }
        self.said = Html()
        for name, box in self.boxes.items():
            box.observe(lambda change, name=name: self._changed(name, change["new"]), "value")

    def _changed(self, name: str, ticked: bool) -> None:
        try:
            if ticked:
                self.session.tick([name], self.name.value)
            else:
                self.session.ticked.pop(name, None)
        except UserError as error:
            self.boxes[name].value = False
            self.said.value = str(error)
        else:
            self.said.value = Markup("ticked: {}").format(", ".join(self.session.ticked) or "nothing")

    def table(self) -> pd.DataFrame:
        """What is ticked by whom."""
        rows = [(text, self.session.ticked.get(name, "not ticked")) for name, text in PERSON.items()]
        return pd.DataFrame(rows, columns=["what", "by"])

    def _ipython_display_(self) -> None:
        if interactive():
            display(ipywidgets.VBox([self.name, *self.boxes.values(), self.said]))
        else:
            display(tables.fit(self.table()))


class OutcomeForm:
    """Asks whether a recorded run succeeded, and for a note; headless it says that nobody has judged it."""

    def __init__(self, session: Deployment):
        self.folder: Path | None = (session.last or {}).get("folder")
        self.success = ipywidgets.ToggleButtons(options=[("success", True), ("failure", False), ("not judged", None)])
        self.success.value = None
        self.note = ipywidgets.Text(placeholder="a note", layout={"width": "40em"})
        self.name = ipywidgets.Text(session.settings.operator, description="name")
        self.save = ipywidgets.Button(description="Keep", icon="check")
        self.said = Html()
        self.save.on_click(self._keep)

    def _keep(self, _button: Any) -> None:
        if self.folder is None or not self.name.value.strip():
            self.said.value = "give your name"
            return
        self.folder = judge(self.folder, self.success.value, self.note.value.strip(), self.name.value.strip())
        self.said.value = Markup("kept: {}").format(shown(self.folder))

    def _ipython_display_(self) -> None:
        if self.folder is None:
            display(tables.sentence("Nothing was recorded."))
        elif interactive():
            display(ipywidgets.VBox([self.success, self.note, self.name, self.save, self.said]))
        else:
            display(tables.sentence(f"Nobody has judged {shown(self.folder)} yet."))


def on_terminal(settings: DeploySettings) -> dict[str, Any]:
    """A session on a terminal, to `settings.until` or to the first stage that does not pass. Returns stage -> whether
    it passed."""
    session = Deployment(settings)
    wanted = STAGES[: STAGES.index(settings.until) + 1]
    look_at(session)
    print(streams(session).to_string(index=False), flush=True)
    for stage in wanted[1:]:
        if stage == "dry run":
            _tick_on_terminal(session)
        elif stage in ("first motion", "task") and sys.stdin.isatty():
            input(f"The arm will move: {stage}. A hand on the emergency stop, then Enter. ")
        asyncio.run(run_stage(session, stage))
        if stage == "preflight":
            print(check_table(session.checks).to_string(index=False), flush=True)
        if stage == "task" and session.last and sys.stdin.isatty():
            ask_outcome(session.last["folder"], settings.operator)
        if stage not in session.passed:
            break
    return {stage: stage in session.passed for stage in wanted}


def _tick_on_terminal(session: Deployment) -> None:
    if session.settings.ticked:
        session.tick(session.settings.ticked, session.settings.operator)
    if not sys.stdin.isatty():
        return
    for name, text in PERSON.items():
        if name not in session.ticked and input(f"{text} [y/n] ").strip().lower().startswith("y"):
            session.tick([name], session.settings.operator or input("Your name: "))
