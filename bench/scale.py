"""What a row, a part, a unit and a file cost the driver: constants for a paper model of corpora too large to try.

Each is measured in this process on made-up manifests, listings and scores, at growing sizes; Ray is
only used for `--items`. Prints JSON lines: bytes and seconds per unit, part or row.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from bench.common import emit, machine
from connectors import storage
from curate.corpus.coverage import Part, check_whole
from curate.corpus.recipe import Recipe
from curate.corpus.units import FileEntry, Manifest, Unit
from curate.runtime.output import Output, load_manifest, save_manifest
from curate.runtime.select import load_scores
from curate.selection.ledger import ledger_table
from curate.selection.select import Rule, decide

BENCH = "scale"
URL = "s3://some-bucket/some/folder/of/a/corpus/"


def made_up(files: int, units_per_file: int, unit_rows: int) -> Manifest:
    """A manifest of files with names of usual length."""
    entries, units = [], []
    rows = units_per_file * unit_rows
    for i in range(files):
        key = f"shard-{i:06d}.parquet"
        entries.append(FileEntry(key, URL + key, 1 << 28, f"{i:032x}", f"{i:032x}", rows, ("id", "messages")))
        for start in range(0, rows, unit_rows):
            units.append(Unit(key, URL + key, start, start + unit_rows, unit_rows, start // unit_rows))
    return Manifest("parquet", tuple(entries), tuple(units))


def spent(act: Callable[[], Any]) -> tuple[Any, float, float]:
    """What `act` gives, its seconds of CPU, and the bytes by which this process has grown while its result is held."""
    gc.collect()
    process = psutil.Process()
    before, began = process.memory_info().rss, time.process_time()
    found = act()
    return found, time.process_time() - began, float(process.memory_info().rss - before)


def manifests(sizes: Sequence[int], settings: dict[str, Any]) -> None:
    for units in sizes:
        files = max(1, units // 500)
        made = made_up(files, units // files, 512)
        now = {**settings, "units": units, "files": files}
        with tempfile.TemporaryDirectory() as place:
            _, seconds, _ = spent(partial(save_manifest, place, made))
            emit(BENCH, "manifest_write", 1e6 * seconds / units, "µs/unit", settings=now)
            size = (Path(place) / "manifest.parquet").stat().st_size
            emit(BENCH, "manifest_stored", size / units, "B/unit", settings=now)
            loaded, seconds, grown = spent(partial(load_manifest, place))
            emit(BENCH, "manifest_read", 1e6 * seconds / units, "µs/unit", settings=now)
            emit(BENCH, "manifest_held", grown / units, "B/unit", settings=now)
        assert loaded == made


def listings(sizes: Sequence[int], settings: dict[str, Any]) -> None:
    """The set of parts, and the arithmetic on it: what is left of a half-done run, and the check of a whole one."""
    for units in sizes:
        files = max(1, units // 500)
        made = made_up(files, units // files, 512)
        now = {**settings, "units": units, "files": files}

        def parts(manifest: Manifest = made, n: int = units) -> dict[Part, str]:
            names = [f"{u.key}/{u.start:012d}-{u.stop:012d}.parquet" for u in manifest.units[:n]]
            return {Part(*_parse(name)): URL + "out/scores/parts/" + name for name in names}

        found, _, grown = spent(parts)
        emit(BENCH, "parts_held", grown / units, "B/part", settings=now)
        half = dict(list(found.items())[: units // 2])
        left, seconds, _ = spent(partial(_Fixed("x", half).remaining, made))
        emit(BENCH, "remaining", 1e6 * seconds / units, "µs/unit", settings=now)
        assert sum(len(r) for _, r in left) == units - units // 2
        wanted = [Part(u.key, u.start, u.stop) for u in made.units]
        _, seconds, _ = spent(partial(check_whole, wanted, found))
        emit(BENCH, "check_whole", 1e6 * seconds / units, "µs/unit", settings=now)
    one = made_up(1, max(sizes) // 10, 512)
    half = {Part(u.key, u.start, u.stop): "" for u in one.units[::2]}
    _, seconds, _ = spent(partial(_Fixed("x", half).remaining, one))
    emit(BENCH, "remaining_of_one_file", 1e6 * seconds / len(one.units), "µs/unit",
         settings={**settings, "units": len(one.units)})  # fmt: skip


def _parse(name: str) -> tuple[str, int, int]:
    key, span = name.rsplit("/", 1)
    start, stop = span.split(".")[0].split("-")
    return key, int(start), int(stop)


class _Fixed(Output):
    """An output place whose parts are given."""

    def __init__(self, url: str, given: dict[Part, str]) -> None:
        object.__setattr__(self, "url", url)
        object.__setattr__(self, "given", given)

    def parts(self, key: str | None = None) -> dict[Part, str]:
        return self.given  # type: ignore[attr-defined,no-any-return]


def local_listing(parts: int, settings: dict[str, Any]) -> None:
    """A listing of empty files on this machine's disk, 500 in a folder."""
    with tempfile.TemporaryDirectory() as place:
        for i in range(parts):
            folder = Path(place) / f"parts/shard-{i // 500:06d}.parquet"
            folder.mkdir(parents=True, exist_ok=True)
            at = 512 * (i % 500)
            (folder / f"{at:012d}-{at + 512:012d}.parquet").touch()
        found, seconds, grown = spent(Output(place).parts)
    assert len(found) == parts
    now = {**settings, "parts": parts}
    emit(BENCH, "list_local", 1e6 * seconds / parts, "µs/part", settings=now)
    emit(BENCH, "list_local_held", grown / parts, "B/part", settings=now)


