"""Scorers by name: settings in, scorers out. To add a method, write its file and name its class here.

The keyword arguments of a scorer's constructor are its settings. `concepts` and `test_vectors` are filled in;
`layers`, if left out, is `default_layers`; and any setting that is a list of texts (`queries`, `reference`) can be
given as `…_url` instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from curate.concepts.concept import Concept
from curate.errors import ConfigError, near
from curate.scoring.activation_norm import ActivationNorm
from curate.scoring.base import Scorer
from curate.scoring.bm25 import BM25
from curate.scoring.embedding_similarity import EmbeddingSimilarity
from curate.scoring.gradient_cosine import GradientCosine
from curate.scoring.influence import ConceptInfluence, GradientProduct, InfluenceFunction
from curate.scoring.known_label import KnownLabel
from curate.scoring.latent_activation import LatentActivation
from curate.scoring.loss_gradient_alignment import LossGradientAlignment
from curate.scoring.projection_difference import ProjectionDifference
from curate.scoring.random import Random
from curate.scoring.response_length import ResponseLength
from curate.scoring.texts import load_texts
from curate.scoring.vector_filter import VectorFilter

SCORERS: dict[str, type[Scorer]] = {
    scorer.name: scorer
    for scorer in (
        VectorFilter,
        ProjectionDifference,
        LossGradientAlignment,
        Random,
        KnownLabel,
        ResponseLength,
        ActivationNorm,
        LatentActivation,
        BM25,
        EmbeddingSimilarity,
        InfluenceFunction,
        ConceptInfluence,
        GradientProduct,
        GradientCosine,
    )
}
_TEXT_LISTS = ("queries", "reference")
_FILLED_IN = ("concepts", "test_vectors")

if TYPE_CHECKING:
    from curate.scoring.influence import TestVectors


def make_scorers(
    settings: Mapping[str, Mapping[str, Any] | None],
    concepts: Sequence[Concept] = (),
    default_layers: int | Sequence[int] | None = None,
    test_vectors: TestVectors | None = None,
) -> list[Scorer]:
    """Scorers for ``{"vector_filter": {"layers": [15]}, "random": {}}``, in that order.

    `test_vectors` are those of the influence methods by the method's name; their headers will do where nothing is
    scored. The first column of the first scorer is the one to select by, unless the selector names another.

    Raises:
        ConfigError: an unknown method or option (the message says which are near), a missing option, or no scorer.
        ConceptError: a concept does not fit; see Directions.
    """
    if not settings:
        raise ConfigError(f"no scorer is chosen{near('', SCORERS)}")
    scorers = [
        _make(name, options or {}, concepts, default_layers, test_vectors or {}) for name, options in settings.items()
    ]
    columns = [c for s in scorers for c in s.columns()]
    if twice := sorted({c for c in columns if columns.count(c) > 1}):
        raise ConfigError(f"two scorers write the column {twice[0]!r}; remove one of them")
    return scorers


def _make(
    name: str,
    options: Mapping[str, Any],
    concepts: Sequence[Concept],
    default_layers: int | Sequence[int] | None,
    test_vectors: TestVectors,
) -> Scorer:
    if name not in SCORERS:
        raise ConfigError(f"there is no scorer {name!r}{near(name, SCORERS)}")
    if not isinstance(options, Mapping):
        raise ConfigError(f"the settings of the scorer {name!r} are {options!r}; expected names and values, or none")
    parameters = inspect.signature(SCORERS[name]).parameters
    public = [p for p in parameters if p not in _FILLED_IN]
    urls = {f"{p}_url": p for p in public if p in _TEXT_LISTS}
    arguments: dict[str, Any] = {}
    for option, value in options.items():
        if option in urls:
            if value is None:
                continue
            if options.get(urls[option]) is not None:
                raise ConfigError(f"{name} has both {urls[option]} and {option}; give one of the two")
            arguments[urls[option]] = load_texts(str(value))
        elif option in public:
            # None means "not given", except to an option that takes None (stopwords).
            if value is not None or (option not in urls.values() and "None" in str(parameters[option].annotation)):
                arguments[option] = value
        else:
            raise ConfigError(f"the scorer {name!r} has no option {option!r}{near(option, [*public, *urls])}")
    if "concepts" in parameters:
        arguments["concepts"] = concepts
    if "test_vectors" in parameters:
        arguments["test_vectors"] = test_vectors
    if "layers" in parameters and arguments.get("layers") is None:
        arguments["layers"] = default_layers
    missing = [p for p in public if parameters[p].default is inspect.Parameter.empty and p not in arguments]
    if missing:
        also = f" (or {missing[0]}_url)" if missing[0] in _TEXT_LISTS else ""
        raise ConfigError(f"the scorer {name!r} needs {missing[0]!r}{also}: set scorer.{name}.{missing[0]}=…")
    try:
        return SCORERS[name](**arguments)
    except (TypeError, ValueError) as e:
        raise ConfigError(f"the settings of the scorer {name!r} cannot be used: {e}") from e
