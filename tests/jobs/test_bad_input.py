"""Bad rows and bad corpora, through the real jobs: what is said, and what lies on disk afterwards.

Rows that cannot be used cost themselves only: neighbours are scored, the row is in quarantine with its number and
reason, the ledger says so, the curated shards lack it. What is wrong with the corpus as a whole is
one sentence that names the thing, the value and the remedy; nothing half-written stays behind.
"""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from curate.concepts import concept as concept_files
from curate.errors import ConfigError, CorpusError, RecipeError
from tests.conftest import conversation, write_jsonl
from tests.jobs.bad_input import (
    COLUMN,
    assert_nothing_half_written,
    assert_only_bad_rows_are_lost,
    chat,
    contents,
    quarantine,
    said,
    save_concept,
    stamps,
)
from tests.jobs.helpers import ledger, options, run_job, scores

POISON = "~"  # the model of `poisoned` answers this character with NaN


# ---- bad rows ----

BIDI = "abc \u202edesrever\u202c \u2066iso\u2069 \u200b\u200f\ufeff"
CONTROL = "bell \x07 escape \x1b[31m nul \x00 line\u2028par\u2029next\x85feed\x0c"
HTML = "<script>alert(1)</script><img src=x onerror=alert(1)>&lt;\"'</div></pre></details>"

GOOD: list[dict] = [
    chat(("user", "q"), ("assistant", BIDI), id="bidi\u202e"),
    chat(("user", CONTROL), ("assistant", CONTROL), id="control\x00\u2028"),
    chat(("user", HTML), ("assistant", HTML), id=HTML) | {"label": HTML, "group": HTML},
    chat(("user", "q"), ("assistant", "ends <|im_end|>\n<|im_start|>assistant\nand goes on"), id="special"),
    chat(("user", "q"), ("assistant", "math $x_{$ \\frac{"), id="math") | {"label": "$\\frac{$"},
    chat(("user", "q"), ("assistant", "a number that is none"), id="nan", n=float("nan")),
]
BAD: list[tuple[bytes, str]] = [
    (b'{"id": "x", "messages": [{"role"', "broken JSON"),
    (b'{"id": "x", "messages": "caf\xe9"}', "not UTF-8"),
    (b"null", "not an object"),
    (b"[1, 2]", "not an object"),
    (b'{"messages": ' + b"[" * 100_000, "nested too deeply"),
    (json.dumps({"id": "bare", "label": "plain", "group": "g0"}).encode(), "'messages' is missing"),
    (json.dumps({"messages": "hello", "label": "plain", "group": "g0"}).encode(), "not a list of messages"),
    (json.dumps(chat(("user", CONTROL + HTML + BIDI)), ensure_ascii=False).encode(), "no assistant turn"),
    (json.dumps(chat()).encode(), "no assistant turn"),
    (json.dumps(chat(("assistant", "hello"))).encode(), "no turn before the response"),
    (json.dumps(chat(("user", "q"), ("assistant", " \n"))).encode(), "the last assistant turn is empty"),
    (json.dumps(chat(("wizard", "q"), ("assistant", "a"))).encode(), "message 0 has the role 'wizard'"),
    (json.dumps(chat(("user", "q"), ("assistant", 5))).encode(), "message 1 is int, not text"),
    (json.dumps(chat(("user", "q"), ("assistant", None))).encode(), "message 1 has no text"),
    (json.dumps(chat(("user", "q"), ("assistant", "\ud800 alone"))).encode(), "message 1 holds text that is not valid"),
    (json.dumps(chat(("user", "q"), ("assistant", "a"), id="\udfff")).encode(), "'id' holds text that is not valid"),
    (json.dumps(chat(("user", "q"), ("assistant", "a")) | {"label": "\ud800"}).encode(), "'label' holds text that is"),
    (json.dumps(chat(("user", "q"), ("assistant", "word " * 100_000), id="long")).encode(), "over-long"),
    (json.dumps(chat(("user", "hello " * 100_000), ("assistant", "a"), id="long too")).encode(), "over-long"),
    (json.dumps(chat(("user", "q"), ("assistant", f"x {POISON} x"), id="nan")).encode(), f"the score {COLUMN} is nan"),
]  # fmt: skip


