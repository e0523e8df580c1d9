"""Audits by scores that need more than a forward pass: generated responses, a curvature fit. Oracle: a plain run."""

from __future__ import annotations

import pytest

from tests.conftest import write_jsonl
from tests.jobs.auditing import arrival, audit_options, last_line, scored
from tests.jobs.helpers import options, parts, run_job
from tests.jobs.test_influence import QUERIES

pytestmark = pytest.mark.usefixtures("here")
METHODS = ("projection_difference", "gradient_product", "influence_function")


def test_a_rewritten_file_gets_its_own_responses_and_all_audits_one_fit(model, tmp_path, capsys):
    corpus, sink = tmp_path / "arrivals", tmp_path / "out"
    write_jsonl(tmp_path / "queries.jsonl", QUERIES)
    how = {
        "scorer": f"[{','.join(METHODS)}]",
        "scorer.gradient_product.behaviours": "[contrast]",
        "scorer.influence_function.behaviours": "[contrast]",
        "query": "file",
        "query.path": tmp_path / "queries.jsonl",
        "curvature.shard_rows": 9,
        "generation.engine": "transformers",
        "generation.max_new_tokens": 4,
        "sink.store": tmp_path / "store",
        "source.unit_rows": 6,
    }
    write_jsonl(corpus / "a.jsonl", [arrival(i) for i in range(14)])
    run_job("audit", audit_options(corpus, model, sink, **how))
    factors = sorted(p.name for p in (tmp_path / "store" / "factors").iterdir())
    assert len(factors) == 1

    write_jsonl(corpus / "a.jsonl", [arrival(i) for i in range(50, 62)])  # the same name and rows, other texts
    run_job("audit", audit_options(corpus, model, sink, **how))
    assert last_line(capsys)["rows"] == 12
    assert sorted(p.name for p in (tmp_path / "store" / "factors").iterdir()) == factors  # of the first audit's corpus

    plain = {**how, "sink.store": tmp_path / "other", "source.max_tokens": 512}
    run_job("score", options(corpus, model, tmp_path / "plain", **plain))
    expected = {r["id"]: r for t in parts(tmp_path / "plain").values() for r in t.to_pylist()}
    found = scored(sink, "000002")
    assert found.keys() == expected.keys()
    columns = [c for c in next(iter(found.values())) if not c.startswith("influence_function")]
    assert len(columns) == 2
    for name, scores in found.items():
        for c in columns:
            assert scores[c] == pytest.approx(expected[name][c], rel=1e-3, abs=1e-5), (name, c)
