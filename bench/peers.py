"""Scores and speed of influence against the public recipe (curvlinops) and kronfluence, on the same layers and rows.

In: real rows, a model and perhaps its adapter. Out: JSON lines: Spearman correlation of the scores with each peer's,
and rows/s of scoring, factors and test vector being there (CPU seconds, so that a busy machine changes ratios little).

Each peer is compared under its own conventions, set here in curate: the loss of both is the sum over tokens, and A
counts all real tokens; kronfluence's damping is relative to each layer, the recipe has one absolute damping. What
differs still: the labels that are sampled (not with --fisher empirical), and in the recipe A is the mean over rows of
each row's mean. With the mean loss and sampled labels curvlinops would weigh a row by 1/n² Σ F_t, and curate by
1/n Σ F_t. The third peer, bfloat16, is curate's own lower precision. bergson's factors are timed in ekfac.py; its
scores come from indexed gradients, and are not compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from bench import demo_rows
from bench.common import emit, machine
from bench.local_fit import LocalFit, loss_vector
from bench.public_recipe import PAD_TO, PublicRecipe, RecipeSpec
from bench.real_data import SETS
from bench.real_rows import DATA, mixed
from curate.corpus.render import Rendered, Renderer
from curate.curvature.ekfac import Damping
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.queries import render_queries
from curate.curvature.test_vector import TestVector
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.tracked import LayerChoice, tracked_layers
from curate.scoring.directional.make import BACKENDS, make_backend

BENCH = "peers"


def timed(run: Callable[[], Any]) -> tuple[Any, float]:
    """What `run` returns, and its CPU seconds."""
    began = time.process_time()
    made = run()
    return made, time.process_time() - began


class Comparison:
    """The rows, the queries, the layers, and curate's side under a peer's conventions."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.spec = ModelSpec(args.model, args.adapter, dtype="float32", device="cpu")
        renderer = Renderer(load_tokenizer(self.spec), args.max_tokens)
        data = mixed(args.set, args.data, args.fit_rows + args.rows, args.queries, renderer)
        self.fit_rows, self.rows = data.rendered[: args.fit_rows], data.rendered[args.fit_rows :]
        self.ids = [row.id for row in data.rows[: args.fit_rows]]
        self.queries: list[Rendered] = [q.positive for q in render_queries(data.queries, renderer)]
        self.model = load_model(replace(self.spec, dtype=args.dtype))
        self.layers, coverage = tracked_layers(self.model, LayerChoice(last=args.last))
        self.settings = {
            **{k: str(v) for k, v in vars(args).items()},
            "fit_tokens": sum(r.end for r in self.fit_rows),
            "tokens": sum(r.end for r in self.rows),
            "coverage": str(coverage),
            **machine(),
        }

    def curate(self, spec: CurvatureSpec, damping: Callable[[LocalFit], Damping]) -> tuple[TestVector, LocalFit]:
        """s of the queries' loss."""
        fit = LocalFit(self.model, self.layers, spec, self.fit_rows, self.ids, self.args.token_budget)
        return loss_vector(self.model, self.layers, fit, self.queries, damping(fit), spec.reduction), fit

    def scores(self, vector: TestVector, backend: str, reduction: str) -> np.ndarray:
        made = make_backend(backend, self.model, vector, self.args.token_budget, reduction=reduction)  # type: ignore[arg-type]
        return made.run(self.rows).scores[:, 0]

    def agreement(self, ours: np.ndarray, theirs: np.ndarray, against: str, **about: Any) -> None:
        values = {
            "spearman": float(spearmanr(ours, theirs).statistic),
            "pearson": float(np.corrcoef(ours, theirs)[0, 1]),
            "largest_difference": float(np.abs(ours - theirs).max() / np.abs(theirs).max()),
        }
        emit(BENCH, "agreement", values, "1", against=against, settings={**self.settings, **about})


