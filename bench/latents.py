"""Latent influence: seconds and memory of a (training row, test item) pair, against the paper's recipe written plainly.

The paper's recipe, by our own hand: one pair at a time, rows padded to 512 tokens, the whole model with all its logits,
activations of all latents [tokens, latents] as the variable, double backward, and for every pair anew 20 steps of
conjugate gradients on the Hessian of 8 rows. Ours: the backends of curate/scoring/latent on batches of rows as long as
they are, all items in one pass, one solve an item, shared by its candidate rows ("amortised").

A solve's time is that of its Hessian products, all alike: on both sides one is measured and the rest are counted. The
recipe's is made row by row, so that its memory is that of one row; its rows are all as long, and some are measured.
Each side runs in a process of its own, on one thread; seconds are CPU seconds. The sparse autoencoder is TopK with
random weights: what a pass costs does not depend on them. Test vectors that are multiplied with are the items'
gradients, for the same reason.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from bench import demo_rows
from bench.common import MemorySampler, emit, machine
from bench.scoring import gradients
from curate.concepts.sae import SAE, dense
from curate.corpus.render import Rendered, Renderer
from curate.curvature.products import Products
from curate.curvature.test_vector import Dense, TestVector
from curate.errors import BadRow
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.models.splice import spliced
from curate.models.tap import decoder_parts, width
from curate.models.tracked import LayerChoice, tracked_layers
from curate.scoring.latent.aggregate import per_token
from curate.scoring.latent.base import RowLatents
from curate.scoring.latent.make import BACKENDS, make_latent_backend

BENCH = "latents"


class Setting:
    """What all sides work on: the model (with an adapter of random weights, not merged, where that is what is tracked),
    rows, items, the autoencoder and the items' gradients above it."""

    def __init__(self, args: argparse.Namespace) -> None:
        torch.set_num_threads(1)
        spec = ModelSpec(args.model, dtype="float32", device="cpu")
        renderer = Renderer(load_tokenizer(spec), args.pad_to)
        found: list[Rendered] = []
        for example in demo_rows.examples(
            demo_rows.spread(demo_rows.corpus_rows(), 2 * (args.rows + args.items + args.hessian_rows))
        ):
            try:
                found.append(renderer.render(example))
            except BadRow:
                continue
        self.rows, rest = found[: args.rows], found[args.rows :]
        self.items, self.sample = rest[: args.items], rest[args.items : args.items + args.hessian_rows]
        self.model = load_model(spec)
        if args.kind == "adapter":
            self.model = _adapted(self.model)
        self.layers, _ = tracked_layers(self.model, LayerChoice(kind=args.kind, first=args.layer))
        self.sae = random_sae(width(self.model), args.latents, args.k, args.layer)

    def vector(self, items: int) -> TestVector:
        with spliced(self.model, self.sae):
            return gradients(self.model, self.layers, self.items[:items])


def random_sae(d: int, latents: int, k: int, layer: int) -> SAE:
    w = F.normalize(torch.randn((latents, d), generator=torch.Generator().manual_seed(0)), dim=1)
    zero = torch.zeros(d)
    return SAE(w, torch.zeros(latents), w.clone(), zero, zero, "topk", layer, "bench", k=min(k, latents))


def _adapted(model: PreTrainedModel) -> PreTrainedModel:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    settings = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", init_lora_weights=False)
    return get_peft_model(model, settings).get_base_model().eval().requires_grad_(False)


class Recipe:
    """The paper's recipe. Losses are means over the response tokens."""

    def __init__(self, setting: Setting, pad_to: int) -> None:
        self.model, self.sae, self.pad_to = setting.model, setting.sae, pad_to
        self.names = [layer.name for layer in setting.layers]
        self.block = decoder_parts(self.model).blocks[self.sae.layer]

    def loss(self, row: Rendered, r: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the row's loss, the activations of its tokens [tokens, latents]); with `r`, these are given."""
        fill = max(0, self.pad_to - len(row.input_ids))
        ids = torch.tensor([row.input_ids + [0] * fill])
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * fill])
        held: list[Tensor] = []

        def insert(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            states = args[0] if args else kwargs["hidden_states"]
            held.append(dense(self.sae, states[0]) if r is None else r)
            new = (held[0] @ self.sae.w_dec + self.sae.b_dec)[None]
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

        handle = self.block.register_forward_pre_hook(insert, with_kwargs=True)
        try:
            logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0]
        finally:
            handle.remove()
        labels = torch.full((ids.shape[1],), -100)
        labels[row.start : row.end] = ids[0, row.start : row.end]
        return F.cross_entropy(logits[:-1], labels[1:]), held[0]

    def weights(self) -> list[Tensor]:
        return [self.model.get_submodule(name).weight for name in self.names]

    def influence(self, row: Rendered, s: Sequence[Tensor]) -> Tensor:
        """−(∇_r ⟨s, ∇L⟩) ⊙ r, [tokens, latents]."""
        with torch.no_grad():
            r = self.loss(row)[1]
        r = r.detach().requires_grad_(True)
        gradient = torch.autograd.grad(self.loss(row, r)[0], self.weights(), create_graph=True)
        projection = sum((part * along).sum() for part, along in zip(gradient, s, strict=True))
        (slope,) = torch.autograd.grad(projection, r)
        return -slope * r.detach()

    def product(self, rows: Sequence[Rendered], s: Sequence[Tensor]) -> list[Tensor]:
        """The Hessian of the rows' mean loss times s."""
        total = [torch.zeros_like(part) for part in s]
        for row in rows:
            gradient = torch.autograd.grad(self.loss(row)[0], self.weights(), create_graph=True)
            projection = sum((part * along).sum() for part, along in zip(gradient, s, strict=True))
            for out, part in zip(total, torch.autograd.grad(projection, self.weights()), strict=True):
                out += part / len(rows)
        return total


