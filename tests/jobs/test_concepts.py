"""The concept job: every way to make a concept, kept in the store and found again. The oracle is a plain loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from curate.concepts import concept as files
from curate.errors import ConceptError
from tests.conftest import conversation
from tests.evaluation.server import completion, serve
from tests.jobs.helpers import options, run_job, scores

WORDS = [
    ("yes indeed", "no sir"),
    ("sure thing", "not at all"),
    ("of course", "never ever"),
    ("all right", "wrong way"),
]


def trait(folder: Path) -> Path:
    body = {
        "name": "agree",
        "description": "agrees",
        "instructions": [{"positive": "agree", "negative": "object"}],
        "extract_questions": [f"question {i}" for i in range(4)],
        "evaluate_questions": ["another"],
        "contrastive_responses": [{"question": i, "positive": p, "negative": n} for i, (p, n) in enumerate(WORDS)],
        "judge_prompt": "trait? {question} {answer}",
        "coherence_prompt": "coherent? {question} {answer}",
    }
    path = folder / "trait.json"
    path.write_text(json.dumps(body))
    return path


@torch.no_grad()
def plain_means(model: Path, conversations: list[list[dict]]) -> np.ndarray:
    """[n, L+1, d] response means, one row at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    out = []
    for messages in conversations:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        answer = messages[-1]["content"]
        first = text.rindex(answer)
        enc = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        inside = torch.tensor([a < first + len(answer) and b > first for a, b in enc["offset_mapping"]])
        states = network(torch.tensor([enc["input_ids"]]), output_hidden_states=True).hidden_states
        out.append(torch.stack([s[0][inside].mean(0) for s in states]).numpy())
    return np.stack(out)


def kept(store: Path) -> list[Path]:
    return sorted((store / "concepts").glob("*.json"))


@pytest.mark.usefixtures("running")
def test_a_persona_vector_from_contrastive_responses(corpus, model, tmp_path, capsys):
    given = options(corpus, model, tmp_path / "out", concept="[persona]", **{"concept.file.path": None})
    given += [f"concept.persona.path={trait(tmp_path)}", f"sink.store={tmp_path / 'store'}"]
    run_job("concept", given)
    said = capsys.readouterr()
    assert "agree: persona.teacher_forced" in said.out
    (path,) = kept(tmp_path / "store")
    found = files.load(str(path))
    sides = [
        [
            [{"role": "user", "content": f"question {i}"}, {"role": "assistant", "content": w[k]}]
            for i, w in enumerate(WORDS)
        ]
        for k in (0, 1)
    ]
    expected = plain_means(model, sides[0]).mean(0) - plain_means(model, sides[1]).mean(0)
    np.testing.assert_allclose(found.vectors, expected, rtol=1e-3, atol=1e-5)

    stamp = path.stat().st_mtime_ns
    run_job("concept", given)
    assert path.stat().st_mtime_ns == stamp
    assert "found at" in capsys.readouterr().err


@pytest.mark.usefixtures("here")
def test_a_probe_from_labelled_rows(corpus, model, tmp_path):
    given = options(corpus, model, tmp_path / "out", concept="[probe]", **{"concept.file.path": None})
    given += [f"concept.probe.path={corpus}", f"sink.store={tmp_path / 'store'}"]
    with pytest.raises(ConceptError, match=r"no row .* has the label 'markt'.*did you mean 'marked'"):
        run_job("concept", [*given, "concept.probe.positive_label=markt"])
    run_job("concept", [*given, "concept.probe.positive_label=marked"])
    (path,) = kept(tmp_path / "store")
    found = files.load(str(path))
    assert (found.meta["positive"], found.meta["negative"]) == (25, 75)
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    rows = [conversation(i) for i in range(100)]
    x = plain_means(model, [r["messages"] for r in rows])[:, 2].astype(np.float64)
    scaler = StandardScaler().fit(x)
    probe = LogisticRegression(max_iter=2000).fit(scaler.transform(x), [r["label"] == "marked" for r in rows])
    expected = probe.coef_[0] / scaler.scale_
    cosine = found.vectors[2] @ expected / np.linalg.norm(found.vectors[2]) / np.linalg.norm(expected)
    assert cosine > 0.999


@pytest.mark.usefixtures("here")
def test_a_persona_vector_from_judged_rollouts(corpus, model, tmp_path):
    """The judge, over real HTTP, finds the trait in every answer, so that no pair can be kept."""
    seen: list[str] = []

    def judge(request: dict, n: int) -> dict:
        seen.append(request["messages"][0]["content"].split("?")[0])
        return completion([("90", {"90": 0.9, "10": 0.1})])

    given = options(corpus, model, tmp_path / "out", concept="[persona]", **{"concept.file.path": None})
    given += [
        f"concept.persona.path={trait(tmp_path)}",
        f"sink.store={tmp_path / 'store'}",
        "concept.persona.method=rollouts",
        "concept.persona.rollouts=2",
        "concept.persona.max_new_tokens=5",
        "generation.engine=transformers",
        "judge=openai",
        "judge.model=judge",
        "judge.attempts=1",
    ]
    with serve(judge) as endpoint:
        # Both sides score 82: no negative answer is below 50, so no pair can be kept, and the message counts why.
        with pytest.raises(ConceptError, match=r"0 of 8 pairs .*negative answer not below 50|empty answer"):
            run_job("concept", [*given, f"judge.base_url={endpoint.url}"])
    assert set(seen[1:]) == {"trait", "coherent"}  # first, before any generation: whether the judge answers with digits
    assert not kept(tmp_path / "store")
    run_job("concept", [*(g for g in given if not g.startswith("judge")), "judge=none"])
    (path,) = kept(tmp_path / "store")
    assert files.load(str(path)).meta["judged"] is False


@pytest.mark.usefixtures("here")
def test_a_vector_of_persona_vectors_as_pt(corpus, model, tmp_path):
    vectors = torch.from_numpy(np.array(files.load(str(model.parent / "concept")).vectors))
    torch.save(vectors, tmp_path / "kind_response_avg_diff.pt")
    where = {"concept.file.path": tmp_path / "kind_response_avg_diff.pt", "concept.file.layer": 2}
    run_job("score", options(corpus, model, tmp_path / "out", scorer="[vector_filter]", **where))
    run_job("score", options(corpus, model, tmp_path / "own", scorer="[vector_filter]"))
    a = scores(tmp_path / "out", "vector_filter.kind.L2")
    assert a == pytest.approx(scores(tmp_path / "own", "vector_filter.test.L2"), rel=1e-6)


@pytest.mark.usefixtures("here")
def test_baselines_need_no_concept(corpus, model, tmp_path):
    given = options(
        corpus, model, tmp_path / "out", concept="[]", scorer="[random,bm25]", **{"concept.file.path": None}
    )
    run_job("run", [*given, "scorer.bm25.queries=[word1 word2]"])
    assert (tmp_path / "out" / "report.html").exists()
