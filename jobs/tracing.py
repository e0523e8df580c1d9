"""The trace with its settings: items, gradients, pre-filter, latent influence, page. Each is made, or found made.

Turns Settings and what the stages found into what the library takes. Holds no mathematics.
"""

from __future__ import annotations

import time
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from connectors import storage
from connectors.packages import expand
from curate import __version__
from curate.concepts import sae_files
from curate.concepts.sae import SAE, check_fits, digest
from curate.corpus.recipe import Recipe
from curate.corpus.render import Renderer, tokenizer_digest
from curate.curvature.behaviour import Behaviour, BehaviourSpec, make_behaviour
from curate.curvature.queries import Query, QueryColumns, QueryExample, question_options, render_queries
from curate.curvature.test_vector import TestVectorHeader
from curate.errors import ConceptError, ConfigError, near
from curate.evaluation.faithfulness import Question, question
from curate.evaluation.masking import FaithfulnessTable, merged
from curate.evaluation.orthogonality import Orthogonality
from curate.models.load import load_tokenizer
from curate.models.tracked import LayerChoice
from curate.runtime.differentiator import DifferentiatorSpec, differentiators
from curate.runtime.evaluate import Evaluation
from curate.runtime.events import say
from curate.runtime.gradient_cosine import Bounds, CosineSpec, bounds, gradient_cosines
from curate.runtime.item_latents import ItemJob, ItemLatents, item_latents, orthogonality
from curate.runtime.latent_influence import LatentSpec, latent_influence
from curate.runtime.latent_totals import Totals, totals
from curate.runtime.output import Output
from curate.scoring.latent.make import BACKENDS
from jobs.evaluation import TUNED, Evaluating

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline

SPLICED = "with SAE"