def recipe(c: Comparison, fisher: str) -> None:
    """curvlinops without padding for the agreement, the recipe with its padding for the time."""
    made = CurvatureSpec(fisher=fisher, tokens="all", reduction="sum")  # type: ignore[arg-type]
    vector, fit = c.curate(made, lambda fit: Damping(c.args.damping * fit.mean_eigenvalue(), "absolute"))
    damping = c.args.damping * fit.mean_eigenvalue()
    labels = "mc" if fisher == "sampled" else "empirical"
    peer = PublicRecipe(load_model(c.spec), c.layers, RecipeSpec(0, "sum", labels, damping))  # type: ignore[arg-type]
    peer.fit(c.fit_rows)
    theirs = peer.test_vector(c.queries)
    c.agreement(c.scores(vector, "contraction", "sum"), peer.scores(c.rows, theirs), "curvlinops", fisher=fisher)

    # As it is published: every row padded. A handful of rows tells the time, and that padding changes no score.
    few = sorted({i * len(c.rows) // c.args.recipe_rows for i in range(c.args.recipe_rows)})
    peer.spec = replace(peer.spec, pad_to=c.args.pad_to)
    padded, seconds = timed(lambda: peer.scores([c.rows[i] for i in few], theirs))
    rate = len(few) / seconds
    emit(BENCH, "recipe_rows_per_second", rate, "rows/s (CPU)", settings=c.settings)
    for backend in c.args.backends:
        ours, took = timed(lambda backend=backend: c.scores(vector, backend, "sum"))  # type: ignore[misc]
        faster = len(c.rows) / took
        about = {**c.settings, "backend": backend}
        emit(BENCH, "rows_per_second", faster, "rows/s (CPU)", faster / rate, "public recipe", about)
        gap = float(np.abs(ours[few] - padded).max() / np.abs(padded).max())
        emit(BENCH, "difference_of_padded_rows", gap, "1", against="public recipe", settings=about)


def kronfluence(c: Comparison, fisher: str) -> None:
    from bench.kronfluence_peer import KronfluencePeer

    made = CurvatureSpec(fisher=fisher, tokens="all", reduction="sum")  # type: ignore[arg-type]
    vector, _ = c.curate(made, lambda fit: Damping(0.1))
    names = [layer.name for layer in c.layers]
    peer = KronfluencePeer(load_model(c.spec), names, fisher == "empirical", c.args.kronfluence_batch)
    peer.fit(c.fit_rows)
    theirs, seconds = timed(lambda: peer.scores(c.rows, c.queries) / len(c.queries))
    peer.close()
    ours, took = timed(lambda: c.scores(vector, "contraction", "sum"))
    c.agreement(ours, theirs, "kronfluence", fisher=fisher)
    rate, faster = len(c.rows) / seconds, len(c.rows) / took
    emit(BENCH, "kronfluence_rows_per_second", rate, "rows/s (CPU, its query gradient included)", settings=c.settings)
    emit(BENCH, "rows_per_second", faster, "rows/s (CPU)", faster / rate, "kronfluence", c.settings)


def bfloat16(c: Comparison, fisher: str) -> None:
    """curate with itself: the fit in bfloat16, and everything in bfloat16, against everything in float32."""
    spec = CurvatureSpec(fisher=fisher)  # type: ignore[arg-type]
    exact, _ = c.curate(spec, lambda fit: Damping(0.1))  # --dtype is float32 here, or the two are one
    theirs = c.scores(exact, "contraction", "mean")
    half = load_model(replace(c.spec, dtype="bfloat16"))
    fit = LocalFit(half, c.layers, spec, c.fit_rows, c.ids, c.args.token_budget)
    for what, model in (("fit", c.model), ("fit, query and scores", half)):
        vector = loss_vector(model, c.layers, fit, c.queries, Damping(0.1), spec.reduction)
        made = make_backend("contraction", model, vector, c.args.token_budget, reduction="mean")
        c.agreement(made.run(c.rows).scores[:, 0], theirs, "float32", fisher=fisher, bfloat16=what)


PEERS: dict[str, tuple[str, Callable[[Comparison, str], None]]] = {
    "recipe": ("curvlinops", recipe),
    "kronfluence": ("kronfluence", kronfluence),
    "bfloat16": ("curate", bfloat16),
}


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    p.add_argument("--data", default=DATA, type=Path, help="folder of the real data")
    p.add_argument("--set", default="gsm8k", choices=list(SETS))
    p.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS))
    p.add_argument("--backends", nargs="*", default=list(BACKENDS), choices=list(BACKENDS))
    p.add_argument("--fisher", nargs="*", default=["sampled", "empirical"], choices=("sampled", "empirical"))
    p.add_argument("--fit-rows", type=int, default=32)
    p.add_argument("--rows", type=int, default=32, help="rows to score")
    p.add_argument("--recipe-rows", type=int, default=3, help="of these, rows that the padded recipe scores")
    p.add_argument("--queries", type=int, default=2)
    p.add_argument("--max-tokens", type=int, default=1024, help="longest row; longer ones are passed over")
    p.add_argument("--pad-to", type=int, default=PAD_TO)
    p.add_argument("--damping", type=float, default=0.1, help="of the mean eigenvalue of all layers")
    p.add_argument("--token-budget", type=int, default=1024)
    p.add_argument("--kronfluence-batch", type=int, default=2)
    p.add_argument("--model", default=demo_rows.MODEL)
    p.add_argument("--adapter", default=None, help="a LoRA adapter, merged")
    p.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="precision of curate's side; peers: float32"
    )
    p.add_argument("--last", type=int, default=20, help="track the attention of the blocks below this one")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    torch.set_num_threads(1)
    comparison = Comparison(args)
    for name in args.peers:
        package, compare = PEERS[name]
        if importlib.util.find_spec(package) is None:
            print(f"{package} is not installed and left out", file=sys.stderr)
            continue
        for fisher in args.fisher:
            compare(comparison, fisher)


if __name__ == "__main__":
    main()
