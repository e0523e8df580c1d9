"""A and B against their definitions by autograd; sums that do not depend on how the rows are batched or divided."""

from __future__ import annotations

import pytest
import torch

from curate.corpus.render import Rendered
from curate.curvature.covariance import Covariances, accumulate_covariances
from curate.curvature.fisher import CurvatureSpec
from curate.errors import ConfigError, CurvatureError
from curate.models.tracked import LayerChoice, tracked_layers
from tests.curvature.oracle import count, inputs_and_deltas, make_rows, names_of, response_loss
from tests.tiny import tiny_model

ROWS = make_rows(7)


@pytest.fixture(scope="module", params=["llama", "gpt2", "opt"])
def model(request):
    return tiny_model(request.param, layers=2).double()


def summed(model, rows=ROWS, names=None, budget=40, layers=None, **settings):
    spec = CurvatureSpec(**settings)
    layers = layers or tracked_layers(model, LayerChoice("all"))[0]
    return accumulate_covariances(model, layers, spec, rows, names or names_of(rows), budget, 3, Covariances())


@pytest.mark.parametrize("tokens", ["loss", "all"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equal_their_definitions(model, tokens, reduction):
    layers, _ = tracked_layers(model, LayerChoice("all"))
    got = summed(model, fisher="empirical", tokens=tokens, reduction=reduction)
    inputs, outputs = {layer.name: [] for layer in layers}, {layer.name: 0.0 for layer in layers}
    for row in ROWS:
        for name, (a, delta) in inputs_and_deltas(model, layers, row.input_ids, response_loss(row)).items():
            inputs[name].append(a if tokens == "all" else a[max(row.start, 1) - 1 : row.end - 1])
            delta = delta / count(row) if reduction == "mean" else delta
            outputs[name] = outputs[name] + delta.T @ delta / len(ROWS)
    for layer in layers:
        a = torch.cat(inputs[layer.name])
        torch.testing.assert_close(got.input_factor(layer.reads), a.T @ a / len(a), rtol=1e-5, atol=1e-9)
        torch.testing.assert_close(got.output_factor(layer.name), outputs[layer.name], rtol=1e-5, atol=1e-12)
    assert got.counts == {"tokens": len(a), "examples": len(ROWS)}
    assert {key for key in got.tensors if key.startswith("A/")} == {f"A/{layer.reads}" for layer in layers}


@pytest.mark.parametrize("fisher", ["sampled", "empirical"])
def test_batches_padding_and_order_change_nothing(model, fisher):
    want = summed(model, fisher=fisher, budget=1000)
    order = [3, 0, 6, 2, 5, 1, 4]
    for other in (
        summed(model, fisher=fisher, budget=1),
        summed(model, [ROWS[i] for i in order], [f"r{i}" for i in order], fisher=fisher, budget=45),
    ):
        assert other.counts == want.counts
        for key, tensor in want.tensors.items():
            torch.testing.assert_close(other.tensors[key], tensor, rtol=1e-6, atol=1e-9)


def test_partial_sums_add_up_also_from_storage():
    model = tiny_model("llama", layers=2).double()
    whole = summed(model)
    parts = [summed(model, ROWS[i : i + 3], names_of(ROWS)[i : i + 3]).state_dict() for i in (0, 3, 6)]
    merged = Covariances()
    for part in parts:
        merged.merge(Covariances.from_state(part))
    assert merged.counts == whole.counts
    for key, tensor in whole.tensors.items():
        torch.testing.assert_close(merged.tensors[key], tensor, rtol=1e-9, atol=1e-12)
    again = Covariances.from_state(whole.state_dict())
    assert all(torch.equal(again.tensors[key], tensor) for key, tensor in whole.tensors.items())
    one = "model.layers.1.mlp.down_proj"
    part = {key: value for key, value in whole.state_dict().items() if key.startswith("count/") or key == f"B/{one}"}
    assert torch.equal(Covariances.from_state(part).output_factor(one), whole.output_factor(one))


def test_labels_depend_on_the_seed_and_the_ids_alone():
    model = tiny_model("llama", layers=2)
    key = "B/model.layers.0.self_attn.q_proj"
    first = summed(model).tensors[key]
    assert torch.equal(summed(model).tensors[key], first)
    assert not torch.allclose(summed(model, seed=1).tensors[key], first, rtol=0.01)
    assert not torch.allclose(summed(model, names=[f"x{i}" for i in range(7)]).tensors[key], first, rtol=0.01)


def test_half_precision_sums_in_float32():
    model = tiny_model("llama", layers=2)
    layers, _ = tracked_layers(model, LayerChoice())
    want = summed(model, layers=layers, fisher="empirical")
    got = summed(model.bfloat16(), layers=layers, fisher="empirical")
    for key, tensor in want.tensors.items():
        assert got.tensors[key].dtype == torch.float32
        assert torch.linalg.norm(got.tensors[key] - tensor) < 0.05 * torch.linalg.norm(tensor)


def test_sums_of_two_models_are_not_added():
    small, large = summed(tiny_model("llama", layers=2)), summed(tiny_model("llama", layers=2, d=64))
    with pytest.raises(CurvatureError, match=r"\(64, 64\) and \(128, 128\)"):
        small.merge(large)


def test_nothing_summed():
    with pytest.raises(CurvatureError, match="no example was seen"):
        Covariances().input_factor("q")
    with pytest.raises(CurvatureError, match="'B/elsewhere'"):
        summed(tiny_model("llama", layers=2)).output_factor("elsewhere")


def test_a_row_without_response_is_named():
    rows = [ROWS[0], Rendered([5, 6, 7], 3, 3, 3)]
    with pytest.raises(CurvatureError, match="'second'"):
        summed(tiny_model("llama", layers=2), rows, ["first", "second"])


@pytest.mark.parametrize("where", ["model.layers.1.mlp.up_proj", "lm_head"])
def test_gradients_that_are_not_finite_name_the_rows(where):
    model = tiny_model("llama", layers=2)
    model.get_submodule(where).weight[0, 0] = float("nan")
    with pytest.raises(CurvatureError, match=r"'r\d'.*not finite"):
        summed(model, budget=1)


def test_an_overflow_with_a_finite_loss_is_seen():
    model = tiny_model("llama", layers=2)
    v = model.model.layers[1].self_attn.o_proj
    v.register_full_backward_hook(lambda module, given, out: (given[0] * float("inf"),))
    with pytest.raises(CurvatureError, match="not finite"):
        summed(model)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "ekfca"}, "ekfac"),
        ({"fisher": "true"}, "sampled"),
        ({"tokens": "response"}, "loss"),
        ({"reduction": "avg"}, "mean"),
        ({"examples": 0}, "at least 1"),
        ({"max_tokens": 1}, "at least 2"),
    ],
)
def test_settings_that_make_no_sense(settings, words):
    with pytest.raises(ConfigError, match=words):
        CurvatureSpec(**settings)
