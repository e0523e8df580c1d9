"""Test vectors: s = H⁻¹∇f for each method, made by an actor that holds the finetuned model, and kept in the store.

Each method's is one item: the gradients of its behaviours over the queries, solved with one layer's factor in memory at
a time; or with conjugate gradients, which are spread over the actors (conjugate_gradient.py). Kept under the digest of
its recipe, so that a later run, or a resumed one, finds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from connectors import storage
from curate.corpus.recipe import Recipe
from curate.curvature import test_vector as files
from curate.curvature.behaviour import Behaviour, query_gradients
from curate.curvature.ekfac import Damping, Factor
from curate.curvature.files import load_factor
from curate.curvature.fisher import CurvatureKind
from curate.curvature.items import item_gradients
from curate.curvature.queries import Query
from curate.curvature.test_vector import TestVector, TestVectorHeader, solve_all
from curate.errors import ConfigError, CurvatureError
from curate.models.tracked import TrackedLayer
from curate.runtime import partials
from curate.runtime.conjugate_gradient import CGRows, CGVector, short, solve_by_cg
from curate.runtime.crew import Crew
from curate.runtime.differentiator import Differentiator
from curate.runtime.events import say


@dataclass(frozen=True)
class VectorSpec:
    """One method's test vector. `url`: where it is kept, without suffix; `factors`: the folder of the curvature's
    factors, None for H = I; `rank`: of its thin form, None for the whole. `model`: identity of the tuned model.

    `each`: a name for each query, called by its id, and not for each behaviour, of which there is then one.
    `cg`: with kind="cg", how to solve and on which rows.
    """

    method: str
    url: str
    recipe: Recipe
    model: Mapping[str, Any]
    behaviours: Sequence[Behaviour]
    queries: Sequence[Query]
    kind: CurvatureKind | Literal["cg"]
    factors: str | None
    damping: Damping
    rank: int | None
    each: bool = False
    cg: CGRows | None = None


def make_test_vectors(specs: Sequence[VectorSpec], crew: Crew) -> dict[str, TestVectorHeader]:
    """The headers of all test vectors by method, found or made now.

    Raises:
        CurvatureError: a gradient that is zero or not finite, a query that a behaviour cannot use, factors that are
            broken or singular, a test vector of another model; what `solve_by_cg` raises.
        ConfigError: a behaviour reads a layer below which nothing is tracked; several behaviours with `each`.
    """
    for s in specs:
        if s.each and len(s.behaviours) != 1:
            raise ConfigError(f"test vectors of single queries are of one behaviour, not {len(s.behaviours)}")
    missing = [s for s in specs if not storage.exists(f"{s.url}.json")]
    made = {s.url for s in missing}
    for told in crew.map(_make, [s for s in missing if s.cg is None]):
        say(told)
    for s in specs:
        if s.cg is None:
            continue
        if s.url in made:
            meta = _meta(s)
            told = solve_by_cg(
                CGVector(s.method, s.url, s.behaviours, s.queries, s.each, s.cg, s.damping, s.rank, meta), crew
            )
            say(f"test vector {s.method}: made and kept at {s.url}.json ({told})")
        else:
            partials.remove(f"{s.url}.work")  # of a run that was killed between the vector and this
    found = {}
    for s in specs:
        header = files.load_header(s.url)
        files.check_fits(header, s.model)
        if s.url not in made:
            say(f"test vector {s.method}: found at {s.url}.json")
        found[s.method] = header
    return found


def _meta(spec: VectorSpec) -> dict[str, Any]:
    return {
        "recipe": spec.recipe.digest,
        "model": dict(spec.model),
        "queries": len(spec.queries),
        "curvature": spec.kind,
    }


def _make(state: Differentiator, spec: VectorSpec) -> str:
    with state.inserted():
        if spec.each:
            gradients = item_gradients(state.model, state.layers, spec.behaviours[0], spec.queries, state.pad_id)
        else:
            gradients = query_gradients(state.model, state.layers, spec.behaviours, spec.queries, state.pad_id)
    meta = {**_meta(spec), "coverage": asdict(state.coverage)}
    if spec.kind == "cg":
        raise CurvatureError(f"the test vector {spec.method} is to be solved by CG, and no rows are given to do it on")
    kind = spec.kind

    def factor(layer: TrackedLayer) -> Factor:
        if spec.factors is None:
            return Factor(layer, "identity")
        read = load_factor(spec.factors, layer, kind)
        parts = (read.eigenvalues, read.q_out, read.q_in)
        return Factor(layer, read.kind, *(None if p is None else p.to(state.device) for p in parts))

    vector = solve_all(gradients, state.layers, factor, spec.damping, meta, spec.rank, consume=True)
    told = f"test vector {spec.method}: made and kept at {spec.url}.json ({short(vector.names)})"
    if spec.rank is not None:
        told += f", rank {spec.rank}: {min(vector.meta['energy_kept'].values()):.1%} of its energy kept, at least"
    files.save(vector, spec.url)
    return told


def load_arrays(urls: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The test vectors at `urls` by method, as plain arrays for the object store."""
    return {method: files.load(url).to_arrays() for method, url in urls.items()}


def from_store(arrays: Mapping[str, Mapping[str, Any]]) -> dict[str, TestVector]:
    """What `load_arrays` gave, in an actor, without a copy."""
    return {method: TestVector.from_arrays(parts) for method, parts in arrays.items()}
