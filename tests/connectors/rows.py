"""Conversations for the tests of formats, and the one way in which all of them look at a connector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from connectors import storage
from connectors.base import Connector, Row
from curate.corpus.units import FileEntry, Unit


def conversation(i: int) -> dict[str, Any]:
    """Row i: nested messages, other columns, texts of uneven length with anything in them."""
    text = f"answer {i} — ü 漢字 \u202e <b>&amp;</b> " + "x" * (i * 7919 % 300)
    turns = [{"role": "user", "content": f"question {i}?"}, {"role": "assistant", "content": text}]
    return {"id": f"row-{i}", "messages": turns, "label": "bad" if i % 3 else "good", "n": i}


def conversations(n: int) -> list[dict[str, Any]]:
    return [conversation(i) for i in range(n)]


def scan(
    connector: Connector, url: str, unit_rows: int = 100, unit_bytes: int | None = None
) -> tuple[FileEntry, list[Unit]]:
    info = storage.info(url)
    assert info is not None
    return connector.scan(info, unit_rows, unit_bytes)


def read(connector: Connector, units: Sequence[Unit], columns: Sequence[str]) -> list[Row]:
    """All rows of the units, with the ranges checked."""
    out: list[Row] = []
    for unit in units:
        ranges = []
        for start, stop, rows in connector.read(unit, columns):
            ranges.append((start, stop))
            assert [r.index for r in rows] == list(range(start, stop))
            out += rows
        assert ranges == unit.ranges()
    return out


def check_units(entry: FileEntry, units: Sequence[Unit], unit_rows: int) -> None:
    """The units tile the file."""
    at = 0
    for unit in units:
        assert (unit.key, unit.url, unit.start) == (entry.key, entry.url, at)
        assert 0 < unit.rows <= unit_rows
        at = unit.stop
    assert at == entry.rows


def some(n: int, seed: int = 0, share: float = 0.4) -> np.ndarray:
    """A decision that keeps about `share` of n rows."""
    return np.random.default_rng(seed).random(n) < share
