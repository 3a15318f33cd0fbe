"""A flow: notebooks with parameters in, run one after another headless; a run folder with one report, one table and each stage's fate out."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from vla_lib.core.errors import UserError
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import RunFolder
from vla_lib.workbench.headless import RunResult, run_notebook
from vla_lib.workbench.notebook import shown
from vla_lib.workbench.parameters import notebook_path, resolve
from vla_lib.workbench.report import write_report


@dataclass(frozen=True)
class Stage:
    """One notebook of a flow and the parameters that differ from its defaults."""

    notebook: str
    parameters: dict[str, Any] = field(default_factory=dict)


@dataclass
class Flow:
    """The stages that have run, their run folders and times."""

    folder: RunFolder
    runs: list[RunResult] = field(default_factory=list)
    times_s: dict[str, float] = field(default_factory=dict)

    def run(self, stages: list[Stage]) -> None:
        """Run the stages in order. All parameters are checked before the first starts. Raises StageFailed at the first that does not end as done."""
        for stage in stages:
            resolve(notebook_path(stage.notebook), stage.parameters)
        for stage in stages:
            print(f"\n=== {stage.notebook}", flush=True)
            start = time.monotonic()
            result = run_notebook(stage.notebook, stage.parameters)
            self.runs.append(result)
            self.times_s[stage.notebook] = time.monotonic() - start
            print(f"=== {stage.notebook} {result.state} after {clock(self.times_s[stage.notebook])}: {shown(result.page)}", flush=True)
            if result.state != "done":
                raise StageFailed(stage.notebook, result)

    def report(self, title: str, summary: pd.DataFrame, notes: list[str]) -> Path:
        """Write the flow's `report.html`; returns its path."""
        page = self.folder.path / "report.html"
        write_report(page, title, summary, [result.path for result in self.runs], notes)
        return page


class StageFailed(UserError):
    """A stage of a flow failed or was cancelled: the cause first, then where to look."""

    def __init__(self, notebook: str, result: RunResult):
        super().__init__(f"{result.error}\n{notebook} {result.state}; the whole notebook: {shown(result.page)}")
        self.result = result
