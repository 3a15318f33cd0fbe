"""A running training job in; live progress out: curves, ETA and a Stop button in JupyterLab, plain lines headless."""

from typing import Any

from vla_lib.core.files import read_jsonl
from vla_lib.workbench.jobs import Job
from vla_lib.workbench.notebook import interactive

REDRAW_EVERY_TICKS = 6  # of half a second


async def follow(job: Job) -> dict[str, Any]:
    """Start `job` and follow it to its end; returns the supervisor's final status.

    `status = await follow(job)` in a cell. Raises JobFailed or JobCancelled as `Job.watch` does.
    """
    if not interactive():
        return await job.watch()
    view = TrainingView(job)
    try:
        return await job.watch(view.tick)
    finally:
        view.close()


class TrainingView:
    """Widgets of one job: its newest log lines, its curves redrawn every few seconds, a Stop button."""

    def __init__(self, job: Job):
        import ipywidgets
        from IPython.display import display

        self.job = job
        self._lines: list[str] = []
        self._ticks = 0
        self._stop = ipywidgets.Button(description="Stop", icon="stop", button_style="danger", tooltip="save a checkpoint and end the job")
        self._stop.on_click(self._stop_clicked)
        self._state = ipywidgets.HTML("<b>starting</b>")
        self._log = ipywidgets.HTML()
        self._curves = ipywidgets.Image(format="png", layout={"max_width": "900px", "visibility": "hidden"})
        display(ipywidgets.VBox([ipywidgets.HBox([self._stop, self._state]), self._curves, self._log]))

    def tick(self, lines: list[str]) -> None:
        """Show new log lines; redraw the curves now and then."""
        import html

        self._ticks += 1
        if lines:
            self._lines = (self._lines + lines)[-8:]
            self._log.value = "<pre style='font-size:12px'>" + html.escape("\n".join(self._lines)) + "</pre>"
        if self._ticks % REDRAW_EVERY_TICKS == 0:
            self._state.value = "<b>running</b>"
            self.draw()

    def draw(self) -> None:
        """Redraw the curves from metrics.jsonl."""
        import io

        from vla_lib.workbench.plots.training import training_curves

        rows = read_jsonl(self.job.run_dir / "metrics.jsonl")
        if any(key.startswith("train/") for row in rows for key in row):  # a cache job has progress, but no curves
            picture = io.BytesIO()
            training_curves(rows).savefig(picture, format="png")
            self._curves.value = picture.getvalue()
            self._curves.layout.visibility = "visible"

    def close(self) -> None:
        """Last state: the button is dead, the curves are final."""
        self.draw()
        self._stop.disabled = True
        status = self.job.status
        self._state.value = f"<b>{status.get('reason') or ('done' if status.get('returncode') == 0 else 'failed')}</b>"

    def _stop_clicked(self, _button: Any) -> None:
        self._state.value = "<b>stopping: saving a checkpoint</b>"
        self.job.stop()
