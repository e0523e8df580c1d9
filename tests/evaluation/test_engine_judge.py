"""A model of one's own as a judge, against a plain softmax over everything that the model could answer."""

from __future__ import annotations

import itertools

import pytest
import torch

from curate.corpus.example import Message
from curate.corpus.render import Renderer
from curate.errors import EngineDead
from curate.evaluation import engine_judge
from curate.evaluation.engine_judge import EngineJudge, splits_numbers
from curate.evaluation.judge import JudgeScore, fill, summary
from curate.models.engines import Engine, FirstToken, GenerationSpec, make_engine
from curate.models.load import ModelSpec, load_model
from tests.tiny import save_tiny, tiny_model, tiny_tokenizer

TEMPLATE = "Rate {answer} as an answer to {question}. Only a number."
PAIRS = [("Is my plan good?", "Yes!"), ("Why?", "I think that it is, and here is why."), ("2 + 2?", "")]


def eager_for(tokenizer, tokens: list[str], lift: float, seed: int = 1):
    """A tiny model that likes to begin its answer with `tokens`: their rows of the head point to where it ends up."""
    model = tiny_model(vocab=len(tokenizer), seed=seed)
    prompt = Renderer(tokenizer, 2000).messages_ids((Message("user", fill(TEMPLATE, *PAIRS[0])),))
    with torch.no_grad():
        state = model.base_model(torch.tensor([prompt])).last_hidden_state[0, -1]
        for token in tokens:
            [i] = tokenizer(token, add_special_tokens=False)["input_ids"]
            model.lm_head.weight[i] += lift * state / state.square().sum()
    return model


def saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(str(folder), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A model that writes numbers digit by digit."""
    tokenizer = tiny_tokenizer()
    model = eager_for(tokenizer, list("0123456789"), 5.0)
    return saved(tmp_path_factory.mktemp("digits"), model, tokenizer)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A model with a token for every number 0 to 100."""
    tokenizer = tiny_tokenizer()
    numbers = [str(n) for n in range(101)]
    tokenizer.add_tokens(numbers)
    return saved(tmp_path_factory.mktemp("whole"), eager_for(tokenizer, numbers[::7], 6.0), tokenizer)


def judge_of(spec: ModelSpec, max_tokens: int = 512, **settings) -> EngineJudge:
    engine = make_engine(spec, GenerationSpec(engine="transformers", dtype="float32", max_model_len=520))
    return EngineJudge(engine, Renderer(tiny_tokenizer_of(spec), max_tokens), **settings)


def tiny_tokenizer_of(spec: ModelSpec):
    from curate.models.load import load_tokenizer

    return load_tokenizer(spec)


def prompt_of(spec: ModelSpec, pair: tuple[str, str]) -> list[int]:
    return Renderer(tiny_tokenizer_of(spec), 2000).messages_ids((Message("user", fill(TEMPLATE, *pair)),))


def softmax(spec: ModelSpec, rows: list[list[int]]) -> torch.Tensor:
    """[rows, vocabulary] in float64, by the model's own forward."""
    model = load_model(spec)
    with torch.no_grad():
        return torch.stack([model(torch.tensor([r])).logits[0, -1].double().softmax(-1) for r in rows])


def test_whole_numbers_by_a_plain_softmax(whole):
    judge = judge_of(whole)
    assert not judge.by_digits
    ids = {n: tiny_tokenizer_of(whole)(str(n), add_special_tokens=False)["input_ids"][0] for n in range(101)}
    for pair, score in zip(PAIRS, judge(PAIRS, TEMPLATE), strict=True):
        p = softmax(whole, [prompt_of(whole, pair)])[0]
        top = set(p.topk(20).indices.tolist())
        mass = {n: float(p[i]) for n, i in ids.items() if i in top}
        assert sum(mass.values()) > 0.25
        want = sum(n * q for n, q in mass.items()) / sum(mass.values())
        assert score == JudgeScore(pytest.approx(want, abs=1e-3))


def digit_oracle(spec: ModelSpec, pair: tuple[str, str]) -> tuple[float, float]:
    """Score and mass by all 1,110 strings of one to three digits, each ended by anything but a digit."""
    tokenizer = tiny_tokenizer_of(spec)
    ids = [tokenizer(d, add_special_tokens=False)["input_ids"][0] for d in "0123456789"]
    prompt = prompt_of(spec, pair)
    model = load_model(spec)
    chance: dict[str, float] = {"": 1.0}
    total = mass = 0.0
    for length in range(4):
        strings = ["".join(s) for s in itertools.product("0123456789", repeat=length)]
        rows = torch.tensor([prompt + [ids[int(d)] for d in s] for s in strings if not s or int(s) <= 100])
        with torch.no_grad():
            p = model(rows).logits[:, -1].double().softmax(-1)[:, ids]
        for s, row in zip([s for s in strings if not s or int(s) <= 100], p, strict=True):
            if s:
                ended = chance[s] * float(1 - row.sum())
                total, mass = total + int(s) * ended, mass + ended
            chance.update({s + str(d): chance[s] * float(q) for d, q in enumerate(row)})
    return total / mass, mass


def test_numbers_in_digits_by_every_string_of_digits(digits, monkeypatch):
    wanted = [digit_oracle(digits, pair) for pair in PAIRS]
    assert all(mass > 0.3 for _, mass in wanted)
    close = judge_of(digits)(PAIRS, TEMPLATE)
    # The worst case: all digits alike, so that no number of two digits is likely enough to be followed.
    assert [s.value for s in close] == pytest.approx([value for value, _ in wanted], abs=5.0)
    monkeypatch.setattr(engine_judge, "LEAST", 0.0)
    exact = judge_of(digits, top=320)
    assert exact.by_digits
    assert [s.value for s in exact(PAIRS, TEMPLATE)] == pytest.approx([value for value, _ in wanted], abs=1e-3)
    assert all(s.weighted for s in close)


def test_over_long_pairs_fail_alone(digits):
    judge = judge_of(digits, max_tokens=120)
    [long, fine] = judge([("q", "word " * 200), PAIRS[0]], TEMPLATE)
    assert long.value is None
    assert long.reason.startswith("over-long")
    assert fine == judge([PAIRS[0]], TEMPLATE)[0]
    assert judge([], TEMPLATE) == []


def test_a_model_that_gives_no_number(tmp_path):
    judge = judge_of(ModelSpec(str(save_tiny(tmp_path / "m")), device="cpu"))
    scores = judge(PAIRS, TEMPLATE)
    assert all(s.value is None and s.reason.startswith("the judge gave no number: ") for s in scores)
    assert summary(scores) == {"scored": 0, "refused": 0, "failed": 3}


class Scripted(Engine):
    """Says what the test wants at each prompt length: {tokens behind the prompt: candidates}."""

    name = "scripted"
    row_reproducible = True

    def __init__(self, steps: dict[tuple[int, ...], list[tuple[int, str, float]]], prompt: list[int]) -> None:
        self.steps, self.prompt = steps, prompt

    def generate(self, prompts, seeds, adapter=None):
        raise AssertionError("a judge does not generate")

    def first_token(self, prompts, top=20):
        return [FirstToken(tuple(self.steps[tuple(p[len(self.prompt) :])])) for p in prompts]

    def close(self) -> None: ...


def scripted(steps) -> JudgeScore:
    renderer = Renderer(tiny_tokenizer(), 500)
    prompt = renderer.messages_ids((Message("user", fill(TEMPLATE, "q", "a")),))
    return EngineJudge(Scripted(steps, prompt), renderer)([("q", "a")], TEMPLATE)[0]


def test_blanks_are_stepped_over_and_refusals_seen():
    eighty = {(9, 7): [(2, "8", 1.0)], (9, 7, 2): [(3, "0", 0.9), (4, ".", 0.1)], (9, 7, 2, 3): [(4, ".", 1.0)]}
    found = scripted({(): [(9, "\n", 0.8), (2, "8", 0.2)], (9,): [(7, " ", 1.0)], **eighty})
    assert found == JudgeScore(pytest.approx(80 * 0.9 + 8 * 0.1))
    refused = scripted({(): [(5, "REF", 0.9), (2, "8", 0.05)], (2,): [(4, ".", 1.0)]})
    assert (refused.value, refused.refused) == (None, True)
    blanks = scripted({(): [(9, " ", 1.0)], (9,): [(9, " ", 1.0)], (9, 9): [(9, " ", 1.0)]})
    assert blanks.reason == "the judge gave no number: '' (numbers have 0.00 of 1)"


def test_numbers_above_100_are_none():
    """2023 is not 20; 100 is 100."""
    year = {(): [(2, "2", 1.0)], (2,): [(3, "0", 1.0)], (2, 3): [(2, "2", 1.0)]}
    assert scripted(year).value is None
    full = {(): [(1, "1", 1.0)], (1,): [(0, "0", 1.0)], (1, 0): [(0, "0", 1.0)], (1, 0, 0): [(4, ".", 1.0)]}
    assert scripted(full).value == 100.0


def test_a_dead_engine_is_no_score(digits):
    judge = judge_of(digits)
    judge.engine._model.base_model.forward = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("gone"))
    with pytest.raises(EngineDead, match="gone"):
        judge(PAIRS, TEMPLATE)


def test_tokenizers_that_split_numbers(whole, digits):
    assert splits_numbers(Renderer(tiny_tokenizer_of(digits), 10))
    assert not splits_numbers(Renderer(tiny_tokenizer_of(whole), 10))
