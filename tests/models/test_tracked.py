"""Tracked layers: chosen by kind, block and name; who shares an input; how much of the model that is."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Qwen2MoeConfig

from curate.errors import ConfigError
from curate.models.load import ModelSpec, load_model
from curate.models.tracked import LayerChoice, is_linear, tracked_layers, weight_of
from tests.tiny import KINDS, save_tiny, tiny_model


def names(layers, block=None):
    return [layer.name.rsplit(".", 1)[-1] for layer in layers if block in (None, layer.block)]


def mixture(kind: str):
    common = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    config = (
        MixtralConfig(**common, num_local_experts=4)
        if kind == "mixtral"
        else Qwen2MoeConfig(**common, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=24)
    )
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def test_kinds_of_a_llama_in_the_order_of_the_forward():
    model = tiny_model("llama")
    attention, _ = tracked_layers(model, LayerChoice())
    mlp, _ = tracked_layers(model, LayerChoice("mlp"))
    both, _ = tracked_layers(model, LayerChoice("all"))
    assert names(attention, 0) == ["q_proj", "k_proj", "v_proj", "o_proj"]
    assert names(mlp, 1) == ["gate_proj", "up_proj", "down_proj"]
    assert names(both, 2) == names(attention, 2) + names(mlp, 2)
    assert [layer.block for layer in both] == sorted(layer.block for layer in both)
    assert {layer.name for layer in both} == {layer.name for layer in [*attention, *mlp]}


def test_layers_that_read_one_input_share_its_name():
    layers, _ = tracked_layers(tiny_model("llama"), LayerChoice("all", first=1, last=2))
    reads = {layer.name.rsplit(".", 1)[-1]: layer.reads.rsplit(".", 1)[-1] for layer in layers}
    assert reads == {
        "q_proj": "q_proj", "k_proj": "q_proj", "v_proj": "q_proj", "o_proj": "o_proj",
        "gate_proj": "gate_proj", "up_proj": "gate_proj", "down_proj": "down_proj",
    }  # fmt: skip
    only, _ = tracked_layers(tiny_model("llama"), LayerChoice(pattern=r"\.(k|v)_proj$"))
    assert {layer.reads.rsplit(".", 1)[-1] for layer in only} == {"k_proj"}  # the group is named after a tracked one


def test_blocks_stride_and_pattern():
    model = tiny_model("llama", layers=7)
    found, _ = tracked_layers(model, LayerChoice(first=1, last=6, stride=2, pattern="q_proj"))
    assert [layer.name for layer in found] == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 3, 5)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_family(kind):
    model = tiny_model(kind)
    attention, _ = tracked_layers(model, LayerChoice("attention"))
    mlp, _ = tracked_layers(model, LayerChoice("mlp"))
    everything, coverage = tracked_layers(model, LayerChoice("all"))
    assert {layer.block for layer in attention} == {layer.block for layer in mlp} == {0, 1, 2}
    assert {layer.name for layer in everything} == {layer.name for layer in [*attention, *mlp]}
    for layer in everything:
        weight = weight_of(model.get_submodule(layer.name))
        assert (layer.out, layer.width) == weight.shape
    total = sum(p.numel() for p in model.parameters())
    assert coverage.total == total
    assert coverage.tracked == sum(layer.size for layer in everything)
    assert coverage.tracked + sum(coverage.left_out.values()) == total
    assert not coverage.warnings
    assert not [m for m in model.modules() if m._forward_pre_hooks]


def test_coverage_in_words():
    _, coverage = tracked_layers(tiny_model("qwen2"), LayerChoice())
    assert 0 < coverage.share < 0.5
    assert "parameters tracked" in str(coverage)
    assert "embeddings" in str(coverage)
    assert {"embeddings", "other linear layers", "norms", "biases"} == set(coverage.left_out)


def test_conv1d_is_seen_as_out_by_in():
    model = tiny_model("gpt2")
    layers, _ = tracked_layers(model, LayerChoice(first=0, last=1))
    fused = layers[0]
    assert fused.name.endswith("c_attn")
    assert (fused.out, fused.width) == (96, 32)
    module = model.get_submodule(fused.name)
    x = torch.randn(5, 32)
    torch.testing.assert_close(module(x), x @ weight_of(module).T + module.bias)
    weight_of(module)[0, 1] = 7.0  # a view: what is written there is the model's
    assert module.weight[1, 0] == 7.0


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    save_tiny(folder / "base")
    wrapped = get_peft_model(tiny_model(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"]))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    wrapped.save_pretrained(folder / "adapter")
    return load_model(ModelSpec(str(folder / "base"), str(folder / "adapter"), merge_adapter=False))


def test_adapter_layers(adapted):
    layers, coverage = tracked_layers(adapted, LayerChoice("adapter"))
    assert len(layers) == 3 * 3 * 2
    assert all(".lora_A." in layer.name or ".lora_B." in layer.name for layer in layers)
    first = {layer.name: layer for layer in layers if layer.block == 0}
    a_of_v = first["model.layers.0.self_attn.v_proj.lora_A.default"]
    assert (a_of_v.out, a_of_v.width) == (4, 32)
    assert a_of_v.reads == "model.layers.0.self_attn.q_proj.lora_A.default"
    b_of_v = first["model.layers.0.self_attn.v_proj.lora_B.default"]
    assert (b_of_v.out, b_of_v.width, b_of_v.reads) == (16, 4, b_of_v.name)
    assert coverage.share < 0.2


def test_the_other_kinds_leave_the_adapter_out(adapted):
    layers, _ = tracked_layers(adapted, LayerChoice("all"))
    assert not [layer.name for layer in layers if "lora_" in layer.name]
    assert len(layers) == 3 * 7


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_a_mixture_of_experts_warns(kind):
    model = mixture(kind)
    layers, coverage = tracked_layers(model, LayerChoice("all"))
    assert any("experts" in warning for warning in coverage.warnings)
    assert any("experts" in warning for warning in coverage.warnings if "mlp" in warning)  # names one
    assert coverage.left_out["fused experts"] > 0
    assert not [layer.name for layer in layers if ".experts." in layer.name]
    assert coverage.tracked + sum(coverage.left_out.values()) == coverage.total
    if kind == "qwen2_moe":  # every token reaches the shared expert
        assert {"gate_proj", "up_proj", "down_proj"} <= set(names(layers, 0))


def test_experts_that_some_tokens_do_not_reach_are_skipped_with_a_warning():
    model = tiny_model("llama", layers=2)
    inner = model.model.layers[1].mlp.down_proj
    whole = inner.forward
    model.model.layers[1].mlp.register_forward_pre_hook(lambda module, args: (args[0][:, :-1],))
    model.model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: torch.nn.functional.pad(out, (0, 0, 0, 1))
    )
    layers, coverage = tracked_layers(model, LayerChoice("mlp"))
    assert inner.forward == whole
    assert {layer.block for layer in layers} == {0}
    assert any("not reached by every token" in warning for warning in coverage.warnings)


class Router(nn.Module):
    """Two experts of plain linear layers; a token goes to one of them, by its state alone."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.gate = nn.Linear(d, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(2))

    def forward(self, states):
        flat = states.flatten(0, 1)
        chosen = self.gate(flat).argmax(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            if (chosen == i).any():
                out[chosen == i] = expert(flat[chosen == i])
        return out.view_as(states)


@pytest.mark.parametrize("seed", range(4))
def test_experts_that_a_router_chooses_by_the_token_are_not_tracked(seed):
    model = tiny_model("llama", layers=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model.model.layers[1].mlp = Router(32).requires_grad_(False)
    layers, coverage = tracked_layers(model, LayerChoice("mlp"))
    assert names(layers, 1) == ["gate"]
    assert any("2 layers are not reached by every token" in warning for warning in coverage.warnings)


def test_quantised_and_integer_weights_are_no_linear_layers():
    layer = torch.nn.Linear(4, 4)
    assert is_linear(layer)
    layer.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    assert not is_linear(layer)
    assert not is_linear(torch.nn.Embedding(4, 4))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kind": "atention"}, "attention"),
        ({"stride": 0}, "at least 1"),
        ({"pattern": "("}, "regular expression"),
    ],
)
def test_a_choice_that_makes_no_sense(settings, words):
    with pytest.raises(ConfigError, match=words):
        LayerChoice(**settings)


@pytest.mark.parametrize("settings", [{"last": 9}, {"first": 2, "last": 2}, {"first": -1}])
def test_blocks_that_are_not_there(settings):
    with pytest.raises(ConfigError, match="blocks 0 to 3"):
        tracked_layers(tiny_model("llama"), LayerChoice(**settings))


@pytest.mark.parametrize("settings", [{"pattern": "nothing"}, {"kind": "adapter"}])
def test_nothing_matches(settings):
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn\.q_proj"):
        tracked_layers(tiny_model("llama"), LayerChoice(**settings))
