"""HTML pages that open offline: an executed notebook with its plots, and the report of a flow with figures of all its
notebooks.

A notebook chooses what a report shows: the outputs of its cells tagged `report`. A report above 5 MB has its largest
pictures encoded anew.
"""

import base64
import io
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import nbformat
import pandas as pd
from nbconvert import HTMLExporter
from nbconvert.preprocessors import Preprocessor
from PIL import Image

from vla_lib.core.files import write_text
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import read_record
from vla_lib.workbench.markup import Markup, joined

WIDGET = "application/vnd.jupyter.widget-view+json"
STATES = "application/vnd.jupyter.widget-state+json"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } .meta { color: #57606a; } .bad { color: #b42318; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid #d0d7de; padding-top: 1rem; }
table { border-collapse: collapse; margin: .6rem 0; } img { max-width: 100%; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e7eb; text-align: right; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
pre { background: #f6f8fa; padding: .6rem; overflow-x: auto; font-size: 13px; }
"""
LIMIT_BYTES = 5e6  # small enough for a mail
PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=\n]+)")


def export_html(notebook: Path, page: Path) -> None:
    """Write the executed `notebook` as `page`; no script or style is fetched from the network."""
    nb = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="", embed_images=True)
    exporter.register_preprocessor(StaticWidgets, enabled=True)
    body, _ = exporter.from_notebook_node(nb, {"metadata": {"name": notebook.parent.name}})
    write_text(page, body)


class StaticWidgets(Preprocessor):
    """Replaces each widget view by its recorded outputs or by `label = value`: drawing widgets needs the network and a
    kernel."""

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        """Replace the views in every cell's outputs and drop the stored widget state."""
        states = nb.metadata.pop("widgets", {}).get(STATES, {}).get("state", {})
        for cell in nb.cells:
            outputs: list[Any] = []
            for output in cell.get("outputs", []):
                view = output.get("data", {}).get(WIDGET)
                outputs += [output] if view is None else static_outputs(view.get("model_id"), states)
            if cell.cell_type == "code":
                cell.outputs = outputs
        return nb, resources


def static_outputs(model_id: str, states: dict[str, Any]) -> list[Any]:
    """What a widget shows, without the widget: the outputs that it recorded, and one line a control."""
    recorded: list[Any] = []
    lines: list[str] = []

    def visit(identifier: str) -> None:
        state = states.get(identifier, {}).get("state", {})
        if state.get("_model_name") == "OutputModel":
            recorded.extend(nbformat.from_dict(output) for output in state.get("outputs", []))
            return
        for child in state.get("children", []):
            visit(child.removeprefix("IPY_MODEL_"))
        if state.get("_model_name") == "HTMLModel":
            lines.append(Markup(state.get("value", "")))  # escaped by whoever made the widget: see `markup`
        elif state.get("description") and "value" in state:
            lines.append(f"{state['description']} = {state['value']}")

    visit(model_id)
    if lines:
        recorded.insert(0, nbformat.v4.new_output("display_data", data={"text/html": str(joined(lines, "<br>"))}))
    return recorded


class Section(NamedTuple):
    """A run that a report shows; `kept`: why an earlier run's results hold, empty for a new run."""

    run: Path
    kept: str = ""


def write_report(
    page: Path, title: str, tables: Sequence[pd.DataFrame], sections: Sequence[Section], notes: Sequence[str] = ()
) -> None:
    """Write `page`: the first table, the notes, the other tables, then each run with its state, times and the outputs
    of its `report` cells."""
    shown = [Markup(table.to_html(index=False, border=0, na_rep="", classes="words")) for table in tables]
    head = Markup("<title>{0}</title><style>{1}</style></head><body><h1>{0}</h1>")
    parts = [
        Markup("<!doctype html><html lang='en'><head><meta charset='utf-8'>"),
        head.format(title, Markup(STYLE)),
        *shown[:1],
        *(Markup("<p>{}</p>").format(note) for note in notes),
        *shown[1:],
        *(_section(section, page.parent) for section in sections),
        Markup("</body></html>"),
    ]
    write_text(page, _within_limit(str(joined(parts, "\n"))))


def _within_limit(text: str) -> str:
    """The page with its largest pictures as ever coarser JPEG, until it fits."""
    for quality, width in ((80, 2000), (60, 1400), (50, 1000), (40, 700)):
        if len(text.encode()) < LIMIT_BYTES:
            break
        largest = sorted(set(PICTURE.findall(text)), key=len, reverse=True)
        for data in largest[: max(1, len(largest) // 2)]:
            text = text.replace(data, _encoded(data, quality, width))
        text = text.replace("data:image/png;base64,/9j/", "data:image/jpeg;base64,/9j/")  # how every JPEG begins
    return text


def _encoded(data: str, quality: int, width: int) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    flat.thumbnail((width, flat.height))
    buffer = io.BytesIO()
    flat.save(buffer, "JPEG", quality=quality)
    return min(base64.b64encode(buffer.getvalue()).decode(), data, key=len)


def _section(section: Section, start: Path) -> Markup:
    run, record = section.run, read_record(section.run)
    took = clock(record["duration_s"]) if record.get("duration_s") is not None else "-"
    link = quote(os.path.relpath(run / "notebook.html", start))  # a name may hold # or %
    state = Markup("<span class='{}'>{}</span>").format("meta" if record["state"] == "done" else "bad", record["state"])
    whole = Markup("<a href='{}'>the whole notebook</a>").format(link)
    begun = record["started"][:16].replace("T", " ")
    lines = [Markup("<h2>{}</h2>").format(record["name"])]
    lines += [Markup("<p class='meta'>{} · {} UTC · took {} · {}</p>").format(state, begun, took, whole)]
    if section.kept:
        lines.append(Markup("<p class='meta'>not run again: {}</p>").format(section.kept))
    if record.get("error"):
        lines.append(Markup("<pre class='bad'>{}</pre>").format(record["error"]))
    executed = run / "notebook.ipynb"
    for cell in nbformat.read(executed, as_version=4).cells if executed.exists() else []:
        if "report" in cell.metadata.get("tags", []):
            lines += [_output(output) for output in cell.get("outputs", [])]
    return joined(lines, "\n")


def _output(output: Any) -> Markup:
    data = output.get("data", {})
    if "image/png" in data:
        return Markup("<p><img alt='figure' src='data:image/png;base64,{}'></p>").format(data["image/png"].strip())
    if "text/html" in data:
        return Markup(data["text/html"])
    if WIDGET in data:
        return Markup("<p class='meta'>Run in JupyterLab: what it showed is live there. `vla run` saves it here.</p>")
    text = output.get("text") or data.get("text/plain", "")
    return Markup("<pre>{}</pre>").format(text) if text.strip() else Markup("")
