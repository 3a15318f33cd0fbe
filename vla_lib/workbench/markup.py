"""The one place where text meets HTML: whatever is not Markup is text, and is escaped.

Names, notes, errors and labels come from files and from other programs: a folder may be named `<img onerror=...>`.
`Markup("<b>{}</b>").format(text)` escapes what it is given, so that HTML is only what stands in our own code; `Html`
and `page` escape what is no Markup. Nobody else in the workbench makes HTML of a string (a test looks).
"""

from typing import Any

import ipywidgets
import traitlets
from IPython.display import HTML
from markupsafe import Markup, escape

__all__ = ["Html", "Markup", "joined", "page"]


class Html(ipywidgets.HTML):
    """The HTML widget that takes text for text: a `value` that is no Markup is escaped."""

    def __init__(self, value: str = "", **keywords: Any):
        super().__init__(escape(value), **keywords)

    @traitlets.validate("value")
    def _escaped(self, proposal: Any) -> Markup:
        return escape(proposal["value"])


def page(content: str) -> HTML:
    """What a cell shows as HTML: `content`, escaped where it is no Markup."""
    return HTML(str(escape(content)))


def joined(parts: Any, between: str = "") -> Markup:
    """The parts one after the other, escaped where they are no Markup."""
    return Markup(between).join(parts)
