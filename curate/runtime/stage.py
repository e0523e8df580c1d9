"""What the stages that stream units have in common: their result, and the refusal of a corpus that is mostly bad.

Imports no model and no scorer: an actor that generates must not carry what scoring imports.
"""

from __future__ import annotations

from dataclasses import dataclass

from curate.corpus.units import Manifest
from curate.errors import CorpusError
from curate.runtime.output import Output

PART_COLUMNS = ("id", "row", "label", "group", "prompt_tokens", "response_tokens")
"""Columns of a score part that are no scores."""


@dataclass(frozen=True)
class StageResult:
    """What a stage did now; rows done by earlier runs are in `already`."""

    rows: int
    already: int
    quarantined: int
    tokens: int
    seconds: float
    peak_worker_gb: float = 0.0


def count_bad(output: Output, manifest: Manifest) -> int:
    """Quarantined rows of `manifest`, of this run and of earlier ones."""
    stops: dict[str, int] = {}
    for u in manifest.units:
        stops[u.key] = max(u.stop, stops.get(u.key, 0))
    return sum(q.row < stops.get(key, 0) for key, q in output.quarantined())


def too_many_bad(output: Output, bad: int, rows: int, allowed: float) -> CorpusError:
    """The error for a corpus of which too much is unusable; shows the commonest reasons."""
    reasons: dict[str, int] = {}
    for _, q in output.quarantined():
        reasons[q.reason] = reasons.get(q.reason, 0) + 1
    top = "; ".join(f"{n} × {r}" for r, n in sorted(reasons.items(), key=lambda kv: -kv[1])[:3])
    return CorpusError(
        f"{bad} of {rows} rows are bad, more than source.max_bad_fraction={allowed:g} allows: {top}. "
        f"They are listed in {output.url}/quarantine; mend the source or raise the limit and run again."
    )
