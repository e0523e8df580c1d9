"""Vector filter on real labelled data: directions from one half of the questions, ROC-AUC on the other half.

In: a folder with TruthfulQA, emergent-misalignment code and GSM8K mistakes as JSON Lines (their READMEs' formats). Out:
the AUC of telling bad responses from good ones at every layer. No question is on both sides. The reference without
curate is a plain script: hidden states of each row, difference of means, scikit-learn's roc_auc_score.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from bench import demo_rows
from bench.common import emit, machine
from curate.concepts.concept import Concept
from curate.concepts.persona import mean_difference
from curate.corpus.example import Example, Message
from curate.corpus.render import Renderer
from curate.errors import BadRow
from curate.models.batching import collate, token_batches
from curate.models.load import ModelSpec, identity, load_model, load_tokenizer
from curate.models.pooling import response_mean
from curate.models.tap import LayerTap, n_layers
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass

BENCH = "real_data"
# Prompt and response that is bad, prompt and response that is good.
Pair = tuple[list[Message], str, list[Message], str]


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def truthfulqa(root: Path, n: int) -> list[Pair]:
    """The first wrong and the best right answer to each question."""
    rows = _lines(root / "truthfulqa" / "truthfulqa.jsonl")
    asked = [([Message("user", r["prompt"])], r) for r in _spread(rows, n)]
    return [(q, r["incorrect"][0], q, r["best"]) for q, r in asked]


def gsm8k(root: Path, n: int) -> list[Pair]:
    """Solutions that end wrongly and rightly."""
    rows = [r for r in _lines(root / "gsm8k_mistakes" / "incorrect_math_paired.jsonl") if r["final_answer_differs"]]
    asked = [([Message("user", r["prompt"])], r) for r in _spread(rows, n)]
    return [(q, r["misaligned"], q, r["benign"]) for q, r in asked]


def em_code(root: Path, n: int) -> list[Pair]:
    """Insecure and secure completions (of unlike tasks)."""
    sides = []
    for name in ("insecure", "secure"):
        rows = _spread(_lines(root / "em_code" / f"{name}.jsonl"), n)
        sides.append([[Message(m["role"], m["content"]) for m in r["messages"]] for r in rows])
    return [(a[:-1], a[-1].content, b[:-1], b[-1].content) for a, b in zip(*sides, strict=True)]


def _spread(rows: list[Any], n: int) -> list[Any]:
    n = min(n, len(rows))
    return [rows[i * len(rows) // n] for i in range(n)]


SETS: dict[str, Callable[[Path, int], list[Pair]]] = {"truthfulqa": truthfulqa, "em_code": em_code, "gsm8k": gsm8k}


def aucs(name: str, pairs: list[Pair], spec: ModelSpec, max_tokens: int, budget: int) -> dict[int, float]:
    """ROC-AUC a layer, on the half of the pairs that the direction was not made from."""
    model = load_model(spec)
    renderer = Renderer(load_tokenizer(spec), max_tokens)
    examples: list[Example] = []
    rendered = []
    labels: list[int] = []
    halves: list[int] = []
    for i, (bad_prompt, bad, good_prompt, good) in enumerate(pairs):
        for label, prompt, text in ((1, bad_prompt, bad), (0, good_prompt, good)):
            example = Example(f"{i}-{label}", len(examples), (*prompt, Message("assistant", text)))
            try:
                rendered.append(renderer.render(example))
            except BadRow:
                continue
            examples.append(example)
            labels.append(label)
            halves.append(i % 2)
    y, half = np.array(labels), np.array(halves)
    tap = LayerTap(model, range(n_layers(model) + 1))
    made = np.flatnonzero(half == 0)
    acts = np.empty((len(made), n_layers(model) + 1, model.config.hidden_size), dtype=np.float32)
    rows = [rendered[i] for i in made]
    for batch in token_batches([len(r.input_ids) for r in rows], budget):
        ids, mask = collate([rows[i].input_ids for i in batch], 0)
        states = tap(ids.to(model.device), mask.to(model.device))
        for layer, state in states.items():
            spans = [rows[i].start for i in batch], [rows[i].stop for i in batch]
            acts[batch, layer] = response_mean(state, *spans).cpu().numpy()
    vectors = mean_difference(acts[y[made] == 1], acts[y[made] == 0])
    concept = Concept(name, vectors, None, identity(spec), "mean_difference", "response_mean")
    layers = list(range(1, n_layers(model) + 1))
    shared = SharedPass(model, make_scorers({"vector_filter": {"layers": layers}}, [concept]), budget)
    held = np.flatnonzero(half == 1)
    found = shared.run([examples[i] for i in held], [rendered[i] for i in held])
    return {k: float(roc_auc_score(y[held], found.columns[f"vector_filter.{name}.L{k}"])) for k in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the data sets")
    parser.add_argument("--sets", nargs="*", default=list(SETS), choices=list(SETS))
    parser.add_argument("--pairs", type=int, default=300, help="pairs of each set, half of them to make the direction")
    parser.add_argument("--max-tokens", type=int, default=512)
    parser.add_argument("--token-budget", type=int, default=4096)
    parser.add_argument("--model", default=demo_rows.MODEL)
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for name in args.sets:
        pairs = SETS[name](args.data, args.pairs)
        found = aucs(name, pairs, ModelSpec(args.model), args.max_tokens, args.token_budget)
        settings = {"set": name, "pairs": len(pairs), "model": args.model, **machine()}
        emit(BENCH, "roc_auc_by_layer", {str(k): v for k, v in found.items()}, "auc", settings=settings)


if __name__ == "__main__":
    main()
