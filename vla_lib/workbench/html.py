"""An executed notebook in; one HTML page that opens offline, plots included, out."""

import html
from pathlib import Path
from typing import Any

import nbformat
from nbconvert import HTMLExporter
from nbconvert.preprocessors import Preprocessor

from vla_lib.core.files import write_text

WIDGET = "application/vnd.jupyter.widget-view+json"


class StaticWidgets(Preprocessor):
    """Replaces each widget view by its recorded outputs or by `label = value`: drawing widgets needs the network and a kernel."""

    def preprocess(self, nb: Any, resources: Any) -> tuple[Any, Any]:
        """Replace the views in every cell's outputs and drop the stored widget state."""
        states = nb.metadata.get("widgets", {}).get("application/vnd.jupyter.widget-state+json", {}).get("state", {})
        for cell in nb.cells:
            if cell.cell_type != "code":
                continue
            outputs = []
            for output in cell.outputs:
                view = (
                    output.get("data", {}).get(WIDGET)
                    if output.output_type in ("display_data", "execute_result")
                    else None
                )
                outputs += [output] if view is None else static_outputs(view.get("model_id"), states)
            cell.outputs = outputs
        nb.metadata.pop("widgets", None)
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
            lines.append(state.get("value", ""))
        elif state.get("description") and "value" in state:
            lines.append(html.escape(f"{state['description']} = {state['value']}"))

    visit(model_id)
    if lines:
        recorded.insert(0, nbformat.v4.new_output("display_data", data={"text/html": "<br>".join(lines)}))
    return recorded


def export_html(notebook: Path, page: Path) -> None:
    """Write the executed `notebook` as `page`; no script or style is fetched from the network."""
    nb = nbformat.read(notebook, as_version=4)
    exporter = HTMLExporter(mathjax_url="", require_js_url="", jquery_url="", mermaid_js_url="", embed_images=True)
    exporter.register_preprocessor(StaticWidgets, enabled=True)
    body, _ = exporter.from_notebook_node(nb, {"metadata": {"name": notebook.parent.name}})
    write_text(page, body)
