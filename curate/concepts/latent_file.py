"""Latents of an SAE file as concepts, and from such a concept back to its SAE.

In: the URL of an SAE. Out: one Concept a latent, whose meta holds what it takes to read the SAE again (`sae_file`, the
arguments of `sae_files.load`): the concept's direction is the latent's decoder row, its activation needs the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from connectors import urls
from curate.concepts.concept import Concept
from curate.concepts.latent import decoder_concept
from curate.concepts.sae import Latent, check_fits, digest
from curate.concepts.sae_files import load
from curate.errors import ConceptError

FILE = "sae_file"


def file_facts(url: str, **options: Any) -> dict[str, Any]:
    """For a concept's meta: how to read the SAE at `url` again, from any folder; `options` of `sae_files.load`."""
    where = str(urls.local_path(url)) if urls.is_local(url) else url
    return {FILE: {"url": where, **{k: v for k, v in options.items() if v is not None}}}


def latent_concepts(
    url: str, latents: Sequence[int], identity: Mapping[str, Any], allow_other_model: bool = False, **options: Any
) -> list[Concept]:
    """Concepts "<SAE>-<latent>" of the SAE at `url`.

    Args:
        identity: of the model that they are for. options: of `sae_files.load` (format, layer, name, scale).

    Raises:
        ConceptError: no latent is given or one twice, there is none of that number, or the SAE does not fit the model.
    """
    if not latents or len(set(latents)) != len(latents):
        raise ConceptError(f"the latents of the SAE {url} are {list(latents)}; give different ones, at least one")
    sae = load(url, **options)
    check_fits(sae, identity, allow_other_model)
    meta = file_facts(url, **options)
    return [decoder_concept(sae, latent, int(identity["layers"]), meta) for latent in latents]


def facts_of(concept: Concept) -> tuple[str, int, Mapping[str, Any]]:
    """(digest of the SAE, number of the latent, arguments of `sae_files.load`) of a latent's concept.

    Raises:
        ConceptError: it is no latent of an SAE, or does not say where that lies.
    """
    facts = concept.meta
    if FILE not in facts or "latent" not in facts:
        raise ConceptError(
            f"the concept {concept.name!r} ({concept.method}) is no latent of an SAE file, so it has no activation. "
            f"Give one with concept=sae concept.sae.path=… concept.sae.latents=[…]"
        )
    return str(facts["sae_digest"]), int(facts["latent"]), facts[FILE]


def latents_of(concepts: Sequence[Concept]) -> list[Latent]:
    """The latents that concepts stand for, each SAE read once.

    Raises:
        ConceptError: a concept is no latent (see `facts_of`), or its SAE is not what it was. StorageError: not there.
    """
    saes = {}
    for concept in concepts:
        wanted, _, file = facts_of(concept)
        if wanted not in saes:
            saes[wanted] = load(**file)
            if (found := digest(saes[wanted])) != wanted:
                raise ConceptError(
                    f"the SAE at {file['url']} is another one than that of the concept {concept.name!r}: its digest is "
                    f"{found}, the concept says {wanted}. Make the concept again."
                )
    return [Latent(saes[wanted], index) for wanted, index, _ in map(facts_of, concepts)]
