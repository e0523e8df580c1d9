"""Influence scores against plain forwards: what each backend costs for one query and for many, and whether they agree.

A plain forward is the model as it is (all logits, no gradient) over the same batches of tokens; once more with logits
at response tokens only, and once as the vector filter, which stops at its layer. Test vectors are gradients of other
rows' losses, and of a concept's projection at the layer that the vector filter reads: what they were multiplied with
since changes no cost. All run in this process on one thread, in alternating repetitions. Ratios are of CPU time, so
that a busy machine changes them little; on CUDA of wall time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scipy.stats import spearmanr
from transformers import PreTrainedModel

from bench import demo_rows, real_data
from bench.common import emit, machine
from bench.vector_filter import clock
from curate.concepts.concept import Concept, direction
from curate.corpus.example import Example, Message
from curate.corpus.render import Rendered, Renderer
from curate.curvature.test_vector import Dense, TestVector
from curate.errors import BadRow
from curate.models.batching import collate, token_batches
from curate.models.linear_tap import LinearTap
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.pooling import response_mean
from curate.models.response_loss import summed_response_loss
from curate.models.tap import LayerTap, n_layers
from curate.models.tracked import LayerChoice, TrackedLayer, tracked_layers
from curate.scoring.directional.difference import token_losses
from curate.scoring.directional.make import BACKENDS, make_backend
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass

BENCH = "scoring"
Run = Callable[[], object]


def load_rows(data: Path | None, name: str, n: int, renderer: Renderer) -> tuple[list[Example], list[Rendered]]:
    """About `n` rows: of a labelled set in `data` (bad and good alternate), or of the embedded corpus."""
    if data is None:
        found = demo_rows.examples(demo_rows.spread(demo_rows.corpus_rows(), n))
    else:
        found = []
        for bad_prompt, bad, good_prompt, good in real_data.SETS[name](data, n // 2):
            for prompt, text in ((bad_prompt, bad), (good_prompt, good)):
                found.append(Example(str(len(found)), len(found), (*prompt, Message("assistant", text))))
    examples, rows = [], []
    for example in found:
        try:
            rows.append(renderer.render(example))
        except BadRow:
            continue
        examples.append(example)
    return examples, rows


def gradients(
    model: PreTrainedModel, layers: Sequence[TrackedLayer], rows: Sequence[Rendered], concept: Concept | None = None
) -> TestVector:
    """∇f of each row as a query: f = -L, or the projection on the concept at its layer."""
    blocks = {layer.name: torch.zeros((len(rows), layer.out, layer.width)) for layer in layers}
    tap = LinearTap(model, layers, None if concept is None else concept.layer)
    for q, row in enumerate(rows):
        ids = torch.tensor([row.input_ids[: row.end]], device=model.device)
        span = [row.start], [row.end]

        def f(last: torch.Tensor, ids: torch.Tensor = ids, span: tuple[list[int], list[int]] = span) -> torch.Tensor:
            if concept is None:
                return -summed_response_loss(model, last, ids, *span) / (span[1][0] - max(span[0][0], 1))
            assert concept.layer is not None
            unit = torch.as_tensor(direction(concept, concept.layer), device=last.device)
            return (response_mean(last, *span) @ unit).sum()

        def keep(layer: TrackedLayer, a: torch.Tensor, delta: torch.Tensor, q: int = q) -> None:
            blocks[layer.name][q] = (delta[0].float().T @ a[0].float()).cpu()

        tap.backward(ids, f, keep)
    kind = "loss" if concept is None else concept.name
    names = tuple(f"{kind}-{q}" for q in range(len(rows)))
    return TestVector(names, tuple(layers), {name: Dense(block) for name, block in blocks.items()}, {})


def plain(model: PreTrainedModel, rows: Sequence[Rendered], budget: int, whole: bool) -> None:
    """A forward of all rows in the batches that a backend makes; logits of all tokens, or losses of the response."""
    tap = LayerTap(model, [n_layers(model)])
    for index in token_batches([r.end for r in rows], budget):
        part = [rows[i] for i in index]
        ids, _ = collate([r.input_ids[: r.end] for r in part], 0, device=model.device)
        if whole:
            with torch.no_grad():
                model(input_ids=ids)
        else:
            last = tap(ids[:, :-1])[tap.n_layers]
            token_losses(model, last, ids, [r.start for r in part], [r.end for r in part])


def timed(runs: dict[str, Run], repetitions: int, now: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each run in each repetition; every other repetition in reverse order."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repetition in range(repetitions):
        for name in list(runs) if repetition % 2 == 0 else list(runs)[::-1]:
            began = now()
            runs[name]()
            seconds[name].append(now() - began)
    return seconds


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.scoring", description=__doc__)
    p.add_argument("--data", type=Path, default=None, help="folder of labelled sets; default: the embedded corpus")
    p.add_argument("--set", default="gsm8k", choices=sorted(real_data.SETS), help="which set of it")
    p.add_argument("--rows", type=int, default=16)
    p.add_argument("--queries", type=int, nargs="+", default=[1, 4, 16], help="query counts")
    p.add_argument("--repetitions", type=int, default=2)
    p.add_argument("--model", default=demo_rows.MODEL, help="any path that model.path takes")
    p.add_argument("--kind", default="attention", choices=("attention", "mlp", "all"), help="tracked layers")
    p.add_argument("--last", type=int, default=20, help="blocks below this one are tracked")
    p.add_argument("--layer", type=int, default=15, help="of the vector filter, and of the concept")
    p.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--token-budget", type=int, default=2048, help="tokens of a batch, padding included")
    p.add_argument("--max-tokens", type=int, default=1024, help="longest row")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    spec = ModelSpec(args.model, dtype=args.dtype, device=args.device)
    renderer = Renderer(load_tokenizer(spec), args.max_tokens)
    most = max(args.queries)
    examples, rows = load_rows(args.data, args.set, args.rows + most + most % 2, renderer)
    queries, examples, rows = rows[:most], examples[most:], rows[most:]
    model = load_model(spec)
    now = clock(model.device)
    settings = {**vars(args), "data": None if args.data is None else args.set, **machine(), "threads": 1}
    settings["tokens"], settings["response_tokens"] = sum(r.end for r in rows), sum(r.end - r.start for r in rows)
    layers, _ = tracked_layers(model, LayerChoice(kind=args.kind, last=args.last))
    vector = gradients(model, layers, queries)
    plain(model, rows[:1], args.token_budget, True)

    backends = [name for name in BACKENDS if not (name == "difference" and args.dtype != "float32")]
    runs: dict[str, Run] = {
        "plain": lambda: plain(model, rows, args.token_budget, True),
        "plain_response_logits": lambda: plain(model, rows, args.token_budget, False),
    }
    scores: dict[str, np.ndarray] = {}
    for count in args.queries:
        some = _first(vector, count)
        for name in backends:
            if name == "difference" and count > 4:
                continue  # each query costs as much as the first
            backend = make_backend(name, model, some, args.token_budget)

            def run(key: str = f"{name}.{count}", backend=backend) -> None:  # type: ignore[no-untyped-def]
                scores[key] = backend.run(rows).scores

            runs[f"{name}.{count}"] = run
    concept, layer = demo_rows.random_concept(spec, args.layer, 0)
    below, _ = tracked_layers(model, LayerChoice(kind=args.kind, last=min(args.last, layer)))
    towards = gradients(model, below, queries[:1], concept)
    vector_filter = SharedPass(
        model, make_scorers({"vector_filter": {"layers": [layer]}}, [concept]), args.token_budget
    )
    runs["vector_filter"] = lambda: vector_filter.run(examples, rows)
    for name in ["auto", *backends]:
        made = make_scorers({"concept_influence": {"backend": name}}, test_vectors={"concept_influence": towards})
        shared = SharedPass(model, made, args.token_budget)
        runs[f"concept_influence.{name}"] = lambda shared=shared: shared.run(examples, rows)  # type: ignore[misc]

    seconds = timed(runs, args.repetitions, now)
    emit(BENCH, "plain_tokens_per_second", settings["tokens"] / median(seconds["plain"]), "tokens/s", settings=settings)
    for name, taken in seconds.items():
        against = "vector_filter" if name.startswith("concept_influence") else "plain"
        for other in (against, "plain_response_logits") if against == "plain" else (against,):
            if name != other:
                ratio = sum(taken) / sum(seconds[other])
                emit(BENCH, f"{name}.seconds", sum(taken) / len(taken), "s", ratio, other, settings)
    for key, found in scores.items():
        name, count = key.split(".")
        if name != "contraction":
            reference = scores[f"contraction.{count}"]
            gap = np.abs(found - reference).max(0) / np.abs(reference).max(0)
            rank = min(spearmanr(found[:, q], reference[:, q]).statistic for q in range(found.shape[1]))
            emit(BENCH, f"{key}.largest_relative_difference", float(gap.max()), "1", settings=settings)
            emit(BENCH, f"{key}.least_spearman", float(rank), "1", settings=settings)


def _first(vector: TestVector, count: int) -> TestVector:
    blocks = {name: Dense(block.dense()[:count]) for name, block in vector.blocks.items()}
    return TestVector(vector.names[:count], vector.layers, blocks, {})


if __name__ == "__main__":
    main()
