"""The page of a layer-stride study: one HTML file with its picture and its table.

In: LayerStrides. Out: the page as text. Knows no model and no files.
"""

from __future__ import annotations

import math
from typing import Any

from curate.evaluation.layer_stride import LayerStrides
from curate.reports import plots
from curate.reports.report import rendered


def build(study: LayerStrides, title: str, level: float = 0.9) -> str:
    """The whole page; `level` is the rank correlation that is asked for. The same study gives the same text."""
    return rendered("layer_stride.html.j2", _context(study, title, level))


def _context(study: LayerStrides, title: str, level: float) -> dict[str, Any]:
    strides = [s.stride for s in study.strides]
    lines = [
        plots.Band(
            strides,
            [s.correlation[q] for s in study.strides],
            [s.lowest[q] for s in study.strides],
            [s.highest[q] for s in study.strides],
            q % 6,
        )
        for q in range(len(study.names))
    ]
    alt = f"Rank correlation with stride 1 for strides 1 to {strides[-1]}"
    largest = study.largest(level)
    return {
        "title": title,
        "study": study,
        "level": level,
        "pictures": {
            size: plots.stride_curves(lines, level, f"stride-{size}", alt, width, height)
            for size, width, height in (("wide", 920, 360), ("narrow", 350, 280))
        },
        "legend": [
            {"name": name, "colour": q % 6, "dash": q % 6, "largest": largest[q]} for q, name in enumerate(study.names)
        ],
        "least": min(largest),
        "rows": [
            {
                "stride": s.stride,
                "blocks": len(s.blocks),
                "share": len(s.blocks) / len(study.blocks),
                "cells": [_cell(*c) for c in zip(s.correlation, s.lowest, s.highest, strict=True)],
            }
            for s in study.strides
        ],
    }


def _cell(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "spread": math.isfinite(low) and high - low >= 0.005}
