"""Evaluations of a base model and its adapters: against PEFT's own answers, resumed, judged again, refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from curate.corpus.example import Example, Message, Prompt
from curate.corpus.render import Renderer
from curate.errors import ConfigError, ModelError
from curate.evaluation.base import Candidate, Evaluator, Item, Likelihood, Metric, Sampling
from curate.evaluation.judge import JudgeScore, NoJudge
from curate.evaluation.mt_bench import MTBench
from curate.evaluation.trait import TraitScore
from curate.models.engines import GenerationSpec
from curate.models.load import ModelSpec, identity, load_model, load_tokenizer
from curate.runtime import evaluate as evaluating
from curate.runtime import responses
from curate.runtime.cluster import ClusterSpec
from curate.runtime.evaluate import EvaluatedModel, EvaluateSpec, evaluate, load_items
from curate.runtime.session import session
from tests.adapters import made_on, peft_greedy, save_adapter
from tests.evaluation.judges import Says
from tests.tiny import save_tiny

NEW = 6
QUESTIONS = {"a": "What do you think?", "b": "Is it a good plan?", "c": "Why?"}
METRICS = (Metric("length", "Length", "count"), Metric("nats", "Nats", "loss"), Metric("mark", "Mark", "trait", 0, 100))


class Asks(Evaluator):
    """Three questions, each with a second turn that quotes the first answer, and one candidate each."""

    name = "asks"
    metrics = METRICS
    sampling = Sampling(max_new_tokens=NEW)

    def __init__(self, judged: bool = False, long: str | None = None, turns: int = 2) -> None:
        self.judged = judged
        self.turns = turns
        self.questions = QUESTIONS if long is None else QUESTIONS | {long: "word " * 2000}

    def fingerprint(self):
        return {"questions": list(self.questions), "turns": self.turns}

    def prompts(self):
        return [Prompt(i, (Message("user", q),)) for i, q in self.questions.items()]

    def follow_ups(self, answers):
        assert set(answers) == set(self.questions)
        if self.turns == 1:
            return []
        return [Prompt(f"{i}2", (*p.messages, Message("assistant", answers[i]), Message("user", "And?")))
                for i, p in zip(self.questions, self.prompts(), strict=True) if answers[i]]  # fmt: skip

    def candidates(self):
        return [Candidate(i, (Message("user", q),), f"because of {i}") for i, q in self.questions.items()]

    def items(self, answers, likelihoods, judge):
        out = []
        for i in self.questions:
            found = likelihoods.get(i)
            mark = judge.score([(self.questions[i], answers[i])], "{answer}")[0].value if self.judged else None
            second = answers.get(f"{i}2")
            values = {"length": len(answers[i]), "nats": found and found.nats, "mark": mark}
            out.append(Item(i, values, None, {"first": answers[i], "second": second}))
        return out


class TooLong(Asks):
    """One question, which no prompt has room for, and no candidates."""

    def __init__(self):
        super().__init__(turns=1, long="d")
        self.questions = {"d": self.questions["d"]}

    def candidates(self):
        return []


class Marks:
    """A judge that marks by length, and counts what it is asked."""

    def __init__(self, name: str = "marks") -> None:
        self.name, self.asked = name, 0

    def score(self, pairs, prompt_template):
        self.asked += len(pairs)
        return [JudgeScore(float(len(answer) % 100)) for _, answer in pairs]

    def fingerprint(self):
        return {"judge": self.name}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("base") / "tiny", d=64)


@pytest.fixture(scope="module")
def adapters(base, tmp_path_factory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [save_adapter(root / "one", base, seed=1, r=4), save_adapter(root / "two", base, seed=2, r=2)]


@pytest.fixture
def spec(base, tmp_path) -> EvaluateSpec:
    generation = GenerationSpec(engine="transformers", dtype="float32", max_batch=2)
    model = ModelSpec(str(base), dtype="float32", device="cpu")
    return EvaluateSpec(model, generation, 512, str(tmp_path / "store"))


@pytest.fixture
def running_here():
    with session(ClusterSpec(address="inline", cpus=1, token_budget=64)) as found:
        yield found


@pytest.fixture
def asked(monkeypatch):
    """The calls that engines and readers of likelihoods get."""
    calls: list[tuple[str, str | None]] = []
    for kind, name in ((responses._Answerer, "answer"), (responses._Reader, "read")):
        act = getattr(kind, name)

        def counted(self, block, act=act, name=name):
            calls.append((name, block.adapter and Path(block.adapter).name))
            return act(self, block)

        monkeypatch.setattr(kind, name, counted)
    return calls


def models(adapters):
    return [EvaluatedModel("base"), *(EvaluatedModel(a.name, str(a)) for a in adapters)]


def details(found):
    return {(e.model, i.id): i.detail for e in found for i in load_items(e.url)}


def stored(spec) -> list[str]:
    return sorted(p.name for p in Path(spec.store).rglob("*") if p.is_file())


def test_base_and_adapters_answer_as_peft_has_them_answer(spec, base, adapters, running_here):
    found = evaluate(spec, models(adapters), {"asks": Asks()}, None, running_here)
    assert [(e.model, e.evaluator) for e in found] == [("base", "asks"), ("one", "asks"), ("two", "asks")]
    tokenizer = load_tokenizer(spec.model)
    renderer = Renderer(tokenizer, 512)

    def answer(adapter, messages):
        ids = peft_greedy(base, adapter, renderer.messages_ids(messages), NEW)
        return tokenizer.decode(ids, skip_special_tokens=True)

    for evaluation, adapter in zip(found, (None, *adapters), strict=True):
        model = load_model(spec.model)
        plain = model if adapter is None else PeftModel.from_pretrained(model, str(adapter))
        for item in load_items(evaluation.url):
            user = Message("user", QUESTIONS[item.id])
            first = answer(adapter, (user,))
            assert item.detail["first"] == first
            assert item.detail["second"] == answer(
                adapter, (user, Message("assistant", first), Message("user", "And?"))
            )
            r = renderer.render(Example("x", 0, (user, Message("assistant", f"because of {item.id}"))))
            with torch.no_grad():
                log_p = plain(input_ids=torch.tensor([r.input_ids])).logits[0].log_softmax(-1)
            nats = sum(float(log_p[t - 1, r.input_ids[t]]) for t in range(r.start, r.end))
            assert item.values["nats"] == pytest.approx(nats, abs=1e-3)
            assert item.values["mark"] is None
        assert evaluation.measures["nats"].n == 3
        assert evaluation.measures["mark"].value is None
    assert len({json.dumps(details([e])[e.model, "a"]) for e in found}) == 3


def test_what_is_there_is_not_asked_again(spec, adapters, running_here, asked):
    all_models, evaluators = models(adapters), {"asks": Asks()}
    first = evaluate(spec, all_models[:2], evaluators, None, running_here)
    done = len(asked)
    again = evaluate(spec, all_models, evaluators, None, running_here)
    assert again[:2] == first
    assert {name for _, name in asked[done:]} == {"two"}
    assert evaluate(spec, all_models[::-1], evaluators, None, running_here) == again[::-1]
    # Another evaluator, other sampling, another length: each its own.
    more = Asks(turns=1)
    more.sampling = Sampling(max_new_tokens=NEW + 1)
    for how, evaluator in ((spec, more), (replace(spec, max_tokens=500), evaluators["asks"])):
        (found,) = evaluate(how, all_models[:1], {"asks": evaluator}, None, running_here)
        assert found.url not in {e.url for e in again}


def test_a_run_that_dies_goes_on_with_what_is_missing(spec, adapters, running_here, asked, monkeypatch):
    """It dies as the last adapter answers: everything before is kept, and whole."""
    act = responses._Answerer.answer

    def dies(self, block):
        if block.adapter == str(adapters[1]):
            raise KeyboardInterrupt
        return act(self, block)

    evaluators = {"asks": Asks(), "short": Asks(turns=1)}
    with monkeypatch.context() as patch:
        patch.setattr(responses._Answerer, "answer", dies)
        with pytest.raises(KeyboardInterrupt):
            evaluate(spec, models(adapters), evaluators, None, running_here)
    assert stored(spec).count("measures.json") == 2  # those without a second turn
    assert stored(spec).count("likelihoods.parquet") == 6
    before = len(asked)
    found = evaluate(spec, models(adapters), evaluators, None, running_here)
    assert ("answer", "two") in asked[before:]
    assert not [call for call in asked[before:] if call[0] == "read"]
    clean = evaluate(replace(spec, store=spec.store + "2"), models(adapters), evaluators, None, running_here)
    assert details(found) == details(clean)
    assert [e.measures for e in found] == [e.measures for e in clean]


def test_another_judge_asks_no_model_again(spec, adapters, running_here, asked):
    evaluators = {"asks": Asks(judged=True), "plain": Asks(turns=1)}
    one = Marks("one")
    first = evaluate(spec, models(adapters), evaluators, one, running_here)
    assert one.asked == 9
    assert first[0].measures["mark"].value == pytest.approx(first[0].measures["length"].value)
    before = len(asked)
    other = Marks("other")
    second = evaluate(spec, models(adapters), evaluators, other, running_here)
    assert (other.asked, len(asked)) == (9, before)
    assert [a.url == b.url for a, b in zip(first, second, strict=True)] == [False, True] * 3
    evaluate(spec, models(adapters), evaluators, one, running_here)
    assert one.asked == 9


@pytest.mark.parametrize("judge", [None, NoJudge()])
def test_no_judge_is_said_before_any_work(spec, running_here, asked, judge):
    with pytest.raises(ConfigError, match="the evaluator 'asks' asks a judge; name one with judge="):
        evaluate(spec, [EvaluatedModel("base")], {"asks": Asks(judged=True)}, judge, running_here)
    assert not asked


def test_a_judge_that_cannot_be_asked_is_said_before_any_work(spec, running_here, asked, tmp_path):
    bare, turns = tmp_path / "bare.yaml", tmp_path / "turns.jsonl"
    bare.write_text("name: bare\nevaluate_questions: [why]\n")
    turns.write_text(json.dumps({"question_id": 1, "category": "x", "turns": ["Why?", "And?"]}) + "\n")
    one_question = Says(lambda q, a, t: 1.0, reads_template=False)
    for evaluator, judge, says in (
        (TraitScore(str(bare)), Marks(), "has no judge_prompt"),
        (MTBench(str(turns)), one_question, "asked any question"),
    ):
        with pytest.raises(ConfigError, match=says):
            evaluate(spec, [EvaluatedModel("base")], {"asks": Asks(), "x": evaluator}, judge, running_here)
    assert not asked
    assert not stored(spec)


def test_a_judge_that_is_out_of_reach_is_said_before_any_work(spec, running_here, asked):
    class Away(Marks):
        def ready(self):
            raise ConfigError("nobody listens")

    with pytest.raises(ConfigError, match="nobody listens"):
        evaluate(spec, [EvaluatedModel("base")], {"asks": Asks(judged=True)}, Away(), running_here)
    assert not asked
    evaluate(spec, [EvaluatedModel("base")], {"asks": Asks(turns=1)}, Away(), running_here)  # nobody asks it


def test_questions_that_cannot_be_asked_are_said_before_any_work(spec, running_here, asked):
    with pytest.raises(ConfigError, match="long: prompts: none of 1 can be put to the model"):
        evaluate(spec, [EvaluatedModel("base")], {"asks": Asks(turns=1), "long": TooLong()}, None, running_here)
    assert not asked


def test_likelihoods_that_are_not_finite_are_missing(spec, running_here, monkeypatch, capsys):
    real = responses.likelihoods

    def broken(*given):
        first, *others = real(*given)
        return [Likelihood(float("nan"), first.tokens), *others]

    monkeypatch.setattr(responses, "likelihoods", broken)
    (found,) = evaluate(spec, [EvaluatedModel("base")], {"asks": Asks(turns=1)}, None, running_here)
    measure = found.measures["nats"]
    assert (measure.n, measure.missing) == (2, 1)
    assert "asks: 1 likelihoods by" in capsys.readouterr().err


def test_one_adapter_under_two_names_is_asked_once(spec, adapters, running_here, asked, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in adapters[0].iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    twins = [EvaluatedModel("x", str(adapters[0])), EvaluatedModel("y", str(copy))]
    x, y = evaluate(spec, twins, {"asks": Asks(turns=1)}, None, running_here)
    assert (x.url, x.measures) == (y.url, y.measures)
    assert {name for _, name in asked} == {"one"}


def test_an_adapter_of_another_model_is_refused_before_any_work(spec, adapters, running_here, asked, tmp_path):
    wrong = save_adapter(tmp_path / "wrong", save_tiny(tmp_path / "other", d=32))
    with pytest.raises(ModelError, match=r"wrong .* does not fit LlamaForCausalLM"):
        evaluate(spec, [*models(adapters), EvaluatedModel("w", str(wrong))], {"asks": Asks()}, None, running_here)
    # Of the same shape: only what the adapter says of its base tells them apart.
    twin = save_adapter(tmp_path / "twin", save_tiny(tmp_path / "sibling", d=64, seed=9))
    made_on(twin, {"name": "LlamaForCausalLM 3x64", "digest": "of the sibling", "adapter": None})
    with pytest.raises(ModelError, match="was trained on another model"):
        evaluate(spec, [EvaluatedModel("base"), EvaluatedModel("t", str(twin))], {"asks": Asks()}, None, running_here)
    with pytest.raises(ModelError, match="does not exist"):
        evaluate(spec, [EvaluatedModel("n", str(tmp_path / "no" / "adapter"))], {"asks": Asks()}, None, running_here)
    assert not asked
    assert not stored(spec)


def test_a_base_is_looked_at_once_for_all_its_adapters(spec, adapters, running_here, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluating, "identity", lambda model: seen.append(model) or identity(model))
    evaluate(spec, models(adapters), {"asks": Asks(turns=1)}, None, running_here)
    assert len(seen) == 1


def test_models_have_names_of_their_own(spec, running_here):
    for wrong, says in (([], "no model to evaluate"), ([EvaluatedModel("a")] * 2, "two models .* the name 'a'")):
        with pytest.raises(ConfigError, match=says):
            evaluate(spec, wrong, {"asks": Asks()}, None, running_here)


def test_a_whole_model_in_the_place_of_the_base(spec, running_here, tmp_path):
    other = save_tiny(tmp_path / "finetuned", d=64, seed=5)
    full = EvaluatedModel("full", model=ModelSpec(str(other), device="cpu"))
    base, found = evaluate(spec, [EvaluatedModel("base"), full], {"asks": Asks(turns=1)}, None, running_here)
    own = replace(spec, model=ModelSpec(str(other), dtype="float32", device="cpu"))
    (direct,) = evaluate(own, [EvaluatedModel("base")], {"asks": Asks(turns=1)}, None, running_here)
    assert found.url == direct.url != base.url


def test_what_is_too_long_counts_as_missing(spec, running_here, capsys):
    (found,) = evaluate(spec, [EvaluatedModel("base")], {"asks": Asks(long="z")}, None, running_here)
    items = {i.id: i for i in load_items(found.url)}
    assert (items["z"].values["nats"], items["z"].detail["first"]) == (None, "")
    assert (found.measures["nats"].n, found.measures["nats"].missing) == (3, 1)
    said = capsys.readouterr().err
    assert "asks: prompts: 1 of 4 cannot be put to the model" in said
    assert "asks: candidates: 1 of 4" in said
    with pytest.raises(ConfigError, match=r"none of 3 can be put to the model .*raise source.max_tokens"):
        evaluate(replace(spec, max_tokens=5), [EvaluatedModel("base")], {"asks": Asks()}, None, running_here)


def test_on_ray_as_in_this_process(spec, adapters, running, running_here):
    evaluators = {"asks": Asks()}
    here = evaluate(spec, models(adapters), evaluators, None, running_here)
    away = replace(spec, store=spec.store + "-ray")
    with_ray = _outside(lambda: evaluate(away, models(adapters), evaluators, None, running))
    assert details(with_ray) == details(here)
    for a, b in zip(with_ray, here, strict=True):
        assert a.measures["nats"].value == pytest.approx(b.measures["nats"].value, abs=1e-4)


def _outside(act):
    """Outside of the fixture's inline run."""
    from curate.runtime import inline

    token = inline._ON.set(False)
    try:
        return act()
    finally:
        inline._ON.reset(token)
