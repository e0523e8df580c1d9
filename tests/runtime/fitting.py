"""A tiny corpus, a fit over it as a job would run it, and the same factors in one piece, by the library alone."""

from __future__ import annotations

import random
import string
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

from curate.corpus.chunk import Chunk
from curate.corpus.example import ColumnMap
from curate.corpus.recipe import Recipe
from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.ekfac import (
    Bases,
    Corrections,
    Damping,
    Factor,
    accumulate_corrections,
    eigenbasis,
    make_factor,
    solve,
)
from curate.curvature.files import load_factor
from curate.curvature.fisher import CurvatureSpec
from curate.models.load import ModelSpec, identity, load_model
from curate.models.tracked import TrackedLayer, tracked_layers
from curate.runtime.cluster import ClusterSpec
from curate.runtime.differentiator import DifferentiatorSpec, differentiators
from curate.runtime.fit import FitSpec, fit
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.reader import ReaderSpec, read_chunks
from curate.runtime.session import session
from curate.runtime.stage import work_items

DAMPING = Damping(0.1)


def varied(i: int) -> dict:
    """Row i of a corpus with so many different tokens that every covariance has its full rank: in a null space of one
    the eigenvectors, and with them EK-FAC, would be a matter of rounding."""
    letters = random.Random(i)
    question, answer = ("".join(letters.choices(string.printable[:94] + " ", k=40 + i % 7)) for _ in range(2))
    return {
        "id": f"r{i}",
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}],
    }


class Fitting:
    """Everything that a fit over the corpus at `corpus` needs, inline."""

    def __init__(self, corpus: Path, model: Path, store: Path, unit_rows: int = 10) -> None:
        self.model, self.store = ModelSpec(str(model), device="cpu"), store
        with session(ClusterSpec(address="inline", cpus=1)):
            spec = SourceSpec(str(corpus), "jsonl", ColumnMap(), unit_rows, False)
            self.manifest, _, columns = build_manifest(spec, None)
        self.reader = ReaderSpec("jsonl", columns, self.model, 512, "truncate")

    def fit(
        self,
        curvature: CurvatureSpec,
        shard_rows: int = 30,
        token_budget: int = 1024,
        max_bad_fraction: float = 1.0,
        **model: object,
    ):
        """(index, what was done, folder)."""
        spec = replace(self.model, **model)
        who = identity(spec)
        recipe = Recipe("factors", {"curvature": asdict(curvature), "model": who})
        url = str(self.store / recipe.digest)
        with session(ClusterSpec(address="inline", cpus=1)) as running:
            with differentiators(DifferentiatorSpec(spec, curvature.layers, token_budget), running) as crew:
                made = FitSpec(url, self.reader, curvature, shard_rows, max_bad_fraction)
                return *fit(made, recipe, self.manifest, who, crew), url

    def in_one_piece(self, curvature: CurvatureSpec) -> dict[str, Factor]:
        """Factors of all rows, {layer: factor}, without shards, files or actors."""
        model = load_model(self.model)
        layers, _ = tracked_layers(model, curvature.layers)
        chunks = [
            Chunk.from_bytes(c)
            for item in work_items([(u, u.ranges()) for u in self.manifest.units])
            for c in read_chunks(item, self.reader)
        ]
        rendered = [r for c in chunks for r in c.rendered]
        ids = [e.id for c in chunks for e in c.examples]
        rest = (rendered, ids, 10**6, 0)
        if curvature.kind == "diagonal":
            found = accumulate_corrections(model, layers, curvature, None, *rest, Corrections())
            return {x.name: make_factor(x, "diagonal", corrected=found.eigenvalues(x.name)) for x in layers}
        cov = accumulate_covariances(model, layers, curvature, *rest, Covariances())
        q_in = {x.reads: eigenbasis(cov.input_factor(x.reads), x.reads) for x in layers}
        q_out = {x.name: eigenbasis(cov.output_factor(x.name), x.name) for x in layers}
        if curvature.kind == "kfac":
            return {x.name: make_factor(x, "kfac", q_in[x.reads], q_out[x.name]) for x in layers}
        found = accumulate_corrections(model, layers, curvature, Bases(q_in, q_out), *rest, Corrections())
        return {
            x.name: make_factor(x, "ekfac", q_in[x.reads], q_out[x.name], found.eigenvalues(x.name)) for x in layers
        }


def solutions(factors: dict[str, Factor] | str, layers: tuple[TrackedLayer, ...], kind: str) -> dict[str, Tensor]:
    """H⁻¹V of a fixed V a layer: what does not depend on the signs of eigenvectors."""
    out = {}
    for i, layer in enumerate(layers):
        v = torch.randn((layer.out, layer.width), generator=torch.Generator().manual_seed(i))
        factor = load_factor(factors, layer, kind) if isinstance(factors, str) else factors[layer.name]
        out[layer.name] = solve(factor, v, DAMPING)
    return out


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert one.keys() == other.keys()
    for name in one:
        difference = torch.linalg.vector_norm(one[name] - other[name]) / torch.linalg.vector_norm(other[name])
        assert difference < tolerance, (name, float(difference))
