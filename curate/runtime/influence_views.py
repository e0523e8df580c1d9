"""What a report says that influence scores rest on, read from the files of test vectors and factors.

Only what the scores' own recipe names is shown: a test vector of other settings, or none, is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from connectors import storage
from curate.corpus.recipe import Recipe
from curate.curvature.files import INDEX, FactorIndex, load_index
from curate.curvature.test_vector import TestVectorHeader, load_header
from curate.reports.data import ExampleSets, InfluenceView
from curate.runtime.crew import Crew
from curate.runtime.reader import ReaderSpec
from curate.runtime.token_shares import TokenSpec, with_tokens
from curate.scoring.directional.cosine import Cosine


@dataclass(frozen=True)
class InfluenceSources:
    """Where a run's test vectors (by method) and factors lie; None where no method uses curvature. `crew` makes actors
    that hold the finetuned model; None where no token is to be coloured."""

    vectors: Mapping[str, str]
    factors: str | None
    crew: Callable[[], Crew] | None = None


def influence_views(sources: InfluenceSources, recipe: Recipe | None) -> tuple[InfluenceView, ...]:
    """One view for all methods that rest on the same things; `recipe` is that of the scores."""
    scorers: Mapping[str, Any] = recipe.fields.get("scorers", {}) if recipe else {}
    index: FactorIndex | None = None
    if sources.factors is not None and storage.exists(storage.join(sources.factors, INDEX)):
        index = load_index(sources.factors)
    views: list[InfluenceView] = []
    for method, url in sources.vectors.items():
        facts = scorers.get(method)
        if facts is None or not storage.exists(f"{url}.json"):
            continue
        header = load_header(url)
        if header.digest == facts.get("test_vector"):
            _add(views, _view(method, header, str(facts.get("backend")), index))
    return tuple(views)


def coloured(
    sets: ExampleSets, column: str, sources: InfluenceSources, recipe: Recipe | None, reader: ReaderSpec
) -> ExampleSets:
    """`sets` with each token's share in the score `column`, where that is an influence score and colours are asked for
    and its test vector is the one that the scores were made with."""
    method, _, name = column.partition(".")
    facts = (recipe.fields.get("scorers", {}) if recipe else {}).get(method)
    url = sources.vectors.get(method)
    if sources.crew is None or facts is None or url is None or not storage.exists(f"{url}.json"):
        return sets
    if load_header(url).digest != facts.get("test_vector"):
        return sets
    if facts.get("backend") == Cosine.name:  # tokens have shares in a product, not in a cosine
        return sets
    with sources.crew() as crew:
        return with_tokens(sets, TokenSpec(url, name, facts["reduction"], reader), crew)


def _view(method: str, header: TestVectorHeader, backend: str, index: FactorIndex | None) -> InfluenceView:
    meta = header.meta
    kind = str(meta.get("curvature", "identity"))
    kept = meta.get("energy_kept", {})
    coverage = meta.get("coverage", {})
    fitted = index if kind not in ("identity", "cg") else None
    damping = meta.get("damping")
    solve = meta.get("cg")
    return InfluenceView(
        methods=(method,),
        curvature=kind,
        behaviours=tuple((name, kept.get(name)) for name in header.names),
        queries=meta.get("queries"),
        backend=f"{backend} (the fastest for the model)" if backend == "auto" else backend,
        fisher=fitted.spec.fisher if fitted else None,
        damping=_damping(damping, solve) if damping and kind != "identity" else None,
        rows=solve["drawn"] if solve else fitted.rows if fitted else None,
        tokens=fitted.tokens if fitted else None,
        tracked=coverage.get("tracked"),
        total=coverage.get("total"),
        left_out=coverage.get("left_out", {}),
        warnings=(*coverage.get("warnings", ()), *_unsolved(solve)),
    )


def _damping(given: Mapping[str, Any], solve: Mapping[str, Any] | None) -> str:
    of = "the layer's mean eigenvalue" if solve is None else f"the mean eigenvalue = {solve['damping']:.3g}"
    return f"{given['value']:g}" + (f" × {of}" if given["kind"] == "relative" else "")


def _unsolved(solve: Mapping[str, Any] | None) -> list[str]:
    """What conjugate gradients did not bring to an end."""
    items = solve["items"].values() if solve else ()
    left = [item["residuals"][-1] for item in items if not item["converged"]]
    if not left:
        return []
    negative = sum(item["stopped"] for item in items)
    return [
        f"{len(left)} of {len(items)} solves have not converged (largest residual {max(left):.2g} of the gradient)"
        + (f", {negative} of them for negative curvature" if negative else "")
    ]


def _add(views: list[InfluenceView], view: InfluenceView) -> None:
    """Methods that differ in nothing but their behaviours share a view."""

    def rest(v: InfluenceView) -> dict[str, Any]:
        return {k: x for k, x in asdict(v).items() if k not in ("methods", "behaviours")}

    for i, other in enumerate(views):
        if rest(other) == rest(view):
            both = asdict(other) | {
                "methods": other.methods + view.methods,
                "behaviours": other.behaviours + tuple(b for b in view.behaviours if b not in other.behaviours),
            }
            views[i] = InfluenceView(**both)
            return
    views.append(view)
