"""Recipe: what a product was made from, and the refusal to mix products of two recipes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from curate.errors import RecipeError


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level: {"model": {"path": "x"}} -> {"model.path": "x"}."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    out: dict[str, Any] = {}
    for k, v in value.items():
        out.update(flatten(v, f"{prefix}.{k}" if prefix else str(k)))
    return out


@dataclass(frozen=True)
class Recipe:
    """`fields` are JSON values only; what does not change the result (pool sizes, paths) is left out by the caller."""

    kind: str
    fields: Mapping[str, Any]

    def to_json(self) -> str:
        body = {"kind": self.kind, "digest": self.digest, "fields": self.fields}
        return json.dumps(body, indent=2, sort_keys=True, ensure_ascii=False)

    @property
    def digest(self) -> str:
        payload = json.dumps([self.kind, self.fields], sort_keys=True, separators=(",", ":"))
        return hashlib.blake2b(payload.encode(), digest_size=12).hexdigest()

    @staticmethod
    def from_json(text: str) -> Recipe:
        body = json.loads(text)
        return Recipe(body["kind"], body["fields"])

    def differences(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Fields that differ, as {name: (this, other)}."""
        mine, theirs = flatten(self.fields), flatten(other.fields)
        if self.kind != other.kind:
            mine, theirs = {"kind": self.kind, **mine}, {"kind": other.kind, **theirs}
        names = sorted(set(mine) | set(theirs))
        absent = "(not set)"
        return {
            n: (mine.get(n, absent), theirs.get(n, absent))
            for n in names
            if mine.get(n, absent) != theirs.get(n, absent)
        }

    def refuse_other(self, stored: Recipe, where: str) -> None:
        """Raise RecipeError when `stored`, found at `where`, is not this recipe; the message names the fields."""
        diff = self.differences(stored)
        if diff:
            lines = "\n".join(f"  {n}: there {theirs!r}, now {mine!r}" for n, (mine, theirs) in list(diff.items())[:12])
            raise RecipeError(
                f"{where} holds the product of another recipe. These fields differ:\n{lines}\n"
                f"Give another place (sink.url=…), or remove that one if it is no longer wanted."
            )