class Tracing:
    """Of one run. What the stages share is computed once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.config = pipeline, pipeline.config
        self.settings = pipeline.config.trace
        self.influence = pipeline.influence
        self.began = time.monotonic()

    def check(self) -> None:
        """Whatever can be wrong before anything is computed: settings, the SAE, the items.

        Raises:
            ConfigError: names the setting. ConceptError: an SAE that is broken, or does not fit the model.
            CurvatureError: an item without a right answer, or no items.
        """
        if self.settings.sae is None:
            raise ConfigError(
                "trace.sae is not set; give the SAE that is inserted: trace.sae=… (`curate sae` makes one)"
            )
        if self.settings.backend not in (*BACKENDS, "auto"):
            raise ConfigError(
                f"trace.backend is {self.settings.backend!r}{near(self.settings.backend, [*BACKENDS, 'auto'])}"
            )
        self.influence.check_model()
        self.layers  # noqa: B018  (raises where SAE, model and layers do not fit together)
        self.items  # noqa: B018
        if self.config.evaluator:
            self.evaluating.check()

    # the SAE, the layers above it, the items

    @cached_property
    def _given(self) -> SAE:
        s = self.settings
        assert s.sae is not None  # checked
        return sae_files.load(expand(s.sae), layer=s.layer, scale=s.scale)

    @cached_property
    def sae_url(self) -> str:
        """Where actors read it: as given or, where its file does not say all, from a copy that does."""
        s = self.settings
        assert s.sae is not None  # checked
        if s.layer is None and s.scale is None:
            return expand(s.sae).rstrip("/")
        place = storage.join(self.pipeline.store, "saes", f"given-{digest(self._given)}")
        if not storage.exists(storage.join(place, sae_files.CONFIG)):  # written last
            sae_files.save(place, self._given)
        return place

    @cached_property
    def sae(self) -> SAE:
        """The SAE, checked against the finetuned model.

        Raises:
            ConceptError: broken, of another width or model, or of a layer with no block above it.
        """
        found = self._given
        check_fits(found, self.influence.identity, self.settings.allow_other_model)
        if found.layer >= (blocks := self.influence.identity["layers"]):
            raise ConceptError(
                f"the SAE {found.name!r} is of layer {found.layer}, above which the model has no block whose weights "
                f"could be influenced; use one of a layer from 0 to {blocks - 1}"
            )
        return found

    @cached_property
    def sae_digest(self) -> str:
        return digest(self.sae)

    @cached_property
    def layers(self) -> LayerChoice:
        """The tracked layers: those of the settings that lie above the SAE.

        Raises:
            ConfigError: there is none.
        """
        given = self.config.curvature.layers
        if given.last is not None and given.last <= self.sae.layer:
            raise ConfigError(
                f"curvature.layers.last={given.last} leaves no tracked block above the SAE of layer {self.sae.layer}: "
                f"the latents influence the blocks from {self.sae.layer} on"
            )
        return replace(given, first=max(given.first or 0, self.sae.layer))

    @cached_property
    def items(self) -> list[Query]:
        """The test items: the configured queries, each with its right answer."""
        return self.influence.queries[: self.settings.items]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(q.id for q in self.items)

    @property
    def behaviour(self) -> Behaviour:
        """f = −L(right answer)."""
        return make_behaviour(BehaviourSpec("loss"), None, self.config.curvature.reduction)

    @cached_property
    def questions(self) -> list[Question]:
        """The items as faithfulness asks them: a multiple-choice question with its options, where their first tokens
        tell them apart."""
        q, n = self.config.query, len(self.items)
        plain = [Question(item.positive) for item in self.items]
        if q.kind != "file" or q.path is None:
            return plain
        columns = QueryColumns(positive=q.positive, negative=q.negative, wrong_option=q.wrong_option, corpus=q.columns)
        renderer = Renderer(load_tokenizer(self.pipeline.model), self.config.source.max_tokens)
        out, alike = [], 0
        for one, options in zip(plain, question_options(expand(q.path), columns, max_queries=n), strict=True):
            texts = [QueryExample(f"{e.id}, option {k}", e) for k, e in enumerate(options[0])] if options else []
            rendered = [r.positive for r in render_queries(texts, renderer)]
            distinct = len({r.input_ids[r.start] for r in rendered}) == len(rendered)
            alike += not distinct
            out.append(question(rendered, options[1]) if options and distinct else one)
        if alike:
            say(
                f"WARNING: of {alike} of {n} items two options begin with the same token: there the prediction is the "
                f"likeliest token of all. Set query.columns.answer_form to letter_and_text, as the model was trained"
            )
        return out

    # stages

    @cached_property
    def gradients(self) -> tuple[str, TestVectorHeader]:
        """Each item's ∇f, and where they lie."""
        return self._vectors("gradients", "identity")

    @cached_property
    def vectors(self) -> tuple[str, TestVectorHeader]:
        """Each item's s = H⁻¹∇f, and where they lie."""
        return self._vectors("trace", None)

    def _vectors(self, name: str, kind: Literal["identity"] | None) -> tuple[str, TestVectorHeader]:
        where = self.sae_url, self.sae_digest
        return self.influence.item_vector(name, self.items, self.behaviour, self.layers, *where, kind=kind)

    @cached_property
    def _rows(self) -> dict[str, Any]:
        """What the rows are to the model, in recipes."""
        return {
            "code": __version__,
            "corpus": self.pipeline.corpus,
            "model": self.influence.facts,
            "tokenizer": tokenizer_digest(load_tokenizer(self.pipeline.model)),
            "max_tokens": self.config.source.max_tokens,
            "overlong": self.config.source.overlong,
            "sae": self.sae_digest,
        }

    def cosines(self) -> tuple[Output, Recipe]:
        """The pre-filter's numbers, where a pre-filter is configured."""
        url, header = self.gradients
        recipe = Recipe("gradient_cosines", {**self._rows, "gradients": header.digest})
        output = Output(storage.join(self.pipeline.store, "gradient_cosines", recipe.digest))
        p = self.pipeline
        spec = CosineSpec(p.reader, output, self.influence.model, self.sae_url, url, p.session.gradient_token_budget)
        bad = self.config.source.max_bad_fraction
        p.timed("trace: pre-filter", gradient_cosines(spec, recipe, p.manifest, p.session, bad))
        return output, recipe

    @cached_property
    def bounds(self) -> tuple[Output, Recipe, Bounds] | None:
        """Who is a candidate; None: every row of every item."""
        s = self.settings
        if s.keep is None:
            return None
        output, recipe = self.cosines()
        found = bounds(output, self.pipeline.manifest, self.names, s.keep, s.min_cosine)
        for q in (found.kept == 0).nonzero()[0]:
            say(
                f"WARNING: no row is a candidate of item {self.names[q]!r}: its largest cosine is "
                f"{found.largest[q]:.3g}, below trace.min_cosine={s.min_cosine}"
            )
        say(
            f"trace: pre-filter keeps {found.kept.min():,} to {found.kept.max():,} of {found.rows:,} rows an item",
            cosine_at_least=f"{found.least.min():.3g} to {found.least.max():.3g}",
        )
        return output, recipe, found

    @cached_property
    def latents(self) -> tuple[Output, Recipe]:
        """The influence of the candidates' latents."""
        p, s, kept = self.pipeline, self.settings, self.bounds
        url, header = self.vectors
        reduction = self.config.curvature.reduction
        fields = {
            **self._rows,
            "vectors": header.digest,
            "items": list(self.names),
            "backend": s.backend,
            "reduction": reduction,
            "token_latents": s.token_latents,
            # A bound depends on all rows of the run.
            "candidates": kept and [kept[1].digest, s.keep, s.min_cosine, p.manifest.rows],
        }
        recipe = Recipe("latent_influence", fields)
        output = Output(storage.join(p.store, "latent_influence", recipe.digest))
        how = (s.backend, reduction, p.session.gradient_token_budget, s.token_latents)
        chosen = (kept[0], tuple(kept[2].least.tolist())) if kept else ()
        spec = LatentSpec(p.reader, output, self.influence.model, self.sae_url, url, self.names, *how, *chosen)  # type: ignore[arg-type]
        bad = self.config.source.max_bad_fraction
        p.timed("trace: latents", latent_influence(spec, recipe, p.manifest, p.session, bad))
        return output, recipe

    @cached_property
    def totals(self) -> Totals:
        """Of all pairs; writes <sink>/trace.parquet."""
        s, p = self.settings, self.pipeline
        url = storage.join(p.sink, "trace.parquet")
        return totals(self.latents[0], p.manifest, self.names, self.sae.latents, s.rows, s.latents, url, s.sign)

    # what is said of the model

    @cached_property
    def evaluating(self) -> Evaluating:
        return Evaluating(self.pipeline)

    @cached_property
    def evaluations(self) -> list[Evaluation]:
        """The configured evaluators on the base model, the finetuned one, and that with the SAE in it."""
        if not self.config.evaluator:
            return []
        models = self.evaluating.models
        last = next((m for m in models if m.key == TUNED), models[0])
        return self.evaluating.run([*models, replace(last, key=f"{last.key}, {SPLICED}", sae=self.sae_url)])

    @cached_property
    def seen(self) -> tuple[list[ItemLatents], FaithfulnessTable | None, tuple[Orthogonality, ...]]:
        """The items' own latents, how faithful the rankings are, and the orthogonality of a sample of rows."""
        p, s = self.pipeline, self.settings
        ks = tuple(sorted({min(k, self.sae.latents) for k in s.ks}))
        spans = [(q.rendered, q.options and list(q.options), q.right) for q in self.questions]
        asked = [[r.input_ids, r.start, r.end, options, right] for r, options, right in spans]
        fields = {
            "influence": self.latents[1].digest,
            "rows": p.manifest.rows,
            "ks": list(ks),
            "seed": self.config.seed,
        }
        recipe = Recipe("item_latents", {**fields, "items": asked})
        spaces = Recipe("orthogonality", {**self._rows, "rows": p.manifest.rows, "sample": s.orthogonality_rows})
        importance = self.totals.importance
        jobs = [
            ItemJob(i, name, question, importance[i], ks, self.config.seed)
            for i, (name, question) in enumerate(zip(self.names, self.questions, strict=True))
        ]
        actors = DifferentiatorSpec(self.influence.model, self.layers, p.session.token_budget, self.sae_url)
        with differentiators(actors, p.session) as crew:
            found = item_latents(storage.join(p.store, "item_latents", recipe.digest), recipe, jobs, crew)
            url = storage.join(p.store, "orthogonality", f"{spaces.digest}.json")
            table = orthogonality(url, crew, p.manifest, p.reader, s.orthogonality_rows) if s.orthogonality_rows else ()
        parts = [x.faithful for x in found if x.faithful is not None]
        if not parts:
            return found, None, table
        replicates = self.config.report.bootstrap
        return found, merged(parts).table(replicates=replicates, seed=self.config.seed), table
