"""Vector filter by SharedPass against the usual loop: rows/s, the largest difference of the scores, the distance from
what the matrix products alone would take.

The usual loop is what the public implementations do: one example at a time, the full model with its head,
`output_hidden_states=True`, the mean over the response. Both run in this process on one thread over the same tokens,
in alternating repetitions. Ratios are of CPU time, so that a busy machine changes them little; on CUDA of wall time.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from bench import demo_rows
from bench.common import emit, machine
from curate.concepts.concept import direction
from curate.corpus.render import Rendered, Renderer
from curate.models.batching import token_batches
from curate.models.flops import model_cost
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.tap import decoder_parts
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass

BENCH = "vector_filter"


def usual_loop(
    model: PreTrainedModel, rows: Sequence[Rendered], layer: int, unit: np.ndarray, pad_to: int = 0
) -> np.ndarray:
    """Scores [n], one full forward pass a row. With `pad_to`, rows are padded to that length as some recipes do."""
    vector = torch.as_tensor(unit, device=model.device)
    out = np.empty(len(rows))
    for i, row in enumerate(rows):
        fill = max(0, pad_to - len(row.input_ids))
        ids = torch.tensor([row.input_ids + [0] * fill], device=model.device)
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * fill], device=model.device)
        with torch.no_grad():
            states = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        out[i] = (states[layer][0, row.start : row.stop].float().mean(0) @ vector).item()
    return out


def clock(device: torch.device) -> Callable[[], float]:
    if device.type == "cpu":
        return time.process_time

    def now() -> float:
        torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def matmul_peak(model: PreTrainedModel, layers: int, token_counts: Sequence[int]) -> float:
    """FLOP/s of the weights' products alone, over the first `layers` blocks and batches of `token_counts` tokens.

    Every distinct product is timed by itself, its best of at least five.
    """
    device, now = model.device, clock(model.device)
    weights = [w for b in decoder_parts(model).blocks[:layers] for w in b.parameters() if w.ndim == 2]
    best: dict[tuple[int, ...], float] = {}
    flops = seconds = 0.0
    for tokens in token_counts:
        for w in weights:
            key = (tokens, *w.shape)
            if key not in best:
                x = torch.randn(tokens, w.shape[1], device=device, dtype=model.dtype)
                other = torch.randn(*w.shape, device=device, dtype=model.dtype)
                taken: list[float] = []
                while len(taken) < 5 or (sum(taken) < 0.1 and len(taken) < 200):
                    began = now()
                    F.linear(x, other)
                    taken.append(now() - began)
                best[key] = min(taken)
            flops += 2.0 * tokens * w.numel()
            seconds += best[key]
    return flops / seconds


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.vector_filter", description=__doc__)
    p.add_argument("--rows", type=int, default=64, help="rows taken evenly from the embedded corpus")
    p.add_argument("--repetitions", type=int, default=3, help="times that each side runs over all rows")
    p.add_argument("--model", default=demo_rows.MODEL, help="any path that model.path takes")
    p.add_argument("--layer", type=int, default=None, help="tapped layer; default: the middle one")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"))
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--token-budget", type=int, default=4096, help="tokens of a SharedPass batch, padding included")
    p.add_argument("--max-tokens", type=int, default=1024, help="longest row")
    p.add_argument("--pad-to", type=int, default=0, help="pad the usual loop's rows to this many tokens; 0: not at all")
    p.add_argument("--seed", type=int, default=0, help="of the direction that is projected on")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    settings = {**vars(args), **machine(), "threads": 1}
    torch.set_num_threads(1)
    spec = ModelSpec(args.model, dtype=args.dtype, device=args.device)
    concept, layer = demo_rows.random_concept(spec, args.layer, args.seed)
    settings["layer"] = layer
    examples = demo_rows.examples(demo_rows.spread(demo_rows.corpus_rows(), args.rows))
    renderer = Renderer(load_tokenizer(spec), args.max_tokens)
    rows = [renderer.render(e) for e in examples]
    model = load_model(spec)
    shared = SharedPass(model, make_scorers({"vector_filter": {"layers": [layer]}}, [concept]), args.token_budget)
    unit, now = direction(concept, layer), clock(model.device)

    shortest = min(range(len(rows)), key=lambda i: len(rows[i].input_ids))
    usual_loop(model, [rows[shortest]], layer, unit)  # once each, so that nobody pays for what is made at first use
    shared.run([examples[shortest]], [rows[shortest]])
    usual_seconds, shared_seconds = [], []
    usual_wall, shared_wall = [], []
    for repetition in range(args.repetitions):
        for side in ("usual", "shared") if repetition % 2 == 0 else ("shared", "usual"):
            began, wall = now(), time.perf_counter()
            if side == "usual":
                usual_scores = usual_loop(model, rows, layer, unit, args.pad_to)
                usual_seconds.append(now() - began)
                usual_wall.append(time.perf_counter() - wall)
            else:
                result = shared.run(examples, rows)
                shared_seconds.append(now() - began)
                shared_wall.append(time.perf_counter() - wall)
    n = len(rows) * args.repetitions
    ratio = sum(usual_seconds) / sum(shared_seconds)
    emit(BENCH, "usual_rows_per_second", n / sum(usual_seconds), "rows/s", settings=settings)
    emit(BENCH, "rows_per_second", n / sum(shared_seconds), "rows/s", ratio, "usual loop", settings)
    pairs = [u / s for u, s in zip(usual_seconds, shared_seconds, strict=True)]
    spread = {"min": min(pairs), "median": statistics.median(pairs), "max": max(pairs)}
    emit(BENCH, "speedup_of_repetitions", spread, "x", settings=settings)
    wall_ratio = sum(usual_wall) / sum(shared_wall)
    emit(BENCH, "wall_rows_per_second", n / sum(shared_wall), "rows/s", wall_ratio, "usual loop", settings)

    scores = result.columns[shared.columns()[0]]
    gap = np.abs(scores - usual_scores)
    emit(BENCH, "largest_absolute_difference", float(gap.max()), "score", settings=settings)
    emit(BENCH, "largest_relative_difference", float((gap / np.abs(usual_scores)).max()), "1", settings=settings)

    lengths = [r.stop for r in rows]
    counts = [len(b) * max(lengths[i] for i in b) for b in token_batches(lengths, args.token_budget)]
    peak = matmul_peak(model, layer, counts[:: -(-len(counts) // 4)])
    whole = [max(len(r.input_ids), args.pad_to) for r in rows]
    usual_flops = model_cost(model).flops(whole, None, sum(whole))
    emit(BENCH, "matmul_peak", peak, "FLOP/s", settings=settings)
    for metric, flops, seconds in (
        ("pass_flops", result.stats.flops, shared_seconds),
        ("usual_flops", usual_flops, usual_seconds),
    ):
        achieved = flops * args.repetitions / sum(seconds)
        emit(BENCH, metric, achieved, "FLOP/s", achieved / peak, "matmul peak of the pass's shapes", settings)
    emit(BENCH, "arithmetic", result.stats.flops, "FLOP", result.stats.flops / usual_flops, "usual loop", settings)
    padded = result.stats.padded_tokens
    emit(BENCH, "padded_tokens", padded, "tokens", padded / result.stats.tokens, "real tokens", settings)


if __name__ == "__main__":
    main()
