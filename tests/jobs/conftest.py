from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from curate.concepts import concept as files
from curate.concepts.concept import Concept
from curate.models.load import ModelSpec, identity


@pytest.fixture(scope="session")
def model(tiny) -> Path:
    """The tiny model, with a concept file beside it."""
    who = identity(ModelSpec(str(tiny)))
    vectors = np.random.default_rng(0).normal(size=(who["layers"] + 1, who["width"])).astype(np.float32)
    files.save(Concept("test", vectors, 2, who, "random", "response_mean"), str(tiny.parent / "concept"))
    return tiny
