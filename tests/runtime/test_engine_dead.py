"""An engine that dies takes its actor with it, so that Ray replaces both; nothing of the chunk is committed."""

from __future__ import annotations

import pytest

from curate.corpus.chunk import Chunk
from curate.corpus.example import ColumnMap, Example, Message
from curate.corpus.render import Rendered
from curate.models.engines import Engine, EngineDead, FirstToken, Generated, GenerationSpec
from curate.models.load import ModelSpec
from curate.runtime import generate
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec
from curate.runtime.stream import DEAD_DEVICE_EXIT


class Dies(Engine):
    name = "dies"
    row_reproducible = True

    def generate(self, prompts, seeds) -> list[Generated]:
        raise EngineDead("out of memory")

    def first_token(self, prompts, top=20) -> list[FirstToken]:
        raise EngineDead("out of memory")

    def close(self) -> None: ...


def test_a_dead_engine_ends_its_actor(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "make_engine", lambda model, spec: Dies())
    ended: list[int] = []

    def leave(status: int) -> None:
        ended.append(status)
        raise SystemExit(status)

    monkeypatch.setattr(generate.os, "_exit", leave)
    reader = ReaderSpec("jsonl", ColumnMap(), ModelSpec("x"), 64, "quarantine")
    worker = generate.GenerateWorker(generate.GenerateSpec(reader, GenerationSpec(), Output(str(tmp_path))), 1)
    example = Example("i", 0, (Message("user", "q"), Message("assistant", "a")))
    chunk = Chunk("k", 0, 1, [example], [Rendered([1, 2], 2, 2, 2)], [None])
    with pytest.raises(SystemExit):
        worker(chunk.to_bytes())
    assert ended == [DEAD_DEVICE_EXIT]
    assert "out of memory" in capsys.readouterr().out
    assert not list(tmp_path.rglob("*"))