class Meter:
    """CPU seconds of calls, and by how much the process grew at most during each (`peaks`)."""

    def __init__(self) -> None:
        self.peaks: dict[str, int] = {}

    def __call__(self, name: str, call: Callable[[], object]) -> float:
        gc.collect()
        if sys.platform == "linux":  # what earlier calls have freed goes back, and is seen to be taken anew
            ctypes.CDLL(None).malloc_trim(0)
        before = psutil.Process().memory_info().rss
        with MemorySampler(interval=0.05) as memory:
            began = time.process_time()
            call()
            taken = time.process_time() - began
        self.peaks[name] = max(s.rss["driver"] for s in memory.samples) - before
        return taken


def _paper(args: argparse.Namespace) -> dict[str, Any]:
    setting = Setting(args)
    vector = setting.vector(1)
    s = [vector.blocks[layer.name].dense()[0] for layer in setting.layers]
    found: dict[str, Any] = {}
    with sdpa_kernel(SDPBackend.MATH):
        for name, pad_to in (("pair", args.pad_to), ("pair_not_padded", 0)):
            recipe = Recipe(setting, pad_to)
            for weight in recipe.weights():
                weight.requires_grad_(True)
            meter = Meter()
            rows = setting.rows[: args.pairs]
            found[name] = meter(name, lambda recipe=recipe, rows=rows: [recipe.influence(x, s) for x in rows]) / len(
                rows
            )
            found[f"{name}.memory"] = meter.peaks[name]
        recipe = Recipe(setting, args.pad_to)
        some = setting.sample[: args.measured_rows]
        found["product"] = meter("product", lambda: recipe.product(some, s)) * len(setting.sample) / len(some)
        found["product.memory"] = meter.peaks["product"]
        first = setting.rows[0]
        found["tokens"] = recipe.influence(first, s)[: first.end].sum(-1).tolist()
    return found


def _solve(args: argparse.Namespace) -> dict[str, Any]:
    """Our Hessian products: seconds for one item, and an item's share where all items are solved together."""
    setting, found = Setting(args), {}
    meter = Meter()
    products = Products(
        setting.model, setting.layers, setting.sample, "hessian", sae=setting.sae, max_tokens=args.budget
    )
    for items in (1, args.items):
        blocks = setting.vector(items).blocks
        vectors = {name: block.dense() for name, block in blocks.items()}
        found[f"product.{items}"] = meter("product", lambda v=vectors: products(v)) / items
    found["memory"] = meter.peaks["product"]
    return found


def _backend(args: argparse.Namespace) -> dict[str, Any]:
    setting = Setting(args)
    found: dict[str, Any] = {}
    whole = setting.vector(args.items)
    first = make_latent_backend(args.side, setting.model, setting.sae, _first(whole, 1), args.budget)
    first.run(setting.rows[-1:])  # so that nobody pays for the first use
    meter = Meter()
    for items in dict.fromkeys((1, args.items)):
        backend = make_latent_backend(args.side, setting.model, setting.sae, _first(whole, items), args.budget)
        found[f"pair.{items}"] = meter(str(items), lambda b=backend: b.run(setting.rows)) / items / len(setting.rows)
    found["single"] = meter("single", lambda: [first.run([x]) for x in setting.rows[: args.pairs]]) / args.pairs
    found["memory"] = max(meter.peaks.values())
    found["memory.single"] = meter.peaks["single"]
    (row,) = first.run(setting.rows[:1])
    assert isinstance(row, RowLatents)
    found["tokens"] = per_token(row)[0].tolist()
    for latents in args.scaling:
        sae = random_sae(setting.sae.width, latents, args.k, args.layer)
        backend = make_latent_backend(args.side, setting.model, sae, _first(whole, 1), args.budget)
        taken = meter("scaling", lambda b=backend: b.run(setting.rows)) / len(setting.rows)
        found[f"latents.{latents}"] = taken
        found[f"latents.{latents}.memory"] = meter.peaks["scaling"]
    return found


def _first(vector: TestVector, count: int) -> TestVector:
    blocks = {name: Dense(block.dense()[:count]) for name, block in vector.blocks.items()}
    return replace(vector, names=vector.names[:count], blocks=blocks)


