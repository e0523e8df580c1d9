"""`curate status <url>`: how far a run is, read from its output place alone. Starts no Ray and loads no model.

Exit status: 0 complete, 1 not (yet) complete, 2 an error.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict

from curate.errors import CurateError
from curate.runtime.status import Run, Status, read_status
from curate.runtime.status_stages import Stage

COMPLETE, INCOMPLETE, FAILED = 0, 1, 2
REASONS = 5


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="curate status",
        description="How far a run is, from what lies in its output place; works from any machine that can read it.",
        epilog="Rates and the time left come from the modification times of the parts of the last ten minutes. "
        "Exit status: 0 complete, 1 not complete, 2 an error.",
    )
    parser.add_argument("url", help="the sink.url of a run; or one product's place, or a store")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--watch", type=float, metavar="SECONDS", help="again every so many seconds, until it ends")
    parser.add_argument(
        "--stalled", type=float, default=10.0, metavar="MINUTES", help="without a new part for so long: stalled (10)"
    )
    return parser


def main() -> None:
    """Print the status once, or again and again."""
    args = _parser().parse_args()
    try:
        while True:
            found = read_status(args.url, time.time(), 60.0 * args.stalled)
            if args.watch and not args.json and sys.stdout.isatty():
                sys.stdout.write("\x1b[H\x1b[2J")
            print(json.dumps(asdict(found), ensure_ascii=False) if args.json else text(found), flush=True)
            if not args.watch or found.state in ("complete", "failed", "interrupted"):
                sys.exit(COMPLETE if found.state == "complete" else INCOMPLETE)
            time.sleep(args.watch)
    except CurateError as e:
        print(f"curate status: {e}", file=sys.stderr)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        sys.exit(130)


def text(status: Status) -> str:
    """The status for a person."""
    lines = [f"{status.url}: {status.state}"]
    for run in status.runs:
        lines += ["", *_run(run, status.now)]
    if status.products:
        lines += ["", *(f"{name}: {url}" for name, url in status.products.items())]
    return "\n".join(lines)


def _run(run: Run, now: float) -> Iterator[str]:
    if run.job:
        began = "" if run.started is None else f", begun {_ago(now - run.started)}"
        heard = "" if run.updated is None or run.state == "complete" else f", last heard of {_ago(now - run.updated)}"
        yield f"{run.job} ({run.run}): {run.state}{began}{heard}, on {run.host}"
    said = {
        "silent": "the driver is silent: killed, or cut off from the store. The same command goes on from the parts.",
        "stalled": "the driver lives, but no part comes: workers that cannot start, a judge or store that hangs?",
    }
    if run.job and run.state in said:
        yield f"  {said[run.state]}"
    if run.message:
        yield f"  {run.message}"
    yield from _table(run.stages, now)
    for stage in run.stages:
        if stage.detail:
            yield f"  {stage.stage}: {stage.detail}"
        if stage.reasons:
            shown = "; ".join(f"{n:,} × {reason}" for reason, n in stage.reasons[:REASONS])
            more = f"; and {len(stage.reasons) - REASONS} other reasons" if len(stage.reasons) > REASONS else ""
            yield f"  {stage.stage}, quarantined: {shown}{more}"


def _table(stages: tuple[Stage, ...], now: float) -> Iterator[str]:
    rows = [("stage", "done", "", "rate", "left", "quarantined", "last commit")]
    for s in stages:
        of = "" if s.total is None else f" of {s.total:,}"
        share = f"{s.done / s.total:.0%}" if s.total else ""
        bad = f"{s.quarantined:,} ({s.quarantined / s.done:.2%})" if s.quarantined and s.done else ""
        rate = "" if s.rate is None else f"{s.rate:,.3g}/s" if s.rate < 100 else f"{s.rate:,.0f}/s"
        left = "" if s.left is None else _span(s.left)
        last = "" if s.last is None else _ago(now - s.last)
        rows.append((s.stage, f"{s.done:,}{of} {s.unit}", share, rate, left, bad, last))
    used = [i for i in range(len(rows[0])) if i < 2 or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    for row in rows:
        yield ("  " + "  ".join(row[i].ljust(widths[i]) for i in used)).rstrip()


def _ago(seconds: float) -> str:
    return f"{_span(max(seconds, 0.0))} ago"


def _span(seconds: float) -> str:
    for size, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {name}"
    return f"{seconds:.0f} s"


if __name__ == "__main__":
    main()
