"""The stages of a trace: cosines and latent influence in the parts against plain autograd, one row at a time and in
float64; resumed, and spread over actors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from curate.corpus.example import ColumnMap, to_example
from curate.corpus.render import Rendered, Renderer
from curate.errors import ConceptError, ConfigError, CorpusError
from curate.models.load import load_tokenizer
from curate.runtime.gradient_cosine import bounds
from curate.runtime.latent_totals import contexts, firings, totals
from curate.runtime.output import Output
from tests.runtime.tracing import ITEMS, Tracing, table
from tests.scoring.latent.setting import dense_latents, expected, loss_of, random_sae, weights_and_direction


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny) -> Tracing:
    return Tracing(tmp_path_factory.mktemp("trace"), tiny)


@pytest.fixture(scope="module")
def rendered(given) -> dict[str, Rendered]:
    renderer = Renderer(load_tokenizer(given.model), 256)
    return {r["id"]: renderer.render(to_example(r, i, ColumnMap(layout="messages"))) for i, r in enumerate(given.rows)}


@pytest.fixture(scope="module")
def oracle(given, rendered) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By row: activations [end, latents] and influence [items, end, latents], by a double backward."""
    model, sae = given.exact, given.sae.to(dtype=torch.float64)
    return {
        name: (dense_latents(model, sae, row), expected(model, sae, row, given.vector))
        for name, row in rendered.items()
    }


@pytest.fixture(scope="module")
def output(given) -> Output:
    """Of every pair, every firing."""
    return given.latents()


@pytest.fixture(scope="module")
def cosines(given) -> Output:
    return given.cosines()


@pytest.fixture(scope="module")
def whole(output) -> list[dict]:
    return table(output).to_pylist()


def test_parts_hold_what_a_double_backward_gives(given, whole, oracle):
    assert [(p["id"], p["item"]) for p in whole] == [(r["id"], item) for r in given.rows for item in ITEMS]
    biggest = max(float(influence.abs().max()) for _, influence in oracle.values())
    for pair in whole:
        activations, influence = oracle[pair["id"]]
        influence = influence[ITEMS.index(pair["item"])]
        close = {"rtol": 2e-3, "atol": 1e-4 * biggest}
        assert pair["score"] == pytest.approx(float(influence.sum()), rel=2e-3, abs=1e-3 * biggest)
        assert pair["latents"] == torch.nonzero(activations.sum(0))[:, 0].tolist()
        np.testing.assert_allclose(pair["influence"], influence.sum(0)[pair["latents"]], **close)
        np.testing.assert_allclose(pair["latent_activation"], activations.sum(0)[pair["latents"]], rtol=1e-4)
        assert pair["latent_tokens"] == (activations > 0).sum(0)[pair["latents"]].tolist()
        where = (pair["token_position"], pair["token_latent"])
        assert sorted(zip(*where, strict=True)) == list(map(tuple, torch.nonzero(activations).tolist()))
        np.testing.assert_allclose(pair["token_influence"], influence[where], **close)
        np.testing.assert_allclose(pair["token_activation"], activations[where], rtol=1e-4)
        assert pair["cosine"] is None
    row = given.rows[3]
    assert (whole[9]["label"], whole[9]["group"], whole[9]["row"]) == (row["label"], row["group"], 3)


def test_the_strongest_of_each_token_are_kept_and_sums_are_of_all(given, whole):
    some = table(given.latents("few", token_latents=1)).to_pylist()
    for pair, full in zip(some, whole, strict=True):
        assert all(pair[k] == full[k] for k in ("score", "latents", "influence"))
        weight: dict[int, dict[int, float]] = {}
        for t, k, i, a in zip(
            *(full[f"token_{x}"] for x in ("position", "latent", "influence", "activation")), strict=True
        ):
            weight.setdefault(t, {})[k] = abs(i * a)
        assert pair["token_position"] == sorted(weight)
        for t, k in zip(pair["token_position"], pair["token_latent"], strict=True):
            assert weight[t][k] == max(weight[t].values())


