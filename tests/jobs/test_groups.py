"""`curate latents` and `curate groups` on a corpus whose bad rows hold a token of their own, and an SAE with a latent
that fires at this token alone: it is found first, and removing its group removes exactly these rows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from curate.concepts import concept as concept_files
from curate.concepts import sae_files
from curate.errors import ConceptError, ConfigError, RecipeError
from tests.conftest import write_jsonl
from tests.jobs.helpers import complete, curated, ledger, options, run_job, scores
from tests.saes import planted_sae, random_sae

N, LATENT, MARK = 40, 11, "~"
pytestmark = pytest.mark.usefixtures("here")


def row(i: int, bad: bool) -> dict:
    words = [f"word{(i * 7 + k) % 23}" for k in range(3 + i % 5)]
    if bad:
        words.insert(1 + i % 3, MARK)
    turns = [{"role": "user", "content": f"question {i} {MARK}?"}, {"role": "assistant", "content": " ".join(words)}]
    return {"id": f"r{i}", "messages": turns, "label": "marked" if bad else "plain", "group": f"g{i % 3}", "n": i / 3}


ROWS = [row(i, i % 5 == 0) for i in range(N)]
BAD = {r["id"] for r in ROWS if r["label"] == "marked"}


@pytest.fixture(scope="module")
def sae(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sae") / "planted"
    sae_files.save(str(folder), planted_sae(model, MARK, LATENT))
    return folder


@pytest.fixture
def given(model, sae, tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ROWS[:25])
    write_jsonl(tmp_path / "corpus" / "b.jsonl", ROWS[25:])

    def make(sink: str = "out", **more: object) -> list[str]:
        base = {
            "scorer": "[known_label,response_length]",
            "scorer.known_label.positive": "marked",
            "latents.sae": sae,
            "latents.around": 4,
            "groups.min_members": 3,
            "groups.fraction": 0.15,
            "sink.store": tmp_path / "store",
        }
        return options(tmp_path / "corpus", model, tmp_path / sink, **{**base, **more})

    return make


def test_the_planted_latent_is_found_first_and_is_a_concept(given, tmp_path, capsys):
    run_job("latents", given())
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "latents.json").read_text())
    best = found["latents"][0]
    assert (best["latent"], best["auc"], best["precision"]) == (LATENT, 1.0, 1.0)
    assert (best["rate_positive"], best["rate_negative"]) == (1.0, 0.0)
    assert best["q"] < 1e-3
    assert found["sets"] == [["marked", len(BAD)], ["plain", N - len(BAD)]]
    assert len(best["passages"]) == 4
    for p in best["passages"]:
        assert p["token"].strip() == MARK
        assert (p["id"] in BAD, p["set"], p["label"]) == (True, "positive", "marked")
    table = pq.read_table(tmp_path / "out" / "latents.parquet").to_pylist()
    assert max(table, key=lambda r: r["auc"])["latent"] == LATENT
    assert f"planted-{LATENT}: AUC 1.000" in told
    page = (tmp_path / "out" / "latents.html").read_text()
    assert f'id="latent-{LATENT}"' in page
    assert "http-equiv" in page
    # The concept that was written scores rows, and bad rows differ by it.
    made = tmp_path / "out" / "concepts" / f"planted-{LATENT}"
    assert concept_files.load(str(made)).meta["auc"] == 1.0
    scorer = {"scorer": "[vector_filter,latent_activation]", "scorer.known_label.positive": None}
    run_job("score", given("scored", **{**scorer, "concept.file.path": made}))
    for column in ("vector_filter.planted-11.L0", "latent_activation.planted-11"):
        by = scores(tmp_path / "scored", column)
        assert np.mean([by[i] for i in BAD]) > np.mean([v for i, v in by.items() if i not in BAD])


def test_two_sources_are_two_sets(given, model, tmp_path):
    write_jsonl(tmp_path / "good" / "x.jsonl", [row(100 + i, False) for i in range(20)])
    write_jsonl(tmp_path / "bad" / "a.jsonl", [row(i, True) for i in range(10)])
    more = {"source.url": tmp_path / "bad", "latents.against": tmp_path / "good", "latents.statistic": "mean"}
    run_job("latents", given(**more))
    found = json.loads((tmp_path / "out" / "latents.json").read_text())
    assert found["latents"][0]["latent"] == LATENT
    assert [n for _, n in found["sets"]] == [10, 20]
    run_job("latents", given("turned", **{**more, "source.url": tmp_path / "good", "latents.against": tmp_path / "bad",
                                          "latents.direction": "negative"}))  # fmt: skip
    turned = json.loads((tmp_path / "turned" / "latents.json").read_text())
    assert (turned["latents"][0]["latent"], turned["latents"][0]["auc"]) == (LATENT, 0.0)


def test_removing_the_group_of_the_planted_latent_removes_exactly_the_bad_rows(given, tmp_path, capsys):
    run_job("score", given())
    capsys.readouterr()
    run_job("groups", given(**{"groups.column": "known_label"}))
    told = capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "groups.json").read_text())
    first = found["groups_shown"][0]
    assert (first["latent"], first["members"], first["taken"]) == (LATENT, len(BAD), True)
    by = scores(tmp_path / "out", "known_label")
    assert first["influence"] == pytest.approx(np.mean([by[i] for i in BAD]))
    assert first["labels"] == [["marked", len(BAD)]]
    assert (found["removed_groups"], found["removed_rows"], found["removed_bad"]) == (1, len(BAD), len(BAD))
    assert f"latent {LATENT}: influence 1" in told
    kept = curated(tmp_path / "out" / "groups")
    assert [r for rows in kept.values() for r in rows] == [r for r in ROWS if r["id"] not in BAD]
    lines = ledger(tmp_path / "out" / "groups")
    assert {r["id"] for r in lines if r["decision"] == "dropped"} == BAD
    assert {r["rule"] for r in lines} == {
        "remove_most whole groups, highest mean first, fraction>=0.15, members>0.1 by known_label"
    }
    assert found["curves"]["influence"]["precision"][0] == 1.0
    assert found["curves"]["influence"]["recall"][0] == 1.0
    assert len(found["curves"]["random"]) == 20
    page = (tmp_path / "out" / "groups.html").read_text()
    assert page.count("<svg") > 4
    assert f'id="latent-{LATENT}"' in page
    table = pq.read_table(tmp_path / "out" / "groups.parquet").to_pylist()
    assert [r["place"] for r in table] == list(range(1, len(table) + 1))
    assert table[0]["members.marked"] == len(BAD)
    stages = complete(tmp_path / "out")
    assert stages["latents"] == stages["select"] == stages["score"] == (len(ROWS), len(ROWS))


def test_a_second_run_uses_what_the_first_one_made(given, tmp_path):
    run_job("score", given())
    run_job("groups", given(**{"groups.column": "known_label"}))
    kept = [p for p in (*(tmp_path / "store" / "latents").rglob("*"), *(tmp_path / "out" / "groups").rglob("*"))]
    stamps = {p: p.stat().st_mtime_ns for p in kept if p.is_file()}
    numbers = (tmp_path / "out" / "groups.json").read_text()
    (tmp_path / "out" / "groups" / "ledger" / "b.jsonl.parquet").unlink()  # as if it had been killed before
    run_job("groups", given(**{"groups.column": "known_label"}))
    changed = {p.name for p, t in stamps.items() if p.stat().st_mtime_ns != t}
    assert changed == {"b.jsonl.parquet", "b.jsonl"}
    assert (tmp_path / "out" / "groups.json").read_text() == numbers
    with pytest.raises(RecipeError, match="threshold"):
        run_job("groups", given(**{"groups.column": "known_label", "groups.threshold": 0.2}))
    run_job("groups", given(**{"groups.column": "known_label", "groups.threshold": 0.2, "groups.write": "false"}))
    run_job("latents", given())  # the same activations
    assert {p: p.stat().st_mtime_ns for p in stamps if "latents" in str(p.parent)}.items() <= stamps.items()


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"latents.sae": None}, ConfigError, r"latents\.sae is not set"),
        (
            {"groups.column": "known"},
            ConfigError,
            "groups.column is 'known', which was not scored; did you mean 'known_label'",
        ),
        ({"groups.threshold": 1e6}, ConfigError, "no latent is above"),
        ({"groups.threshold": -1}, ConfigError, r"groups\.threshold is -1"),
        ({"groups.fraction": 0.999, "groups.max_share": 1}, ConfigError, "less than groups.fraction|leaves none"),
        ({"groups.min_members": 41}, ConfigError, "no group has at least 41"),
        ({"source.positive_label": "mark"}, ConfigError, "'mark'.*did you mean 'marked'"),
        ({"groups.shown": 0}, ConfigError, r"groups\.shown is 0"),
        ({"latents.contexts": -1}, ConfigError, r"latents\.contexts is -1"),
    ],
)
def test_groups_that_cannot_be_are_refused(given, tmp_path, change, error, told):
    if not (tmp_path / "out").exists():
        run_job("score", given())
    with pytest.raises(error, match=told):
        run_job("groups", given(**change))
    assert not (tmp_path / "out" / "groups" / "curated").exists()


def test_scores_of_another_corpus_are_refused(given, tmp_path):
    run_job("score", given())
    write_jsonl(tmp_path / "other" / "a.jsonl", ROWS[:20])
    with pytest.raises(ConfigError, match="of another corpus"):
        run_job(
            "groups", given("new", **{"source.url": tmp_path / "other", "sink.scores": tmp_path / "out" / "scores"})
        )
    with pytest.raises(ConfigError, match="there are no scores"):
        run_job("groups", given("empty"))


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        ({"source.positive_label": None}, ConfigError, "two sets of rows are needed"),
        ({"latents.positive_label": "mark"}, ConfigError, "no row has the label 'mark'.*did you mean 'marked'"),
        ({"source.columns.label": None}, ConfigError, "no row has a label"),
        ({"latents.min_rows": 99}, ConfigError, "no latent fires on 99"),
        ({"latents.top": 0}, ConfigError, r"latents\.top is 0"),
        ({"latents.sae": "/nowhere/sae"}, Exception, "/nowhere/sae"),
    ],
)
def test_sets_that_cannot_be_told_apart_are_refused(given, change, error, told):
    with pytest.raises(error, match=told):
        run_job("latents", given(**change))


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ({"d": 16}, "width 16"),
        ({"layer": 9}, "layer 9"),
        ({"model": {"name": "x", "digest": "y", "adapter": None}}, "was made from"),
    ],
)
def test_an_sae_of_another_model_width_or_layer_is_refused(given, tmp_path, form, told):
    sae_files.save(str(tmp_path / "sae"), random_sae(**form))
    with pytest.raises(ConceptError, match=told):
        run_job("latents", given(**{"latents.sae": tmp_path / "sae"}))
