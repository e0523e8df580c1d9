"""Which connector reads a source: by name, or by what lies there.

In: a path, URL, pattern or list of them, and a format name or "auto". Out: a connector and the files, each with a name
that is unique within the corpus. Reads names only, not contents (but for the index of a Hugging Face dataset).
"""

from __future__ import annotations

import posixpath
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from connectors import hf_disk, storage
from connectors.arrow_ipc import ArrowIpc
from connectors.base import Connector
from connectors.hf_disk import HfDisk
from connectors.jsonl import Jsonl
from connectors.parquet import Parquet
from connectors.storage import FileInfo
from curate.errors import ConfigError, CorpusError, near

_CONNECTORS: dict[str, Connector] = {c.name: c for c in (Jsonl(), Parquet(), ArrowIpc(), HfDisk())}
_SUFFIXES = {e: c for c in _CONNECTORS.values() if not isinstance(c, HfDisk) for e in c.extensions}
# Too common in a folder to be taken for data there, but right when a person names the file itself.
_NAMED_ONLY = {".json": "jsonl", ".json.gz": "jsonl", ".json.zst": "jsonl"}
_PATTERN = re.compile(r"[*?\[]")


def connectors() -> Mapping[str, Connector]:
    """All formats by name."""
    return dict(_CONNECTORS)


def _by_name(name: str) -> Connector | None:
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return _SUFFIXES[suffix]
    return None


def connector_for(format: str, files: Sequence[FileInfo]) -> Connector:
    """The connector of that name; for "auto", the one that the files' names ask for.

    Raises:
        ConfigError: no such format.
        CorpusError: "auto" and the files are of several formats, or of none.
    """
    if format != "auto":
        if format not in _CONNECTORS:
            raise ConfigError(f"source.format={format!r} is unknown{near(format, ['auto', *_CONNECTORS])}")
        return _CONNECTORS[format]
    if hf_disk.is_saved_dataset(files):
        return _CONNECTORS["hf_disk"]
    found = Counter(c.name for c in (_by_name(f.name) for f in files) if c)
    if not found:
        raise CorpusError(f"none of the files is of a known format. {_expected(files)}")
    if len(found) > 1:
        counts = ", ".join(f"{n} {name}" for name, n in sorted(found.items()))
        first = min(found)
        raise CorpusError(
            f"the files are of several formats ({counts}); choose one, for example source.format={first}, "
            f"or name the files with a pattern."
        )
    return _CONNECTORS[next(iter(found))]


def discover(source: str | Sequence[str], format: str = "auto") -> tuple[Connector, list[FileInfo]]:
    """Find the files of a corpus: a file, a folder, a pattern (* ? [] **), or a list of these.

    Names of the files are relative to the folder, to the fixed part of the pattern, or, for a list, to the folder that
    holds all of it.

    Raises:
        ConfigError: no such format.
        CorpusError: nothing is there, no file is of the format, or "auto" meets several formats.
        StorageError: the place cannot be listed.
    """
    connector_for(format, []) if format != "auto" else None
    urls = [source] if isinstance(source, str) else list(source)
    if not urls or not all(urls):
        raise CorpusError("the source is empty: give a file, a folder, a pattern or a list of them (source.url=…)")
    where = urls[0] if len(urls) == 1 else f"{urls[0]} and {len(urls) - 1} more"
    found: list[FileInfo] = []
    named: set[str] = set()  # URLs that a person named one by one
    for url in urls:
        listed, itself = _list(url)
        if len(urls) == 1 and hf_disk.is_saved_dataset(listed) and format in ("auto", "hf_disk"):
            return _CONNECTORS["hf_disk"], hf_disk.data_files(url, listed)
        if hf_disk.is_saved_dataset(listed) and format in ("auto", "hf_disk"):
            raise CorpusError(f"{url} is a Hugging Face dataset on disk; give one such folder at a time.")
        if itself:
            named.add(url)
            if format == "auto":
                listed = [replace(f, name=_as_format(f.name)) for f in listed]
        found += listed
    if format == "hf_disk":
        raise CorpusError(f"{where} has no {hf_disk.STATE}: it is no folder written by save_to_disk.")
    try:
        connector = connector_for(format, found)
    except CorpusError as e:
        raise CorpusError(f"{where}: {e}") from None
    chosen = [f for f in found if _by_name(f.name) is connector or (f.url in named and format != "auto")]
    if not chosen:
        raise CorpusError(f"{where} has no {connector.name} files. {_expected(found, connector)}")
    files = list({f.url: f for f in chosen}.values())
    return connector, _checked(_rename(files) if len(urls) > 1 else [_own_name(f, f.url in named) for f in files])


