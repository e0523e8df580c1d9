"""A paper model of a corpus too large to try: what its rows, parts and files would cost, from measured constants.

In: the JSON lines of bench.scale and bench.s3_requests. Out: a Markdown table. Nothing is measured here. The driver's
memory is a sum of constants times counts; storage requests likewise; GPU hours are the scored tokens times the floating
point operations of a forward pass up to the tapped layer, over a device's peak and the share of it that is reached.

    python -m bench.paper scale.jsonl s3_requests.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GB, TB = 1e9, 1e12


@dataclass(frozen=True)
class Corpus:
    """`file_rows` rows a file, `unit_rows` rows a unit, `tokens` a row."""

    rows: float
    unit_rows: int
    file_rows: int
    tokens: int

    @property
    def units(self) -> float:
        return self.rows / self.unit_rows

    @property
    def files(self) -> float:
        return self.rows / self.file_rows


def constants(lines: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{metric: value}, of several sizes the largest (the last)."""
    return {line["metric"]: line["value"] for line in lines}


def forward_flops(width: int, mlp: int, key_value: int, blocks: int) -> float:
    """Multiplications and additions of one token in `blocks` gated blocks, attention scores left out."""
    return 2.0 * blocks * (2 * width * width + 2 * width * key_value + 3 * width * mlp)


def requests(found: Mapping[str, Any], corpus: Corpus) -> tuple[float, float]:
    """(those that cost like a PUT: PUT, LIST, …; those that cost like a GET: GET, HEAD)."""
    dear = cheap = 0.0
    for name, by in found.items():
        if not isinstance(by, Mapping) or "by_unit" not in by:
            continue
        n = by["fixed"] + by["by_file"] * corpus.files + by["by_unit"] * corpus.units
        if name in ("GetObject", "HeadObject", "HeadBucket"):
            cheap += n
        elif not name.startswith("Delete"):
            dear += n
    return dear, cheap


def model(found: Mapping[str, Any], corpus: Corpus, args: argparse.Namespace) -> dict[str, str]:
    """{what: how much}, of one corpus."""
    units, rows = corpus.units, corpus.rows
    held = units * (found["manifest_held"] + found["parts_held"])
    ranking = rows * (8 * args.columns + found["decide_peak"])
    store = rows * (1 + 8 + 8 + 8)  # kept, score, rank, quantile
    listings = args.listings * (units // 1000 + 1)
    dear, cheap = requests(found, corpus)
    dear += listings
    dollars = dear * args.put / 1e6 + cheap * args.get / 1e6
    flops = rows * corpus.tokens * forward_flops(args.width, args.mlp, args.key_value, args.blocks)
    hours = flops / (args.peak * args.share) / 3600
    cpu = rows / args.rows_per_second / 3600
    return {
        "units (parts); files": f"{_count(units)}; {_count(corpus.files)}",
        "manifest, stored": _bytes(units * found["manifest_stored"]),
        "driver: manifest and list of parts": _bytes(held),
        "driver: items in Ray Data, at most": _known(found, "stream_driver_peak", units, _bytes),
        "driver: what is left, and the last check": _seconds(
            1e-6 * units * (found["remaining"] + found["check_whole"])
        ),
        "items through Ray Data, driver, reader and actor on two cores": _known(
            found, "stream_item", 1e-3 * units, _seconds
        ),
        "driver: scores read for the selection": _seconds(1e-6 * rows * found["load_scores"]),
        "driver: ranking": _seconds(1e-6 * rows * found["decide"]),
        "driver: memory of the ranking": _bytes(ranking),
        "object store: the decision, on each node": _bytes(store),
        "score parts; ledger": f"{_bytes(rows * found['part_stored'])}; {_bytes(rows * found['ledger_stored'])}",
        f"LIST requests, {args.listings} listings; at 0.1 s each": f"{_count(listings)}; {_seconds(0.1 * listings)}",
        "requests like PUT; like GET": f"{_count(dear)}; {_count(cheap)}",
        "requests, US dollars": f"{dollars:,.2f}" if dollars < 100 else f"{dollars:,.0f}",
        "GPU hours of the score pass": _count(hours),
        "hours of one core for reading, tokenising, commits": _count(cpu),
    }


def _known(found: Mapping[str, Any], name: str, times: float, shown: Callable[[float], str]) -> str:
    """A constant that is only there where Ray was measured too."""
    return shown(times * found[name]) if name in found else "–"


def _count(n: float) -> str:
    for size, name in ((1e9, " billion"), (1e6, " million")):
        if n >= size:
            return f"{n / size:,.3g}{name}"
    return f"{n:,.0f}" if n >= 10 else f"{n:.2g}"


def _bytes(n: float) -> str:
    return f"{n / TB:.3g} TB" if n >= TB else f"{n / GB:.3g} GB" if n >= GB else f"{n / 1e6:.3g} MB"


def _seconds(s: float) -> str:
    return f"{s / 3600:.3g} h" if s >= 7200 else f"{s / 60:.3g} min" if s >= 120 else f"{s:.3g} s"


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.paper", description=__doc__)
    p.add_argument("files", type=Path, nargs="+", help="JSON lines of bench.scale and bench.s3_requests")
    p.add_argument("--rows", type=float, nargs="+", default=[1e6, 1e8, 1e10])
    p.add_argument("--file-rows", type=int, default=50_000)
    p.add_argument("--tokens", type=int, default=500, help="of a row")
    p.add_argument("--columns", type=int, default=2, help="score columns")
    p.add_argument("--listings", type=int, default=8, help="of all parts, in one run")
    p.add_argument("--put", type=float, default=5.0, help="dollars a million PUT or LIST requests")
    p.add_argument("--get", type=float, default=0.4, help="dollars a million GET requests")
    p.add_argument(
        "--width", type=int, default=4096, help="of the model; defaults: 8 billion parameters, layer 16 of 32"
    )
    p.add_argument("--mlp", type=int, default=14336)
    p.add_argument("--key-value", type=int, default=1024)
    p.add_argument("--blocks", type=int, default=16, help="blocks below the tapped layer")
    p.add_argument("--peak", type=float, default=989e12, help="FLOP/s of a GPU; default: H100, dense bfloat16")
    p.add_argument("--share", type=float, default=0.4, help="share of the peak that is reached")
    p.add_argument("--rows-per-second", type=float, default=1000.0, help="of one core, all but the model")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    found = constants([json.loads(line) for path in args.files for line in path.read_text().splitlines()])
    sizes = [*((n, 512) for n in args.rows), *((n, 8192) for n in args.rows[1:])]
    columns = [model(found, Corpus(n, u, args.file_rows, args.tokens), args) for n, u in sizes]
    print("| | " + " | ".join(f"{_count(n)} rows, units of {u:,}" for n, u in sizes) + " |")
    print("|---|" + "---|" * len(sizes))
    for what in columns[0]:
        print(f"| {what} | " + " | ".join(c[what] for c in columns) + " |")


if __name__ == "__main__":
    main()
