"""A flow: notebooks with parameters in, run one after another headless unless what they make is up to date; a run folder with one report, one
table and each step's fate out."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.files import write_json
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench.headless import RunResult, run_notebook
from vla_lib.workbench.parameters import notebook_path, resolve
from vla_lib.workbench.report import Section, write_report
from vla_lib.workbench.runs import results_of
from vla_lib.workbench.up_to_date import standing


@dataclass(frozen=True)
class Step:
    """What became of one step: `ran`, `skipped`, `failed`, `cancelled` or `lost`, why, in how long, and the run that holds its results."""

    name: str
    state: str
    why: str
    seconds: float
    run: Path | None = None


@dataclass
class Flow:
    """The steps so far."""

    folder: RunFolder
    steps: list[Step] = field(default_factory=list)

    def run(self, notebook: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """Run a notebook headless, or skip it where what it makes is up to date; returns its results.

        Raises StepFailed where it does not end as done, UserError where its inputs are refused before it starts.
        """
        start = time.monotonic()
        try:
            found = standing(notebook, resolve(notebook_path(notebook), parameters))
        except UserError as error:
            self._add(Step(notebook, "failed", str(error), time.monotonic() - start))
            raise
        if found.current:
            print(f"=== {notebook} skipped: {found.why}", flush=True)
            self._add(Step(notebook, "skipped", found.why, time.monotonic() - start, found.run))
            return found.facts | (results_of(found.run) if found.run else {})
        print(f"=== {notebook} runs: {found.why}", flush=True)
        result = run_notebook(notebook, parameters, flow=self.folder.path.name, **found.record)
        took, state = time.monotonic() - start, "ran" if result.state == "done" else result.state
        self._add(Step(notebook, state, (result.error or found.why).splitlines()[0], took, result.path))
        print(f"=== {notebook} after {clock(took)} {result.told}", flush=True)
        if result.state != "done":
            raise StepFailed(notebook, result)
        return found.facts | results_of(result.path)

    def note(self, name: str, seconds: float) -> None:
        """Note a step that was no notebook."""
        self._add(Step(name, "ran", "", seconds))

    def results(self) -> dict[str, dict[str, Any]]:
        """Step -> its results, of this flow or of the run that made them."""
        return {step.name: results_of(step.run) for step in self.steps if step.run is not None}

    def table(self) -> pd.DataFrame:
        """One row a step; `why` where there is something to say."""
        told = pd.DataFrame(
            [(s.name, s.state, clock(s.seconds), s.why) for s in self.steps], columns=["step", "state", "time", "why"]
        )
        return told if any(told["why"]) else told.drop(columns="why")

    def report(self, title: str, summary: pd.DataFrame, notes: list[str]) -> Path:
        """Write the flow's `report.html`; returns its path."""
        page = self.folder.path / "report.html"
        sections = [Section(s.run, s.why if s.state == "skipped" else "") for s in self.steps if s.run is not None]
        write_report(page, title, [summary, self.table()], sections, notes)
        return page

    def _add(self, step: Step) -> None:
        self.steps.append(step)
        rows = [
            {"step": s.name, "state": s.state, "why": s.why, "seconds": s.seconds, "run": s.run and s.run.name}
            for s in self.steps
        ]
        write_json(self.folder.path / "results.json", {"steps": rows})


class StepFailed(UserError):
    """A step failed or was cancelled: the cause first, then where to look."""

    def __init__(self, notebook: str, result: RunResult):
        super().__init__(f"{result.error}\n{notebook} {result.told}")
        self.result = result
