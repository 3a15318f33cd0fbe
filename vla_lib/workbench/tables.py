"""Frames as tables that fit a page: short columns stay short, sentences wrap, long tables scroll."""

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
from IPython.display import HTML

from vla_lib.core.errors import UserError
from vla_lib.episodes.quality import verdict_table
from vla_lib.workbench.markup import Markup, joined, page

WRAPPING_EM = {"reasons": 24, "problem": 24, "episode": 12, "clock": 12, "used by": 12, "not better than": 12}
VERDICT = ["episode", "layout", "verdict", "seconds", "steps", "valid"]
VERDICT += ["robot_hz", "pose_hz", "sensor_hz", "camera_hz", "reasons"]
RATES = {"robot_hz": "rows Hz", "pose_hz": "poses Hz", "sensor_hz": "sensor Hz", "camera_hz": "camera Hz"}


def fit(frame: pd.DataFrame) -> HTML:
    """A table of at most 480 pixels on screen (it scrolls; printed it is whole). The columns of WRAPPING_EM wrap."""

    def cell(column: str, value: Any, tag: str = "td") -> Markup:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is None or (isinstance(value, float) and pd.isna(value)):
            value = ""
        elif isinstance(value, float):
            value = f"{value:.0f}" if 1000 <= abs(value) < 1e9 else f"{value + 0.0:.3g}"  # no -0
        wrap = "white-space:nowrap" if tag == "td" else ""
        if column in WRAPPING_EM:
            wrap = f"min-width:{WRAPPING_EM[column]}em;white-space:normal;overflow-wrap:anywhere"
        style = f"padding:2px 6px;vertical-align:top;text-align:{'right' if number else 'left'};{wrap}"
        return Markup("<{0} style='{1}'>{2}</{0}>").format(tag, style, str(value))

    heads = joined(cell(column, str(column), "th") for column in frame.columns)
    rows = [map(cell, frame.columns, row) for row in frame.itertuples(index=False)]
    body = joined(Markup("<tr>{}</tr>").format(joined(row)) for row in rows)
    table = Markup(
        "<style>@media print {{.fit-table {{max-height:none !important; overflow:visible !important}}}}</style>"
        "<div class='fit-table' style='max-height:480px;overflow:auto'>"
        "<table style='border-collapse:collapse;font-size:11px;margin:0'><thead><tr>{}</tr></thead>"
        "<tbody>{}</tbody></table></div>"
    )
    return page(table.format(heads, body))


def sentence(text: str) -> HTML:
    """A sentence where a table or a plot would be."""
    return page(Markup("<p>{}</p>").format(text))


def verdicts(summaries: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """The verdicts of all episodes in the columns that fit a page, the ones to record again first."""
    frame = verdict_table(dict(summary) for summary in summaries)
    return frame[[name for name in VERDICT if name in frame]].rename(columns={"seconds": "s", **RATES})


def frame(rows: Iterable[Mapping[str, Any]]) -> pd.DataFrame:
    """Rows of a preflight table as a frame, underscores read as spaces."""
    return pd.DataFrame(list(rows)).rename(columns=lambda name: str(name).replace("_", " "))


def best_report(reports: Iterable[Mapping[str, Any]]) -> Mapping[str, Any]:
    """The report of the episode with the most valid steps. Raises UserError where every one is rejected."""
    kept = [report for report in reports if report["verdict"] != "rejected"]
    if not kept:
        raise UserError(
            "Every episode is rejected, so there is nothing to show; the table of verdicts gives the reasons."
        )
    return max(kept, key=lambda report: report["summary"]["valid"])
