"""FLOPs against PyTorch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import MixtralConfig

from curate.models.tap import LayerTap
from curate.scoring.flops import forward_cost, forward_flops
from curate.scoring.registry import make_scorers
from curate.scoring.shared_pass import SharedPass
from tests.scoring.rows import make_concept, make_examples, render
from tests.tiny import tiny_model


class Counter(TorchDispatchMode):
    """PyTorch's formulas for each operator, without FlopCounterMode's module hooks (they refuse a nested backward)."""

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func.overloadpacket)) is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3", "neox"])
@pytest.mark.parametrize("layer", [0, 1, 3, None])
def test_forward_equals_the_counter(kind, layer):
    model = tiny_model(kind)
    model.set_attn_implementation("eager")  # the counter does not know the fused kernel of the CPU
    ids = torch.randint(5, 300, (3, 50), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        if layer is None:
            with torch.no_grad():
                model(ids)
        else:
            LayerTap(model, [layer])(ids, torch.ones_like(ids))
    want = forward_flops(model.config, [50] * 3, layer, head_tokens=150 if layer is None else 0)
    # Rotary positions are a small product of their own.
    assert counter.get_total_flops() == pytest.approx(want, rel=0.01, abs=5000)


def test_gradient_pass_is_near_the_counter():
    model = tiny_model("llama")
    model.set_attn_implementation("eager")
    examples = make_examples()[1:2]
    rows = render(examples)
    run = SharedPass(model, make_scorers({"loss_gradient_alignment": {"layers": [1]}}, [make_concept()]))
    with Counter() as counter:
        stats = run.run(examples, rows).stats
    assert stats.flops == pytest.approx(counter.total, rel=0.02)


def test_experts_count_by_how_many_are_visited():
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    settings |= {"num_key_value_heads": 4, "vocab_size": 100}
    costs = [
        forward_cost(MixtralConfig(**settings, num_local_experts=n, num_experts_per_tok=k)).block
        for n, k in ((4, 1), (4, 2), (8, 2))
    ]
    one_expert = 3 * 32 * 64
    assert costs[1] - costs[0] == pytest.approx(one_expert)
    assert costs[2] - costs[1] == pytest.approx(4 * 32)  # only the router grows
