"""Engines that change adapters between calls: greedy text against PEFT's own, and the base model left as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from curate.errors import ModelError
from curate.models import engines
from curate.models.adapter import Wardrobe, check_fits, rank
from curate.models.engines import GenerationSpec, make_engine, row_seed
from curate.models.load import ModelSpec, load_model
from tests.adapters import made_on, peft_greedy, save_adapter
from tests.tiny import save_tiny, tiny_model

PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46, 47], [7], [100, 101, 102, 103], [200, 30, 77, 5, 6]]
SEEDS = [row_seed(0, str(i)) for i in range(len(PROMPTS))]
NEW = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", d=256, scale=0.05)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory):
    """Three of unlike rank, one rank-stabilised, none an engine's own number of ranks."""
    root = tmp_path_factory.mktemp("adapters")
    return [
        save_adapter(root / "a", base, seed=1, r=4, scale=0.15),
        save_adapter(root / "b", base, seed=2, r=7, scale=0.1, rslora=True),
        save_adapter(root / "c", base, seed=3, r=2, scale=0.2, target_modules=["v_proj", "up_proj"]),
    ]


@pytest.fixture(scope="module")
def wanted(base, adapters):
    """Greedy tokens by PEFT, for the base model (None) and each adapter; no two alike."""
    out = {a: [peft_greedy(base, a, p, NEW) for p in PROMPTS] for a in (None, *adapters)}
    assert len({json.dumps(x) for x in out.values()}) == len(out)
    return out


def engine_for(base, name, **settings):
    spec = {"max_new_tokens": NEW, "temperature": 0, "max_batch": 4, "kv_cache_gb": 0.1, "max_model_len": 64}
    generation = GenerationSpec(engine=name, dtype="float32", **{**spec, **settings})
    return make_engine(ModelSpec(str(base), device="cpu"), generation, lora_rank=7)


def interleaved(engine, adapters, wanted):
    """Every order of change: none to one, one to another, back to none, the same twice, and back to an old one."""
    a, b, c = adapters
    for adapter in (None, a, b, None, None, b, a, c, b, None, c, None, a, a, None):
        got = [g.token_ids for g in engine.generate(PROMPTS, SEEDS, adapter)]
        assert got == wanted[adapter], f"with {adapter}"


def test_transformers_wears_adapters_in_any_order(base, adapters, wanted):
    interleaved(engine_for(base, "transformers"), adapters, wanted)


def mixed(engine, adapter):
    """What no caller can ask of the engine: every other prompt with the adapter, the rest without, in one batch."""
    engine.generate(PROMPTS[:1], SEEDS[:1], adapter)
    answers = engine._llm.generate(
        [engine._vllm.TokensPrompt(prompt_token_ids=p) for p in PROMPTS],
        [engine._sampling(0, engine._spec) for _ in PROMPTS],
        use_tqdm=False,
        lora_request=[engine._worn if i % 2 == 0 else None for i in range(len(PROMPTS))],
    )
    return [list(a.outputs[0].token_ids) for a in answers]


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_wears_adapters_in_any_order(base, adapters, wanted):
    """vLLM on the CPU gives requests for the base model an adapter's weights when its last slot is filled and the batch
    is mixed. Calls are not mixed, and the slot stays empty: both are looked at."""
    pytest.importorskip("vllm")
    if not engines.vllm_serves(torch.device("cpu")):
        pytest.skip("no vLLM for the CPU is installed")
    engine = engine_for(base, "vllm")
    try:
        interleaved(engine, adapters, wanted)
        one = GenerationSpec(max_new_tokens=3, temperature=0)
        assert [g.token_ids for g in engine.generate(PROMPTS, SEEDS, adapters[0], one)] == [
            ids[:3] for ids in wanted[adapters[0]]
        ]
        assert mixed(engine, adapters[1]) == [
            wanted[adapters[1] if i % 2 == 0 else None][i] for i in range(len(PROMPTS))
        ]
        with pytest.raises(ModelError, match="the rank 9; the engine was started for 7"):
            engine.generate(PROMPTS, SEEDS, save_adapter(adapters[0].parent / "wide", base, r=9))
        other = save_tiny(adapters[0].parent / "other", d=64)
        with pytest.raises(ModelError, match=r"wrong .* does not fit LlamaForCausalLM"):
            engine.generate(PROMPTS, SEEDS, save_adapter(adapters[0].parent / "wrong", other))
        with pytest.raises(ModelError, match=r"vLLM cannot put the adapter .* on the model: .*DoRA"):
            engine.generate(PROMPTS, SEEDS, save_adapter(adapters[0].parent / "dora", base, use_dora=True))
        assert [g.token_ids for g in engine.generate(PROMPTS, SEEDS)] == wanted[None]
    finally:
        engine.close()