def test_cosines_are_those_of_whole_gradients_and_bounds_keep_the_share(given, cosines, rendered):
    found = table(cosines)
    assert found["id"].to_pylist() == [r["id"] for r in given.rows]
    model, sae = given.exact, given.sae.to(dtype=torch.float64)
    want = np.array([_cosines(model, sae, given.vector, rendered[r["id"]]) for r in given.rows])
    np.testing.assert_allclose(np.array(found["cosine"].to_pylist()), want, atol=2e-5)
    kept = bounds(cosines, given.manifest, ITEMS, 0.25)
    assert kept.kept.tolist() == [3, 3, 3]
    assert kept.rows == 12
    np.testing.assert_allclose(kept.least, np.sort(want, axis=0)[-3], atol=2e-5)
    np.testing.assert_allclose(kept.largest, want.max(axis=0), atol=2e-5)
    assert bounds(cosines, given.manifest, ITEMS, 1.0).kept.tolist() == [12, 12, 12]
    least = float(np.sort(want.max(axis=0))[1:].mean())  # between the two largest of the items' largest
    some = bounds(cosines, given.manifest, ITEMS, 1.0, least)
    assert sorted(some.kept.tolist()) == [0, 0, 1]
    none = r"keeps none of the 12 rows .* largest cosine is 0\.\d+ \(item '\w+'\), below trace\.min_cosine=0\.99; lower"
    with pytest.raises(ConfigError, match=none):
        bounds(cosines, given.manifest, ITEMS, 1.0, 0.99)


def _cosines(model, sae, vector, row) -> list[float]:
    """cos(−∇L(row), s) for every item, whole gradients flattened."""
    r = dense_latents(model, sae, row)
    found = []
    for q in range(len(vector.names)):
        weights, s = weights_and_direction(model, vector, q)
        leaves = {name: w.clone().requires_grad_(True) for name, w in weights.items()}
        gradient = torch.autograd.grad(loss_of(model, sae, row, r, leaves), list(leaves.values()))
        one, other = (torch.cat([t.flatten() for t in of]) for of in (gradient, s.values()))
        found.append(float(-(one @ other) / one.norm() / other.norm()))
    return found


def test_of_each_item_its_candidates_alone_are_there(given, cosines, whole):
    kept = bounds(cosines, given.manifest, ITEMS, 0.3)
    pairs = table(given.latents("some", cosines=cosines, least=tuple(kept.least.tolist()))).to_pylist()
    numbers = {r["id"]: r["cosine"] for r in table(cosines).to_pylist()}
    full = {(p["id"], p["item"]): p for p in whole}
    assert [p["item"] for p in pairs].count("two") == kept.kept[1] == 4
    for item in ITEMS:
        best = sorted(numbers, key=lambda name: -numbers[name][ITEMS.index(item)])[:4]
        assert {p["id"] for p in pairs if p["item"] == item} == set(best)
    for p in pairs:
        assert p["cosine"] == numbers[p["id"]][ITEMS.index(p["item"])]
        want = full[p["id"], p["item"]]
        assert p["latents"] == want["latents"]
        np.testing.assert_allclose(p["influence"], want["influence"], rtol=1e-3, atol=1e-5 * abs(want["score"]))


