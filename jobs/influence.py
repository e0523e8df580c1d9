"""The stages behind influence scores: queries, curvature factors, test vectors; each made, or found in the store.

Turns Settings into what the library takes, for the pipeline that owns it. Holds no mathematics and no data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from connectors import storage
from connectors.packages import expand
from curate import __version__
from curate.concepts.concept import digest as concept_digest
from curate.concepts.latent_file import latents_of
from curate.concepts.sae import digest as sae_digest
from curate.concepts.trait import load_trait
from curate.corpus.recipe import Recipe
from curate.corpus.render import Renderer, tokenizer_digest
from curate.curvature.behaviour import Behaviour, BehaviourSpec, make_behaviour
from curate.curvature.conjugate_gradient import CGSpec
from curate.curvature.ekfac import Damping
from curate.curvature.files import INDEX
from curate.curvature.fisher import CurvatureSpec
from curate.curvature.queries import (
    Query,
    QueryColumns,
    QueryExample,
    queries_from_file,
    queries_from_trait,
    render_queries,
    top_queries,
)
from curate.curvature.test_vector import TestVectorHeader
from curate.errors import ConfigError
from curate.models.load import ModelSpec, identity, load_tokenizer
from curate.models.tracked import Coverage, LayerChoice
from curate.runtime.crew import Crew
from curate.runtime.differentiator import DifferentiatorSpec, differentiators
from curate.runtime.events import say
from curate.runtime.fit import FitSpec, fit, say_coverage
from curate.runtime.influence_views import InfluenceSources
from curate.runtime.plan import InfluencePlan
from curate.runtime.queries import OnPolicySpec, on_policy
from curate.runtime.reader import ReaderSpec
from curate.runtime.test_vectors import VectorSpec, make_test_vectors
from curate.scoring.base import Scorer
from curate.scoring.directions import as_layers
from curate.scoring.registry import SCORERS
from jobs.item_vectors import ItemVector, cg_fields, cg_rows

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

METHODS = frozenset(name for name, scorer in SCORERS.items() if scorer.derivative is not Scorer.derivative)
"""Scorers that need a test vector."""
WITHOUT_CURVATURE = frozenset({"gradient_product", "gradient_cosine"})
_OPTIONS = ("behaviours", "layers", "pooling", "whole")  # of conf/scorer/<method>.yaml, for the test vector alone


def scorer_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """What of a scorer's settings goes to its constructor."""
    return {k: v for k, v in options.items() if name not in METHODS or k not in _OPTIONS}


