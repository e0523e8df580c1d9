"""The manifest of a corpus: files scanned in parallel once, stored with the output, checked cheaply on resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from connectors import registry, storage
from connectors.base import Connector
from connectors.storage import FileInfo
from curate.corpus.example import ColumnMap
from curate.corpus.units import FileEntry, Manifest, Unit
from curate.errors import CorpusError
from curate.runtime.events import say
from curate.runtime.output import load_manifest, save_manifest
from curate.runtime.stream import map_tasks


@dataclass(frozen=True)
class SourceSpec:
    """What a manifest is made from."""

    url: str | list[str]
    format: str
    columns: ColumnMap
    unit_rows: int
    skip_broken_shards: bool


def scan(job: tuple[Connector, FileInfo, int]) -> tuple[FileEntry, list[Unit]] | str:
    """One file's entry and units, or why it is broken."""
    connector, info, unit_rows = job
    try:
        return connector.scan(info, unit_rows)
    except CorpusError as e:
        return str(e)


def _check_columns(files: list[FileEntry], columns: ColumnMap) -> ColumnMap:
    """The resolved column map. Every shard must have the columns that are used."""
    files = [f for f in files if f.columns]  # of a file without any, each row goes to quarantine with its reason
    resolved = columns.resolve(files[0].columns, files[0].url)
    for f in files[1:]:
        lacking = [c for c in resolved.required(resolved.layout) if c not in f.columns]
        if lacking:
            raise CorpusError(
                f"the shards have mixed schemas: {f.url} has no column {lacking[0]!r} (it has {sorted(f.columns)!r}), "
                f"while {files[0].url} has it. Curate them as two corpora, or bring them to one schema."
            )
    return resolved


def build_manifest(
    spec: SourceSpec, where: str | None, progress: Callable[[int, int], None] = lambda done, of: None
) -> tuple[Manifest, Connector, ColumnMap]:
    """The manifest of the whole corpus, from `where` when it is stored there and no file has changed.

    Args:
        where: output place that keeps the manifest; None to keep it nowhere.
        progress: called with (files scanned, files in all).

    Raises:
        CorpusError: nothing found, no rows, a broken shard, a missing column, mixed schemas.
    """
    connector, infos = registry.discover(spec.url, spec.format)
    stored = load_manifest(where) if where else None
    if stored is not None and _unchanged(stored, infos) and stored.format == connector.name:
        manifest = stored
    else:
        files: list[FileEntry] = []
        units: list[Unit] = []
        skipped: list[str] = []
        jobs = [(connector, i, spec.unit_rows) for i in infos]
        for n, found in enumerate(map_tasks(scan, jobs), 1):
            progress(n, len(jobs))
            if isinstance(found, str):
                if not spec.skip_broken_shards:
                    raise CorpusError(
                        f"{found} Nothing was scored. To go on without it: source.skip_broken_shards=true"
                    )
                say(f"left out: {found}")
                skipped.append(found)
            else:
                files.append(found[0])
                units.extend(found[1])
        manifest = Manifest(connector.name, tuple(files), tuple(units), tuple(skipped))
    if manifest.rows == 0:
        raise CorpusError(f"the corpus {spec.url!r} has no rows in its {len(infos)} file(s)")
    files_with_rows = [f for f in manifest.files if f.rows]
    if not any(f.columns for f in files_with_rows):
        raise CorpusError(
            f"no row at the start of {files_with_rows[0].url} can be read as an object with named values "
            f"(format {connector.name!r}); check the file and source.format"
        )
    columns = _check_columns(files_with_rows, spec.columns)
    if where and manifest is not stored and (stored is None or stored.digest == manifest.digest):
        storage.check_writable(where)
        save_manifest(where, manifest)
    return manifest, connector, columns


def _unchanged(stored: Manifest, infos: list[FileInfo]) -> bool:
    now = {i.url: (i.size, i.stamp) for i in infos}
    then = {f.url: (f.size, f.stamp) for f in stored.files}
    return now == then and not stored.skipped