def _as_format(name: str) -> str:
    """A file that was named itself counts as JSON lines if it is called .json."""
    for suffix, format in _NAMED_ONLY.items():
        if name.lower().endswith(suffix):
            return name + _CONNECTORS[format].extensions[0]
    return name


def _own_name(f: FileInfo, named: bool) -> FileInfo:
    return replace(f, name=f.url.rstrip("/").rsplit("/", 1)[-1]) if named else f


def _checked(files: list[FileInfo]) -> list[FileInfo]:
    """The files, none of whose names would lead out of a folder that products are written to. In an object store any
    text is a name.

    Raises:
        CorpusError: one would.
    """
    for f in files:
        if f.name.startswith("/") or ".." in f.name.split("/") or "\0" in f.name:
            raise CorpusError(f"{f.url}: products are named by their source, and {f.name!r} leads out of its folder.")
    return files


def _rename(files: list[FileInfo]) -> list[FileInfo]:
    """Names relative to the deepest folder that holds all files; across stores, with bucket and path."""
    paths = [f.url.split("://", 1)[-1].lstrip("/") for f in files]
    common = posixpath.commonpath([posixpath.dirname(p) for p in paths])
    names = [p[len(common) :].lstrip("/") for p in paths]
    return [replace(f, name=n) for f, n in sorted(zip(files, names, strict=True), key=lambda pair: pair[1])]


def _list(url: str) -> tuple[list[FileInfo], bool]:
    """Files at one place, and whether the place is itself a file."""
    itself = storage.info(url)
    if itself:
        return [itself], True
    if storage.is_dir(url):
        return storage.list_files(url), False
    if _PATTERN.search(url):
        fixed = posixpath.dirname(url[: _PATTERN.search(url).start()])  # type: ignore[union-attr]
        base = str(storage.local_path(fixed or ".")) if storage.is_local(url) else fixed
        out = []
        for info in storage.glob(url):
            name = info.url.removeprefix(base).lstrip("/")
            if not storage.hidden(name):
                out.append(replace(info, name=name))
        if not out:
            raise CorpusError(f"{url}: no file matches this pattern; check the spelling.")
        return out, False
    raise CorpusError(f"{url}: no such file or folder{_siblings(url)}")


def _siblings(url: str) -> str:
    """A hint for a misspelt local path."""
    if not storage.is_local(url):
        return "; check the spelling, the bucket and the endpoint"
    path = storage.local_path(url)
    if not path.parent.is_dir():
        return f"; the folder {path.parent} does not exist either"
    return near(path.name, (p.name for p in path.parent.iterdir() if not p.name.startswith(".")))


def _expected(files: Sequence[FileInfo], connector: Connector | None = None) -> str:
    extensions = connector.extensions if connector else tuple(_SUFFIXES)
    text = f"Expected names that end in {', '.join(sorted(extensions))}"
    endings = Counter(posixpath.splitext(f.name)[1] or "no extension" for f in files)
    if not endings:
        return f"{text}; there are no files."
    return f"{text}; found {', '.join(f'{n} × {e}' for e, n in endings.most_common(5))}."
