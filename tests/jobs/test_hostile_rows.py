"""Ten thousand hostile rows through the whole job: each is scored or quarantined, and nothing of them acts anywhere."""

from __future__ import annotations

import gzip
import json
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from connectors import registry
from curate.corpus.example import ColumnMap, to_example
from curate.corpus.render import Renderer
from curate.errors import BadRow
from tests.jobs.bad_input import COLUMN, assert_nothing_half_written, contents, quarantine
from tests.jobs.helpers import options, parts, run_job
from tests.jobs.hostile import EVIL, Line, hostile
from tests.tiny import tiny_tokenizer

ROWS = 10_000
BUDGET_SECONDS = 60.0  # of processor time, for the job


def shards(lines: list[Line]) -> dict[str, tuple[bytes, list[Line]]]:
    """File name -> (bytes, its lines): plain, with a byte order mark and CRLF, in a folder, and compressed."""
    out = {}
    for i, (name, end) in enumerate(
        {"a.jsonl": b"\n", "b.jsonl": b"\r\n", "sub/c d.jsonl": b"\n\n", "z.jsonl.gz": b"\n"}.items()
    ):
        own = lines[i::4]
        first = next(n for n, line in enumerate(own) if line.good)
        own = [own[first], *own[:first], *own[first + 1 :]]
        raw = b"".join(line.raw + end for line in own)
        if name == "b.jsonl":
            raw = b"\xef\xbb\xbf" + raw
        out[name] = (gzip.compress(raw, mtime=0) if name.endswith(".gz") else raw, own)
    return out


