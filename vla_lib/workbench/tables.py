"""Frames as tables that fit a page: short columns stay short, sentences wrap, long tables scroll."""

import html
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from IPython.display import HTML

from vla_lib.episodes.quality import verdict_table

WRAPPING_EM = {"reasons": 24, "problem": 24, "episode": 12, "clock": 12, "used by": 12, "not better than": 12}
STYLE = "@media print {.fit-table {max-height:none !important; overflow:visible !important}}"
VERDICT = ["episode", "layout", "verdict", "seconds", "steps", "valid"]
VERDICT += ["robot_hz", "pose_hz", "sensor_hz", "camera_hz", "reasons"]
RATES = {"robot_hz": "rows Hz", "pose_hz": "poses Hz", "sensor_hz": "sensor Hz", "camera_hz": "camera Hz"}


def fit(frame: pd.DataFrame, precision: int = 3, height_px: int = 480) -> HTML:
    """A table of at most `height_px` on screen (it scrolls; printed it is whole). The columns of WRAPPING_EM wrap."""

    def cell(column: str, value: Any, tag: str = "td") -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (isinstance(value, float) and pd.isna(value)):
            value = ""
        elif isinstance(value, float):
            value = f"{value:.{precision}g}"
        wrap = "white-space:nowrap" if tag == "td" else ""
        if column in WRAPPING_EM:
            wrap = f"min-width:{WRAPPING_EM[column]}em;white-space:normal;overflow-wrap:anywhere"
        style = f"padding:2px 6px;vertical-align:top;text-align:{'right' if number else 'left'};{wrap}"
        return f"<{tag} style='{style}'>{html.escape(str(value), quote=False)}</{tag}>"

    heads = "".join(cell(column, str(column), "th") for column in frame.columns)
    rows = [map(cell, frame.columns, row) for row in frame.itertuples(index=False)]
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    table = f"<table style='border-collapse:collapse;font-size:11px;margin:0'><thead><tr>{heads}</tr></thead>"
    scrolled = f"<div class='fit-table' style='max-height:{height_px}px;overflow:auto'>"
    return HTML(f"<style>{STYLE}</style>{scrolled}{table}<tbody>{body}</tbody></table></div>")


def sentence(text: str) -> HTML:
    """A sentence where a table or a plot would be."""
    return HTML(f"<p>{html.escape(text)}</p>")


def verdicts(summaries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The verdicts of all episodes in the columns that fit a page, the ones to record again first."""
    frame = verdict_table(dict(summary) for summary in summaries)
    return frame[[name for name in VERDICT if name in frame]].rename(columns={"seconds": "s", **RATES})


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of a preflight table as a frame, underscores read as spaces."""
    return pd.DataFrame(list(rows)).rename(columns=lambda name: str(name).replace("_", " "))
