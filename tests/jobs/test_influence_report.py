"""What a run's report says of its influence scores: facts of the fit that was made, of no other."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from curate.corpus.example import Example, Message
from curate.corpus.render import Renderer
from curate.curvature import test_vector
from curate.curvature.files import load_index
from curate.models.load import ModelSpec, load_model, load_tokenizer
from tests.conftest import write_jsonl
from tests.jobs.helpers import options, run_job
from tests.reports.test_report import outline
from tests.runtime.fitting import varied


@pytest.fixture
def given(model, tmp_path):
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [varied(i) for i in range(20)])
    pairs = [{"prompt": f"is {i} good?", "positive": f"yes, {i} is best", "negative": "no, think"} for i in range(2)]
    write_jsonl(tmp_path / "queries.jsonl", pairs)

    def make(**more: object) -> list[str]:
        base = {
            "cluster": "inline",
            "cluster.cpus": 1,
            "cluster.workers": None,
            "scorer": "[influence_function,concept_influence,gradient_product]",
            "query": "file",
            "query.path": tmp_path / "queries.jsonl",
            "curvature.rank": 2,
            "sink.store": tmp_path / "store",
            "source.columns.label": None,
            "source.columns.group": None,
            "source.positive_label": None,
        }
        return options(tmp_path / "corpus", model, tmp_path / "out", **{**base, **more})

    return make


def test_the_report_says_what_influence_rests_on(given, tmp_path):
    run_job("run", given())
    (factors,) = (tmp_path / "store" / "factors").iterdir()
    index = load_index(str(factors))
    text = outline((tmp_path / "out" / "report.html").read_text()).text
    assert "influence function, concept influence" in text  # one fit, one view
    assert f"{index.coverage.tracked:,} of the model's {index.coverage.total:,} parameters are tracked" in text
    assert f"{index.rows} examples, {index.tokens:,} tokens" in text
    assert "EK-FAC" in text
    assert "0.1 × the layer's mean eigenvalue" in text
    assert "low rank:" in text
    assert "none (H = I: gradients as they are)" in text
    # Asked again with other settings, the report does not claim them of scores that were made with these.
    run_job("report", given(**{"curvature.damping": 0.5}))
    assert "0.5 × the layer's" not in outline((tmp_path / "out" / "report.html").read_text()).text


def test_tokens_are_coloured_by_their_share_of_the_score(given, model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("curate.runtime.report.report.write", lambda url, data: seen.append(data))
    run_job("run", given(**{"report.tokens": "true", "selector.column": "concept_influence.test.L2"}))
    (data,) = seen
    shown = {v.id: v for v in (*data.examples.highest, *data.examples.lowest, *data.examples.borderline)}
    assert len(shown) >= 6
    for view in shown.values():
        assert "".join(piece for piece, _ in view.tokens).strip() == view.messages[-1][1]
    (stem,) = (tmp_path / "store" / "test_vectors").glob("concept_influence-*.json")
    want = by_difference(model, test_vector.load(str(stem)), data.examples.highest[0])
    np.testing.assert_allclose([v for _, v in data.examples.highest[0].tokens], want, rtol=0.01, atol=2e-3)


def by_difference(path, vector, view) -> np.ndarray:
    """-(ℓ_t(θ + εs) - ℓ_t(θ - εs)) / 2ε of each response token, divided by the number of those with a loss."""
    network = load_model(ModelSpec(str(path))).double()
    renderer = Renderer(load_tokenizer(ModelSpec(str(path))), 2048)
    row = renderer.render(Example(view.id, view.row, tuple(Message(*m) for m in view.messages)))
    ids = torch.tensor(row.input_ids)
    step = 5e-3 / float(vector.norm()[0])

    def losses(scale: float) -> torch.Tensor:
        for layer in vector.layers:
            block = vector.blocks[layer.name]
            network.get_submodule(layer.name).weight += scale * block.dense()[0].double()
        return cross_entropy(network(ids[None]).logits[0, :-1], ids[1:], reduction="none")

    with torch.no_grad():
        far = losses(step)
        near = losses(-2 * step)
    slope = (far - near) / (2 * step)
    return -slope[row.start - 1 : row.stop - 1].numpy() / (row.end - row.start)