class Influence:
    """Of one run. What the stages share is computed once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.config = pipeline.config
        c = self.config.curvature
        kind = "identity" if c.kind == "cg" else c.kind  # nothing is fitted
        self.spec = CurvatureSpec(kind, c.fisher, c.tokens, c.reduction, c.examples, c.max_tokens, c.seed, c.layers)
        self.damping = Damping(c.damping, c.damping_kind)
        how = (c.product, c.rows, c.iterations, c.tolerance, c.block, c.save_every, c.max_tokens, c.seed)
        self.cg = CGSpec(*how) if c.kind == "cg" else None

    def check(self) -> None:
        """Whatever can be wrong in the settings alone.

        Raises:
            ConfigError: names the setting.
        """
        if not self.methods:
            return
        self.check_model()
        c = self.config.curvature
        self._query_path  # noqa: B018  (raises where there is none)
        for method, options in self.methods.items():
            self._behaviour_specs(method)
            if (own := options.get("reduction", c.reduction)) != c.reduction:
                raise ConfigError(
                    f"scorer.{method}.reduction is {own!r} and curvature.reduction {c.reduction!r}: queries, curvature "
                    f"and rows must have one loss; set curvature.reduction alone"
                )

    def check_model(self) -> None:
        """The same of the model to differentiate and its curvature alone."""
        tuned, c = self.config.tuned, self.config.curvature
        if c.layers.kind == "adapter" and tuned.merge:
            raise ConfigError(
                "curvature.layers.kind=adapter tracks the LoRA matrices, which are gone once merged; set "
                "tuned.merge=false and tuned.adapter=…"
            )
        if not tuned.merge and self.tuned.adapter is None:
            raise ConfigError("tuned.merge=false leaves an adapter beside the weights; give one with tuned.adapter=…")
        for name, value in (("rank", c.rank), ("shard_rows", c.shard_rows)):
            if value is not None and value < 1:
                raise ConfigError(f"curvature.{name} is {value}; it must be at least 1")

    @property
    def methods(self) -> dict[str, dict[str, Any]]:
        """{method: settings} of the configured scorers that need a test vector."""
        return {name: o for name, o in self.pipeline.scorer_settings.items() if name in METHODS}

    # the model to differentiate

    @property
    def tuned(self) -> ModelSpec:
        """The model that gradients are taken of, as configured."""
        t, m = self.config.tuned, self.config.model
        if t.path is not None:
            return replace(m, path=t.path, adapter=t.adapter, revision=None, merge_adapter=t.merge)
        return replace(m, adapter=t.adapter or m.adapter, merge_adapter=t.merge)

    @cached_property
    def model(self) -> ModelSpec:
        """`tuned` in the base model's precision, which is decided once and needs a running session."""
        return replace(self.tuned, dtype=self.pipeline.model.dtype)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Of the tuned model.

        Raises:
            ConfigError: it reads other tokens than the base model, so that rows would mean something else to it.
        """
        if self.tuned == self.config.model:
            return self.pipeline.identity
        if self.config.tuned.path is not None:
            mine, theirs = (load_tokenizer(spec).get_vocab() for spec in (self.tuned, self.config.model))
            if mine != theirs:
                raise ConfigError(
                    f"tuned.path={self.tuned.path!r} has another vocabulary than the model {self.config.model.path!r}; "
                    f"give the finetuned form of the same model"
                )
        return identity(self.tuned)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The tuned model in recipes."""
        return {**self.identity, "merged": self.tuned.merge_adapter, "dtype": self.model.dtype}

    # behaviours and queries

    def _behaviour_specs(self, method: str) -> list[BehaviourSpec]:
        options = self.methods[method]
        kinds = options.get("behaviours") or []
        if not isinstance(kinds, list) or not kinds:
            raise ConfigError(f"scorer.{method}.behaviours is {kinds!r}; give a list, such as [loss]")
        layers = as_layers(options.get("layers"), f"scorer.{method}") or (None,)
        whole, pooling = bool(options.get("whole", False)), options.get("pooling", "response_mean")
        specs: list[BehaviourSpec] = []
        for kind in kinds:
            if kind in ("concept", "concept_contrast"):
                specs += [BehaviourSpec(kind, pooling, layer, whole) for layer in layers]
            else:
                specs.append(BehaviourSpec(kind, whole=whole))
        return specs

    def behaviours(self, method: str) -> list[Behaviour]:
        """What `method` measures, one column each."""
        reduction = self.config.curvature.reduction
        out = []
        for spec in self._behaviour_specs(method):
            if not spec.of_concept:
                out.append(make_behaviour(spec, None, reduction))
                continue
            concepts = self.pipeline.concept_list
            if not concepts:
                raise ConfigError(f"scorer.{method}.behaviours has {spec.kind!r}, which needs a concept; set concept=…")
            latents = latents_of(concepts) if spec.of_latent else [None] * len(concepts)
            out += [make_behaviour(spec, c, reduction, x) for c, x in zip(concepts, latents, strict=True)]
        return out

    @cached_property
    def queries(self) -> list[Query]:
        """The configured queries as tokens."""
        renderer = Renderer(load_tokenizer(self.pipeline.model), self.config.source.max_tokens)
        found = render_queries(self.query_examples, renderer)
        say(f"queries: {len(found)} from {self._query_path} (query={self.config.query.kind})")
        return found

    @property
    def _query_path(self) -> str:
        """The file that queries are made from.

        Raises:
            ConfigError: none is set, and no one persona concept says which.
        """
        q = self.config.query
        if q.path is not None:
            return expand(q.path)
        if q.kind == "file":
            raise ConfigError("query.path is not set; give the JSON lines of your queries: query.path=…")
        personas = {name: s.path for name, s in (self.config.concept or {}).items() if s.kind == "persona"}
        path = next(iter(personas.values())) if len(personas) == 1 else None
        if not isinstance(path, str):
            found = ", ".join(personas) or "none"
            raise ConfigError(
                f"query.path is not set, and its trait file is that of a persona concept only where there is exactly "
                f"one (configured: {found}); give query.path=…"
            )
        return expand(path)

    @cached_property
    def query_examples(self) -> list[QueryExample]:
        """The configured queries as text."""
        q, path = self.config.query, self._query_path
        if q.max_queries is not None and q.max_queries < 1:
            raise ConfigError(f"query.max_queries is {q.max_queries}; it must be at least 1")
        if q.kind == "file":
            columns = QueryColumns(q.positive, q.negative, q.columns, q.wrong_option)
            return queries_from_file(path, columns, max_queries=q.max_queries)
        trait = load_trait(path)
        if q.kind == "trait":
            return queries_from_trait(trait)[: q.max_queries]
        spec = OnPolicySpec(
            trait,
            q.questions,
            q.samples,
            q.coherence_threshold,
            self.model,
            self.facts,
            replace(self.pipeline.sampling, max_new_tokens=q.max_new_tokens),
            self.config.source.max_tokens,
        )
        found = on_policy(spec, self.pipeline.judge(), self.pipeline.store, self.pipeline.session)
        paired = any(s.contrasts for method in self.methods for s in self._behaviour_specs(method))
        return top_queries(found, q.keep, paired)[: q.max_queries]

    # curvature

    @cached_property
    def rows(self) -> dict[str, Any]:
        """In recipes: the rows that curvature is made of, and what they are to the model."""
        return {
            "code": __version__,
            "corpus": self.pipeline.corpus,
            "model": self.facts,
            "tokenizer": tokenizer_digest(load_tokenizer(self.pipeline.model)),
        }

    @property
    def reader(self) -> ReaderSpec:
        """How rows are read for curvature: long ones are cut."""
        longest = min(self.spec.max_tokens, self.config.source.max_tokens)
        return replace(self.pipeline.reader, max_tokens=longest, overlong="truncate")

    @cached_property
    def factor_recipe(self) -> Recipe:
        """What factors are made from; its digest names their folder."""
        spec = {**asdict(self.spec), "max_tokens": self.reader.max_tokens}
        return Recipe("factors", {**self.rows, "curvature": spec})

    @property
    def factors_url(self) -> str | None:
        """Where the factors lie, or will; None where no method uses curvature."""
        if self.spec.kind == "identity" or set(self.methods) <= WITHOUT_CURVATURE:
            return None
        return storage.join(self.pipeline.store, "factors", self.factor_recipe.digest)

    def fit(self, crew: Crew, recipe: Recipe, spec: CurvatureSpec) -> str:
        """The folder of the factors of `recipe`, fitted now where they are not there."""
        url, bad = storage.join(self.pipeline.store, "factors", recipe.digest), self.config.source.max_bad_fraction
        made = FitSpec(url, self.reader, spec, self.config.curvature.shard_rows, bad)
        _, done = fit(made, recipe, self.pipeline.whole_manifest, self.identity, crew)
        if done is not None:
            self.pipeline.timed("fit", done)
        return url

    # test vectors

    def _vector(self, method: str) -> VectorSpec:
        c, behaviours = self.config.curvature, self.behaviours(method)
        cg = None if method in WITHOUT_CURVATURE else cg_rows(self)
        plain = method in WITHOUT_CURVATURE or (self.spec.kind == "identity" and cg is None)
        concepts = {x.name: concept_digest(x) for x in self.pipeline.concept_list}
        fields = {
            "code": __version__,
            "model": self.facts,
            "layers": asdict(self.spec.layers),
            "behaviours": [[b.name, asdict(b.spec), b.reduction] for b in behaviours],
            "concepts": concepts if any(b.spec.of_concept for b in behaviours) else {},
            "saes": sorted({sae_digest(b.latent.sae) for b in behaviours if b.latent is not None}),
            "queries": [asdict(q) for q in self.queries],
            "factors": None if plain or cg is not None else self.factor_recipe.digest,
            "damping": None if plain else asdict(self.damping),
            "rank": c.rank,
        }
        recipe = Recipe("test_vector", fields if cg is None else {**fields, "cg": cg_fields(self)})
        url = storage.join(self.pipeline.store, "test_vectors", f"{method}-{recipe.digest}")
        kind, factors = ("identity", None) if plain else (self.spec.kind, self.factors_url)
        made = VectorSpec(
            method, url, recipe, self.identity, behaviours, self.queries, kind, factors, self.damping, c.rank
        )
        return made if cg is None else replace(made, kind="cg", factors=None, cg=cg)

    @cached_property
    def _vectors(self) -> dict[str, VectorSpec]:
        return {method: self._vector(method) for method in self.methods}

    @cached_property
    def vectors(self) -> dict[str, TestVectorHeader]:
        """The headers of all test vectors by method; makes queries, factors and vectors that are not there."""
        if not self.methods:
            return {}
        budget = self.pipeline.session.gradient_token_budget
        specs = list(self._vectors.values())
        with differentiators(DifferentiatorSpec(self.model, self.spec.layers, budget), self.pipeline.session) as crew:
            if self.factors_url is not None:
                self.fit(crew, self.factor_recipe, self.spec)
            found = make_test_vectors(specs, crew)
        if self.factors_url is None:  # else the fit has said it, before the work
            say_coverage(Coverage(**next(iter(found.values())).meta["coverage"]))
        return found

    def item_vector(
        self,
        name: str,
        items: Sequence[Query],
        behaviour: Behaviour,
        layers: LayerChoice,
        sae: str | None = None,
        sae_digest: str | None = None,
        kind: Literal["identity"] | None = None,
    ) -> tuple[str, TestVectorHeader]:
        """(URL without suffix, header) of the test vector with one row an item; see `jobs.item_vectors`."""
        return ItemVector(self, name, items, behaviour, layers, sae, sae_digest, kind).make()

    @property
    def urls(self) -> dict[str, str]:
        """Where the test vectors lie, or will, by method."""
        return {method: spec.url for method, spec in self._vectors.items()}

    @property
    def sources(self) -> InfluenceSources | None:
        """What a report reads of all this; None where no method needs it."""
        if not self.methods:
            return None
        actors = DifferentiatorSpec(self.model, self.spec.layers, self.pipeline.session.gradient_token_budget)
        wanted = self.config.report.tokens
        crew = (lambda: differentiators(actors, self.pipeline.session)) if wanted else None
        return InfluenceSources(self.urls, self.factors_url, crew)

    def plan(self) -> InfluencePlan | None:
        """What a plan needs to know of all this; None where no method needs it. Makes nothing but concepts."""
        if not self.methods:
            return None
        reads = {method: [(b.name, b.top) for b in self.behaviours(method)] for method in self.methods}
        url = self.factors_url
        todo = url is not None and not storage.exists(storage.join(url, INDEX))
        rows = min(self.spec.examples, self.pipeline.whole_manifest.rows) if todo else 0
        passes = 2 if self.spec.kind == "ekfac" else 1
        if self.cg is not None and not set(self.methods) <= WITHOUT_CURVATURE:
            solved = sum(len(r) for method, r in reads.items() if method not in WITHOUT_CURVATURE)
            rows = min(self.cg.rows, self.pipeline.whole_manifest.rows)
            passes = 2 * solved * self.cg.iterations  # a product is about two forwards and backwards a behaviour
        return InfluencePlan(self.model, self.spec.layers, reads, self.config.curvature.rank, rows, passes)

    def told(self) -> str:
        """Where the products of the fit lie, for its job.

        Raises:
            ConfigError: no configured scorer needs any.
        """
        if not self.methods:
            raise ConfigError(f"no configured scorer needs a fit; these do: {', '.join(sorted(METHODS))} (scorer=…)")
        lines = [f"factors: {self.factors_url}"] if self.factors_url is not None else []
        for method, header in self.vectors.items():
            lines.append(f"{method}: {self.urls[method]}.json ({', '.join(header.names)})")
        return "\n".join(lines)
