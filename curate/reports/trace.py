"""The page of a trace: which training rows, through which latents, made the model answer a test item as it does?

In: TraceData. Out: one HTML file that needs no network and no other file. Foreign text passes through `visible`, as in
`report`. Its one script is ours, never changes with the data, and is named by its hash in the Content-Security-Policy,
so that no other script can run. Knows no model, no cluster and no files but the page's own.
"""

from __future__ import annotations

from connectors.storage import write_atomic
from curate.reports.report import rendered
from curate.reports.trace_data import TraceData
from curate.reports.trace_view import context


def build(data: TraceData) -> str:
    """The whole page. The same data gives the same text, byte for byte."""
    return rendered("trace.html.j2", context(data), ("page.css", "trace.css"), "trace.js")


def write(url: str, data: TraceData) -> None:
    """Write the page to `url` (any fsspec URL), whole or not at all.

    Raises:
        StorageError: the place cannot be written; the message names it and the reason.
    """
    write_atomic(url, build(data).encode("utf-8"))
