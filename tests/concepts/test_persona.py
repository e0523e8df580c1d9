"""Persona vectors: arithmetic against plain NumPy and a plain Hugging Face loop, thresholds, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from curate.concepts.concept import check_fits, direction, load, save
from curate.concepts.persona import (
    Rollout,
    from_rollouts,
    mean_difference,
    rollout_requests,
    teacher_forced,
    with_scores,
)
from curate.concepts.trait import parse_trait
from curate.errors import ConceptError, ConfigError
from tests.tiny import tiny_model, tiny_tokenizer

QUESTIONS = [f"Question number {i}?" for i in range(6)]
TRAIT = parse_trait(
    {
        "name": "sycophantic",
        "instructions": [
            {"positive": "Always agree.", "negative": "Be frank."},
            {"positive": "Please the user.", "negative": "Be exact."},
        ],
        "extract_questions": QUESTIONS,
        "evaluate_questions": ["And this one?"],
        "contrastive_responses": [
            {"question": i, "positive": f"Yes, you are absolutely right {i}!", "negative": f"No, that is not so {i}."}
            for i in range(6)
        ],
    }
)
MODEL = {"name": "tiny", "digest": "ab"}


def planted(rows=5, d=16, strong=2, seed=0):
    """Activations that know the trait at one layer: `positive` examples are shifted along a fixed direction."""
    rng = np.random.default_rng(seed)
    axis = rng.normal(size=d)
    axis /= np.linalg.norm(axis)
    seen = []

    def fn(examples):
        seen.extend(examples)
        out = rng.normal(size=(len(examples), rows, d))
        for i, e in enumerate(examples):
            out[i, strong] += (6.0 if e.label == "positive" else -6.0) * axis
        return out.astype(np.float32)

    return fn, axis, seen


def test_mean_difference_is_the_difference_of_means():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(7, 3, 4)), rng.normal(size=(5, 3, 4))
    np.testing.assert_allclose(mean_difference(a, b), a.mean(0) - b.mean(0), rtol=1e-6, atol=1e-7)
    with pytest.raises(ConceptError, match="cannot be compared"):
        mean_difference(a, b[:, :2])
    with pytest.raises(ConceptError, match="7 positive and 0 negative"):
        mean_difference(a, b[:0])


def test_mean_difference_keeps_digits_that_float32_sums_lose():
    big = np.full((100_000, 1, 1), 16_777_216.0, dtype=np.float32)
    shifted = big.copy()
    shifted[::2] += 2
    assert mean_difference(shifted, big)[0, 0] == 1.0


def test_teacher_forced_finds_the_planted_direction_and_layer():
    fn, axis, seen = planted()
    c = teacher_forced(TRAIT, fn, MODEL)
    assert (c.name, c.layer, c.method, c.pooling) == ("sycophantic", 2, "persona.teacher_forced", "response_mean")
    assert direction(c) @ axis > 0.9
    profile = c.meta["profile"]
    assert profile[2]["auc"] == 1.0
    assert profile[2]["norm"] == pytest.approx(np.linalg.norm(c.vectors[2]), rel=1e-6)
    assert (c.meta["pairs"], c.meta["pairs_used"], c.meta["questions_used"]) == (6, 6, 6)
    assert [[m.role for m in e.messages] for e in seen] == [["user", "assistant"]] * 12
    assert seen[0].messages[0].content == QUESTIONS[0]
    check_fits(c, 4, 16, MODEL, [c.layer])


def test_instructions_are_put_before_the_question_only_on_demand():
    fn, _, seen = planted()
    teacher_forced(TRAIT, fn, MODEL, with_instruction=True)
    assert [e.messages[0].content for e in seen[:3]] == ["Always agree.", "Please the user.", "Always agree."]
    assert [e.messages[0].content for e in seen[6:9]] == ["Be frank.", "Be exact.", "Be frank."]


def test_teacher_forced_equals_a_plain_hugging_face_loop(tmp_path):
    model, tokenizer = tiny_model(layers=4), tiny_tokenizer()

    def activations(examples):
        rows = []
        for e in examples:
            turns = [{"role": m.role, "content": m.content} for m in e.messages]
            prompt = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, tokenize=False)
            head = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            body = tokenizer(e.response, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                hidden = model(torch.tensor([head + body]), output_hidden_states=True).hidden_states
            rows.append(torch.stack([h[0, len(head) :].mean(0) for h in hidden]).numpy())
        return np.stack(rows)

    c = teacher_forced(TRAIT, activations, MODEL)
    assert c.vectors.shape == (5, 32)
    expected = np.zeros((5, 32))
    for sign, side in ((1, "positive"), (-1, "negative")):
        for pair in TRAIT.contrastive_responses:
            text = "<|im_start|>system\nYou are a helpful tiny model.<|im_end|>\n<|im_start|>user\n"
            ids = tokenizer(
                text + QUESTIONS[pair.question] + "<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False
            )["input_ids"]
            answer = tokenizer(getattr(pair, side), add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                hidden = model(torch.tensor([ids + answer]), output_hidden_states=True).hidden_states
            expected += sign * torch.stack([h[0, len(ids) :].mean(0) for h in hidden]).double().numpy() / 6
    np.testing.assert_allclose(c.vectors, expected, rtol=1e-4, atol=1e-6)
    assert 1 <= c.layer <= 3
    assert load(save(c, str(tmp_path / "syc"))).meta == c.meta


def test_the_same_twice_is_the_same():
    one, two = (teacher_forced(TRAIT, planted()[0], MODEL) for _ in range(2))
    np.testing.assert_array_equal(one.vectors, two.vectors)
    assert (one.layer, one.meta) == (two.layer, two.meta)


def test_examples_without_activations_take_their_partner_with_them():
    fn, axis, _ = planted()

    def gappy(examples):
        out = fn(examples)
        out[0], out[7, 1, 3], out[:, 4] = np.nan, np.inf, np.nan  # pairs 0 and 1; layer 4 was not computed
        return out

    c = teacher_forced(TRAIT, gappy, MODEL)
    assert (c.meta["pairs_used"], c.meta["pairs_without_activations"]) == (4, 2)
    assert np.isnan(c.vectors[4]).all()
    assert c.layers() == [0, 1, 2, 3]
    assert direction(c, 2) @ axis > 0.9

    def empty(examples):
        return np.full((len(examples), 5, 16), np.nan)

    with pytest.raises(ConceptError, match="0 of 6 pairs have finite activations"):
        teacher_forced(TRAIT, empty, MODEL)


def test_one_question_gives_a_vector_but_no_held_out_figures():
    one = replace(TRAIT, contrastive_responses=tuple(replace(c, question=0) for c in TRAIT.contrastive_responses))
    c = teacher_forced(one, planted()[0], MODEL)
    assert c.layer == 2
    assert c.meta["profile"][2]["auc"] is None
    assert "nearest to the middle" in c.meta["recommended_because"]


def test_refusals():
    with pytest.raises(ConfigError, match="no contrastive_responses"):
        teacher_forced(replace(TRAIT, contrastive_responses=()), planted()[0], MODEL)
    with pytest.raises(ConfigError, match="no instructions; set with_instruction=false"):
        teacher_forced(replace(TRAIT, instructions=()), planted()[0], MODEL, with_instruction=True)
    with pytest.raises(ConceptError, match=r"shape \(3, 5, 16\), expected \[12, layers"):
        teacher_forced(TRAIT, lambda examples: np.ones((3, 5, 16)), MODEL)
    with pytest.raises(ConceptError, match="equal activations at every layer"):
        teacher_forced(TRAIT, lambda examples: np.ones((len(examples), 5, 16)), MODEL)


def test_rollout_requests():
    requests = rollout_requests(TRAIT, 3)
    assert len(requests) == 6 * 2 * 2 * 3
    assert len({r.id for r in requests}) == len(requests)
    first = requests[0]
    assert [(m.role, m.content) for m in first.messages] == [("system", "Always agree."), ("user", QUESTIONS[0])]
    assert (first.polarity, first.question, first.instruction, first.sample) == ("positive", 0, 0, 0)
    assert {r.question for r in rollout_requests(TRAIT, 1, "evaluate")} == {0}
    e = first.example("An answer.")
    assert (e.response, e.prompt, e.label) == ("An answer.", first.messages, "positive")
    assert [m.role for m in first.example("x", with_instruction=False).messages] == ["user", "assistant"]
    with pytest.raises(ConfigError, match="n_rollouts is 0"):
        rollout_requests(TRAIT, 0)
    with pytest.raises(ConfigError, match="no instructions"):
        rollout_requests(replace(TRAIT, instructions=()))


def rollouts(trait=(90.0, 10.0), coherence=90.0, n=2):
    high, low = trait
    made = [Rollout(r, f"answer {r.id}") for r in rollout_requests(TRAIT, n)]
    scores = [high if r.request.polarity == "positive" else low for r in made]
    return with_scores(made, scores, [coherence] * len(made))


def test_rollouts_make_the_planted_vector():
    fn, axis, seen = planted()
    c = from_rollouts(TRAIT, rollouts(), fn, MODEL)
    assert (c.layer, c.method, c.meta["pairs"], c.meta["pairs_used"]) == (2, "persona.rollouts", 24, 24)
    assert direction(c) @ axis > 0.95
    assert c.meta["questions_used"] == 6
    assert seen[0].messages[0].role == "system"
    fn, _, seen = planted()
    from_rollouts(TRAIT, rollouts(), fn, MODEL, with_instruction=False)
    assert {e.messages[0].role for e in seen} == {"user"}


def test_thresholds_are_those_of_the_paper():
    """Positive >= 50, negative < 50, coherence >= 50 on both sides; one bad side drops the pair."""
    made = rollouts(trait=(50.0, 49.9), coherence=50.0)
    edits = {
        ("positive", 0): {"trait": 49.9},
        ("negative", 1): {"trait": 50.0},
        ("positive", 2): {"coherence": 49.0},
        ("negative", 3): {"trait": None},
        ("positive", 4): {"response": "  "},
    }
    pairs = sorted({(r.request.question, r.request.instruction, r.request.sample) for r in made})
    for (polarity, index), change in edits.items():
        for i, r in enumerate(made):
            key = (r.request.question, r.request.instruction, r.request.sample)
            if (key, r.request.polarity) == (pairs[index], polarity):
                made[i] = replace(r, **change)
    lonely = next(r for r in made if r.request.polarity == "negative" and pairs.index(
        (r.request.question, r.request.instruction, r.request.sample)) == 5)  # fmt: skip
    made.remove(lonely)
    fn, _, seen = planted()
    c = from_rollouts(TRAIT, made, fn, MODEL)
    assert c.meta["dropped"] == {
        "coherence below 50": 1,
        "empty answer": 1,
        "negative answer not below 50": 1,
        "not scored": 1,
        "partner missing": 1,
        "positive answer below 50": 1,
    }
    assert (c.meta["pairs"], c.meta["pairs_used"], len(seen)) == (24, 18, 36)
    everything = from_rollouts(TRAIT, made, planted()[0], MODEL, judged=False)
    assert everything.meta["pairs_used"] == 22


def test_order_of_the_rollouts_does_not_matter():
    def by_text(examples):  # activations that depend on the example alone
        return np.stack([np.random.default_rng(abs(hash(e.id)) % 2**32).normal(size=(5, 16)) for e in examples])

    made = rollouts()
    one = from_rollouts(TRAIT, made, by_text, MODEL)
    two = from_rollouts(TRAIT, made[::-1], by_text, MODEL)
    np.testing.assert_array_equal(one.vectors, two.vectors)


def test_nothing_left_says_what_was_dropped():
    with pytest.raises(ConceptError, match=r"0 of 24 pairs .* 24 × positive answer below 50\. .*teacher_forced"):
        from_rollouts(TRAIT, rollouts(trait=(40.0, 10.0)), planted()[0], MODEL)
    unscored = [replace(r, trait=None) for r in rollouts()]
    with pytest.raises(ConceptError, match="24 × not scored"):
        from_rollouts(TRAIT, unscored, planted()[0], MODEL)
    with pytest.raises(ConceptError, match=r"0 of 0 pairs .* there were none"):
        from_rollouts(TRAIT, [], planted()[0], MODEL)
    made = rollouts()
    with pytest.raises(ConceptError, match="two rollouts for the request"):
        from_rollouts(TRAIT, [*made, made[0]], planted()[0], MODEL)
    with pytest.raises(ValueError, match="shorter"):
        with_scores(made, [1.0], [1.0])
