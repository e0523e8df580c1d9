"""A classifier as a judge, against the classifier's own forward of one text at a time."""

from __future__ import annotations

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from curate.errors import ConfigError, ModelError
from curate.evaluation.classifier_judge import ClassifierJudge, ClassifierSpec
from curate.evaluation.judge import JudgeScore, reads_template
from curate.models.load import ModelSpec
from tests.tiny import save_tiny, tiny_tokenizer

PAIRS = [("Is it?", "Yes, it is."), ("Why?", "I think that it is a good plan, and here is why."), ("So?", "No!")]
NAMES = {0: "harmless", 1: "harmful", 2: "unsure"}


def save(folder, labels: int = 3, decoder: bool = False, **config):
    tokenizer = tiny_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "id2label": {i: NAMES[i] for i in range(labels)},
        "pad_token_id": None if decoder else 3,
        **config,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = (
            LlamaForSequenceClassification(LlamaConfig(**common))
            if decoder
            else BertForSequenceClassification(BertConfig(**common))
        )
        for weight in model.parameters():
            if weight.ndim >= 2:
                torch.nn.init.normal_(weight, std=0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelSpec(str(folder), device="cpu", dtype="float32"), model.eval(), tokenizer


@torch.no_grad()
def alone(model, tokenizer, *texts: str) -> torch.Tensor:
    return model(**tokenizer(*texts, return_tensors="pt")).logits[0].double()


@pytest.mark.parametrize("decoder", [False, True])
@pytest.mark.parametrize("reads", ["answer", "pair"])
def test_probability_of_the_label(tmp_path, decoder, reads):
    spec, model, tokenizer = save(tmp_path, decoder=decoder)
    judge = ClassifierJudge(ClassifierSpec(spec, "harmful", reads), token_budget=48)
    assert not reads_template(judge)
    for (question, answer), score in zip(PAIRS, judge(PAIRS, "{question}"), strict=True):
        texts = (question, answer) if reads == "pair" else (answer,)
        want = 100 * float(alone(model, tokenizer, *texts).softmax(-1)[1])
        assert score == JudgeScore(pytest.approx(want, abs=1e-3))
    assert len({round(s.value, 3) for s in judge(PAIRS)}) == 3
    assert judge([]) == []
    assert ClassifierJudge(ClassifierSpec(spec, "1", reads), 48)(PAIRS) == judge(PAIRS)  # by index


@pytest.mark.parametrize(("labels", "config"), [(1, {}), (3, {"problem_type": "multi_label_classification"})])
def test_one_label_or_several_at_once_are_sigmoids(tmp_path, labels, config):
    spec, model, tokenizer = save(tmp_path, labels, **config)
    judge = ClassifierJudge(ClassifierSpec(spec, None if labels == 1 else "harmless"), 512)
    for (_, answer), score in zip(PAIRS, judge(PAIRS), strict=True):
        assert score.value == pytest.approx(100 * float(alone(model, tokenizer, answer)[0].sigmoid()), abs=1e-3)


def test_long_answers_are_cut_and_say_so(tmp_path):
    spec, model, tokenizer = save(tmp_path)
    long = "the plan " * 100
    whole = len(tokenizer(long)["input_ids"])
    [score, empty] = ClassifierJudge(ClassifierSpec(spec, "harmful", max_tokens=512), 512)([("q", long), ("q", " ")])
    assert score.reason == f"only 64 of {whole} tokens were read"
    with torch.no_grad():
        ids = torch.tensor([tokenizer(long)["input_ids"][:64]])
        want = 100 * float(model(ids).logits[0].softmax(-1)[1])
    assert score.value == pytest.approx(want, abs=1e-3)
    assert empty == JudgeScore(None, reason="the answer is empty")


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "judge.label is not set; the classifier .* has the labels harmless, harmful, unsure"),
        ("harmfull", "has no such label; did you mean 'harmful'"),
        ("3", "judge.label is '3'"),
    ],
)
def test_labels_are_checked(tmp_path, label, message):
    spec, _, _ = save(tmp_path)
    with pytest.raises(ConfigError, match=message):
        ClassifierJudge(ClassifierSpec(spec, label), 512)


def test_models_that_are_no_classifier(tmp_path):
    plain = ModelSpec(str(save_tiny(tmp_path / "lm")), device="cpu")
    with pytest.raises(ModelError, match="is it a sequence classifier"):
        ClassifierJudge(ClassifierSpec(plain, "0"), 512)
    spec, _, _ = save(tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").rename(tmp_path / "bin" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"holds no \.safetensors weights"):
        ClassifierJudge(ClassifierSpec(spec, "harmful"), 512)