_SIDES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "paper": _paper,
    "solve": _solve,
    **dict.fromkeys(BACKENDS, _backend),
}


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.latents", description=__doc__)
    p.add_argument("--model", default=demo_rows.MODEL)
    p.add_argument("--kind", default="adapter", choices=("adapter", "attention", "mlp", "all"), help="tracked weights")
    p.add_argument("--layer", type=int, default=22, help="of the autoencoder; blocks from it on are tracked")
    p.add_argument("--latents", type=int, default=2048)
    p.add_argument("--k", type=int, default=64)
    p.add_argument("--scaling", type=int, nargs="*", default=[512, 16384], help="numbers of latents to compare")
    p.add_argument("--rows", type=int, default=6, help="training rows of a pass")
    p.add_argument("--items", type=int, default=4, help="test items of a pass")
    p.add_argument("--candidates", type=int, default=250, help="training rows that one solve serves, for the amortised")
    p.add_argument("--iterations", type=int, default=20, help="steps of a solve")
    p.add_argument("--hessian-rows", type=int, default=8, help="rows of the loss whose Hessian it is")
    p.add_argument("--measured-rows", type=int, default=2, help="of these, those measured of the recipe's product")
    p.add_argument("--pairs", type=int, default=2, help="pairs to measure the paper's recipe on")
    p.add_argument("--pad-to", type=int, default=512)
    p.add_argument("--budget", type=int, default=1024, help="tokens of a batch of ours, padding included")
    p.add_argument(
        "--sides", nargs="*", default=list(_SIDES), choices=list(_SIDES), help="paper and solve are always run"
    )
    p.add_argument("--side", default=None, choices=list(_SIDES), help=argparse.SUPPRESS)
    return p


def _child(side: str, arguments: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "bench.latents", *arguments, "--side", side]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = _parser().parse_args(given)
    if args.side is not None:
        print(json.dumps(_SIDES[args.side](args)))
        return
    about = {**vars(args), **machine(), "threads": 1, "autoencoder": "TopK, random weights", "product": "hessian"}
    about = {key: value for key, value in about.items() if key not in ("side", "sides")}
    paper, solve = _child("paper", given), _child("solve", given)
    report(paper, solve, {name: _child(name, given) for name in BACKENDS if name in args.sides}, about)


def report(
    paper: dict[str, Any], solve: dict[str, Any], backends: dict[str, dict[str, Any]], about: dict[str, Any]
) -> None:
    """The JSON lines of what the sides found."""
    steps, items, candidates = about["iterations"], about["items"], about["candidates"]
    whole = paper["pair"] + steps * paper["product"]
    emit(BENCH, "paper.pair.seconds", whole, "s", settings=about)
    for name in ("pair", "pair_not_padded", "product"):
        emit(BENCH, f"paper.{name}_alone.seconds", paper[name], "s", settings=about)
        emit(BENCH, f"paper.{name}_alone.memory", paper[f"{name}.memory"] / 2**20, "MiB", settings=about)
    for n in dict.fromkeys((1, items)):
        ratio = solve[f"product.{n}"] / paper["product"]
        emit(BENCH, f"product.{n}.seconds_an_item", ratio * paper["product"], "s", ratio, "paper.product_alone", about)
    emit(BENCH, "product.memory", solve["memory"] / 2**20, "MiB", settings=about)
    for name, found in backends.items():
        alone = found["single"] + steps * solve["product.1"]
        shared = found[f"pair.{items}"] + steps * solve[f"product.{items}"] / candidates
        for what, seconds, against in (
            ("pair_with_its_own_solve", alone, whole),
            ("pair_amortised", shared, whole),
            ("pair_alone", found["single"], paper["pair"]),
            ("pair_in_a_pass", found["pair.1"], paper["pair"]),
            (f"pair_in_a_pass_of_{items}", found[f"pair.{items}"], paper["pair"]),
        ):
            reference = "paper.pair.seconds" if against == whole else "paper.pair_alone.seconds"
            emit(BENCH, f"{name}.{what}.seconds", seconds, "s", seconds / against, reference, about)
            emit(BENCH, f"{name}.{what}.speedup", against / seconds, "times", settings=about)
        for what in ("memory", "memory.single"):
            mib = found[what] / 2**20
            emit(
                BENCH,
                f"{name}.{what}",
                mib,
                "MiB",
                found[what] / paper["pair.memory"],
                "paper.pair_alone.memory",
                about,
            )
        sizes = about["scaling"]
        if sizes:
            seconds = {str(n): found[f"latents.{n}"] for n in sizes}
            ratio = seconds[str(sizes[-1])] / seconds[str(sizes[0])]
            emit(BENCH, f"{name}.by_latents.seconds", seconds, "s", ratio, f"{sizes[0]} latents", about)
            memory = {str(n): found[f"latents.{n}.memory"] / 2**20 for n in sizes}
            emit(BENCH, f"{name}.by_latents.memory", memory, "MiB", settings=about)
        ours, theirs = np.array(found["tokens"]), np.array(paper["tokens"])
        gap = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        emit(BENCH, f"{name}.largest_relative_difference", gap, "1", settings=about)


if __name__ == "__main__":
    main()
