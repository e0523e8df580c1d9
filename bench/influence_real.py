"""Which method finds the bad rows? AUC-PR and ROC-AUC of every method on real labelled data.

SmolLM2 is fine-tuned (LoRA) on a mixed set of real rows, half of them bad (wrong mathematics, insecure code), each of a
question of its own. The methods score those rows; queries and concept come from pairs to other questions. In: a folder
of data sets. Out: a JSON line a figure, and a table. One process, no cluster.

The concept is the difference of means of the base model's activations over the queries' bad and good answers, all at
one layer. H is fitted on the mixed set itself, in the finetuned model with its adapter merged. In a name,
"influence_function.contrast" is f = L(good) − L(bad) with EK-FAC, "gradient_product.contrast" the same with H = I.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import average_precision_score, roc_auc_score

from bench import demo_rows
from bench.common import emit, machine
from bench.finetune import LoraSpec, finetune, save
from bench.local_fit import LocalFit
from bench.real_data import SETS
from bench.real_rows import DATA, Mixed, mixed
from curate.concepts.concept import Concept
from curate.concepts.persona import mean_difference
from curate.corpus.render import Rendered, Renderer
from curate.curvature.behaviour import BehaviourSpec, make_behaviour, query_gradients
from curate.curvature.ekfac import Damping, Factor
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.queries import Query, render_queries
from curate.curvature.test_vector import TestVector, solve_all
from curate.errors import BadRow
from curate.models.batching import collate, token_batches
from curate.models.engines import GenerationSpec, row_seed
from curate.models.load import ModelSpec, identity, load_model, load_tokenizer
from curate.models.pooling import response_mean
from curate.models.tap import LayerTap, n_layers
from curate.models.tracked import LayerChoice, tracked_layers
from curate.models.transformers_engine import TransformersEngine
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass

BENCH = "influence_real"


def concept_of(name: str, queries: Sequence[Query], spec: ModelSpec, layer: int, budget: int) -> Concept:
    """Mean response activation of the queries' positive answers less that of the negative ones, at every layer."""
    model = load_model(spec)
    tap = LayerTap(model, range(n_layers(model) + 1))
    sides: dict[str, list[Rendered]] = {
        "positive": [q.positive for q in queries],
        "negative": [q.negative for q in queries if q.negative is not None],
    }
    means = {}
    for side, rows in sides.items():
        found = np.empty((len(rows), n_layers(model) + 1, model.config.hidden_size), dtype=np.float32)
        for batch in token_batches([len(r.input_ids) for r in rows], budget):
            ids, _ = collate([rows[i].input_ids for i in batch], 0)
            spans = [rows[i].start for i in batch], [rows[i].stop for i in batch]
            for at, state in tap(ids.to(model.device)).items():
                found[batch, at] = response_mean(state, *spans).cpu().numpy()
        means[side] = found
    vectors = mean_difference(means["positive"], means["negative"])
    return Concept(name, vectors, layer, identity(spec), "mean_difference", "response_mean")


def own_answers(spec: ModelSpec, data: Mixed, renderer: Renderer, tokens: int) -> list[Rendered | None]:
    """The base model's own answers to the rows' prompts; None where it gives none."""
    engine = TransformersEngine(spec, GenerationSpec(max_new_tokens=tokens, engine="transformers", max_batch=16))
    prompts = [renderer.prompt_ids(row) for row in data.rows]
    found: list[Rendered | None] = []
    for row, answer in zip(data.rows, engine.generate(prompts, [row_seed(0, r.id) for r in data.rows]), strict=True):
        try:
            found.append(renderer.render_pair(row, answer.text))
        except BadRow:
            found.append(None)
    engine.close()
    return found


