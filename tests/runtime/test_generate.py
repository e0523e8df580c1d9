"""The generation stage: made once, used by every concept, resumed, bad prompts quarantined."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from curate.concepts import concept as files
from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import options, parts, run_job, scores

COLUMN = "projection_difference.test.L2"


def with_generation(corpus, model, sink, store, **more) -> list[str]:
    settings = {
        "scorer": "[projection_difference]",
        "sink.store": store,
        "generation.engine": "transformers",
        "generation.max_new_tokens": 6,
        "source.unit_rows": 4,
        "cluster.workers": 1,
    }
    return options(corpus, model, sink, **{**settings, **more})


def responses(store: Path) -> dict[int, dict]:
    (artifact,) = (store / "generations").iterdir()
    tables = [pq.read_table(p) for p in sorted((artifact / "parts").rglob("*.parquet"))]
    return {r["row"]: r for t in tables for r in t.to_pylist()}


@torch.no_grad()
def own_mean(model: Path, messages: list[dict], text: str) -> np.ndarray:
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": text}], tokenize=False)
    first = whole.rindex(text + "<|im_end|>")
    enc = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    inside = [a < first + len(text) and b > first for a, b in enc["offset_mapping"]]
    states = network(torch.tensor([enc["input_ids"]]), output_hidden_states=True).hidden_states[2][0]
    return states[torch.tensor(inside)].mean(0).numpy()


@pytest.mark.usefixtures("running")
def test_projection_difference_from_responses_that_are_made_once(model, tmp_path):
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    rows = [conversation(i) for i in range(12)]
    write_jsonl(corpus / "a.jsonl", rows)
    run_job("run", with_generation(corpus, model, tmp_path / "out", store, **{"source.generate_rows": 8}))
    made = responses(store)
    assert sorted(made) == list(range(8))
    facts = json.loads(next((store / "generations").glob("*/artifact.json")).read_text())
    assert facts == {"engine": "transformers", "row_reproducible": True}

    found = scores(tmp_path / "out", COLUMN)
    v = files.load(str(model.parent / "concept")).vectors[2]
    for i, row in enumerate(rows):
        text = made[i]["response"] if i in made else ""
        if not text.strip():
            assert found[row["id"]] is None  # no response of the model: no score, and no quarantine either
            continue
        prompt, answer = row["messages"][:-1], row["messages"][-1]["content"]
        difference = own_mean(model, prompt, answer) - own_mean(model, prompt, text)
        assert found[row["id"]] == pytest.approx(float(difference @ v / np.linalg.norm(v)), rel=2e-4, abs=1e-5)

    # A later run over all rows, into another place, makes only the four that are missing.
    stamps = {p: p.stat().st_mtime_ns for p in store.rglob("*.parquet")}
    run_job("score", with_generation(corpus, model, tmp_path / "more", store))
    assert sorted(responses(store)) == list(range(12))
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    # The seeds follow the rows: generating all at once, in other batches, gives the same responses.
    other = with_generation(corpus, model, tmp_path / "x", tmp_path / "other", **{"source.unit_rows": 12})
    run_job("generate", other)
    assert {k: r["response"] for k, r in responses(tmp_path / "other").items()} == {
        k: r["response"] for k, r in responses(store).items()
    }


@pytest.mark.usefixtures("here")
def test_an_over_long_prompt_is_quarantined_and_the_others_go_on(model, tmp_path):
    corpus, store = tmp_path / "corpus", tmp_path / "store"
    rows = [conversation(i) for i in range(4)]
    rows[1]["messages"][0]["content"] = "why " * 300
    write_jsonl(corpus / "a.jsonl", rows)
    more = {"source.max_bad_fraction": 0.5, "source.max_tokens": 200}
    run_job("run", with_generation(corpus, model, tmp_path / "out", store, **more))
    assert sorted(responses(store)) == [0, 2, 3]
    files_of_bad = [p for p in store.rglob("quarantine/**/*.jsonl") if p.is_file()]
    (bad,) = [json.loads(x) for p in files_of_bad for x in p.read_text().splitlines()]
    assert bad["row"] == 1
    assert "over-long" in bad["reason"]
    assert sum(t.num_rows for t in parts(tmp_path / "out").values()) == 3
