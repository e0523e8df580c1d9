"""The layer-stride study: how far influence scores change when only every s-th block is tracked; a page and a table."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from connectors import storage
from curate import __version__
from curate.corpus.recipe import Recipe
from curate.corpus.render import tokenizer_digest
from curate.errors import ConfigError
from curate.evaluation.layer_stride import LayerStrides
from curate.models.load import load_tokenizer
from curate.runtime.differentiator import DifferentiatorSpec, differentiators
from curate.runtime.events import say
from curate.runtime.study import StudySpec, study
from curate.scoring.directional.base import Reduction
from jobs.app import entry
from jobs.influence import METHODS

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


def stages(pipeline: Pipeline) -> None:
    found, page = layer_stride_study(pipeline)
    for name, largest in zip(found.names, found.largest(pipeline.config.study.level), strict=True):
        print(f"{name}: rank correlation at least {pipeline.config.study.level:g} up to stride {largest}")
    print(f"report: {page}.html\nnumbers: {page}.json")


def layer_stride_study(pipeline: Pipeline) -> tuple[LayerStrides, str]:
    """The study of all configured influence scores, and where it lies, without suffix. Makes what it needs first.

    Raises:
        ConfigError: no configured scorer is an influence score, or the settings make no sense.
    """
    influence, s = pipeline.influence, pipeline.config.study
    if not influence.methods:
        raise ConfigError(f"a layer-stride study needs influence scores: scorer={', '.join(sorted(METHODS))}")
    if s.rows < 3:
        raise ConfigError(f"study.rows is {s.rows}; it must be at least 3")
    if not 0 < s.level < 1:
        raise ConfigError(f"study.level is {s.level}; it must lie between 0 and 1")
    if influence.spec.layers.stride > 1:
        say(
            f"WARNING: curvature.layers.stride={influence.spec.layers.stride}: the study compares with these blocks, "
            f"not with all of them"
        )
    derivatives = {scorer.name: scorer.derivative() for scorer in pipeline.scorers if scorer.name in influence.methods}
    vectors = {
        name: (influence.urls[name], cast(Reduction, d.reduction)) for name, d in derivatives.items() if d is not None
    }
    fields = {
        "code": __version__,
        "corpus": pipeline.corpus,
        "rows": min(s.rows, pipeline.manifest.rows),
        "of": pipeline.manifest.rows,
        "model": influence.facts,
        "tokenizer": tokenizer_digest(load_tokenizer(pipeline.model)),
        "max_tokens": pipeline.config.source.max_tokens,
        "overlong": pipeline.config.source.overlong,
        "vectors": {name: [d.vector.digest, d.reduction] for name, d in derivatives.items() if d is not None},
        "layers": asdict(influence.spec.layers),
    }
    recipe = Recipe("layer_stride", fields)
    page = storage.join(pipeline.sink, "layer_stride")
    spec = StudySpec(
        storage.join(pipeline.store, "studies", recipe.digest),
        pipeline.reader,
        vectors,
        s.rows,
        s.max_stride,
        s.level,
        page,
        pipeline.config.report.title,
    )
    actors = DifferentiatorSpec(influence.model, influence.spec.layers, pipeline.session.gradient_token_budget)
    with differentiators(actors, pipeline.session) as crew:
        return study(spec, recipe, pipeline.manifest, crew), page


main = entry("study", stages)

if __name__ == "__main__":
    main()
