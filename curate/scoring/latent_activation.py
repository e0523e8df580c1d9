"""Latent activation: how strongly latents of an SAE fire on the response (METHODS §4).

score(x, y) = mean (or maximum) over response tokens of r_j(h_t), h_t the state at the SAE's layer of the base model and
r_j the activation of latent j by the SAE's encoder. Tokens are read within the pass; what leaves it is a number a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from curate.concepts.concept import Concept
from curate.concepts.latent_file import facts_of, latents_of
from curate.concepts.sae import SAE, activations
from curate.errors import ConfigError, near
from curate.scoring.base import Batch, Columns, Needs, Readout, Scorer, as_column, column

Pooling = Literal["mean", "max"]


class LatentActivation(Scorer):
    """One column a concept, each of which must be a latent of an SAE (concept=sae). SAEs are read in `prepare`.

    Raises:
        ConfigError: no concept, or an unknown pooling. ConceptError: a concept that is no latent of an SAE file.
    """

    name = "latent_activation"

    def __init__(self, concepts: Sequence[Concept], pooling: Pooling = "mean") -> None:
        if not concepts:
            raise ConfigError(f"the scorer {self.name!r} needs latents and none is given; set concept=sae")
        if pooling not in get_args(Pooling):
            raise ConfigError(f"scorer.{self.name}.pooling is {pooling!r}{near(pooling, get_args(Pooling))}")
        self.concepts, self.pooling = list(concepts), pooling
        self._by_sae: dict[str, list[int]] = {}  # by digest: places in `concepts`
        for i, concept in enumerate(self.concepts):
            self._by_sae.setdefault(facts_of(concept)[0], []).append(i)
        self._readouts: list[Readout] = []

    def needs(self) -> Needs:
        return Needs(states=frozenset(c.layer for c in self.concepts if c.layer is not None))

    def columns(self) -> list[str]:
        return [column(self.name, concept.name) for concept in self.concepts]

    def prepare(self, device: torch.device) -> None:
        latents = latents_of(self.concepts)
        self._readouts = []
        for digest, places in self._by_sae.items():
            sae = latents[places[0]].sae.to(device, torch.float32)
            read = partial(_read, sae, [latents[i].index for i in places])
            most = sae.latents if sae.activation == "topk" else len(places)
            name = f"{self.name}.{digest}"
            self._readouts.append(Readout(name, sae.layer, read, len(places), self.pooling, most))

    def readouts(self) -> Sequence[Readout]:
        return self._readouts

    def score(self, batch: Batch) -> Columns:
        found = {
            i: as_column(batch.readouts[f"{self.name}.{digest}"][:, j])
            for digest, places in self._by_sae.items()
            for j, i in enumerate(places)
        }
        return {name: found[i] for i, name in enumerate(self.columns())}

    def fingerprint(self) -> dict[str, Any]:
        targets = [facts_of(concept)[:2] for concept in self.concepts]
        return {"method": self.name, "latents": [list(t) for t in targets], "pooling": self.pooling}


def _read(sae: SAE, latents: list[int], states: Float[Tensor, "tokens d"]) -> Float[Tensor, "tokens m"]:
    return activations(sae, states, latents)
