"""Tables and run folders of a flow in; one offline HTML page with its figures and a link to each notebook out.

A notebook chooses what a report shows: the outputs of its cells tagged `report`. A page above 5 MB has its largest pictures encoded anew.
"""

import base64
import html
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
import pandas as pd
from PIL import Image

from vla_lib.core.files import write_text
from vla_lib.core.progress import clock
from vla_lib.core.run_folder import read_record

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-top: 1px solid #d0d7de; padding-top: 1rem; }
table { border-collapse: collapse; margin: .6rem 0; } th, td { padding: .25rem .7rem; border-bottom: 1px solid #e3e7eb; text-align: right; }
th:first-child, td:first-child, .words th, .words td { text-align: left; } img { max-width: 100%; } .meta { color: #57606a; } .bad { color: #b42318; }
pre { background: #f6f8fa; padding: .6rem; overflow-x: auto; font-size: 13px; }
"""

LIMIT_BYTES = 5e6  # small enough for a mail
PICTURE = re.compile(r"data:image/(?:png|jpeg);base64,([A-Za-z0-9+/=\n]+)")


@dataclass(frozen=True)
class Section:
    """A run that the report shows; `kept`: why an earlier run's results stand, empty for a new run."""

    run: Path
    kept: str = ""


def write_report(
    page: Path, title: str, tables: list[pd.DataFrame], sections: list[Section], notes: list[str] = ()
) -> None:
    """Write `page`: the first table, the notes, the other tables, then each run with its state, times and the outputs of its `report` cells."""
    parts = [
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
    ]
    parts.append(f"<h1>{html.escape(title)}</h1>")
    shown = [table.to_html(index=False, border=0, na_rep="", classes="words") for table in tables]
    parts += [*shown[:1], *(f"<p>{html.escape(note)}</p>" for note in notes), *shown[1:]]
    parts += [_section(section, page.parent) for section in sections]
    parts.append("</body></html>")
    write_text(page, _within_limit("\n".join(parts)))


def _within_limit(text: str) -> str:
    """The page with its largest pictures as ever coarser JPEG, until it fits."""
    for quality, width in ((80, 2000), (60, 1400), (50, 1000), (40, 700)):
        if len(text.encode()) < LIMIT_BYTES:
            break
        largest = sorted({found.group(1) for found in PICTURE.finditer(text)}, key=len, reverse=True)
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
    small = base64.b64encode(buffer.getvalue()).decode()
    return small if len(small) < len(data) else data


def _section(section: Section, start: Path) -> str:
    run, record = section.run, read_record(section.run)
    link = html.escape(os.path.relpath(run / "notebook.html", start))
    took = clock(record["duration_s"]) if record.get("duration_s") is not None else "-"
    lines = [f"<h2>{html.escape(record['name'])}</h2>"]
    state = f"<span class='{'meta' if record['state'] == 'done' else 'bad'}'>{record['state']}</span>"
    lines.append(
        f"<p class='meta'>{state} · {html.escape(record['started'][:16].replace('T', ' '))} UTC · took {took} · <a href='{link}'>the whole notebook</a></p>"
    )
    if section.kept:
        lines.append(f"<p class='meta'>not run again: {html.escape(section.kept)}</p>")
    if record.get("error"):
        lines.append(f"<pre class='bad'>{html.escape(record['error'])}</pre>")
    executed = run / "notebook.ipynb"
    if executed.exists():
        for cell in nbformat.read(executed, as_version=4).cells:
            if cell.cell_type == "code" and "report" in cell.metadata.get("tags", []):
                lines += [_output(output) for output in cell.outputs]
    return "\n".join(lines)


def _output(output: Any) -> str:
    data = output.get("data", {})
    if "image/png" in data:
        return f"<p><img alt='figure' src='data:image/png;base64,{data['image/png'].strip()}'></p>"
    if "text/html" in data:
        return data["text/html"]
    text = output.get("text") or data.get("text/plain", "")
    return f"<pre>{html.escape(text)}</pre>" if text.strip() else ""
