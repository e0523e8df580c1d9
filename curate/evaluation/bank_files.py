"""A bank of retrained models on disk: one small file a model, so that a bank grows as models are trained.

In: what one model was trained on and what it then did. Out: a Bank, of all that are there. Any fsspec URL.

    <url>/bank.json                        what all models share: number of rows, names of the queries, recipe
    <url>/models/<digest of rows and seed>.safetensors   kept [ceil(rows/8)] bits as uint8, outputs [queries] float64
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import safetensors.numpy
from jaxtyping import Bool, Float
from safetensors import SafetensorError

from connectors import storage
from curate.corpus.recipe import Recipe
from curate.errors import ConfigError, StorageError
from curate.evaluation.datamodel import Bank

INDEX = "bank.json"
_END = ".safetensors"


@dataclass(frozen=True)
class BankPlace:
    """An opened bank: where it lies, and what all its models share."""

    url: str
    rows: int
    names: tuple[str, ...]
    recipe: Mapping[str, Any]

    def key(self, kept: Bool[np.ndarray, " n"], seed: int = 0) -> str:
        """The name of the model that was trained on `kept` with `seed`."""
        if kept.shape != (self.rows,):
            raise ConfigError(f"kept rows of the shape {kept.shape} do not fit a bank of {self.rows} rows")
        digest = hashlib.blake2b(np.packbits(kept).tobytes(), digest_size=12)
        digest.update(str(seed).encode())
        return digest.hexdigest()

    def present(self) -> set[str]:
        """Names of the models that are there: a sweep trains what is missing."""
        files = storage.list_files(storage.join(self.url, "models"))
        return {f.name.removesuffix(_END) for f in files if f.name.endswith(_END)}

    def add(self, kept: Bool[np.ndarray, " n"], outputs: Float[np.ndarray, " q"], seed: int = 0) -> None:
        """Record a model, whole or not at all; the same rows and seed again replace it.

        Raises:
            ConfigError: another number of rows or queries than the bank's, or an output that is not finite.
        """
        one = Bank(np.asarray(kept, dtype=bool)[None], np.asarray(outputs, dtype=np.float64)[None], self.names)
        url = storage.join(self.url, "models", self.key(one.kept[0], seed) + _END)
        parts = {"kept": np.packbits(one.kept[0]), "outputs": one.outputs[0]}
        storage.write_atomic(url, safetensors.numpy.save(parts))

    def load(self) -> Bank:
        """All models that are there, by name: the same bank whatever the order they were added in.

        Raises:
            StorageError: a file is broken or of another bank; the message names it.
        """
        kept, outputs = [], []
        for name in sorted(self.present()):
            url = storage.join(self.url, "models", name + _END)
            try:
                parts = safetensors.numpy.load(storage.read_bytes(url))
            except SafetensorError as e:
                raise StorageError(f"{url} is broken ({e}); remove it, and train its model again") from e
            bits, found = parts.get("kept"), parts.get("outputs")
            if (
                bits is None
                or found is None
                or bits.dtype != np.uint8
                or bits.shape != (-(-self.rows // 8),)
                or found.shape != (len(self.names),)
            ):
                raise StorageError(f"{url} holds no model of this bank ({self.rows} rows, {len(self.names)} queries)")
            kept.append(np.unpackbits(bits, count=self.rows).astype(bool))
            outputs.append(found)
        table = np.array(kept, dtype=bool).reshape(-1, self.rows)
        return Bank(table, np.array(outputs, dtype=np.float64).reshape(-1, len(self.names)), self.names, self.recipe)


def open_bank(url: str, rows: int, names: tuple[str, ...], recipe: Mapping[str, Any]) -> BankPlace:
    """The bank at `url`, made there if there is none.

    recipe: what all models share and what changes their outputs (model, training settings, identity of the rows in
    their order, queries), as JSON values; not the method that is to be judged.

    Raises:
        RecipeError: another bank lies there; the message names the fields that differ.
    """
    mine = Recipe("datamodel-bank", {"rows": rows, "names": list(names), "recipe": dict(recipe)})
    index = storage.join(url, INDEX)
    if storage.exists(index):
        mine.refuse_other(_stored(index), url)
    else:
        storage.write_atomic(index, mine.to_json() + "\n")
    return BankPlace(url, rows, names, recipe)


def load_bank(url: str) -> Bank:
    """The bank at `url`, whatever it is of.

    Raises:
        StorageError: there is none, or a part of it is broken.
    """
    index = storage.join(url, INDEX)
    if not storage.exists(index):
        raise StorageError(f"there is no bank of retrained models at {url}: {INDEX} is missing")
    fields = _stored(index).fields
    try:
        place = BankPlace(url, int(fields["rows"]), tuple(fields["names"]), fields["recipe"])
    except (KeyError, TypeError, ValueError) as e:
        raise StorageError(f"{index} is not the index of a bank of retrained models: {e!r}") from e
    return place.load()


def _stored(index: str) -> Recipe:
    try:
        return Recipe.from_json(storage.read_text(index))
    except (json.JSONDecodeError, KeyError, TypeError) as e:
        raise StorageError(f"{index} is not the index of a bank of retrained models: {e!r}") from e