def test_totals_are_means_over_the_candidates(given, output, whole, tmp_path):
    found = totals(output, given.manifest, ITEMS, 20, 2, 3, str(tmp_path / "all.parquet"))
    assert found.pairs.tolist() == [12, 12, 12]
    want = np.zeros((3, 20))
    for p in whole:
        want[ITEMS.index(p["item"]), p["latents"]] += np.array(p["influence"]) / 12
    np.testing.assert_allclose(found.importance, want, rtol=1e-5, atol=1e-9)
    mine = [p for p in whole if p["item"] == "two"]
    by_score = sorted(mine, key=lambda p: -p["score"])
    assert [p.id for p in found.best[1]] == [p["id"] for p in by_score[:2]]
    assert [p.id for p in found.worst[1]] == [p["id"] for p in by_score[:-3:-1]]
    strongest = np.argsort(-np.abs(by_score[0]["influence"]))
    assert [k for k, _ in found.best[1][0].latents] == [by_score[0]["latents"][i] for i in strongest]
    assert found.best[1][0].tokens[0].tolist() == by_score[0]["token_position"]
    tokens = sum(p["prompt_tokens"] + p["response_tokens"] for p in mine)
    fires = np.zeros(20)
    for p in mine:
        fires[p["latents"]] += p["latent_tokens"]
    np.testing.assert_allclose(found.frequency, fires / tokens)
    pairs = pq.read_table(tmp_path / "all.parquet").to_pylist()
    assert [p["score"] for p in pairs] == [p["score"] for p in whole]
    assert {p["source"] for p in pairs} == {"a.jsonl", "b.jsonl"}
    assert [len(p["latents"]) for p in pairs] == [min(3, len(p["latents"])) for p in whole]
    totals(output, given.manifest, ITEMS, 20, 2, 3, str(tmp_path / "paper.parquet"), "paper")
    other = pq.read_table(tmp_path / "paper.parquet").to_pylist()
    assert [p["score"] for p in other] == [-p["score"] for p in pairs]
    assert [p["influence"] for p in other] == [[-x for x in p["influence"]] for p in pairs]
    # A run over fewer rows takes these and no more.
    assert (
        totals(output, given.manifest.head(3), ITEMS, 20, 1, 1, str(tmp_path / "head.parquet")).pairs.tolist()
        == [3] * 3
    )


def test_contexts_are_the_strongest_firings(given, output, whole):
    chosen = sorted({k for p in whole for k in p["latents"]})[:4]
    found = contexts(output, given.manifest, chosen, 3)
    assert list(found) == chosen
    columns = ("token_position", "token_latent", "token_activation")
    for latent, places in found.items():
        every = [
            (a, p["id"], t)
            for p in whole
            if p["item"] == "one"
            for t, k, a in zip(*(p[c] for c in columns), strict=True)
            if k == latent
        ]
        want: list[tuple[str, float]] = []
        rows, seen = set(), set()  # of firings after the same words the first
        for a, name, t in sorted(every, key=lambda x: -x[0]):
            if name not in rows and (t, round(a, 3)) not in seen:
                want.append((name, a))
                rows.add(name)
                seen.add((t, round(a, 3)))
        assert [(f.id, f.activation) for f in places] == want[:3]
    first = found[chosen[0]][0]
    fires = firings(output, given.manifest, {first.place})
    assert fires[first.place][first.position, chosen[0]] == pytest.approx(first.activation)


def test_a_part_that_is_gone_is_made_again_and_nothing_else(given, output):
    urls = [Path(url) for _, url in sorted(output.parts().items())]
    assert len(urls) == 3
    before = {u: u.read_bytes() for u in urls}
    stamps = {u: u.stat().st_mtime_ns for u in urls}
    urls[1].unlink()
    given.latents()
    assert {u: u.read_bytes() for u in urls} == before
    assert [u.stat().st_mtime_ns == stamps[u] for u in urls] == [True, False, True]


def test_two_actors_and_other_batches_give_what_this_process_gives(given, whole, running):
    pairs = table(given.latents("ray", running, token_budget=70)).to_pylist()
    assert [(p["id"], p["item"]) for p in pairs] == [(p["id"], p["item"]) for p in whole]
    for p, want in zip(pairs, whole, strict=True):
        assert p["latents"] == want["latents"]
        assert p["token_latent"] == want["token_latent"]
        scale = np.abs(want["influence"]).max()
        np.testing.assert_allclose(p["influence"], want["influence"], rtol=1e-4, atol=1e-5 * scale)


def test_an_sae_of_another_width_or_with_numbers_too_large(given):
    from curate.concepts import sae_files

    sae_files.save(str(given.root / "wide"), random_sae(d=48))
    with pytest.raises(ConceptError, match="48"):
        given.latents("wide_out", sae="wide")
    huge = random_sae()
    huge.b_enc[:] = 3e38
    huge.w_dec[:] *= 1e3
    sae_files.save(str(given.root / "huge"), huge)
    with pytest.raises(CorpusError, match=r"rows are bad, .*not finite"):
        given.latents("huge_out", sae="huge")
