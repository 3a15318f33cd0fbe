"""Frames in; tables that fit a page out: short columns stay short, sentences wrap, long tables scroll."""

import html
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from IPython.display import HTML

from vla_lib.episodes.verdict import verdict_table

SENTENCES = ("reasons", "problem")
WRAPPING = ("episode", "clock", "used by", "not better than")
CELL = "padding:2px 6px;text-align:{align};vertical-align:top;{more}"


def fit(frame: pd.DataFrame, precision: int = 3, height_px: int = 480) -> HTML:
    """A table of at most `height_px` on screen (it scrolls; printed it is whole). Columns named in SENTENCES wrap."""

    def cell(column: str, value: Any, tag: str = "td") -> str:
        sentence = column in SENTENCES
        more = "" if tag == "th" else "white-space:nowrap;"
        if column in SENTENCES + WRAPPING:
            more = f"min-width:{24 if sentence else 12}em;white-space:normal;overflow-wrap:anywhere;"
        number = isinstance(value, int | float) and not isinstance(value, bool)
        text = (
            ""
            if value is None or (isinstance(value, float) and pd.isna(value))
            else f"{value:.{precision}g}"
            if isinstance(value, float)
            else str(value)
        )
        text = text.replace("&", "&amp;").replace("<", "&lt;")
        return f"<{tag} style='{CELL.format(align='right' if number else 'left', more=more)}'>{text}</{tag}>"

    head = "".join(cell(column, str(column), "th") for column in frame.columns)
    rows = [
        "".join(cell(column, value) for column, value in zip(frame.columns, row, strict=True))
        for row in frame.itertuples(index=False)
    ]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    style = "<style>@media print {.fit-table {max-height:none !important; overflow:visible !important}}</style>"
    return HTML(
        f"{style}<div class='fit-table' style='max-height:{height_px}px;overflow:auto'>"
        f"<table style='border-collapse:collapse;font-size:11px;margin:0'><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def sentence(text: str) -> HTML:
    """A sentence where a table or a plot would stand."""
    return HTML(f"<p>{html.escape(text)}</p>")


def verdicts(summaries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The verdicts of all episodes in the columns that fit a page, the ones to record again first."""
    frame = verdict_table(dict(summary) for summary in summaries)
    shown = {
        "episode": "episode",
        "layout": "layout",
        "verdict": "verdict",
        "seconds": "s",
        "steps": "steps",
        "valid": "valid",
    }
    shown |= {
        "robot_hz": "rows Hz",
        "pose_hz": "poses Hz",
        "sensor_hz": "sensor Hz",
        "camera_hz": "camera Hz",
        "reasons": "reasons",
    }
    return frame[[name for name in shown if name in frame]].rename(columns=shown)


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of a preflight table as a frame, underscores read as spaces."""
    found = pd.DataFrame(list(rows))
    return found.rename(columns={name: str(name).replace("_", " ") for name in found.columns})
