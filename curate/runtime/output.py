"""Output places: parts, quarantine and recipe below one URL. Resume lists the parts; there is no other state.

<url>/recipe.json                          what everything here was made from
<url>/parts/<key>/<start>-<stop>.parquet   one committed range; written last, at once or not at all
<url>/quarantine/<key>/<start>-<stop>.jsonl  the bad rows of that range
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import pyarrow as pa
import pyarrow.parquet as pq

from connectors import storage
from curate.corpus.chunk import Quarantined
from curate.corpus.coverage import Covered, Part, check_whole, parse_part, part_name, unit_name
from curate.corpus.recipe import Recipe
from curate.corpus.units import Manifest, Unit
from curate.errors import RecipeError, StorageError
from curate.runtime.events import note


def read_recipe(url: str, place: str) -> Recipe | None:
    """The recipe at `url`, or None where there is none yet."""
    if not storage.exists(url):
        return None
    try:
        return Recipe.from_json(storage.read_text(url))
    except (ValueError, KeyError, TypeError) as e:
        raise RecipeError(f"{url} cannot be read ({e}); remove {place} and run again") from None


def claim(url: str, recipe: Recipe, place: str) -> None:
    """Write `recipe` to `url`, or check that it is the one that is there, and remove the half files that killed writers
    left below `place`, the folder of the product, which is what the user is told.

    Raises:
        RecipeError: another recipe is there. StorageError: the place cannot be written.
    """
    stored = read_recipe(url, place)
    if stored is not None:
        recipe.refuse_other(stored, place)
    else:
        storage.check_writable(place)
        storage.write_atomic(url, recipe.to_json())
    storage.remove_stale_temps(place)  # where there was no recipe too: its writer may have been killed while it wrote


@dataclass(frozen=True)
class Output:
    """One product that is made of parts. Cheap to pickle: workers hold a copy."""

    url: str

    @property
    def recipe_url(self) -> str:
        return storage.join(self.url, "recipe.json")

    def open(self, recipe: Recipe) -> None:
        """Claim the place for `recipe`, or go on with what an earlier run left.

        Raises:
            RecipeError: the place holds the product of another recipe; names the fields that differ.
            StorageError: the place cannot be written.
        """
        if self.recipe() is None and self.parts():
            raise RecipeError(
                f"{self.url} holds parts but no recipe.json, so nobody can say what they are; remove them"
            )
        claim(self.recipe_url, recipe, self.url)

    def recipe(self) -> Recipe | None:
        """The stored recipe, or None where nothing was made yet."""
        return read_recipe(self.recipe_url, self.url)

    def _urls(self, folder: str, key: str | None = None) -> dict[Part, str]:
        root = storage.join(self.url, folder, *([key] if key else []))
        found = {}
        for info in storage.list_files(root) if storage.exists(root) else []:
            part = parse_part(f"{key}/{info.name}" if key else info.name)
            if part is not None:
                found[part] = info.url
        return found

    def parts(self, key: str | None = None) -> dict[Part, str]:
        """Committed parts (of one source file) and where each lies."""
        return self._urls("parts", key)

    def remaining(self, manifest: Manifest) -> list[tuple[Unit, list[tuple[int, int]]]]:
        """Units that are not wholly covered, each with the part ranges still to do."""
        done: dict[str, list[tuple[int, int]]] = {}
        for p in self.parts():
            done.setdefault(p.key, []).append((p.start, p.stop))
        covered = {key: Covered(ranges) for key, ranges in done.items()}
        nothing = Covered([])
        out = []
        for unit in manifest.units:
            have = covered.get(unit.key, nothing)
            ranges = [g for a, b in unit.ranges() for g in have.gaps(a, b)]
            if ranges:
                out.append((unit, ranges))
        return out

    def check_whole(self, manifest: Manifest) -> dict[Part, str]:
        """The parts, after the check that they cover every row of `manifest` exactly once."""
        parts = self.parts()
        check_whole([Part(u.key, u.start, u.stop) for u in manifest.units], parts)
        return parts

    def commit(self, part: Part, table: pa.Table, bad: Sequence[Quarantined]) -> None:
        """Write one range: quarantine first, the part itself last, each at once or not at all."""
        if bad:
            lines = "".join(json.dumps(asdict(b), ensure_ascii=False) + "\n" for b in bad)
            name = part_name(part.key, part.start, part.stop, "jsonl")
            storage.write_atomic(storage.join(self.url, "quarantine", name), lines.encode("utf-8", "backslashreplace"))
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        name = part_name(part.key, part.start, part.stop, "parquet")
        storage.write_atomic(storage.join(self.url, "parts", name), sink.getvalue().to_pybytes())
        note("committed", unit=unit_name(part.key, part.start, part.stop), rows=table.num_rows, bad=len(bad))

    def quarantined(self) -> Iterator[tuple[str, Quarantined]]:
        """All quarantined rows of committed parts as (key, row)."""
        done = self.parts()
        for part, url in sorted(self._urls("quarantine").items()):
            if part in done:  # else its writer was killed before the part itself was written
                yield from ((part.key, q) for q in read_quarantine(url))

    def quarantine_of(self, key: str) -> list[Quarantined]:
        """Quarantined rows of one source file."""
        urls = sorted(self._urls("quarantine", key).items())
        return [q for _, u in urls for q in read_quarantine(u)]


def read_quarantine(url: str) -> list[Quarantined]:
    """The rows of one quarantine file.

    Raises:
        StorageError: it cannot be read.
    """
    # Not splitlines(): an excerpt may hold U+2028 and other characters at which that would cut.
    try:
        return [Quarantined(**json.loads(line)) for line in storage.read_text(url).split("\n") if line]
    except (ValueError, TypeError) as e:
        raise StorageError(
            f"{url} cannot be read ({e}); remove it, and the part of the same name, and run again"
        ) from None


def read_part(url: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One part; a broken one is an error that names it."""
    try:
        return pq.read_table(pa.BufferReader(storage.read_bytes(url)), columns=list(columns) if columns else None)
    except (pa.ArrowInvalid, OSError) as e:
        raise StorageError(f"the part {url} cannot be read ({e}); remove it and run the job again") from None


def read_parts(urls: Sequence[str], columns: Sequence[str] | None = None, threads: int = 8) -> Iterator[pa.Table]:
    """Several parts in order, read ahead by a few threads."""
    with ThreadPoolExecutor(threads) as pool:
        for at in range(0, len(urls), 4 * threads):
            yield from pool.map(lambda u: read_part(u, columns), urls[at : at + 4 * threads])


def load_manifest(url: str) -> Manifest | None:
    """The manifest stored at an output place, if there is one."""
    where = storage.join(url, "manifest.parquet")
    return Manifest.from_table(read_part(where)) if storage.exists(where) else None


def save_manifest(url: str, manifest: Manifest) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(manifest.to_table(), sink, compression="zstd")
    storage.write_atomic(storage.join(url, "manifest.parquet"), sink.getvalue().to_pybytes())
