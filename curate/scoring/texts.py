"""Texts that the text baselines compare: of an example, and of a list of queries.

In: an Example, or a URL. Out: strings. Knows no score.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from connectors import storage
from curate.corpus.example import Example
from curate.errors import ConfigError, near

PARTS = ("response", "conversation")
AGGREGATES = ("mean", "max")


def check_choice(method: str, setting: str, value: str, choices: Sequence[str]) -> str:
    """`value`, or ConfigError naming the setting and what can be chosen."""
    if value not in choices:
        raise ConfigError(f"{method}.{setting} is {value!r}, which is unknown{near(value, choices)}")
    return value


def check_queries(method: str, queries: Sequence[str]) -> tuple[str, ...]:
    """The queries, or ConfigError if there are none or one is empty."""
    if isinstance(queries, str):
        raise ConfigError(f"{method}.queries is one text; give a list of texts")
    if not queries:
        raise ConfigError(f"{method} needs queries: set scorer.{method}.queries to a list, or queries_url to a file")
    for i, query in enumerate(queries):
        if not isinstance(query, str) or not query.strip():
            raise ConfigError(f"{method}.queries[{i}] is {query!r}; expected a text that is not empty")
    return tuple(queries)


def example_text(example: Example, part: str) -> str:
    """The response alone, or all turns, one paragraph each."""
    return example.response if part == "response" else "\n\n".join(m.content for m in example.messages)


def aggregate(similarities: NDArray[np.float64], how: str) -> NDArray[np.float64]:
    """[n, queries] → [n]: the mean over the queries, or the best of them."""
    return similarities.mean(axis=1) if how == "mean" else similarities.max(axis=1)


def digest_texts(texts: Sequence[str]) -> str:
    """128-bit digest of a list of texts."""
    payload = json.dumps(list(texts)).encode()
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def load_texts(url: str) -> list[str]:
    """Read texts: `.jsonl` one JSON value a line, `.json` one list, anything else one text a line; blank lines skipped.

    A JSON value is a text, or an object with `response`, `text`, `content` or `messages` (its last turn).

    Raises:
        StorageError: the file cannot be read.
        ConfigError: broken JSON, or a value that holds no text; names the line.
    """
    content = storage.read_text(url)
    path = url.split("?")[0].lower()
    if path.endswith(".json"):
        values = _json(content, url)
        if not isinstance(values, list):
            raise ConfigError(f"{url} holds {type(values).__name__}; expected a list of texts")
        return [_value_text(v, f"entry {i} of {url}") for i, v in enumerate(values)]
    lines = [(i, line) for i, line in enumerate(content.split("\n"), 1) if line.strip()]
    if path.endswith(".jsonl"):
        return [_value_text(_json(line, f"line {i} of {url}"), f"line {i} of {url}") for i, line in lines]
    return [line.strip() for _, line in lines]


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        raise ConfigError(f"{where} is not JSON: {e}") from None


def _value_text(value: Any, where: str) -> str:
    if isinstance(value, Mapping):
        turns = value.get("messages")
        if isinstance(turns, list) and turns and isinstance(turns[-1], Mapping):
            value = turns[-1]
        value = next((value[k] for k in ("response", "text", "content") if k in value), None)
    if not isinstance(value, str):
        raise ConfigError(f"{where} holds no text; expected a text or an object with 'response', 'text' or 'messages'")
    return value
