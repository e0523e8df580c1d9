"""What tests of bad input look at: the disk before and after, what was quarantined, what stands in the ledger."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curate.concepts import concept as concept_files
from curate.concepts.concept import Concept
from curate.models.load import ModelSpec, identity
from jobs import cli
from tests.jobs.helpers import parts

COLUMN = "vector_filter.test.L2"


def contents(*roots: Path) -> dict[Path, bytes]:
    """Every file below `roots`."""
    return {p: p.read_bytes() for root in roots for p in sorted(root.rglob("*")) if p.is_file()}


def stamps(root: Path) -> dict[Path, int]:
    """When each part below `root` was written."""
    return {p: p.stat().st_mtime_ns for p in root.rglob("*.parquet") if p.is_file()}


def assert_nothing_half_written(sink: Path) -> None:
    """No temporary file, and every file that has its final name can be read to its end."""
    for path in sink.rglob("*") if sink.exists() else []:
        if path.is_dir():
            continue
        assert not path.name.endswith(".tmp"), path
        assert ".probe" not in path.name, path
        if path.suffix == ".parquet":
            pq.read_table(path)
        elif path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".jsonl" and "quarantine" in path.parts:
            [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def quarantine(sink: Path, stage: str = "scores") -> dict[tuple[str, int], dict]:
    """(source file, row) -> quarantined row; a doubled one fails."""
    found: dict[tuple[str, int], dict] = {}
    root = sink / stage / "quarantine"
    for path in sorted(p for p in root.rglob("*.jsonl") if p.is_file()):
        key = path.parent.relative_to(root).as_posix()
        for line in path.read_bytes().removesuffix(b"\n").split(b"\n"):
            row = json.loads(line)
            assert (key, row["row"]) not in found
            found[key, row["row"]] = row
    return found


def assert_only_bad_rows_are_lost(sink: Path, lines: dict[str, list[bytes]], bad: dict[tuple[str, int], str]) -> None:
    """Over scores, quarantine, ledger and curated JSON lines. `bad` maps (file, row) to a part of the reason."""
    assert_nothing_half_written(sink)
    told = quarantine(sink)
    assert told.keys() == bad.keys()
    assert [k for k, reason in bad.items() if reason not in told[k]["reason"]] == []
    scored = {
        (str(Path(name).parent), row): value
        for name, table in parts(sink).items()
        for row, value in zip(table["row"].to_pylist(), table[COLUMN].to_pylist(), strict=True)
    }
    rows = {(key, i) for key, shard in lines.items() for i in range(len(shard))}
    assert scored.keys() == rows - bad.keys()
    assert np.isfinite(list(scored.values())).all()
    for key, shard in lines.items():
        entries = pq.read_table(sink / "ledger" / f"{key}.parquet").to_pylist()
        assert [e["row"] for e in entries] == list(range(len(shard)))
        for e in entries:
            at = (key, e["row"])
            assert (e["decision"] == "quarantined") == (at in bad)
            assert e["reason"] == (told[at]["reason"] if at in bad else None)
            assert e["score"] == scored.get(at)
        kept = [line for line, e in zip(shard, entries, strict=True) if e["kept"]]
        assert not any(e["kept"] for e in entries if (key, e["row"]) in bad)
        assert (sink / "curated" / key).read_bytes() == b"".join(line + b"\n" for line in kept)


def said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """What `curate <arguments>` prints to stderr, given that it ends with status 2."""
    monkeypatch.setattr(sys, "argv", ["curate", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    err = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in err
    return err


def chat(*turns: tuple[str, object], **more: object) -> dict:
    return {"messages": [{"role": r, "content": c} for r, c in turns], "label": "plain", "group": "g0", **more}


def save_concept(url: Path, model: Path, seed: int, width: int | None = None) -> Path:
    who = identity(ModelSpec(str(model)))
    shape = (who["layers"] + 1, width or who["width"])
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    concept_files.save(Concept("test", vectors, 2, who, "random", "response_mean"), str(url))
    return url
