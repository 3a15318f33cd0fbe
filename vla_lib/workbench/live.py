"""The live progress of a job: bar with ETA, curves and a Stop button in JupyterLab, plain lines headless."""

from pathlib import Path
from typing import Any

import ipywidgets
from IPython.display import display

from vla_lib.core.files import read_jsonl
from vla_lib.core.progress import read_line
from vla_lib.workbench.busy_kernel import answering
from vla_lib.workbench.jobs import Job, explain
from vla_lib.workbench.markup import Html, Markup
from vla_lib.workbench.notebook import dataset_path, interactive, shown
from vla_lib.workbench.plots.style import drawn
from vla_lib.workbench.plots.training import newest_figures, training_curves

REDRAW_EVERY_TICKS = 6  # of half a second
LINES = 8  # of the log
BOLD = Markup("<b>{}</b>")


async def follow(job: Job | Path | str) -> dict[str, Any]:
    """Start `job` and follow it to its end; returns the supervisor's final status: `status = await follow(job)`.

    A notebook whose tab was closed meanwhile shows the job again when it is opened again. A job that runs in that
    folder already, or ended well there with the same command, is shown and not started a second time. Given a run
    folder, its job is shown, whoever started it. Interrupting a cell that only shows a job leaves the job alone; Stop
    stops it. Raises JobFailed or JobCancelled as `Job.watch` does, UserError for a folder without a job.
    """
    if not isinstance(job, Job):
        job = Job.attach(dataset_path(str(job)))
    elif job.running or job.done:
        job = Job.attach(job.run_dir)
    if job.attached:
        again = "" if job.running else "; nothing is started again, run the notebook from its first cell for that"
        print(f"{'running' if job.running else 'ended'} already in {shown(job.run_dir)}{again}", flush=True)
    if not interactive():
        return await job.watch()
    view = TrainingView(job)
    try:
        with answering():
            return await job.watch(view.tick)
    finally:
        view.close()


class TrainingView:
    """Widgets of one job: a bar with its ETA, figures and log lines, curves redrawn now and then, a Stop button."""

    def __init__(self, job: Job):
        self.job = job
        self._lines: list[str] = []
        self._ticks = 0
        self._stop = ipywidgets.Button(
            description="Stop", icon="stop", button_style="danger", tooltip="save a checkpoint and end the job"
        )
        self._stop.on_click(self._stop_clicked)
        self._state = Html(BOLD.format("running" if job.attached else "starting"))
        self._bar = ipywidgets.FloatProgress(min=0.0, max=1.0, layout={"width": "300px", "visibility": "hidden"})
        self._counted = Html()
        self._figures = Html()
        self._log = Html()
        self._curves = ipywidgets.Image(format="png", layout={"max_width": "900px", "display": "none"})
        top = ipywidgets.HBox([self._stop, self._state, self._bar, self._counted])
        display(ipywidgets.VBox([top, self._figures, self._curves, self._log]))
        if job.attached:
            self.draw()

    def tick(self, lines: list[str]) -> None:
        """Show new log lines and what they count; redraw the curves now and then."""
        self._ticks += 1
        if lines:
            self._lines = (self._lines + lines)[-LINES:]
            self._log.value = Markup("<pre style='font-size:12px'>{}</pre>").format("\n".join(self._lines))
            self._count()
        if self._ticks % REDRAW_EVERY_TICKS == 0:
            if self._state.value == BOLD.format("starting"):
                self._state.value = BOLD.format("running")
            self.draw()

    def _count(self) -> None:
        counted = next(filter(None, map(read_line, reversed(self._lines))), None)
        if counted is not None:
            self._bar.value = counted.done / max(counted.total, 1e-9)
            self._bar.layout.visibility = "visible"
            self._counted.value = f"{counted.done:,.10g} of {counted.total:,.10g} {counted.unit}, {counted.left}"

    def draw(self) -> None:
        """Redraw the curves from metrics.jsonl."""
        rows = read_jsonl(self.job.run_dir / "metrics.jsonl")
        if any(key.startswith("train/") for row in rows for key in row):  # a cache job has progress, but no curves
            self._figures.value = newest_figures(rows)
            self._curves.value = drawn(training_curves(rows))
            self._curves.layout.display = "block"

    def close(self) -> None:
        """Last state: the button is dead, the curves are final; a job that was only shown may go on."""
        self.draw()
        self._stop.disabled = True
        status = self.job.status
        ended = status.get("reason") or ("done" if status.get("returncode") == 0 else "failed")
        if ended.startswith("stopped"):
            ended = self.job.stopped(ended)
        elif ended == "failed" and "returncode" in status:
            ended += f": {explain(self.job.log, status['returncode'], status['log_from']).splitlines()[0]}"
        self._state.value = BOLD.format("running on, no longer shown here" if self.job.running else ended)

    def _stop_clicked(self, _button: Any) -> None:
        self._state.value = BOLD.format("stopping: saving a checkpoint")
        self._stop.disabled = True
        self.job.stop()