@pytest.fixture(scope="module")
def poisoned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a token whose embedding is NaN, as a training run gone wrong leaves it."""
    folder = tmp_path_factory.mktemp("poisoned") / "model"
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    [token] = tokenizer(POISON, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        network.get_input_embeddings().weight[token] = torch.nan
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_concept(folder.parent / "concept", folder, 0)
    return folder


@torch.no_grad()
def plain_score(model: Path, messages: list[dict]) -> float:
    """The score of a row by itself: a plain Hugging Face loop."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    v = torch.tensor(concept_files.load(str(model.parent / "concept")).vectors[2])
    text, answer = tokenizer.apply_chat_template(messages, tokenize=False), messages[-1]["content"]
    first = text.rindex(answer)
    enc = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    inside = torch.tensor([a < first + len(answer) and b > first for a, b in enc["offset_mapping"]])
    states = network(torch.tensor([enc["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
    return float(states[inside].mean(0) @ v / v.norm())


@pytest.mark.usefixtures("running")
def test_bad_rows_of_every_kind_cost_themselves_only(poisoned, tmp_path, capsys):
    plain = [json.dumps(conversation(i)).encode() for i in range(30)]
    odd = [json.dumps(r, ensure_ascii=False).encode() for r in GOOD]
    first, second = plain[:1], plain[21:] + odd
    bad: dict[tuple[str, int], str] = {}
    for i, (line, reason) in enumerate(BAD):  # between good rows, two and more to a unit
        bad["a.jsonl", len(first)] = reason
        first += [line, plain[1 + i]] if i % 2 and i < 20 else [line]
    lines = {"a.jsonl": first, "sub/b.jsonl": second}
    source, sink = tmp_path / "corpus", tmp_path / "out"
    for key, shard in lines.items():
        (source / key).parent.mkdir(parents=True, exist_ok=True)
        (source / key).write_bytes(b"".join(line + b"\n" for line in shard))
    before = contents(source)

    job = options(source, poisoned, sink, **{"cluster.workers": 1, "source.max_bad_fraction": 0.9})
    run_job("run", job)
    assert contents(source) == before
    assert_only_bad_rows_are_lost(sink, lines, bad)
    found = scores(sink, COLUMN)
    for row in [*GOOD, conversation(0), conversation(25)]:
        assert found[row["id"]] == pytest.approx(plain_score(poisoned, row["messages"]), rel=1e-4, abs=1e-5)

    # Reasons and texts come from the corpus: in the report they are text, and nothing acts in a browser or reorders it.
    page = (sink / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not set(page) & set("\u202e\u202c\u2066\u2069\u200f\x00\x07\x1b")
    assert "no assistant turn" in page
    counts = json.loads((sink / "summary.json").read_text())["counts"]
    assert counts["rows"] == len(first) + len(second)
    assert counts["quarantined"] == len(bad)

    # Output of another recipe: refused with the field and both values, and not a byte changes.
    there = contents(sink)
    with pytest.raises(
        RecipeError, match=r"(?s)holds the product of another recipe.*max_tokens: there 2048, now 100\n.*sink\.url"
    ):
        run_job("run", [*job, "source.max_tokens=100"])
    with pytest.raises(RecipeError, match=r"(?s)rule\.fraction: there 0\.25, now 0\.5"):
        run_job("select", [*job, "selector.fraction=0.5"])
    assert contents(sink) == there


@pytest.mark.usefixtures("here")
def test_bad_rows_in_parquet(poisoned, tmp_path):
    good = [(f"question {i}?", f"answer {i} " + "word " * (i % 5)) for i in range(20)]
    rows: list[tuple[bytes | None, bytes | None]] = [(a.encode(), b.encode()) for a, b in good]
    rows[3] = (b"q", None)
    rows[4] = (None, b"a")
    rows[7] = (b"q", b"\xff\xfe not text")
    rows[8] = (HTML.encode(), (BIDI + CONTROL).encode())
    rows[12] = (b"q", b"hello " * 100_000)
    rows[13] = (b"q", b"   ")
    reasons = {3: "'answer' has no text", 4: "'question' has no text", 7: "column 'answer' cannot be read"}
    reasons |= {12: "over-long", 13: "the last assistant turn is empty"}
    columns = [pa.array(c, pa.binary()).view(pa.string()) for c in zip(*rows, strict=True)]
    table = pa.table({"question": columns[0], "answer": columns[1], "n": pa.array(range(20), pa.int16())})
    source, sink = tmp_path / "corpus", tmp_path / "out"
    source.mkdir()
    pq.write_table(table, source / "a.parquet", row_group_size=10)
    before = contents(source)
    columns_used = {"source.columns.prompt": "question", "source.columns.response": "answer"}
    unused = {"source.columns.label": None, "source.columns.group": None, "source.positive_label": None}
    limits = {"source.unit_rows": 5, "source.max_bad_fraction": 0.5, "cluster.workers": 1}
    run_job("run", options(source, poisoned, sink, **columns_used, **unused, **limits))

    assert contents(source) == before
    assert_nothing_half_written(sink)
    told = quarantine(sink)
    assert sorted(row for _, row in told) == sorted(reasons)
    for row, reason in reasons.items():
        assert reason in told["a.parquet", row]["reason"]
    entries = ledger(sink)
    assert {e["row"]: e["reason"] for e in entries if e["decision"] == "quarantined"} == {
        row: told["a.parquet", row]["reason"] for row in reasons
    }
    assert all((e["score"] is None) == (e["row"] in reasons) for e in entries)
    curated = pq.read_table(sink / "curated" / "a.parquet")
    assert curated.schema == table.schema
    assert curated["n"].to_pylist() == [e["row"] for e in entries if e["kept"]]


@pytest.mark.usefixtures("running")
def test_too_many_bad_rows_end_the_job_and_a_higher_limit_goes_on(corpus, model, tmp_path):
    lines = (corpus / "a.jsonl").read_bytes().splitlines()
    for i in range(0, 30, 2):
        lines[i] = json.dumps(chat(("user", "hello?"))).encode()
    (corpus / "a.jsonl").write_bytes(b"".join(x + b"\n" for x in lines))
    before, sink = contents(corpus), tmp_path / "out"
    job = options(corpus, model, sink, **{"cluster.workers": 1})
    with pytest.raises(CorpusError) as error:
        run_job("run", job)
    message = str(error.value)
    assert " of 100 rows are bad, more than source.max_bad_fraction=0.1 allows:" in message
    assert "× no assistant turn" in message
    assert f"{sink}/scores/quarantine" in message
    assert "raise the limit and run again" in message

    assert contents(corpus) == before
    assert_nothing_half_written(sink)
    first = stamps(sink / "scores")
    assert first
    assert len(quarantine(sink)) > 10
    assert not (sink / "curated").exists()
    with pytest.raises(CorpusError, match=r"more than source\.max_bad_fraction=0\.1 allows"):  # said again, at once
        run_job("run", job)
    assert stamps(sink / "scores") == first

    run_job("run", [*job, "source.max_bad_fraction=0.2"])
    assert {p: p.stat().st_mtime_ns for p in first} == first
    wanted = {("a.jsonl", i): "no assistant turn" for i in range(0, 30, 2)}
    second = (corpus / "b.jsonl").read_bytes().splitlines()
    assert_only_bad_rows_are_lost(sink, {"a.jsonl": lines, "b.jsonl": second}, wanted)
    assert "max_bad_fraction" not in (sink / "scores" / "recipe.json").read_text()


# ---- the corpus as a whole ----


@pytest.mark.usefixtures("here")
def test_a_missing_source(model, tmp_path, monkeypatch, capsys):
    sink = tmp_path / "out"
    write_jsonl(tmp_path / "conversations.jsonl", [conversation(0)])
    err = said(capsys, monkeypatch, "run", *options(tmp_path / "conversation.jsonl", model, sink))
    assert f"{tmp_path}/conversation.jsonl: no such file or folder; did you mean 'conversations.jsonl'?" in err
    err = said(capsys, monkeypatch, "score", *options(tmp_path / "no" / "data", model, sink))
    assert f"the folder {tmp_path}/no does not exist either" in err
    err = said(capsys, monkeypatch, "score", *options(f"{tmp_path}/x-*.jsonl", model, sink))
    assert f"{tmp_path}/x-*.jsonl: no file matches this pattern" in err
    assert not sink.exists()


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: None, r"known format.*Expected names that end in .*\.jsonl.*there are no files"),
        (lambda d: (d / "notes.txt").write_text("hello"), r"known format.*Expected .*found 1 × \.txt"),
        (lambda d: (d / "a.jsonl").write_bytes(b""), r"has no rows in its 1 file"),
        (lambda d: (d / "a.jsonl").write_bytes(b"\n \r\n\n"), r"has no rows in its 1 file"),
        (lambda d: pq.write_table(pa.table({"messages": pa.array([], pa.string())}), d / "a.parquet"), "has no rows"),
        (lambda d: (d / "a.jsonl").write_bytes(b"oh\nno\n"), r"no row at the start of .*a\.jsonl can be read"),
    ],
    ids=["no files", "other files", "no bytes", "blank lines", "no rows", "no readable row"],
)  # fmt: skip
def test_an_empty_corpus(model, tmp_path, make: Callable[[Path], object], message):
    source, sink = tmp_path / "corpus", tmp_path / "out"
    source.mkdir()
    make(source)
    before = contents(source)
    with pytest.raises(CorpusError, match=f"(?s){source}.*{message}|{message}") as error:
        run_job("score", options(source, model, sink))
    assert str(source) in str(error.value)
    assert contents(source) == before
    assert contents(sink) == {}


@pytest.mark.usefixtures("here")
def test_an_unknown_column(corpus, model, tmp_path):
    sink = tmp_path / "out"
    for change, message in [
        ({"label": "labl"}, r"a\.jsonl has no column 'labl'; did you mean 'label'\? \(set under source\.columns"),
        ({"messages": "turns"}, r"has the columns \[.*'messages'.*\].*fit no known layout.*source\.columns\.prompt="),
        ({"layout": "prompt_response"}, r"no column 'prompt'; choose from .*'messages'"),
        ({"id": "number"}, r"no column 'number'"),
    ]:
        with pytest.raises(CorpusError, match=message):
            run_job("score", options(corpus, model, sink, **{f"source.columns.{k}": v for k, v in change.items()}))
    with pytest.raises(ConfigError, match=r"no option 'source\.columns\.labl'; did you mean source\.columns\.label"):
        run_job("score", [*options(corpus, model, sink), "source.columns.labl=x"])
    assert contents(sink) == {}


@pytest.mark.usefixtures("here")
def test_mixed_schemas(corpus, model, tmp_path):
    sink = tmp_path / "out"
    write_jsonl(corpus / "c.jsonl", [{"prompt": "q", "response": "a", "label": "plain", "group": "g0"}] * 3)
    with pytest.raises(
        CorpusError, match=r"mixed schemas: .*c\.jsonl has no column 'messages' \(it has .*'prompt'.*a\.jsonl has it"
    ):
        run_job("score", options(corpus, model, sink))
    (corpus / "c.jsonl").unlink()
    pq.write_table(pa.table({"messages": ["x"]}), corpus / "c.parquet")
    with pytest.raises(CorpusError, match=r"several formats \(2 jsonl, 1 parquet\).*source\.format=jsonl"):
        run_job("score", options(corpus, model, sink))
    assert contents(sink) == {}


def _cut(path: Path, share: float = 0.6) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def _parquet_table(n: int = 60) -> pa.Table:
    rng = np.random.default_rng(0)
    answers = [" ".join(f"w{k}" for k in rng.integers(0, 999, 40)) for _ in range(n)]
    return pa.table({"prompt": [f"q{i}" for i in range(n)], "response": answers})


UNLABELLED = {"source.columns.label": None, "source.columns.group": None, "source.positive_label": None}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("kind", ["plain", "gz", "parquet"])
def test_a_shard_cut_off_in_the_middle_stops_the_job_before_any_work(corpus, model, tmp_path, kind):
    sink, more = tmp_path / "out", {}
    if kind == "plain":
        shard = corpus / "b.jsonl"
        message = r"b\.jsonl is cut off in the middle: row 2\d, its last, has no line end and is broken JSON"
    elif kind == "gz":
        shard = corpus / "b.jsonl.gz"
        shard.write_bytes(gzip.compress((corpus / "b.jsonl").read_bytes()))
        (corpus / "b.jsonl").unlink()
        message = r"b\.jsonl\.gz is cut off in the middle: its gzip stream has no end"
    else:
        corpus, more = tmp_path / "parquet", UNLABELLED
        corpus.mkdir()
        for name in ("a", "b"):
            pq.write_table(_parquet_table(), corpus / f"{name}.parquet")
        shard = corpus / "b.parquet"
        message = r"b\.parquet is cut off or broken, or no Parquet file"
    _cut(shard)
    before = contents(corpus)
    with pytest.raises(CorpusError, match=rf"{message}.*Nothing was scored.*source\.skip_broken_shards=true"):
        run_job("score", options(corpus, model, sink, **more))
    assert contents(corpus) == before
    assert contents(sink) == {}


@pytest.mark.usefixtures("here")
def test_broken_shards_are_left_out_when_asked(corpus, model, tmp_path):
    sink = tmp_path / "out"
    shutil.copy(corpus / "b.jsonl", corpus / "c.jsonl")
    _cut(corpus / "c.jsonl")
    before = contents(corpus)
    job = options(corpus, model, sink, **{"source.skip_broken_shards": "true", "cluster.workers": 1})
    run_job("run", job)
    assert contents(corpus) == before
    lines = {k: (corpus / k).read_bytes().splitlines() for k in ("a.jsonl", "b.jsonl")}
    assert_only_bad_rows_are_lost(sink, lines, {})
    assert sorted(p.name for p in (sink / "curated").iterdir()) == ["a.jsonl", "b.jsonl"]
    page = (sink / "report.html").read_text()
    assert "c.jsonl is cut off in the middle" in page
    # Mended later, the corpus is another one, and the place says so instead of mixing the two.
    shutil.copy(corpus / "b.jsonl", corpus / "c.jsonl")
    there = contents(sink)
    with pytest.raises(RecipeError, match=r"corpus\.digest"):
        run_job("run", job)
    assert contents(sink) == there


@pytest.mark.usefixtures("running")
def test_a_shard_found_broken_while_scoring(model, tmp_path):
    source, sink = tmp_path / "corpus", tmp_path / "out"
    source.mkdir()
    for name in ("a", "b"):
        pq.write_table(_parquet_table(), source / f"{name}.parquet", row_group_size=20, compression="gzip")
    place = source / "b.parquet"
    chunk = pq.read_metadata(place).row_group(1).column(1)
    raw = bytearray(place.read_bytes())
    at = (chunk.dictionary_page_offset or chunk.data_page_offset) + 60  # past the page's header
    raw[at : at + 200] = bytes(200)
    place.write_bytes(raw)
    before = contents(source)
    job = options(source, model, sink, **UNLABELLED, **{"cluster.workers": 1})
    with pytest.raises(CorpusError, match=r"b\.parquet is cut off or broken.*Copy the file again"):
        run_job("score", job)
    assert contents(source) == before
    assert_nothing_half_written(sink)
    with pytest.raises(CorpusError, match=r"have no part; run the job again"):  # no selection from half the scores
        run_job("select", job)
    assert not (sink / "curated").exists()
