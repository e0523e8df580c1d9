"""Answers of a judge, kept by content, so that a question once paid for is never asked twice.

In: a key and the judge's answer as JSON values. Out: the same answer later. Knows no judge. Two ways, both shared by
any number of processes, as every file is written atomically and never changed:

- `JudgeCache`: one small file an answer, `<url>/<first two letters>/<key>.json`. For endpoints: what was paid for is
  safe at once. 2,000 answers on a local disk: written in 8 s, read in 1 s.
- `SegmentCache`: one JSON Lines file a batch, `<url>/<hash of its keys>.jsonl`, read whole. For local judges, which
  answer by batches. The same answers: written in 0.04 s, read in 0.05 s.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
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


class SegmentCache:
    """A folder or URL of segments: lines of [key, answer]. Segments are read once each, when first asked.

    Raises (in every method):
        StorageError: the place cannot be read or written.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._answers: dict[str, dict[str, Any]] = {}
        self._seen: set[str] = set()

    def get(self, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
        """The stored answers among `keys`. A segment that cannot be parsed is reported and counts as absent."""
        for place in (f.url for f in storage.list_files(self.url)):
            if place in self._seen:
                continue
            self._seen.add(place)
            try:
                found = dict(json.loads(line) for line in storage.read_text(place).splitlines())
                self._answers.update({str(key): dict(answer) for key, answer in found.items()})
            except (ValueError, TypeError):
                log.warning("the judge's cached answers %s are broken; asking again", place)
        return {key: self._answers[key] for key in keys if key in self._answers}

    def put(self, answers: Mapping[str, Mapping[str, Any]]) -> None:
        """Store the answers of one batch as a segment."""
        if not answers:
            return
        name = content_key({"keys": sorted(answers)}) + ".jsonl"
        lines = (json.dumps([key, answer], sort_keys=True) + "\n" for key, answer in answers.items())
        storage.write_atomic(storage.join(self.url, name), "".join(lines))
        self._answers.update({key: dict(answer) for key, answer in answers.items()})
