"""What a person clicks in JupyterLab, and the static twin of each for headless runs and HTML pages: the same plots."""

import base64
import io
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anywidget
from IPython.display import HTML
from matplotlib.figure import Figure

from vla_lib.core.errors import UserError
from vla_lib.workbench.markup import Markup, joined, page


def drawn(figure: Figure, kind: str = "png") -> bytes:
    """The figure as a picture file: `png`, or `jpeg` where several stand in one page (a third of the bytes)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, pil_kwargs={"quality": 85} if kind == "jpeg" else None)
    return buffer.getvalue()


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


class HoldKey(anywidget.AnyWidget):
    """A field that calls `held` ten times a second while a person holds its space bar, or a button of a gamepad."""

    _esm = Path(__file__).parent / "browser" / "hold.js"

    def __init__(self, held: Callable[[], None]):
        super().__init__()
        self.on_msg(lambda _widget, _said, _buffers: held())


def best_report(reports: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report of the episode with the most valid steps. Raises UserError where every one is rejected."""
    kept = [report for report in reports if report["verdict"] != "rejected"]
    if not kept:
        raise UserError(
            "Every episode is rejected, so there is nothing to show; the table of verdicts gives the reasons."
        )
    return max(kept, key=lambda report: report["summary"]["valid"])
