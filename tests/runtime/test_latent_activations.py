"""The latents stage against the model's own hidden states and dense encodings."""

from __future__ import annotations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from curate.concepts.sae import dense
from curate.corpus.example import ColumnMap, to_example
from curate.corpus.render import Renderer
from curate.errors import RecipeError
from curate.models.load import ModelSpec, load_model, load_tokenizer
from curate.runtime.cluster import ClusterSpec
from curate.runtime.latent_activations import (
    LatentActivationSpec,
    latent_activations,
    latent_recipe,
    latent_table,
    row_latents,
)
from curate.runtime.manifest import SourceSpec, build_manifest
from curate.runtime.output import Output
from curate.runtime.reader import ReaderSpec
from curate.runtime.session import session
from tests.conftest import conversation, write_jsonl
from tests.saes import random_sae

FORMS = [
    {"activation": "topk", "k": 5},
    {"activation": "relu", "k": None},
    {"activation": "jumprelu", "k": None, "threshold": torch.linspace(0.0, 2.0, 48)},
]


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f["activation"])
@pytest.mark.parametrize("cells", [1, 200, 1 << 20])
def test_mean_max_and_peak_of_every_row(form, cells):
    sae = random_sae(**form)
    g = torch.Generator().manual_seed(1)
    states = [torch.randn(n, 32, generator=g) for n in (3, 1, 7)]
    states[2][4] = states[2][1]  # of two equal maxima the first counts
    for s, start, row in zip(states, (10, 0, 2), row_latents(sae, states, (10, 0, 2), cells), strict=True):
        r = dense(sae, s).numpy()
        fired = np.flatnonzero((r > 0).any(0))
        assert row.latents.tolist() == fired.tolist()
        np.testing.assert_allclose(row.mean, r.mean(0)[fired], rtol=1e-5)
        np.testing.assert_allclose(row.max, r.max(0)[fired], rtol=1e-5)
        assert all(s.shape[0] > p - start >= 0 for p in row.peak)
        np.testing.assert_allclose(r[row.peak - start, fired], row.max, rtol=1e-5)
        assert len(s) < 7 or 4 not in row.peak - start


def test_rows_on_which_nothing_fires():
    sae = random_sae(activation="jumprelu", k=None, threshold=torch.full((48,), 99.0))
    found = row_latents(sae, [torch.ones(2, 32), torch.ones(3, 32)], (0, 0))
    assert [len(f.latents) for f in found] == [0, 0]


@pytest.fixture
def made(tiny, tmp_path):
    rows = [conversation(i) for i in range(23)]
    rows[4] = {"messages": []}
    write_jsonl(tmp_path / "c" / "a.jsonl", rows[:15])
    write_jsonl(tmp_path / "c" / "b.jsonl", rows[15:])
    model, sae = ModelSpec(str(tiny), dtype="float32"), random_sae()

    def run(max_rows: int | None = None, tokens: str = "response", sae=sae, place: str = "latents", address="inline"):
        with session(ClusterSpec(address=address, cpus=1, workers=1, token_budget=200)) as running:
            source = SourceSpec(str(tmp_path / "c"), "jsonl", ColumnMap(label="label"), 4, False)
            manifest, _, columns = build_manifest(source, None)
            reader = ReaderSpec("jsonl", columns, model, 512, "quarantine")
            output = Output(str(tmp_path / place))
            recipe = latent_recipe({"digest": manifest.digest}, reader, {"digest": "x"}, sae, tokens, "1")
            spec = LatentActivationSpec(reader, output, running.token_budget, tokens)
            part = manifest.head(max_rows)
            done = latent_activations(spec, sae, recipe, part, running, 0.2)
            return done, latent_table(output, part, sae.latents), latent_table(output, part, sae.latents, "mean")

    return rows, model, sae, run


@pytest.mark.parametrize("tokens", ["response", "all"])
def test_parts_hold_what_the_model_and_the_sae_say(made, tokens):
    rows, spec, sae, run = made
    done, highest, mean = run(tokens=tokens)
    assert (done.rows, done.quarantined) == (23, 1)
    model, renderer = load_model(spec), Renderer(load_tokenizer(spec), 512)
    columns = ColumnMap(label="label").resolve(["messages", "label"])
    found = {int(r): v for block in highest.blocks() for r, v in zip(block.rows, block.values.toarray(), strict=True)}
    means = {int(r): v for block in mean.blocks() for r, v in zip(block.rows, block.values.toarray(), strict=True)}
    assert sorted(found) == [i for i in range(23) if i != 4]
    for i in found:
        r = renderer.render(to_example(rows[i], 0, columns))
        with torch.no_grad():
            states = model(torch.tensor([r.input_ids]), output_hidden_states=True).hidden_states[sae.layer][0]
        want = dense(sae, states[0 if tokens == "all" else r.start : r.stop]).numpy()
        np.testing.assert_allclose(found[i], want.max(0), rtol=2e-4, atol=1e-6)
        np.testing.assert_allclose(means[i], want.mean(0), rtol=2e-4, atol=1e-6)
    labels = highest.texts("label")
    assert labels[4] is None
    assert all(labels[i] == rows[i]["label"] for i in found)


def test_a_second_run_goes_on_and_a_longer_one_adds(made, tmp_path):
    _, _, _, run = made
    done, table, _ = run(max_rows=10)
    assert done.rows == 10
    assert sum(len(b.rows) for b in table.blocks()) == 9
    stamps = {p: p.stat().st_mtime_ns for p in (tmp_path / "latents" / "parts").rglob("*.parquet")}
    done, table, _ = run()
    assert done.already == 10
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert sum(len(b.rows) for b in table.blocks()) == 22
    _, table, _ = run(max_rows=10)
    assert sorted(int(r) for b in table.blocks() for r in b.rows) == [i for i in range(10) if i != 4]


def test_actors_write_the_same(made, running):
    run = made[3]
    (_, here, _), (done, there, _) = run(), run(place="by-actors", address="local")
    assert done.rows == 23
    for one, other in zip(here.blocks(), there.blocks(), strict=True):
        assert one.rows.tolist() == other.rows.tolist()
        np.testing.assert_array_equal(one.values.toarray(), other.values.toarray())


def test_another_sae_is_refused_at_the_same_place(made):
    _, _, _, run = made
    run(max_rows=4)
    with pytest.raises(RecipeError, match="sae"):
        run(max_rows=4, sae=random_sae(seed=1))


def test_columns_of_a_part(made, tmp_path):
    made[3](max_rows=4)
    (part,) = (tmp_path / "latents" / "parts").rglob("*.parquet")
    table = pq.read_table(part)
    assert table.column_names == ["id", "row", "label", "group", "prompt_tokens", "response_tokens", "latents", "mean",
                                  "max", "peak"]  # fmt: skip
    for row in table.to_pylist():
        assert row["latents"] == sorted(set(row["latents"]))
        assert len(row["latents"]) == len(row["mean"]) == len(row["max"]) == len(row["peak"])
        assert all(row["prompt_tokens"] <= p < row["prompt_tokens"] + row["response_tokens"] for p in row["peak"])
