"""From settings to an SAE's activations on rows: which model reads them, where the products lie, contexts to show."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from connectors import storage
from connectors.packages import expand
from curate import __version__
from curate.concepts import sae_files
from curate.concepts.concept import same_model
from curate.concepts.sae import SAE, check_fits
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest
from curate.errors import ConfigError
from curate.models.load import ModelSpec
from curate.runtime.events import say
from curate.runtime.latent_activations import (
    LatentActivationSpec,
    LatentTable,
    Statistic,
    latent_activations,
    latent_recipe,
    latent_table,
)
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec

if TYPE_CHECKING:
    from jobs.pipeline import Pipeline


class LatentActivations:
    """Of one run. What the jobs share is computed once."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.settings = pipeline.config.latents

    @property
    def url(self) -> str:
        """Where the SAE lies.

        Raises:
            ConfigError: none is set.
        """
        if self.settings.sae is None:
            raise ConfigError("latents.sae is not set; give the folder of an SAE (`curate sae` makes one)")
        return expand(self.settings.sae)

    @cached_property
    def sae(self) -> SAE:
        """The configured SAE, checked against the model that reads.

        Raises:
            ConfigError: none is set. ConceptError: broken, or of another model, width or layer.
        """
        found = sae_files.load(self.url)
        who = self.pipeline.influence.identity if self._tuned(found) else self.pipeline.identity
        check_fits(found, who, self.settings.allow_other_model)
        return found

    def _tuned(self, sae: SAE) -> bool:
        """Whether the tuned model reads the rows: as configured, or as the SAE says that it was made from."""
        if self.settings.model != "auto":
            return self.settings.model == "tuned"
        base, influence = self.pipeline.identity, self.pipeline.influence
        if influence.tuned == self.pipeline.config.model or same_model(sae.model, base):
            return False
        return same_model(sae.model, influence.identity)

    @cached_property
    def model(self) -> tuple[ModelSpec, dict[str, Any]]:
        """The model that reads, and its identity with its precision."""
        if self._tuned(self.sae):
            return self.pipeline.influence.model, self.pipeline.influence.facts
        return self.pipeline.model, {**self.pipeline.identity, "dtype": self.pipeline.model.dtype}

    @property
    def reader(self) -> ReaderSpec:
        """How rows become tokens for that model."""
        return replace(self.pipeline.reader, model=self.model[0])

    def recipe(self, corpus: dict[str, Any], reader: ReaderSpec) -> Recipe:
        """What activations on a corpus are made from."""
        return latent_recipe(corpus, reader, self.model[1], self.sae, self.settings.tokens, __version__)

    def table(self, statistic: Statistic) -> LatentTable:
        """Activations of the source's rows; makes what is not there.

        Raises:
            see `curate.runtime.latent_activations.latent_activations`
        """
        return self.of(self.pipeline.manifest, self.pipeline.corpus, self.reader, statistic)

    def of(self, manifest: Manifest, corpus: dict[str, Any], reader: ReaderSpec, statistic: Statistic) -> LatentTable:
        """The same of any corpus."""
        p, tokens, recipe = self.pipeline, self.settings.tokens, self.recipe(corpus, reader)
        output = Output(storage.join(p.store, "latents", recipe.digest))
        spec = LatentActivationSpec(reader, output, p.session.token_budget, tokens)
        bad = p.config.source.max_bad_fraction
        p.timed("latents", latent_activations(spec, self.sae, recipe, manifest, p.session, bad))
        say(f"latents of {self.sae.name} (layer {self.sae.layer}): {output.url}")
        return latent_table(output, manifest, self.sae.latents, statistic)
