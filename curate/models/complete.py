"""Did every weight of a model come from its files? Knows only what transformers reports after loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from curate.errors import ModelError


def check_complete(info: Mapping[str, Any], path: str, kind: str = "causal language model") -> None:
    """
    Raises:
        ModelError: weights are missing: transformers would fill them with random numbers and go on.
    """
    missing = sorted(info["missing_keys"])
    if missing:
        raise ModelError(
            f"the model {path!r} cannot be loaded: {len(missing)} weights are missing, such as {missing[0]!r}. "
            f"Are all its files there, and is it a {kind}?"
        )
