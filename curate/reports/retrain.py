"""The page of a retraining sweep: did removing what a score points at change what the model does?

In: RetrainData. Out: one HTML file that needs no network, no script and no other file. Foreign text passes through
`visible`, as in `report`. Knows no model, no cluster and no files but the page's own.
"""

from __future__ import annotations

from connectors.storage import write_atomic
from curate.reports.report import rendered
from curate.reports.retrain_data import RetrainData
from curate.reports.retrain_view import context


def build(data: RetrainData) -> str:
    """The whole page. The same data gives the same text, byte for byte."""
    return rendered("retrain.html.j2", context(data))


def write(url: str, data: RetrainData) -> None:
    """Write the page to `url` (any fsspec URL), whole or not at all.

    Raises:
        StorageError: the place cannot be written; the message names it and the reason.
    """
    write_atomic(url, build(data).encode("utf-8"))
