"""Faithfulness of orders of latents: masks against explicit dense forwards, the ends of k, a planted circuit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.concepts.sae import SAE, dense
from curate.corpus.render import Rendered
from curate.errors import ConfigError, ModelError
from curate.evaluation.faithfulness import KS, Question, faithfulness, question
from curate.evaluation.latent_orders import activity_orders, influence_orders
from curate.evaluation.masking import JUDGED, MODES, estimates, merged
from tests.tiny import KINDS, tiny_model

LATENTS, WIDTH = 48, 32


def sae_of(layer: int = 1, k: int | None = 6, latents: int = LATENTS, seed: int = 0, **more: object) -> SAE:
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=rng) * 0.4

    w = draw(latents, WIDTH)
    bias, b_pre, b_dec = draw(latents), draw(WIDTH) * 0.1, draw(WIDTH) * 0.1
    return SAE(w, bias, w.clone(), b_pre, b_dec, "topk" if k else "relu", layer, "s", k, **more)


def item(seed: int, tokens: int = 9) -> Rendered:
    ids = np.random.default_rng(seed).integers(4, 300, tokens).tolist()
    return Rendered(ids, tokens - 2, tokens - 1, tokens)


@torch.no_grad()
def explicit(model, sae: SAE, rendered: Rendered, keep: np.ndarray) -> torch.Tensor:
    """Logits at the token before the response, by dense algebra inside a plain forward of the whole model."""
    ids = torch.tensor([rendered.input_ids[: rendered.start]])

    def hook(module, args, kwargs):
        x = args[0] if args else kwargs["hidden_states"]
        r = dense(sae, x) * torch.from_numpy(keep).to(x.dtype)
        new = ((r @ sae.w_dec + sae.b_dec) / sae.scale).to(x.dtype)
        return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})

    blocks = next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList))
    handle = blocks[sae.layer].register_forward_pre_hook(hook, with_kwargs=True)
    try:
        return model(input_ids=ids).logits[0, -1].double()
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("k", [6, None])
def test_masks_are_what_an_explicit_forward_gives(kind, k):
    model, sae = tiny_model(kind), sae_of(k=k, scale=1.5)
    items = [item(0), item(1, 14), item(2)]
    orders = {"some": [np.random.default_rng(i).permutation(LATENTS) for i in range(3)]}
    ks = (0, 3, 20, LATENTS)
    got = faithfulness(model, sae, items, orders, ks, token_budget=20)
    for i, rendered in enumerate(items):
        correct = rendered.input_ids[rendered.start]
        whole = explicit(model, sae, rendered, np.ones(LATENTS))
        for mode in MODES:
            for j, n in enumerate(ks):
                keep = np.full(LATENTS, float(mode == "necessity"))
                keep[orders["some"][i][:n]] = float(mode == "sufficiency")
                want = explicit(model, sae, rendered, keep)
                found = {name: values[j, i] for name, values in got.values["some", mode].items()}
                nll = -torch.log_softmax(want, 0)[correct]
                assert found["logit"] == pytest.approx(float(want[correct]), abs=2e-5)
                assert found["nll"] == pytest.approx(float(nll), abs=2e-5)
                assert found["delta_logit"] == pytest.approx(float(want[correct] - whole[correct]), abs=4e-5)
                assert found["delta_nll"] == pytest.approx(float(nll + torch.log_softmax(whole, 0)[correct]), abs=4e-5)
                assert found["flip"] == float(want.argmax() != whole.argmax())
                assert found["same"] == 1 - found["flip"]
                assert found["right"] == float(want.argmax() == correct)


def test_no_latent_changes_nothing_and_all_latents_change_everything():
    model, sae = tiny_model(), sae_of()
    items = [item(i) for i in range(4)]
    orders = {"any": [np.arange(LATENTS)] * 4}
    got = faithfulness(model, sae, items, orders, (0, LATENTS, 10 * LATENTS))
    needed, enough = got.values["any", "necessity"], got.values["any", "sufficiency"]
    assert np.abs(needed["delta_logit"][0]).max() == 0
    assert needed["flip"][0].max() == 0
    assert np.abs(enough["delta_logit"][1]).max() == 0
    for name in needed:
        np.testing.assert_array_equal(needed[name][1], enough[name][0])  # nothing left
        np.testing.assert_array_equal(needed[name][1], needed[name][2])  # more than all is all
    bias = explicit(model, sae, items[0], np.zeros(LATENTS))[items[0].input_ids[items[0].start]]
    assert needed["logit"][1, 0] == pytest.approx(float(bias), abs=2e-5)


@torch.no_grad()
def test_unmasked_values_are_the_models_own():
    model, sae, rendered = tiny_model(), sae_of(), item(3)
    got = faithfulness(model, sae, [rendered], {}, (1,)).base
    plain = model(input_ids=torch.tensor([rendered.input_ids[: rendered.start]])).logits[0, -1]
    spliced = explicit(model, sae, rendered, np.ones(LATENTS))
    correct = rendered.input_ids[rendered.start]
    assert got["logit"][0] == pytest.approx(float(plain[correct]), abs=2e-5)
    assert got["spliced_logit"][0] == pytest.approx(float(spliced[correct]), abs=2e-5)
    assert got["agree"][0] == float(plain.argmax() == spliced.argmax())


def test_neither_the_batches_nor_the_company_change_a_number():
    model, sae = tiny_model(), sae_of()
    items = [item(i, 8 + i) for i in range(5)]
    orders = activity_orders(model, sae, items, first=LATENTS)
    whole = faithfulness(model, sae, items, orders, (2, 5, 10))
    parts = [
        faithfulness(
            model, sae, [q], activity_orders(model, sae, [q], first=LATENTS, numbers=[i]), (2, 5, 10), token_budget=1
        )
        for i, q in enumerate(items)
    ]
    joined = merged(parts)
    assert joined.items == whole.items == 5
    for key, by in whole.values.items():
        for name, values in by.items():
            np.testing.assert_allclose(joined.values[key][name], values, atol=1e-5)
    assert merged([whole]).table("frequency") == whole.table("frequency")


def planted(items: int = 10) -> tuple[torch.nn.Module, SAE, list[Question], list[dict[int, float]], set[int]]:
    """Latents 0–3 alone write what the head reads at the correct token; the others fire as often and write noise."""
    model = tiny_model(layers=2, scale=0.02)
    head = model.get_output_embeddings().weight
    target = torch.nn.functional.normalize(torch.randn(WIDTH, generator=torch.Generator().manual_seed(7)), dim=0)
    sae = sae_of(layer=2 - 1, k=None)
    head.data[50] = 4 * target
    w = sae.w_dec - (sae.w_dec @ target)[:, None] * target
    w[:4] = 2.0 * target
    sae = replace(sae, w_dec=w, b_enc=torch.full((LATENTS,), 0.3))
    asked = []
    for i in range(items):
        r = item(i)
        ids = [*r.input_ids[: r.start], 50, *r.input_ids[r.start + 1 :]]
        asked.append(Question(Rendered(ids, r.start, r.stop, r.end)))
    importance = [{0: 1.0, 1: 0.9, 2: 0.8, 3: 0.7, **{k: 0.01 * k / LATENTS for k in range(4, LATENTS)}}] * items
    return model, sae, asked, importance, {0, 1, 2, 3}


def test_a_planted_circuit_is_found_needed_and_sufficient():
    model, sae, asked, importance, circuit = planted()
    orders = activity_orders(model, sae, asked, first=LATENTS)
    for name in ("influence", "influence, paper's sign"):
        orders[name] = [influence_orders(i, LATENTS, LATENTS)[name] for i in importance]
    assert set(orders["influence"][0][:4].tolist()) == circuit
    table = faithfulness(model, sae, asked, orders, (4, 8)).table()
    assert {c.other for c in table.contrasts} == set(orders) - {"influence"}
    for c in table.contrasts:
        if c.other.startswith("random") and c.measure in ("delta_logit", "delta_nll", "logit"):
            low, high = c.difference.low, c.difference.high
            assert (low > 0) if c.better > 0 else (high < 0), c
    assert {(c.mode, c.measure, c.better) for c in table.contrasts} == {
        (mode, *pair) for mode in MODES for pair in JUDGED[mode]
    }


def test_the_prediction_of_a_multiple_choice_item_is_its_likeliest_option():
    model, sae = tiny_model(), sae_of()
    rendered = item(0)
    options = (7, rendered.input_ids[rendered.start], 90)
    asked = question(
        [replace(rendered, input_ids=[*rendered.input_ids[: rendered.start], o, 2]) for o in options], right=1
    )
    assert (asked.options, asked.right, asked.correct) == (options, 1, options[1])
    got = faithfulness(model, sae, [asked], {"any": [np.arange(LATENTS)]}, (5,))
    logits = explicit(model, sae, rendered, np.ones(LATENTS))[list(options)]
    assert got.base["spliced_right"][0] == float(logits.argmax() == 1)
    keep = np.ones(LATENTS)
    keep[:5] = 0
    masked = explicit(model, sae, rendered, keep)[list(options)]
    assert got.values["any", "necessity"]["flip"][0, 0] == float(masked.argmax() != logits.argmax())
    assert got.values["any", "necessity"]["right"][0, 0] == float(masked.argmax() == 1)


def test_draws_are_averaged():
    model, sae, items = tiny_model(), sae_of(), [item(0), item(1)]
    draws = np.stack([np.random.default_rng(i).permutation(LATENTS) for i in range(3)])
    got = faithfulness(
        model, sae, items, {"drawn": [draws] * 2, **{str(i): [d] * 2 for i, d in enumerate(draws)}}, (7,)
    )
    for mode in MODES:
        for name in ("delta_logit", "flip", "nll"):
            mean = np.mean([got.values[str(i), mode][name] for i in range(3)], axis=0)
            np.testing.assert_allclose(got.values["drawn", mode][name], mean, atol=1e-9)


@pytest.mark.parametrize("normalise", ["constant_norm", "layer_norm"])
def test_an_sae_that_normalises_each_state(normalise):
    model, sae = tiny_model(), sae_of(normalise=normalise)
    got = faithfulness(model, sae, [item(0)], {"any": [np.arange(LATENTS)]}, (0, 5))
    assert got.values["any", "necessity"]["delta_logit"][0, 0] == 0
    assert got.values["any", "necessity"]["delta_logit"][1, 0] != 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_architecture(kind):
    got = faithfulness(tiny_model(kind), sae_of(layer=2), [item(0)], {"any": [np.arange(LATENTS)]}, (0, 9))
    assert got.values["any", "necessity"]["delta_nll"][0, 0] == pytest.approx(0, abs=1e-6)
    assert np.isfinite(got.values["any", "sufficiency"]["nll"]).all()


def test_influence_orders_begin_at_the_two_ends():
    found = influence_orders({3: 2.0, 5: -1.0, 7: 0.5}, 9, 9)
    assert found["influence"].tolist() == [3, 7, 0, 1, 2, 4, 6, 8, 5]
    assert found["influence, paper's sign"].tolist() == [5, 0, 1, 2, 4, 6, 8, 7, 3]
    assert influence_orders(np.arange(9.0), 9, 2)["influence"].tolist() == [8, 7]
    assert influence_orders({}, 4, 2)["influence"].tolist() == [0, 1]


@torch.no_grad()
def test_activity_orders_count_and_sum_the_items_own_latents():
    model, sae, rendered = tiny_model(), sae_of(), item(0)
    found = activity_orders(model, sae, [rendered], draws=2, first=LATENTS)
    ids = torch.tensor([rendered.input_ids[: rendered.start]])
    r = dense(sae, model(input_ids=ids, output_hidden_states=True).hidden_states[1][0]).numpy()
    by_size = r.sum(0)[found["activation magnitude"][0]]
    by_count = (r > 0).sum(0)[found["frequency"][0]]
    assert (np.diff(by_size) <= 1e-5).all()
    assert (np.diff(by_count) <= 0).all()
    active = int((r > 0).any(0).sum())
    assert found["random"][0].shape == found["random, active"][0].shape == (2, LATENTS)
    for order in found["random, active"][0]:
        assert (r > 0).any(0)[order[:active]].all()
        assert sorted(order.tolist()) == list(range(LATENTS))
    assert not np.array_equal(*found["random"][0])
    again = activity_orders(model, sae, [rendered], draws=2, first=5)
    np.testing.assert_array_equal(again["random"][0], found["random"][0][:, :5])


def test_intervals_are_of_resampled_items():
    values = np.random.default_rng(0).normal(2.0, 1.0, (2, 400))
    first, second = estimates(values, 2000, 0)
    assert first.value == pytest.approx(values[0].mean())
    assert first.high - first.low == pytest.approx(2 * 1.96 / 20, rel=0.1)
    assert second == estimates(values, 2000, 0)[1]
    assert estimates(values[:, :1], 1000, 0)[0].low is None


def test_what_does_not_fit_is_refused():
    model, sae, rendered = tiny_model(), sae_of(), item(0)
    order = np.arange(LATENTS)
    for items, orders, ks, message in (
        ([], {}, KS, "no test items"),
        ([rendered], {"a": []}, (3,), "orders the latents of 0 items"),
        ([rendered], {"a": [order[:2]]}, (3,), "k goes up to 3"),
        ([rendered], {"a": [order + 1]}, (3,), "is not in 0..47"),
        ([rendered], {"a": [order // 2]}, (3,), "twice"),
        ([rendered], {"a": [order]}, (), "give at least one"),
        ([rendered], {"a": [order]}, (-1,), "below 0"),
        ([Rendered([5, 6], 0, 1, 2)], {"a": [order]}, (1,), "no prompt"),
        ([Rendered([5, 6], 2, 2, 2)], {"a": [order]}, (1,), "no answer"),
    ):
        with pytest.raises(ConfigError, match=message):
            faithfulness(model, sae, items, orders, ks)
    with pytest.raises(ConfigError, match="number 2 is said"):
        question([rendered, rendered], 2)
    with pytest.raises(ConfigError, match="same token"):
        question([rendered, rendered], 0)
    with pytest.raises(ConfigError, match="different prompts"):
        question([rendered, item(5)], 0)
    with pytest.raises(ConfigError, match="not finite"):
        influence_orders({0: float("nan")}, 4)
    with pytest.raises(ConfigError, match="of latent 9"):
        influence_orders({9: 1.0}, 4)
    with pytest.raises(ConfigError, match="3 importances"):
        influence_orders(np.zeros(3), 4)
    one = faithfulness(model, sae, [rendered], {"a": [order]}, (1,))
    with pytest.raises(ConfigError, match="cannot join"):
        merged([one, faithfulness(model, sae, [rendered], {"a": [order]}, (2,))])
    with pytest.raises(ConfigError, match="no test items"):
        merged([])
    with pytest.raises(ConfigError, match="was not measured"):
        one.contrast("b", "a", "necessity", "flip")


def test_logits_that_are_not_finite_are_no_measure():
    model = tiny_model()
    model.get_output_embeddings().weight.data[7] = torch.inf
    with pytest.raises(ModelError, match=r"test item 0 are not finite with the SAE 's' in layer 1"):
        faithfulness(model, sae_of(), [item(0)], {"a": [np.arange(LATENTS)]}, (1,))