def test_vectors(
    model: Any, concept: Concept, queries: Sequence[Query], data: Mixed, args: argparse.Namespace
) -> dict[str, TestVector]:
    """Of every gradient method. Layers: attention of the blocks below `args.last`."""
    layers, coverage = tracked_layers(model, LayerChoice(last=args.last))
    emit(BENCH, "coverage", coverage.share, "1", settings={"set": concept.name})
    of_loss = [make_behaviour(BehaviourSpec(kind)) for kind in ("loss", "contrast")]
    of_concept = [make_behaviour(BehaviourSpec(kind), concept) for kind in ("concept", "concept_contrast")]
    # Every other row is bad: neighbours are taken together, to keep the mixture.
    couples, wanted = len(data.rows) // 2, max(1, args.fit_rows // 2)
    chosen = [2 * (i * couples // wanted) + side for i in range(min(wanted, couples)) for side in (0, 1)]
    rows = [data.rendered[i] for i in chosen]
    ids = [data.rows[i].id for i in chosen]
    fit = LocalFit(model, layers, CurvatureSpec(), rows, ids, args.token_budget)
    gradients = query_gradients(model, layers, [*of_loss, *of_concept], queries, 0)
    damping = Damping(args.damping)
    first, second = ({b.name: gradients[b.name] for b in group} for group in (of_loss, of_concept))
    return {
        "influence_function": solve_all(first, layers, lambda layer: fit.factors[layer.name], damping),
        "concept_influence": solve_all(second, layers, lambda layer: fit.factors[layer.name], damping),
        "gradient_product": solve_all(gradients, layers, lambda layer: Factor(layer, "identity"), damping),
    }


def table(name: str, found: dict[str, dict[str, float]]) -> str:
    """The figures as Markdown, best AUC-PR first."""
    lines = [f"| {name} | AUC-PR | ROC-AUC |", "|---|---|---|"]
    for column in sorted(found["auc_pr"], key=lambda c: -found["auc_pr"][c]):
        lines.append(f"| {column} | {found['auc_pr'][column]:.3f} | {found['roc_auc'][column]:.3f} |")
    return "\n".join(lines)


def run(name: str, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """{"auc_pr": {column: value}, "roc_auc": …} of one data set; seconds of every step are printed."""
    seconds: dict[str, float] = {}
    mark = time.process_time()

    def step(what: str) -> None:
        nonlocal mark
        now = time.process_time()
        seconds[what] = now - mark
        mark = now
        print(f"{name}: {what} {seconds[what]:.0f} s", file=sys.stderr, flush=True)

    base = ModelSpec(args.model, dtype="float32", device=args.device)
    renderer = Renderer(load_tokenizer(base), args.max_tokens)
    data = mixed(name, args.data, args.rows, args.queries, renderer)
    queries = render_queries(data.queries, renderer)
    with tempfile.TemporaryDirectory(prefix="influence-real-") as temp:
        adapter = args.adapter / name if args.adapter else Path(temp) / "adapter"
        if not adapter.is_dir():
            lora = LoraSpec(r=args.r, alpha=2 * args.r, learning_rate=args.lr, epochs=args.epochs)
            save(finetune(replace(base, dtype=args.tune_dtype), data.rendered, lora)[0], adapter)
            step("fine-tune")
        tuned = load_model(replace(base, adapter=str(adapter)))
    concept = concept_of(name, queries, base, args.layer, args.token_budget)
    step("concept")
    vectors = test_vectors(tuned, concept, queries, data, args)
    step("test vectors")
    methods: dict[str, dict[str, Any]] = {
        "vector_filter": {"layers": [args.layer]},
        "random": {},
        "response_length": {},
    }
    methods |= {method: {} for method in vectors}
    generated = None
    if args.own_tokens:
        methods["projection_difference"] = {"layers": [args.layer]}
        generated = own_answers(base, data, renderer, args.own_tokens)
        step("own answers")
    scorers = make_scorers(methods, [concept], test_vectors=vectors)
    shared = SharedPass(load_model(base), scorers, args.token_budget, tuned=tuned)
    columns = shared.run(data.rows, data.rendered, generated).columns
    step("scores")
    found: dict[str, dict[str, float]] = {"auc_pr": {}, "roc_auc": {}}
    bad = np.array(data.bad)
    for column, values in columns.items():
        there = np.isfinite(values)
        found["auc_pr"][column] = float(average_precision_score(bad[there], values[there]))
        found["roc_auc"][column] = float(roc_auc_score(bad[there], values[there]))
    settings = {
        "set": name, "rows": len(data.rows), "bad": int(bad.sum()), "tokens": sum(r.end for r in data.rendered),
        **{k: v for k, v in vars(args).items() if k not in ("data", "sets", "adapter")}, **machine(),
    }  # fmt: skip
    emit(BENCH, "seconds", seconds, "s (CPU)", settings=settings)
    for metric, by_column in found.items():
        emit(BENCH, metric, by_column, "1", settings=settings)
    return found


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.influence_real", description=__doc__)
    p.add_argument("--data", default=DATA, type=Path, help="folder of the data sets")
    p.add_argument("--sets", nargs="*", default=["gsm8k", "em_code"], choices=list(SETS))
    p.add_argument("--rows", type=int, default=240, help="rows to fine-tune on and to score")
    p.add_argument("--queries", type=int, default=16, help="pairs to other questions")
    p.add_argument("--fit-rows", type=int, default=64, help="of the rows, those that H is fitted on")
    p.add_argument("--max-tokens", type=int, default=320, help="longest row; longer ones are passed over")
    p.add_argument("--layer", type=int, default=15, help="of the concept")
    p.add_argument("--last", type=int, default=20, help="track the attention of the blocks below this one")
    p.add_argument("--damping", type=float, default=0.1, help="of each layer's mean eigenvalue")
    p.add_argument("--own-tokens", type=int, default=48, help="of the model's own answers; 0: no projection difference")
    p.add_argument("--adapter", type=Path, default=None, help="folder to keep the adapters in, or to find them")
    p.add_argument("--epochs", type=int, default=2)
    p.add_argument("--lr", type=float, default=1e-3)
    p.add_argument("--r", type=int, default=8)
    p.add_argument("--tune-dtype", default="float32", choices=("float32", "bfloat16"))
    p.add_argument("--token-budget", type=int, default=1024)
    p.add_argument("--model", default=demo_rows.MODEL)
    p.add_argument("--device", default="cpu")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    for name in args.sets:
        print(table(name, run(name, args)), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
