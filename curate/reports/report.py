"""The report: one HTML file that needs no network, no script and no other file.

In: ReportData. Out: the page as text, or written to a URL. All foreign text passes through `visible`, which escapes
it and marks hidden characters; a Content-Security-Policy forbids the page to load or run anything.
Knows no model, no cluster and no corpus format.
"""

from __future__ import annotations

from functools import lru_cache
from importlib import resources

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from connectors.storage import write_atomic
from curate.reports import text
from curate.reports.data import ReportData
from curate.reports.view import context


@lru_cache(maxsize=1)
def environment() -> Environment:
    """Templates of this folder, with the filters that make foreign text safe."""
    found = Environment(
        loader=PackageLoader("curate.reports", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    strings = (text.visible, text.breakable, text.plain, text.short)
    numbers = (text.whole, text.percent, text.number, text.fixed, text.duration)
    for function in strings + numbers:
        found.filters[function.__name__] = function
    return found


def build(data: ReportData) -> str:
    """The whole page. The same data gives the same text, byte for byte."""
    style = resources.files("curate.reports").joinpath("page.css").read_text(encoding="utf-8")
    return environment().get_template("page.html.j2").render(**context(data), style=Markup(style))


def write(url: str, data: ReportData) -> None:
    """Write the page to `url` (any fsspec URL), whole or not at all.

    Raises:
        StorageError: the place cannot be written; the message names it and the reason.
    """
    write_atomic(url, build(data).encode("utf-8"))