class Markup(HTMLParser):
    """What a page has as markup: names of tags, attributes with their values, text within scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str | None]] = []
        self.acting: list[str] = []
        self._within: str | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self._within = tag if tag in ("script", "style") else None

    def handle_data(self, data: str) -> None:
        if self._within:
            self.acting.append(data)

    def handle_endtag(self, tag: str) -> None:
        self._within = None

    def handle_comment(self, data: str) -> None:
        self.acting.append(data)

    def handle_decl(self, decl: str) -> None:
        self.acting.append(decl)

    def unknown_decl(self, data: str) -> None:
        self.acting.append(data)


@pytest.mark.usefixtures("here")
def test_ten_thousand_hostile_rows(model, tmp_path):
    lines = hostile(ROWS)
    files = shards(lines)
    source, sink = tmp_path / "corpus", tmp_path / "out"
    for name, (raw, _) in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(raw)
    before = contents(source)
    began = time.process_time()
    limits = {"source.max_bad_fraction": 1.0, "source.unit_rows": 500, "source.columns.id": "id"}
    run_job("run", options(source, model, sink, **limits))
    seconds = time.process_time() - began
    assert seconds < BUDGET_SECONDS, f"the job took {seconds:.0f} s"
    print(f"{ROWS} hostile rows: {seconds:.1f} s of processor time")
    assert contents(source) == before
    assert_nothing_half_written(sink)

    told = quarantine(sink)
    assert all(q["reason"].strip() for q in told.values())
    scored = {
        (str(Path(name).parent), row): value
        for name, table in parts(sink).items()
        for row, value in zip(table["row"].to_pylist(), table[COLUMN].to_pylist(), strict=True)
    }
    assert np.isfinite(list(scored.values())).all()
    rows = {(name, i): line for name, (_, own) in files.items() for i, line in enumerate(own)}
    assert sum(t.num_rows for t in parts(sink).values()) == len(scored)
    assert scored.keys() | told.keys() == rows.keys()
    assert not scored.keys() & told.keys()
    wrongly = {told[at]["reason"]: rows[at].raw[:300] for at in told if rows[at].good}
    assert not wrongly, "rows that are as they should be were quarantined"
    accepted = [rows[at].raw[:300] for at in scored if rows[at].good is False]
    assert not accepted, "rows that nothing can mend were scored"

    for name, (_, own) in files.items():
        entries = pq.read_table(sink / "ledger" / f"{name}.parquet").to_pylist()
        assert [e["row"] for e in entries] == list(range(len(own)))
        assert all((e["decision"] == "quarantined") == ((name, e["row"]) in told) for e in entries)
        kept = b"".join(own[e["row"]].raw + (b"\r\n" if name == "b.jsonl" else b"\n") for e in entries if e["kept"])
        made = (sink / "curated" / name).read_bytes()
        made = gzip.decompress(made) if name.endswith(".gz") else made.removeprefix(b"\xef\xbb\xbf")
        assert made == kept

    text = (sink / "report.html").read_text(encoding="utf-8")
    page = Markup()
    page.feed(text)
    page.close()
    assert EVIL in text  # injected rows are shown, as text
    assert not [t for t in page.tags if EVIL in t]
    assert not page.tags & {"img", "base", "iframe", "object", "embed", "link"}
    assert not [a for a in page.attributes if a[1].startswith("on") or EVIL in a[1]]
    reaching = ("href", "src", "action", "style", "http-equiv", "srcdoc")
    assert not [a for a in page.attributes if a[1] in reaching and EVIL in (a[2] or "")]
    assert not [t for t in page.acting if EVIL in t]
    assert not set(text) & set("\u202e\u202c\u2066\u2069\u200f\x00\x07\x1b")
    counts = json.loads((sink / "summary.json").read_text())["counts"]
    assert (counts["rows"], counts["quarantined"]) == (len(rows), len(told))


# smaller pieces, each by properties


RENDERER = Renderer(tiny_tokenizer(), max_tokens=512)
_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=20)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(("role", "content", "text", "type")), inner)
    ),
    max_leaves=12,
)
_ROWS = st.dictionaries(st.sampled_from(("messages", "id", "label", "group", "prompt", "response")), _VALUES)
_MAPS = st.sampled_from(
    [
        ColumnMap(layout="messages", label="label", group="group"),
        ColumnMap(layout="messages", id="id"),
        ColumnMap(layout="prompt_response", system="group"),
        ColumnMap(layout="alpaca", instruction="prompt", output="response", input="label"),
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(row=_ROWS, columns=_MAPS)
def test_any_row_is_an_example_or_a_bad_row_with_a_reason(row, columns):
    reason, example, tokens = None, None, None
    try:
        example = to_example(row, 0, columns)
        tokens = RENDERER.render(example)
    except BadRow as e:
        reason = e.reason
    if example is None or tokens is None:
        assert reason
        assert reason.strip()
        return
    assert example.messages[-1].role == "assistant"
    assert 0 < tokens.start < tokens.stop <= tokens.end <= len(tokens.input_ids)


@settings(max_examples=200, deadline=None)
@given(
    lines=st.lists(st.binary(max_size=60).map(lambda b: b.replace(b"\n", b" ")), min_size=1, max_size=20),
    ends=st.lists(st.sampled_from((b"\n", b"\r\n", b"\n\n", b"\n \n")), min_size=20, max_size=20),
    unit_rows=st.integers(1, 7),
)
def test_any_bytes_are_rows_that_come_back_as_they_are(tmp_path_factory, lines, ends, unit_rows):
    from connectors import storage

    first = b'{"messages": []}\n'
    raw = first + b"".join(line + end for line, end in zip(lines, ends, strict=False))
    path = tmp_path_factory.mktemp("bytes") / "a.jsonl"
    path.write_bytes(raw)
    connector = registry.connectors()["jsonl"]
    found = storage.info(str(path))
    assert found is not None
    entry, units = connector.scan(found, unit_rows)
    wanted = [line + b"\n" for line in raw.split(b"\n")[:-1] if line.strip(b" \t\r\x0b\x0c")]
    assert entry.rows == len(wanted)
    numbers = [row.index for unit in units for _, _, rows in connector.read(unit, ("messages",)) for row in rows]
    assert numbers == list(range(entry.rows))
    keep = np.arange(entry.rows) % 3 != 1
    target = path.with_name("out.jsonl")
    connector.curate(entry, str(target), keep)
    assert target.read_bytes() == b"".join(line for line, k in zip(wanted, keep, strict=True) if k)
