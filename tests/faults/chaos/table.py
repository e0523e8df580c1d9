"""The table of a chaos run: kind × kills × lost × doubled × redone × orphans × half files, in Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

HEAD = ("job", "killed", "kills", "lost", "doubled", "different", "redone (allowed)", "orphans", "half files")
MORE = ("ended itself", "all gone after, s", "trials", "s per kill")


def markdown(outcomes: Sequence[dict[str, Any]]) -> str:
    """One line a job and kind, from the lines of the log."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for o in outcomes:
        groups.setdefault((o["job"], o["kind"]), []).append(o)
    columns = HEAD + MORE
    lines = [" | ".join(columns), " | ".join("---" for _ in columns)]
    for (job, kind), found in groups.items():
        total = {k: sum(o[k] for o in found) for k in found[0] if isinstance(found[0][k], (int, float))}
        counts = [total[k] for k in ("kills", "lost", "doubled", "different")]
        redone = f"{total['redone']} ({total['allowed']})"
        gone = max(o["gone"] for o in found)
        seconds = total["seconds"] / max(total["kills"], 1)
        hits: Counter[str] = Counter()
        for o in found:
            hits.update(o["hits"])
        named = ", ".join(f"{k} {n}" for k, n in sorted(hits.items())) if kind == "mixed" else kind
        row = [job, named, *counts, redone, total["orphans"], total["half"], total["ended"]]
        lines.append(" | ".join(str(c) for c in (*row, gone, len(found), f"{seconds:.1f}")))
    return "\n".join(f"| {line} |" for line in lines)
