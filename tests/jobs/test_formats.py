"""The main job on every format: curated shards have the source's format, columns and order, and open elsewhere."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import conversation
from tests.jobs.helpers import ledger, options, run_job

ROWS = [conversation(i) for i in range(30)]


def parquet(folder: Path) -> None:
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=7)


def arrow(folder: Path) -> None:
    folder.mkdir()
    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(folder / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=8)


def hf_disk(folder: Path) -> None:
    datasets.Dataset.from_list(ROWS).save_to_disk(folder)


def jsonl_gz(folder: Path) -> None:
    folder.mkdir()
    (folder / "a.jsonl.gz").write_bytes(gzip.compress("".join(json.dumps(r) + "\n" for r in ROWS).encode()))


def read_parquet(folder: Path) -> list[dict]:
    return pq.read_table(folder / "a.parquet").to_pylist()


def read_arrow(folder: Path) -> list[dict]:
    return pa.ipc.open_file(folder / "a.arrow").read_all().to_pylist()


def read_hf(folder: Path) -> list[dict]:
    return datasets.load_from_disk(str(folder)).to_list()


def read_gz(folder: Path) -> list[dict]:
    return [json.loads(x) for x in gzip.decompress((folder / "a.jsonl.gz").read_bytes()).splitlines()]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("write", "read"),
    [(parquet, read_parquet), (arrow, read_arrow), (hf_disk, read_hf), (jsonl_gz, read_gz)],
    ids=["parquet", "arrow", "hf_disk", "jsonl.gz"],
)
def test_curated_rows_are_source_rows(write, read, model, tmp_path):
    write(tmp_path / "source")
    given = options(tmp_path / "source", model, tmp_path / "out", scorer="[response_length]", **{"cluster.workers": 1})
    run_job("run", given)
    kept = {r["id"] for r in ledger(tmp_path / "out") if r["kept"]}
    assert len(kept) == 22
    found = read(tmp_path / "out" / "curated")
    assert found == [r for r in ROWS if r["id"] in kept]
    assert [list(r) for r in found] == [list(ROWS[0])] * 22