def test_sampling_of_one_call(base, adapters, wanted):
    engine = engine_for(base, "transformers", temperature=1.0)
    greedy = GenerationSpec(max_new_tokens=3, temperature=0)
    a = adapters[0]
    assert [g.token_ids for g in engine.generate(PROMPTS, SEEDS, a, greedy)] == [ids[:3] for ids in wanted[a]]
    assert [g.token_ids for g in engine.generate(PROMPTS, SEEDS, a)] != wanted[a]


def test_the_base_model_is_the_same_afterwards(base, adapters):
    model = load_model(ModelSpec(str(base)))
    before = {name: w.clone() for name, w in model.state_dict().items()}
    logits = model(torch.tensor([PROMPTS[1]])).logits
    wardrobe = Wardrobe(model)
    for adapter in (*adapters, adapters[0]):
        wardrobe.wear(adapter)
        assert not torch.equal(model(torch.tensor([PROMPTS[1]])).logits, logits)
        assert not any(p.requires_grad for p in model.parameters())
    wardrobe.wear(None)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(model(torch.tensor([PROMPTS[1]])).logits, logits)


def test_an_adapter_that_does_not_fit_leaves_the_model_bare(base, adapters, wanted, tmp_path):
    engine = engine_for(base, "transformers")
    wrong = save_adapter(tmp_path / "wrong", save_tiny(tmp_path / "other", d=64))
    engine.generate(PROMPTS, SEEDS, adapters[0])
    with pytest.raises(ModelError, match="does not fit LlamaForCausalLM"):
        engine.generate(PROMPTS, SEEDS, wrong)
    assert [g.token_ids for g in engine.generate(PROMPTS, SEEDS)] == wanted[None]


def test_an_adapter_without_some_of_its_matrices_leaves_the_model_bare(base, adapters, tmp_path):
    model = load_model(ModelSpec(str(base), dtype="float32"))
    wardrobe, tokens = Wardrobe(model), torch.tensor([PROMPTS[1]])
    bare = model(tokens).logits
    partial = save_adapter(tmp_path / "partial", base)
    weights = load_file(partial / "adapter_model.safetensors")
    weights.pop(next(iter(weights)))
    save_file(weights, partial / "adapter_model.safetensors")
    with pytest.raises(ModelError, match="has no weights for 1 modules"):
        wardrobe.wear(partial)
    assert not any("lora" in name for name, _ in model.named_modules())
    assert torch.equal(model(tokens).logits, bare)


def test_rank(base, adapters, tmp_path):
    assert [rank(a) for a in adapters] == [4, 7, 2]
    assert rank(save_adapter(tmp_path / "p", base, r=2, rank_pattern={"o_proj": 6})) == 6


def test_adapters_of_another_kind_are_refused(base, tmp_path):
    other = save_adapter(tmp_path / "other", base)
    (other / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3", "base_model_name_or_path": "x"}))
    with pytest.raises(ModelError, match="is of the kind 'IA3'; only LoRA"):
        check_fits(tiny_model(d=256).to("meta"), other)


def test_fits_is_told_without_weights(base, adapters, tmp_path):
    bare = tiny_model(d=256).to("meta")
    for adapter in adapters:
        check_fits(bare, adapter, {"digest": "x", "adapter": None})
    with pytest.raises(ModelError, match=r"made for .* does not fit LlamaForCausalLM: .*the shape"):
        check_fits(tiny_model(d=64).to("meta"), adapters[0], {})
    with pytest.raises(ModelError, match="the model has no module"):
        check_fits(tiny_model("gpt2", d=256).to("meta"), adapters[0], {})
    own = save_adapter(tmp_path / "own", base)
    made_on(own, {"name": "Llama 3x256", "digest": "aaa"})
    check_fits(bare, own, {"name": "Llama 3x256", "digest": "aaa", "adapter": None})
    with pytest.raises(ModelError, match=r"trained on another model \(Llama 3x256, digest aaa\).*digest bbb"):
        check_fits(bare, own, {"name": "Llama 3x256", "digest": "bbb", "adapter": None})
    weights = load_file(own / "adapter_model.safetensors")
    save_file(weights, own / "adapter_model.safetensors")
    (own / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ModelError, match="is broken"):
        check_fits(bare, own, {"digest": "aaa"})
    (own / "adapter_config.json").write_text("[1]")
    with pytest.raises(ModelError, match="holds no settings"):
        rank(own)
