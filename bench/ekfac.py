"""The fit of EK-FAC factors: CPU seconds and peak memory of curate's against curvlinops', kronfluence's and bergson's.

Each side runs in a process of its own over the same rows of real data (half mathematics, half code), with the same
tracked layers, on one thread in float32 (curate's passes in bfloat16 where asked for), with sampled labels. curvlinops
takes one row at a time, not padded (padding would make its A that of the padding); kronfluence takes batches of rows
of like length. Both make the logits of every position, as their examples do. Seconds are of the CPU, so that a busy
machine changes the ratios little; memory is what the fit adds to the resident set of a process that has loaded the
model.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psutil
import torch

from bench import demo_rows
from bench.common import GIB, MemorySampler, emit, machine
from bench.real_rows import DATA, mixed
from curate.corpus.render import Rendered, Renderer
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.tracked import LayerChoice, TrackedLayer, tracked_layers

BENCH = "ekfac"
PEERS = ("curvlinops", "kronfluence", "bergson")  # the names of their packages too


def rows_of(root: Any, n: int, renderer: Renderer) -> list[Rendered]:
    """`n` rows, half of GSM8K and half of em_code."""
    return mixed("gsm8k", root, n - n // 2, 0, renderer).rendered + mixed("em_code", root, n // 2, 0, renderer).rendered


def _curate(model: Any, layers: Sequence[TrackedLayer], rows: Sequence[Rendered], args: argparse.Namespace) -> Any:
    from bench.local_fit import LocalFit
    from curate.curvature.fisher import CurvatureSpec

    ids = [str(i) for i in range(len(rows))]
    return LocalFit(model, layers, CurvatureSpec(), rows, ids, args.token_budget).seconds


def _curvlinops(model: Any, layers: Sequence[TrackedLayer], rows: Sequence[Rendered], args: argparse.Namespace) -> Any:
    from bench.public_recipe import PublicRecipe, RecipeSpec

    began = time.process_time()
    PublicRecipe(model, layers, RecipeSpec(pad_to=0)).fit(rows)
    return {"fit": time.process_time() - began}


def _kronfluence(model: Any, layers: Sequence[TrackedLayer], rows: Sequence[Rendered], args: argparse.Namespace) -> Any:
    from bench.kronfluence_peer import KronfluencePeer

    peer = KronfluencePeer(model, [layer.name for layer in layers], batch=args.kronfluence_batch)
    peer.fit(rows)
    peer.close()
    return peer.seconds


def _bergson(model: Any, layers: Sequence[TrackedLayer], rows: Sequence[Rendered], args: argparse.Namespace) -> Any:
    from bench import bergson_peer

    began = time.process_time()
    bergson_peer.fit(model, [layer.name for layer in layers], rows, args.token_budget)
    return {"fit": time.process_time() - began}


_SIDES: dict[str, Callable[..., dict[str, float]]] = {
    "curate": _curate,
    "curvlinops": _curvlinops,
    "kronfluence": _kronfluence,
    "bergson": _bergson,
}


def measure(side: str, args: argparse.Namespace) -> dict[str, Any]:
    """One side in this process: seconds of its phases, all of them, bytes added at the peak, tokens."""
    torch.set_num_threads(1)
    spec = ModelSpec(args.model, dtype=args.dtype if side == "curate" else "float32", device="cpu")
    rows = rows_of(args.data, args.rows, Renderer(load_tokenizer(spec), args.max_tokens))
    model = load_model(spec)
    layers, coverage = tracked_layers(model, LayerChoice(args.kind, last=args.last))
    _SIDES[side](model, layers[:4], [min(rows, key=lambda r: r.end)], args)  # so that nobody pays for the first use
    if side != "curate":  # kronfluence has wrapped the layers, and weights ask for gradients
        model = load_model(spec)
    gc.collect()
    before = psutil.Process().memory_info().rss
    cpu, wall = time.process_time(), time.perf_counter()
    with MemorySampler(interval=0.02) as memory:
        phases = _SIDES[side](model, layers, rows, args)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = max(s.rss["driver"] for s in memory.samples)
    return {
        "phases": phases,
        "cpu": cpu,
        "wall": wall,
        "memory": peak - before,
        "tokens": sum(r.end for r in rows),
        "coverage": str(coverage),
    }


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.ekfac", description=__doc__)
    p.add_argument("--data", default=DATA, type=type(DATA), help="folder of the real data")
    p.add_argument("--rows", type=int, default=64, help="rows to fit on")
    p.add_argument("--max-tokens", type=int, default=1024, help="longest row; longer ones are passed over")
    p.add_argument("--token-budget", type=int, default=1024, help="tokens of a batch of curate's, padding included")
    p.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "bfloat16"),
        help="precision of curate's passes (factors are float32); the peers' is float32",
    )
    p.add_argument("--kronfluence-batch", type=int, default=2, help="rows of a batch of kronfluence's")
    p.add_argument("--model", default=demo_rows.MODEL)
    p.add_argument("--kind", default="attention", choices=("attention", "mlp", "all"))
    p.add_argument("--last", type=int, default=20, help="track blocks below this one")
    p.add_argument("--sides", nargs="*", default=list(_SIDES), choices=list(_SIDES))
    p.add_argument("--side", default=None, choices=list(_SIDES), help=argparse.SUPPRESS)
    return p


def _child(side: str, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.ekfac", *arguments, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(given)
    if args.side:
        print(json.dumps(measure(args.side, args)))
        return
    settings = {**{k: str(v) for k, v in vars(args).items() if k not in ("side", "sides")}, **machine(), "threads": 1}
    found: dict[str, dict[str, Any]] = {}
    for side in args.sides:
        if side in PEERS and importlib.util.find_spec(side) is None:
            print(f"{side} is not installed and left out", file=sys.stderr)
            continue
        found[side] = _child(side, given)
    for side, took in found.items():
        about = {**settings, "tokens": took["tokens"], "coverage": took["coverage"]}
        emit(BENCH, f"{side}_seconds", {"cpu": took["cpu"], "wall": took["wall"]}, "s", settings=about)
        emit(BENCH, f"{side}_phases", took["phases"], "s (CPU)", settings=about)
        emit(BENCH, f"{side}_memory", took["memory"] / GIB, "GiB", settings=about)
        emit(BENCH, f"{side}_tokens_per_second", took["tokens"] / took["cpu"], "tokens/s (CPU)", settings=about)
    others = {side: took for side, took in found.items() if side != "curate"}
    if "curate" in found and others:
        ours = found["curate"]
        fastest = min(others, key=lambda side: others[side]["cpu"])
        leanest = min(others, key=lambda side: others[side]["memory"])
        emit(BENCH, "speedup", others[fastest]["cpu"] / ours["cpu"], "x", against=fastest, settings=settings)
        emit(BENCH, "memory_ratio", ours["memory"] / others[leanest]["memory"], "1", against=leanest, settings=settings)


if __name__ == "__main__":
    main()
