"""What killed writers leave half written is gone when a stage has ended, and when a product is gone on with."""

from __future__ import annotations

from pathlib import Path

import pytest

from curate.corpus.recipe import Recipe
from curate.runtime.output import Output, claim
from tests.jobs.helpers import options, run_job

NAME = ".00000-00010.parquet.0123456789abcdef.tmp"  # as connectors.localfile names them


def left(root: Path) -> list[Path]:
    return sorted(root.rglob("*.tmp"))


def test_a_product_that_is_gone_on_with_is_swept(tmp_path):
    recipe = Recipe("made", {"of": 1})
    claim(str(tmp_path / "recipe.json"), recipe, str(tmp_path))
    (tmp_path / "work" / "covariance").mkdir(parents=True)
    (tmp_path / "work" / "covariance" / NAME).write_bytes(b"half")
    claim(str(tmp_path / "recipe.json"), recipe, str(tmp_path))
    assert not left(tmp_path)


def test_a_product_whose_first_writer_was_killed_before_its_recipe_was_there_is_swept(tmp_path):
    (tmp_path / NAME.replace("00000-00010.parquet", "recipe.json")).write_bytes(b"half")
    claim(str(tmp_path / "recipe.json"), Recipe("made", {"of": 1}), str(tmp_path))
    assert not left(tmp_path)


@pytest.mark.usefixtures("here")
def test_a_stage_sweeps_what_replaced_actors_left_and_a_selection_its_shards(corpus, model, tmp_path, monkeypatch):
    sink, commit = tmp_path / "out", Output.commit
    (sink / "curated").mkdir(parents=True)
    (sink / "curated" / NAME).write_bytes(b"half")

    def and_leave(self, part, table, bad) -> None:
        commit(self, part, table, bad)
        (Path(self.url) / "parts" / part.key / NAME).write_bytes(b"half")

    monkeypatch.setattr(Output, "commit", and_leave)
    run_job("score", options(corpus, model, sink))
    assert left(sink) == [sink / "curated" / NAME]
    run_job("select", options(corpus, model, sink))
    assert not left(sink)
