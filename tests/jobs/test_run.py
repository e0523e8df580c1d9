"""The main job on tiny models: products, resume, invariance. The oracle for scores is a plain Hugging Face loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from curate.concepts import concept as files
from curate.errors import ConfigError, RecipeError
from tests.conftest import conversation
from tests.jobs.helpers import curated, ledger, options, parts, run_job, scores

COLUMN = "vector_filter.test.L2"


@torch.no_grad()
def plain_scores(model: Path, rows: list[dict]) -> dict[str, float]:
    """One row at a time, all hidden states, no batching: what a research script does."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    v = torch.tensor(files.load(str(model.parent / "concept")).vectors[2])
    out = {}
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
        answer = row["messages"][-1]["content"]
        first = text.rindex(answer)
        enc = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = [a < first + len(answer) and b > first for a, b in enc["offset_mapping"]]
        states = network(torch.tensor([enc["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
        out[row["id"]] = float(states[torch.tensor(inside)].mean(0) @ v / v.norm())
    return out


@pytest.mark.usefixtures("running")
def test_the_main_job_end_to_end(corpus, model, tmp_path):
    sink = tmp_path / "out"
    run_job("run", options(corpus, model, sink))
    rows = [conversation(i) for i in range(100)]
    found, expected = scores(sink, COLUMN), plain_scores(model, rows)
    assert found.keys() == expected.keys()
    np.testing.assert_allclose([found[k] for k in expected], list(expected.values()), rtol=1e-4, atol=1e-5)

    worst = set(sorted(expected, key=lambda k: -expected[k])[:25])
    kept = [r["id"] for shard in curated(sink).values() for r in shard]
    assert kept == [r["id"] for r in rows if r["id"] not in worst]  # order of the rows
    lines = {r["id"]: r for r in ledger(sink)}
    assert len(lines) == 100
    assert {k for k, r in lines.items() if not r["kept"]} == worst
    assert sorted(r["rank"] for r in lines.values()) == list(range(100))
    # Curated rows are the source's own lines, byte for byte.
    source = (corpus / "a.jsonl").read_text().splitlines()
    assert set((sink / "curated" / "a.jsonl").read_text().splitlines()) <= set(source)
    summary = json.loads((sink / "summary.json").read_text())
    assert summary["counts"] == {"rows": 100, "scored": 100, "kept": 75, "dropped": 25, "quarantined": 0}
    from sklearn.metrics import average_precision_score

    marked = [int(i % 4 == 0) for i in range(100)]
    auc = average_precision_score(marked, [expected[f"r{i}"] for i in range(100)])
    assert summary["rankings"][COLUMN]["average_precision"]["value"] == pytest.approx(auc, abs=1e-6)
    page = (sink / "report.html").read_text()
    assert "AUC-PR" in page
    assert "<script" not in page


@pytest.mark.usefixtures("running")
def test_a_second_call_computes_nothing(corpus, model, tmp_path, capsys):
    overrides = options(corpus, model, tmp_path / "out")
    run_job("run", overrides)
    files_before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "scores").rglob("*.parquet")}
    capsys.readouterr()
    run_job("run", overrides)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out" / "scores").rglob("*.parquet")} == files_before
    assert "rows_left=0" in capsys.readouterr().err


@pytest.mark.usefixtures("running")
@pytest.mark.parametrize("change", [{"cluster.workers": 2}, {"cluster.token_budget": 64}, {"cluster.token_budget": 1}])
def test_scores_do_not_depend_on_workers_or_batches(corpus, model, tmp_path, change, monkeypatch):
    scorer = "[vector_filter,loss_gradient_alignment,activation_norm]"
    run_job("score", options(corpus, model, tmp_path / "b", scorer=scorer, **change))
    monkeypatch.setattr("tests.jobs.helpers.HERE", True)  # against a run without any cluster
    run_job("score", options(corpus, model, tmp_path / "a", scorer=scorer))
    for column in (COLUMN, "loss_gradient_alignment.test.L2", "activation_norm.L2"):
        a, b = scores(tmp_path / "a", column), scores(tmp_path / "b", column)
        assert a.keys() == b.keys()
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("running")
def test_resume_reads_only_what_is_missing(corpus, model, tmp_path):
    overrides = options(corpus, model, tmp_path / "out")
    run_job("score", overrides)
    whole = parts(tmp_path / "out")
    root = tmp_path / "out" / "scores" / "parts"
    gone = [n for i, n in enumerate(whole) if i % 3 == 0]
    kept = {n: (root / n).stat().st_mtime_ns for n in whole if n not in gone}
    for n in gone:
        (root / n).unlink()
    run_job("score", overrides)
    again = parts(tmp_path / "out")
    assert again.keys() == whole.keys()
    assert all(again[n].equals(whole[n]) for n in whole)
    assert {n: (root / n).stat().st_mtime_ns for n in kept} == kept


@pytest.mark.usefixtures("here")
def test_more_rows_later_go_on_from_the_first(corpus, model, tmp_path):
    run_job("score", options(corpus, model, tmp_path / "out", **{"source.max_rows": 25}))
    first = parts(tmp_path / "out")
    assert sum(t.num_rows for t in first.values()) == 25
    run_job("score", options(corpus, model, tmp_path / "out"))
    whole = parts(tmp_path / "out")
    assert sum(t.num_rows for t in whole.values()) == 100
    assert all(whole[n].equals(first[n]) for n in first)
    run_job("score", options(corpus, model, tmp_path / "undisturbed"))
    a, b = scores(tmp_path / "out", COLUMN), scores(tmp_path / "undisturbed", COLUMN)
    np.testing.assert_allclose([a[k] for k in b], [b[k] for k in b], rtol=1e-5)


@pytest.mark.usefixtures("here")
def test_another_recipe_is_refused_and_nothing_changes(corpus, model, tmp_path):
    run_job("score", options(corpus, model, tmp_path / "out"))
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(RecipeError, match=r"(?s)max_tokens: there 2048, now 512.*sink\.url"):
        run_job("score", options(corpus, model, tmp_path / "out", **{"source.max_tokens": 512}))
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    (corpus / "a.jsonl").write_text((corpus / "a.jsonl").read_text() + json.dumps(conversation(200)) + "\n")
    with pytest.raises(RecipeError, match=r"corpus\.digest"):
        run_job("score", options(corpus, model, tmp_path / "out"))


@pytest.mark.usefixtures("here")
def test_another_rule_needs_another_place_but_not_another_scoring(corpus, model, tmp_path):
    run_job("run", options(corpus, model, tmp_path / "out"))
    with pytest.raises(RecipeError, match=r"rule\.fraction: there 0\.25, now 0\.5"):
        run_job("select", options(corpus, model, tmp_path / "out", **{"selector.fraction": 0.5}))


@pytest.mark.usefixtures("running")
def test_stages_as_jobs_of_their_own_give_the_same(corpus, model, tmp_path):
    run_job("run", options(corpus, model, tmp_path / "whole"))
    for job in ("concept", "score", "select", "report"):
        run_job(job, options(corpus, model, tmp_path / "stages"))
    assert curated(tmp_path / "stages") == curated(tmp_path / "whole")
    assert (tmp_path / "stages" / "report.html").exists()


@pytest.mark.usefixtures("here")
def test_selection_per_group_and_by_another_column(corpus, model, tmp_path):
    more = {"selector.per_group": "true", "selector.column": "response_length", "selector.fraction": 0.1}
    run_job("run", options(corpus, model, tmp_path / "out", **more))
    dropped = [r for r in ledger(tmp_path / "out") if not r["kept"]]
    groups = [int(r["id"][1:]) % 3 for r in dropped]
    assert sorted(groups) == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # a tenth of 34, 33 and 33, rounded
    run_job("score", options(corpus, model, tmp_path / "scored"))
    with pytest.raises(ConfigError, match="'respons_length', which was not scored; did you mean 'response_length'"):
        run_job("select", options(corpus, model, tmp_path / "scored", **{"selector.column": "respons_length"}))


@pytest.mark.usefixtures("here")
def test_plan_counts_what_a_run_does(corpus, model, tmp_path, capsys):
    run_job("run", [*options(corpus, model, tmp_path / "out"), "plan=true"])
    said = capsys.readouterr().out
    assert "100 in 2 file(s), 10 units" in said
    for word in ("tokens a row", "FLOPs", "scoring", "bytes written", "broadcast"):
        assert word in said
    assert not (tmp_path / "out" / "scores").exists()
