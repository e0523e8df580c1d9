"""The arithmetic of the million-row benchmark and of the paper model; the run itself only on a thousand rows."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import threading
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bench import million, paper, scale
from bench.watched import Commit, Watched, commits, run_job


def lines(capsys) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_parts_are_told_by_their_names(tmp_path):
    for name in ("a.parquet/000000000000-000000000010.parquet", "b.parquet/000000000010-000000000013.parquet"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"12345")
    (tmp_path / "a.parquet" / ".000000000010-000000000020.parquet.0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "a.parquet" / "other.parquet").write_bytes(b"no part")
    found = commits(tmp_path)
    assert sorted((n, c.rows, c.bytes) for n, c in found.items()) == [
        ("a.parquet/000000000000-000000000010.parquet", 10, 5),
        ("b.parquet/000000000010-000000000013.parquet", 3, 5),
    ]


def test_a_rate_leaves_out_the_first_part():
    assert million.rate([Commit(12.0, 5, 1), Commit(10.0, 100, 1), Commit(14.0, 3, 1)]) == 2.0


def test_a_line_is_found_by_its_words():
    run = Watched(0.0, lines=[(1.0, "score: 5/9 rows"), (2.5, "score: done rows=9")])
    assert run.when("score: done") == 2.5
    with pytest.raises(RuntimeError, match=r"never said 'select: done'.*score: done rows=9"):
        run.when("select: done")


def made(out: Path, ids: list[str], kept: set[str], curated: list[str]) -> None:
    for name, table in {
        "scores/parts/s/000000000000-000000000010.parquet": pa.table({"id": ids}),
        "ledger/s.parquet": pa.table({"id": ids, "kept": [i in kept for i in ids]}),
        "curated/s.parquet": pa.table({"id": curated}),
    }.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, out / name)


def test_the_check_finds_what_is_lost_doubled_or_wrongly_kept(tmp_path):
    ids = [str(i) for i in range(10)]
    made(tmp_path / "good", ids, set(ids[1:]), ids[1:])
    assert million.check(tmp_path / "good", 10, 0.1)["curated"] == 9
    for name, rows, kept, curated in (
        ("lost", ids[:9], set(ids[:9]), ids[:9]),
        ("doubled", [*ids[:9], ids[0]], set(ids[1:9]), ids[:9]),
        ("other", ids, set(ids[1:]), ids[:9]),
        ("short", ids, set(ids[1:]), ids[2:]),
    ):
        made(tmp_path / name, rows, kept, curated)
        with pytest.raises(RuntimeError, match="of 10 rows"):
            million.check(tmp_path / name, 10, 0.1)


def test_the_corpus_is_generated_once(tmp_path):
    folder = tmp_path / "corpus"
    assert million.generate(folder, 40, 4, 0, 1) > 0
    assert million.generate(folder, 40, 4, 0, 1) == 0.0
    assert million.generate(folder, 44, 4, 0, 1) > 0
    assert sum(pq.read_metadata(p).num_rows for p in folder.iterdir()) == 44


def test_a_job_that_fails_is_an_error_with_its_words(tmp_path):
    before = threading.active_count()
    with pytest.raises(RuntimeError, match=r"failed with 2.*there is no option 'nonsense'"):
        run_job("run", ["nonsense=1"], tmp_path, tmp_path / "parts", interval=0.05)
    assert threading.active_count() <= before


@pytest.mark.slow
def test_the_whole_thing_on_few_rows(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench.million",
        "--rows",
        "3000",
        "--shards",
        "6",
        "--unit-rows",
        "50",
        "--inline",
    ]
    command += ["--folder", str(tmp_path), "--table", str(tmp_path / "table.md"), "--interval", "0.02"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr
    found = {line["metric"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert found["rows_per_second"]["settings"]["curated"] == 2700
    assert 0 <= found["rows_scored_twice"]["value"] <= 50
    assert found["driver_rss_max"]["value"] > 0.1
    assert "rows scored twice" in (tmp_path / "table.md").read_text()


def test_scale_measures_every_constant_that_the_paper_takes(capsys):
    sizes = ["--units", "600", "--parts", "20", "--rows", "2000", "--score-rows", "50000", "--unit-rows", "5000"]
    sizes += ["--read-rows", "20"]
    scale.main(sizes)
    found = paper.constants(lines(capsys))
    taken = {"manifest_held", "parts_held", "decide_peak", "manifest_stored", "remaining", "check_whole", "load_scores",
             "decide", "part_stored", "ledger_stored"}  # fmt: skip
    assert taken <= set(found)
    assert 5 < found["ledger_stored"] < 100
    assert 5 < found["part_stored"] < 200


def test_the_paper_model_multiplies(tmp_path, capsys):
    given = {"manifest_held": 100.0, "parts_held": 400.0, "manifest_stored": 2.0, "remaining": 3.0, "check_whole": 1.0,
             "load_scores": 2.0, "decide": 0.5, "decide_peak": 80.0, "part_stored": 20.0, "ledger_stored": 30.0,
             "stream_driver_peak": 1000.0, "stream_item": 2.0,
             "PutObject": {"fixed": 10, "by_file": 2, "by_unit": 1},
             "GetObject": {"fixed": 0, "by_file": 0, "by_unit": 4},
             "DeleteObject": {"fixed": 9, "by_file": 9, "by_unit": 9}}  # fmt: skip
    args = argparse.Namespace(columns=2, listings=6, put=5.0, get=0.4, width=2, mlp=3, key_value=1, blocks=10,
                              peak=1e9, share=0.5, rows_per_second=1000.0)  # fmt: skip
    assert paper.forward_flops(2, 3, 1, 10) == 20 * (8 + 4 + 18)
    corpus = paper.Corpus(1e8, 500, 50_000, 600)
    assert paper.requests(given, corpus) == (10 + 2 * 2000 + 200_000, 800_000)
    found = paper.model(given, corpus, args)
    assert found["driver: manifest and list of parts"] == "100 MB"  # 200,000 units × 500 B
    assert found["driver: items in Ray Data, at most"] == "200 MB"
    assert found["driver: memory of the ranking"] == "9.6 GB"  # 10⁸ × (16 + 80)
    assert found["driver: ranking"] == "50 s"
    assert found["GPU hours of the score pass"] == "20"  # 10⁸ × 600 × 600 / 5·10⁸ / 3600
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"metric": k, "value": v}) + "\n" for k, v in given.items()))
    paper.main([str(tmp_path / "c.jsonl")])
    table = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in table}) == 1
    assert "10 billion rows" in table[0]
