"""Chunk: the tokenised rows of one part range, on their way from a reader to a scorer, as Arrow IPC bytes.

One chunk is one part: whatever cuts the stream into blocks, a part's rows stay together.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

import pyarrow as pa

from curate.corpus.example import Example, Message
from curate.corpus.render import Rendered

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("row", pa.int64()),
        ("messages", pa.string()),
        ("label", pa.string()),
        ("group", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("span", pa.list_(pa.int32(), 3)),
        ("own_text", pa.string()),
        ("own_ids", pa.list_(pa.int32())),
        ("own_span", pa.list_(pa.int32(), 3)),
    ]
)


@dataclass(frozen=True)
class Quarantined:
    """One row that could not be used, and why. `excerpt` is the beginning of its text, for the report."""

    row: int
    reason: str
    id: str | None = None
    excerpt: str = ""


@dataclass(frozen=True)
class Chunk:
    """Rows [start, stop) of file `key`: the good ones tokenised, the bad ones with their reason.

    `own[i]` is the base model's own response to the same prompt (text, tokens), where one was generated.
    """

    key: str
    start: int
    stop: int
    examples: list[Example]
    rendered: list[Rendered]
    own: list[tuple[str, Rendered] | None]
    bad: list[Quarantined] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        def span(r: Rendered | None) -> list[int] | None:
            return None if r is None else [r.start, r.stop, r.end]

        rows = [
            {
                "id": e.id,
                "row": e.row,
                "messages": json.dumps([[m.role, m.content] for m in e.messages]),
                "label": e.label,
                "group": e.group,
                "ids": r.input_ids,
                "span": span(r),
                "own_text": o[0] if o else None,
                "own_ids": o[1].input_ids if o else None,
                "own_span": span(o[1]) if o else None,
            }
            for e, r, o in zip(self.examples, self.rendered, self.own, strict=True)
        ]
        meta = {"key": self.key, "start": self.start, "stop": self.stop, "bad": [b.__dict__ for b in self.bad]}
        schema = _SCHEMA.with_metadata({b"chunk": json.dumps(meta).encode()})
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))
        return sink.getvalue().to_pybytes()

    @staticmethod
    def from_bytes(data: bytes) -> Chunk:
        table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        meta = json.loads(table.schema.metadata[b"chunk"])
        examples: list[Example] = []
        rendered: list[Rendered] = []
        own: list[tuple[str, Rendered] | None] = []
        for r in table.to_pylist():
            messages = tuple(Message(a, b) for a, b in json.loads(r["messages"]))
            examples.append(Example(r["id"], r["row"], messages, r["label"], r["group"]))
            rendered.append(Rendered(r["ids"], *r["span"]))
            own.append((r["own_text"], Rendered(r["own_ids"], *r["own_span"])) if r["own_ids"] is not None else None)
        bad = [Quarantined(**b) for b in meta["bad"]]
        return Chunk(meta["key"], meta["start"], meta["stop"], examples, rendered, own, bad)
