"""Answers of a judge, kept by content, so that a question once paid for is never asked twice.

In: a key and the judge's answer as JSON values. Out: the same answer later. One small file an answer,
`<url>/<first two letters>/<key>.json`, written atomically: several processes may share a cache. Knows no judge.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

from connectors import storage

log = logging.getLogger(__name__)


def content_key(fields: Mapping[str, Any]) -> str:
    """Hash of everything that the answer depends on."""
    payload = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(payload.encode(), digest_size=20).hexdigest()


class JudgeCache:
    """A folder or URL of answers.

    Raises (in every method):
        StorageError: the place cannot be read or written.
    """

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, key: str) -> dict[str, Any] | None:
        """The stored answer, or None. A file that is not JSON is reported and counts as absent."""
        place = self._place(key)
        if not storage.exists(place):
            return None
        try:
            body = json.loads(storage.read_bytes(place))
        except ValueError:
            log.warning("the judge's cached answer %s is broken; asking again", place)
            return None
        return body if isinstance(body, dict) else None

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        """Store an answer."""
        storage.write_atomic(self._place(key), json.dumps(answer, sort_keys=True))

    def _place(self, key: str) -> str:
        return storage.join(self.url, key[:2], key + ".json")
