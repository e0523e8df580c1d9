"""The stages of curation with their settings: each makes what it needs from the ones before, or finds it made.

Turns Settings into what the rooms of the library take. Holds no mathematics and no data.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import cached_property
from typing import Any, Literal

import torch

from conf.schema import ConceptSettings, Settings
from connectors import registry, storage
from connectors.packages import expand
from curate import __version__
from curate.concepts import concept as concept_files
from curate.concepts.concept import Concept, check_fits
from curate.concepts.latent_file import latent_concepts
from curate.corpus.example import ColumnMap
from curate.corpus.recipe import Recipe
from curate.corpus.render import tokenizer_digest
from curate.corpus.units import Manifest
from curate.errors import ConfigError, near
from curate.evaluation.judge import Judge
from curate.models.engines import GenerationSpec, vllm_serves
from curate.models.load import ModelSpec, identity, load_tokenizer
from curate.runtime import concepts as making
from curate.runtime.events import say
from curate.runtime.generate import GenerateSpec, generate, generation_recipe
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.output import Output
from curate.runtime.plan import PlanSpec, make_plan
from curate.runtime.reader import ReaderSpec
from curate.runtime.report import Place, ReportSpec, headline, table, write_report
from curate.runtime.score import ScoreSpec, score
from curate.runtime.select import Scores, SelectSpec, load_scores, pick_column, score_columns, select
from curate.runtime.session import Session
from curate.runtime.stage import StageResult
from curate.scoring.base import Needs, Scorer
from curate.scoring.registry import SCORERS, make_scorers
from curate.selection.select import Decision, Rule, decide
from jobs.influence import METHODS, Influence, scorer_options
from jobs.judging import make_judge

DEFAULT_FRACTION = 0.25


class Pipeline:
    """One run. Stages are methods; what they share is computed once."""

    session: Session

    def __init__(self, config: Settings) -> None:
        self.config = config
        source = config.source
        urls = [source.url] if isinstance(source.url, str) else list(source.url)
        self.source_urls = [expand(u) for u in urls]
        self.sink = config.sink.url.rstrip("/")
        self.store = config.sink.store.rstrip("/")
        self.scores_place = Output((config.sink.scores or storage.join(self.sink, "scores")).rstrip("/"))
        self.place = Place(self.sink)
        self.influence = Influence(self)

    def check(self) -> None:
        """Whatever can be wrong without reading the corpus or starting a cluster, said first."""
        self.rule  # noqa: B018  (raises where the rule makes no sense)
        for name in self.scorer_settings:
            if name not in SCORERS:
                raise ConfigError(f"there is no scorer {name!r}{near(name, SCORERS)}")
        if not self.scorer_settings:
            raise ConfigError(f"no scorer is chosen{near('', SCORERS)}")
        self.influence.check()
        registry.discover(self.source_urls, self.config.source.format)
        storage.check_writable(self.sink)

    def check_shared(self) -> None:
        """Say so when the workers of several machines would each write to a disk of their own."""
        for what, url in (("sink.url", self.sink), ("sink.store", self.store)):
            if self.session.hosts > 1 and storage.is_local(url):
                say(f"WARNING: {what}={url} must be a file system that all {self.session.hosts} machines share")

    @property
    def scorer_settings(self) -> dict[str, dict[str, Any]]:
        """{method: settings}; a scorer without settings is an empty mapping."""
        return {name: dict(options or {}) for name, options in (self.config.scorer or {}).items()}

    @property
    def scorer_options(self) -> dict[str, dict[str, Any]]:
        """The same, as scorers take them: without what is for their test vectors alone."""
        return {name: scorer_options(name, options) for name, options in self.scorer_settings.items()}

    @cached_property
    def rule(self) -> Rule:
        s = self.config.selector
        given = (s.fraction, s.count, s.threshold)
        fraction = DEFAULT_FRACTION if given == (None, None, None) else s.fraction
        return Rule(s.mode, fraction, s.count, s.threshold, s.per_group)

    @cached_property
    def _source(self) -> tuple[Manifest, ColumnMap]:
        s = self.config.source
        spec = SourceSpec(
            self.source_urls if len(self.source_urls) > 1 else self.source_urls[0],
            s.format,
            s.columns,
            s.unit_rows,
            s.skip_broken_shards,
        )

        def progress(done: int, of: int) -> None:
            if of > 20 and done % max(1, of // 10) == 0:
                say(f"manifest: {done}/{of} files")

        manifest, _, columns = build_manifest(spec, self.sink, progress)
        scope = manifest.head(s.max_rows)
        say(f"corpus: {manifest.rows:,} rows in {len(manifest.files)} file(s), {scope.rows:,} of them in this run")
        return manifest, columns

    @property
    def whole_manifest(self) -> Manifest:
        """All rows of the corpus: what it is made of, and what curvature is sampled from."""
        return self._source[0]

    @property
    def manifest(self) -> Manifest:
        """The rows of this run."""
        return self._source[0].head(self.config.source.max_rows)

    @cached_property
    def corpus(self) -> dict[str, Any]:
        """What the corpus is, for recipes: all of it, so that a run over more rows goes on from one over fewer."""
        return {"digest": self._source[0].digest, "columns": self._source[1].facts()}

    @cached_property
    def model(self) -> ModelSpec:
        """The model with its precision decided here, once: workers on unlike machines must not mix two."""
        dtype = self.config.model.dtype
        return replace(self.config.model, dtype=self._precision if dtype == "auto" else dtype)

    @cached_property
    def sampling(self) -> GenerationSpec:
        """How responses are generated, precision and engine decided likewise: an artifact is of one engine."""
        spec = self.config.generation
        engine = spec.engine
        if engine == "auto":
            device = torch.device("cuda" if self.session.engines.gpus else "cpu")
            engine = "vllm" if vllm_serves(device) else "transformers"
            if engine == "transformers":
                say(f"WARNING: vLLM for {device.type} is not installed: generating with transformers, which is slower")
        return replace(spec, engine=engine, dtype=self._precision if spec.dtype == "auto" else spec.dtype)

    @property
    def _precision(self) -> Literal["bfloat16", "float32"]:
        return "bfloat16" if self.session.scorers.gpus else "float32"

    @cached_property
    def identity(self) -> dict[str, Any]:
        return identity(self.config.model)

    @cached_property
    def reader(self) -> ReaderSpec:
        s = self.config.source
        manifest, columns = self._source
        return ReaderSpec(manifest.format, columns, self.model, s.max_tokens, s.overlong)

    # concepts

    @cached_property
    def concept_list(self) -> list[Concept]:
        """All configured concepts, made or found, checked against the model."""
        found: list[Concept] = []
        longest = self.config.source.max_tokens
        context = making.ConceptContext(self.model, self.identity, longest, self.store, self.session)
        for name, s in (self.config.concept or {}).items():
            for made in self._concepts(name, s, context):
                if s.layer is not None:
                    made.check_layer(s.layer)
                    made = replace(made, layer=s.layer)
                layers, width = self.identity["layers"], self.identity["width"]
                check_fits(made, layers, width, self.identity, allow_other_model=s.allow_other_model)
                found.append(made)
        return found

    def _concepts(self, name: str, s: ConceptSettings, context: making.ConceptContext) -> list[Concept]:
        if s.path is None:
            raise ConfigError(f"concept.{name}.path is not set; give the file that the concept is made from")
        if s.kind == "file":
            return [concept_files.load(expand(u), key=s.key) for u in ([s.path] if isinstance(s.path, str) else s.path)]
        if s.kind == "probe":
            if s.positive_label is None:
                raise ConfigError(
                    f"concept.{name}.positive_label is not set; give the label of the rows with the trait"
                )
            rows = expand(s.path) if isinstance(s.path, str) else [expand(u) for u in s.path]
            return [making.probe(context, s.name or name, rows, s.format, s.columns, s.positive_label, s.max_rows)]
        if not isinstance(s.path, str):
            raise ConfigError(f"concept.{name}.path is a list; a concept of the kind {s.kind!r} is made from one file")
        path = expand(s.path)
        if s.kind == "sae":
            file = {"format": s.format, "layer": s.layer, "name": s.name, "scale": s.scale}
            return latent_concepts(path, s.latents, self.identity, s.allow_other_model, **file)
        label = s.name or (making.load_trait(path).name if name == "persona" else name)
        if s.method == "teacher_forced":
            return [making.persona(context, label, path, s.with_instruction)]
        judge = self.judge()
        return [
            making.persona_rollouts(
                context,
                label,
                path,
                s.rollouts,
                replace(self.sampling, max_new_tokens=s.max_new_tokens),
                judge,
                (s.trait_threshold, s.coherence_threshold),
                s.with_instruction,
            )
        ]

    def judge(self) -> Judge | None:
        """The configured judge, or None."""
        return make_judge(self)

    def concepts(self) -> None:
        """The concept job."""
        self.concept_list  # noqa: B018

    # generation

    @cached_property
    def generations(self) -> tuple[Output, Recipe]:
        """Where the base model's own responses lie, and what they are made from."""
        recipe = generation_recipe(self.corpus, self.reader, self.identity, self.sampling)
        return Output(storage.join(self.store, "generations", recipe.digest)), recipe

    def generate(self) -> None:
        """Generate what is missing."""
        output, recipe = self.generations
        manifest = self.manifest.head(self.config.source.generate_rows)
        spec = GenerateSpec(self.reader, self.sampling, output)
        bad = self.config.source.max_bad_fraction
        self.timed("generate", generate(spec, recipe, manifest, self.session, bad))

    # scores

    @cached_property
    def scorers(self) -> list[Scorer]:
        """As the driver needs them: names of columns and fingerprints. Makes the test vectors that are not there."""
        return make_scorers(self.scorer_options, self.concept_list, test_vectors=self.influence.vectors)

    @cached_property
    def needs(self) -> Needs:
        """What all scorers need, told without making a test vector."""
        plain = {name: options for name, options in self.scorer_options.items() if name not in METHODS}
        found = [s.needs() for s in make_scorers(plain, self.concept_list)] if plain else []
        needs = Needs.union([*found, Needs(derivatives=frozenset(self.influence.methods))])
        top = max(needs.layers | needs.generated | needs.gradients | needs.states, default=0)
        if top > self.identity["layers"]:
            raise ConfigError(
                f"layer {top} is asked for, but the model has {self.identity['layers']} layers "
                f"(valid: 0 to {self.identity['layers']})"
            )
        return needs

    def fit(self) -> None:
        """The fit job: curvature factors and test vectors."""
        self.influence.vectors  # noqa: B018

    @cached_property
    def _known(self) -> dict[str, Any]:
        """What of the scores' recipe is known before anything is computed."""
        needs = self.needs
        fields: dict[str, Any] = {
            "code": __version__,
            "corpus": self.corpus,
            "model": self.identity,
            "dtype": self.model.dtype,
            "tokenizer": tokenizer_digest(load_tokenizer(self.model)),
            "max_tokens": self.config.source.max_tokens,
            "overlong": self.config.source.overlong,
        }
        if needs.derivatives:
            fields["tuned"] = self.influence.facts
        if needs.generated:
            fields["generations"] = self.generations[1].digest
            fields["generate_rows"] = self.config.source.generate_rows
        return fields

    @cached_property
    def score_recipe(self) -> Recipe:
        stored = self.scores_place.recipe()
        if stored is not None and self.needs.derivatives:  # refuse before a fit, not after
            there = {name: value for name, value in stored.fields.items() if name in self._known}
            Recipe("scores", self._known).refuse_other(Recipe(stored.kind, there), self.scores_place.url)
        return Recipe("scores", {**self._known, "scorers": {s.name: s.fingerprint() for s in self.scorers}})

    def score(self) -> None:
        """Score what has no part yet; generates first where a scorer reads the base model's own responses."""
        recipe = self.score_recipe
        self.scores_place.open(recipe)  # refuse before anything is computed
        reader = self.reader
        if self.needs.generated:
            self.generate()
            reader = replace(reader, generations=self.generations[0].url)
        places = (self.influence.model, self.influence.urls) if self.needs.derivatives else ()
        budgets = self.session.token_budget, self.session.gradient_token_budget
        spec = ScoreSpec(reader, self.scorer_options, self.scores_place, *budgets, *places)
        bad = self.config.source.max_bad_fraction
        self.timed("score", score(spec, recipe, self.manifest, self.concept_list, self.session, bad))

    # selection and report

    @cached_property
    def _scores(self) -> Scores:
        columns = score_columns(self.scores_place.parts())
        if not columns:
            raise ConfigError(
                f"there are no scores at {self.scores_place.url}; run `curate score` with this sink first"
            )
        pick_column(columns, self.config.selector.column)
        with_groups = self.rule.per_group
        return load_scores(self.scores_place, self.manifest, columns, with_groups, labels=True)

    @cached_property
    def select_spec(self) -> SelectSpec:
        column = pick_column(list(self._scores.columns), self.config.selector.column)
        places = (self.source_urls[0], self.place.curated, self.place.ledger)
        return SelectSpec(self.scores_place, self.manifest.format, *places, column, self.rule.text())

    @cached_property
    def decision(self) -> Decision:
        stored = self.scores_place.recipe()
        fields = {
            "scores": stored.digest if stored else None,
            "rows": self.manifest.rows,
            "column": self.select_spec.column,
            "rule": asdict(self.rule),
        }
        groups = self._scores.groups if self.rule.per_group else None
        decision = decide(self._scores.columns[self.select_spec.column], self.rule, groups)
        select(decision, self.select_spec, Recipe("selection", fields), self.manifest, self._scores)
        return decision

    def select(self) -> None:
        """Write curated shards and ledgers."""
        self.decision  # noqa: B018

    def report(self) -> None:
        """Write the report."""
        recipe = self.scores_place.recipe()
        concepts = self.concept_list if recipe and self.config.concept else []
        spec = ReportSpec(
            self.place,
            self.config.report.title,
            self.config.source.positive_label,
            self.config.report.examples,
            self.config.report.bootstrap,
            self.reader,
            self.generations[0].url if self.needs.generated else None,
            self.influence.sources if recipe else None,
        )
        found = (self.manifest, self._scores, self.select_spec, self.decision, concepts)
        self.summary = write_report(spec, recipe, *found)

    def plan(self) -> None:
        """Print what a run will cost; writes nothing but the manifest."""
        spec = PlanSpec(
            self.reader,
            self.scorer_options,
            self.sampling,
            self.config.source.generate_rows,
            self.session.token_budget,
            self.session.gradient_token_budget,
            self.config.seed,
            self.influence.plan(),
        )
        print(make_plan(spec, self.manifest, self.concept_list, self.session))

    def timed(self, stage: str, result: StageResult) -> None:
        """Note what a stage did, for the report."""
        if result.rows:
            self.place.add_timing(stage, result)

    # what is printed

    def print_concepts(self) -> None:
        for c in self.concept_list:
            aucs = {p["layer"]: p.get("auc") for p in c.meta.get("profile", [])}
            auc = aucs.get(c.layer)
            found = "" if auc is None else f", held-out AUC {auc:.3f}"
            print(f"{c.name}: {c.method}, layer {c.layer}{found}, width {c.width}")

    def print_places(self) -> None:
        columns = score_columns(self.scores_place.parts())
        print(json.dumps({**self.place.existing(), "store": self.store, "score columns": columns}, indent=2))

    def print_table(self) -> None:
        print(table(headline(self.summary), self.place))