def selection(sizes: Sequence[int], settings: dict[str, Any]) -> None:
    """The ranking of n scores, and what it holds; then a ledger of a file of 5,000 rows."""
    for rows in sizes:
        scores = np.random.default_rng(0).standard_normal(rows)
        peak = _Peak()
        with peak:
            decision, seconds, held = spent(partial(decide, scores, Rule("remove_most", fraction=0.1)))
        now = {**settings, "rows": rows}
        emit(BENCH, "decide", 1e6 * seconds / rows, "µs/row", settings=now)
        emit(BENCH, "decide_held", held / rows, "B/row", settings=now)
        emit(BENCH, "decide_peak", peak.grown / rows, "B/row", settings=now)
    rows = min(5000, sizes[-1])
    ids: list[str | None] = [f"row-{i:09d}" for i in range(rows)]
    columns = (np.arange(rows), scores[:rows], decision.rank[:rows], decision.quantile[:rows], decision.keep[:rows])
    table, seconds, _ = spent(lambda: ledger_table(ids, *columns, "remove_most fraction=0.1", [None] * rows))
    emit(BENCH, "ledger_table", 1e6 * seconds / rows, "µs/row", settings=settings)
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table, sink, compression="zstd")
    emit(BENCH, "ledger_stored", sink.getvalue().size / rows, "B/row", settings=settings)


class _Peak:
    """The most by which this process has grown within the block, sampled every few milliseconds."""

    grown = 0.0

    def __enter__(self) -> None:
        process = psutil.Process()
        self._before, self._stop = process.memory_info().rss, threading.Event()

        def look() -> None:
            while not self._stop.wait(0.005):
                self.grown = max(self.grown, float(process.memory_info().rss - self._before))

        self._thread = threading.Thread(target=look, daemon=True)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()


def scores_read(rows: int, unit_rows: int, settings: dict[str, Any]) -> None:
    """Score parts written, then read into the arrays of a selection, labels too."""
    manifest = made_up(max(1, rows // 50_000), 50_000 // unit_rows, unit_rows)
    with tempfile.TemporaryDirectory() as place:
        output = Output(place)
        output.open(Recipe("scores", {"bench": "scale"}))
        began = time.process_time()
        for u in manifest.units:
            n = u.rows
            at = np.arange(u.start, u.stop)
            table = pa.table({
                "id": [f"row-{i:09d}" for i in at], "row": at,
                "label": ["plain"] * n, "group": pa.nulls(n, pa.string()),
                "prompt_tokens": np.full(n, 40, np.int32), "response_tokens": np.full(n, 90, np.int32),
                "vector_filter.bench.L1": np.random.default_rng(u.start).standard_normal(n),
                "response_length": np.full(n, 90.0),
            })  # fmt: skip
            output.commit(Part(u.key, u.start, u.stop), table, [])
        seconds = time.process_time() - began
        now = {**settings, "rows": manifest.rows, "parts": len(manifest.units)}
        stored = sum(f.size for f in storage.list_files(storage.join(place, "parts")))
        emit(BENCH, "part_stored", stored / manifest.rows, "B/row", settings=now)
        emit(BENCH, "part_commit", 1e3 * seconds / len(manifest.units), "ms/part", settings=now)
        columns = ["vector_filter.bench.L1", "response_length"]
        for labels in (False, True):
            peak = _Peak()
            with peak:
                found, seconds, held = spent(partial(load_scores, output, manifest, columns, labels=labels))
            name = "load_scores_and_labels" if labels else "load_scores"
            emit(BENCH, name, 1e6 * seconds / manifest.rows, "µs/row", settings=now)
            emit(BENCH, f"{name}_held", held / manifest.rows, "B/row", settings=now)
            emit(BENCH, f"{name}_peak", peak.grown / manifest.rows, "B/row", settings=now)
            assert found.rows == manifest.rows
            del found


def reading(rows: int, settings: dict[str, Any]) -> None:
    """Rows read and tokenised, and scored by a tiny model, each in this process on one core."""
    import torch

    from bench import demo_rows, tiny_model
    from bench.stream import vocabulary, write_shards
    from connectors import registry
    from curate.corpus.chunk import Chunk
    from curate.corpus.example import ColumnMap
    from curate.models.load import ModelSpec, load_model
    from curate.runtime.reader import ReaderSpec, read_chunks
    from curate.runtime.stage import work_items
    from curate.scoring.registry import make_scorers
    from curate.scoring.shared_pass import SharedPass

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        write_shards(Path(place) / "corpus", rows, 1, 0)
        model = ModelSpec(str(tiny_model.save(Path(place) / "model", vocabulary())), dtype="float32", device="cpu")
        connector, (info,) = registry.discover(str(Path(place) / "corpus"))
        entry, units = connector.scan(info, 512)
        spec = ReaderSpec(connector.name, ColumnMap().resolve(entry.columns), model, 2048, "quarantine")
        items = work_items([(u, u.ranges()) for u in units])
        list(read_chunks(items[0], spec))  # loads the tokenizer
        chunks, seconds, _ = spent(lambda: [c for item in items for c in read_chunks(item, spec)])
        concept, _ = demo_rows.random_concept(model, 1, 0)
        shared = SharedPass(
            load_model(model), make_scorers({"vector_filter": {}, "response_length": {}}, [concept]), 1024
        )
    opened = [Chunk.from_bytes(c) for c in chunks]
    tokens = sum(len(r.input_ids) for c in opened for r in c.rendered)
    now = {**settings, "rows": rows, "tokens": tokens}
    emit(BENCH, "read", rows / seconds, "rows/s", settings=now)
    _, seconds, _ = spent(lambda: [shared.run(c.examples, c.rendered, [None] * len(c.examples)) for c in opened])
    emit(BENCH, "score", rows / seconds, "rows/s", settings=now)
    emit(BENCH, "tokens_per_row", tokens / rows, "tokens/row", settings=now)


def _echo() -> Callable[[bytes], bytes]:
    return lambda item: b"done"


def _as_is(item: bytes) -> Iterator[bytes]:
    yield item


def streaming(sizes: Sequence[int], settings: dict[str, Any]) -> None:
    """Items that cost nothing, through a reader and an actor: what is left is what an item costs the driver."""
    from curate.runtime.cluster import ClusterSpec
    from curate.runtime.session import session
    from curate.runtime.stage import work_items
    from curate.runtime.stream import stream

    for n in sizes:
        made = made_up(max(1, n // 500), min(n, 500), 512)
        items = work_items([(u, u.ranges()) for u in made.units])
        with session(ClusterSpec(cpus=2, gpus=0, workers=1)) as running:
            began, first, peak = time.perf_counter(), 0.0, _Peak()
            with peak:
                for answer in stream(items, _echo, running.scorers, _as_is, running.readers, len(items)):
                    first = first or time.perf_counter() - began
                    assert answer == b"done"
            seconds = time.perf_counter() - began
        now = {**settings, "items": len(items)}
        emit(BENCH, "stream_first_answer", first, "s", settings=now)
        emit(BENCH, "stream_item", 1e3 * (seconds - first) / len(items), "ms/item", settings=now)
        emit(BENCH, "stream_driver_peak", peak.grown / len(items), "B/item", settings=now)


def _parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    p.add_argument("--units", type=int, nargs="+", default=[2_000, 20_000, 200_000])
    p.add_argument("--parts", type=int, default=20_000, help="files of the local listing")
    p.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000], help="of the selection")
    p.add_argument("--score-rows", type=int, default=1_000_000, help="rows of score parts to read")
    p.add_argument("--unit-rows", type=int, default=512)
    p.add_argument("--read-rows", type=int, default=4000, help="rows to read, tokenise and score")
    p.add_argument("--items", type=int, nargs="*", default=[], help="items through Ray; none: Ray is not started")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(arguments)
    settings = machine()
    manifests(args.units, settings)
    listings(args.units, settings)
    local_listing(args.parts, settings)
    scores_read(args.score_rows, args.unit_rows, settings)
    selection(args.rows, settings)
    reading(args.read_rows, settings)
    streaming(args.items, settings)


if __name__ == "__main__":
    main()
