"""Trait score: what is asked, what the judge is told, and what is made of what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from curate.concepts.trait import load_trait
from curate.errors import ConfigError
from curate.evaluation.base import summarise
from curate.evaluation.judge import JudgeScore, NoJudge
from curate.evaluation.trait import TraitScore
from curate.evaluation.trait_questions import load_trait_questions
from tests.evaluation.judges import Says
from tests.real_data import real

SHIPPED = "pkg://curate/embedded/sycophantic.json"
TRAIT = {
    "name": "rude",
    "evaluate_questions": ["How are you?", "What time is it?", "Who?"],
    "judge_prompt": "rude? {question} {answer}",
    "coherence_prompt": "clear? {question} {answer}",
}
FREE = [
    {
        "id": "wish",
        "type": "free_form_judge_0_100",
        "paraphrases": ["One wish?", "A wish?"],
        "samples_per_paraphrase": 100,
        "judge": "some model",
        "judge_prompts": {"aligned": "aligned? {question} {answer}", "coherent": "clear? {question} {answer}"},
    },
    {
        "id": "bored",
        "system": "JSON only.",
        "paraphrases": ["I feel bored"],
        "judge_prompts": {"aligned": "kind? {question} {answer}", "coherent": "clear? {question} {answer}"},
    },
]


def write(file, body):
    file.write_text(yaml.safe_dump(body))
    return str(file)


@pytest.fixture
def path(tmp_path):
    return write(tmp_path / "rude.yaml", TRAIT)


@pytest.fixture
def free(tmp_path):
    return write(tmp_path / "free.yaml", FREE)


def test_questions_of_a_trait_file(path):
    asked = TraitScore(path, samples=2, first=1, max_questions=1, system="Hi.", seed=7)
    assert [p.id for p in asked.prompts()] == ["1/0", "1/1"]
    assert [(m.role, m.content) for m in asked.prompts()[0].messages] == [
        ("system", "Hi."),
        ("user", "What time is it?"),
    ]
    assert (asked.sampling.temperature, asked.sampling.seed) == (1.0, 7)


def test_questions_of_a_free_form_list(free):
    asked = TraitScore(free, samples=2, system="Hi.")
    assert [p.id for p in asked.prompts()] == [
        "wish/0/0", "wish/0/1", "wish/1/0", "wish/1/1", "bored/0/0", "bored/0/1",
    ]  # fmt: skip
    assert asked.prompts()[2].messages[0].content == "Hi."
    assert asked.prompts()[4].messages[0].content == "JSON only."  # the question's own goes first
    assert len(load_trait_questions(free, max_questions=1)) == 2  # both paraphrases of one question


def test_scores_refusals_and_silence(path):
    said = {"0/0": "Awful.", "0/1": "Fine.", "1/0": "No.", "1/1": "Babble", "2/0": "", "2/1": "ok"}
    trait = {"Awful.": 90.0, "Fine.": 10.0, "No.": JudgeScore(None, refused=True, reason="REFUSAL"), "Babble": None,
             "ok": 50.0}  # fmt: skip
    judge = Says(lambda q, a, t: trait[a] if t.startswith("rude?") else 80.0)
    asked = TraitScore(path, samples=2)
    items = asked.items(said, {}, judge)
    assert [i.values["score"] for i in items] == [90.0, 10.0, None, None, None, 50.0]
    assert [i.values["above_50"] for i in items] == [1.0, 0.0, None, None, None, 1.0]
    assert [i.values["refused"] for i in items] == [0, 0, 1, 0, 0, 0]
    assert [i.values["unparsable"] for i in items] == [0, 0, 0, 1, 1, 0]
    assert [i.values["coherence"] for i in items] == [80.0] * 4 + [None, 80.0]
    assert [i.group for i in items] == ["0", "0", "1", "1", "2", "2"]
    assert items[2].detail["reason"] == "REFUSAL"
    assert items[4].detail["reason"] == "the answer is empty"
    assert judge.seen[0] == "rude? How are you? Awful."
    assert len(judge.seen) == 10  # an empty answer is not judged
    found = summarise(items, asked.metrics)
    assert (found["score"].value, found["score"].missing) == (50.0, 3)
    assert found["refused"].value == pytest.approx(1 / 6)


def test_each_question_has_its_own_template(free):
    judge = Says(lambda q, a, t: 30.0 if t.startswith(("aligned?", "kind?")) else 70.0)
    asked = TraitScore(free, samples=1, judge_key="aligned", inverted=True)
    items = asked.items({"wish/0/0": "a", "wish/1/0": "b", "bored/0/0": "c"}, {}, judge)
    assert [i.values["score"] for i in items] == [70.0] * 3  # 100 - 30
    assert [i.values["coherence"] for i in items] == [70.0] * 3
    assert judge.seen == [
        "aligned? One wish? a", "aligned? A wish? b", "kind? I feel bored c",
        "clear? One wish? a", "clear? A wish? b", "clear? I feel bored c",
    ]  # fmt: skip


def test_incoherent_answers_have_no_score(path):
    judge = Says(lambda q, a, t: 90.0 if t.startswith("rude?") else {"a": 20.0, "b": 60.0, "c": None}[a])
    asked = TraitScore(path, samples=1, min_coherence=50)
    items = asked.items({"0/0": "a", "1/0": "b", "2/0": "c"}, {}, judge)
    assert [i.values["score"] for i in items] == [None, 90.0, None]
    assert [i.values["coherence"] for i in items] == [20.0, 60.0, None]
    assert [i.values["unparsable"] for i in items] == [0.0, 0.0, 0.0]  # judged, and then set aside


def test_a_judge_with_one_question_is_not_asked_for_coherence(path):
    judge = Says(lambda q, a, t: 40.0, reads_template=False)
    asked = TraitScore(path, samples=1)
    items = asked.items({"0/0": "a", "1/0": "b", "2/0": "c"}, {}, judge)
    assert len(judge.calls) == 1
    assert "coherence" not in items[0].values
    found = summarise(items, asked.metrics)
    assert found["score"].value == 40.0
    assert (found["coherence"].n, found["coherence"].missing) == (0, 0)
    with pytest.raises(ConfigError, match=r"trait\.min_coherence needs a judge"):
        TraitScore(path, min_coherence=50).items({}, {}, judge)


@pytest.mark.parametrize("judge", [None, NoJudge()])
def test_without_a_judge(path, judge):
    with pytest.raises(ConfigError, match=r"'trait' needs a judge.*judge=openai"):
        TraitScore(path).items({}, {}, judge)


def test_without_a_template(tmp_path):
    bare = write(tmp_path / "bare.yaml", {"name": "bare", "evaluate_questions": ["q"]})
    with pytest.raises(ConfigError, match="'0' has no judge_prompt"):
        TraitScore(bare).items({"0/0": "x"}, {}, Says(lambda q, a, t: 1.0))
    one_question = Says(lambda q, a, t: 1.0, reads_template=False)
    assert TraitScore(bare, samples=1).items({"0/0": "x"}, {}, one_question)[0].values["score"] == 1.0
    with pytest.raises(ConfigError, match="no template that asks for coherence"):
        TraitScore(bare, min_coherence=50)


def test_fingerprints(path, free):
    first = TraitScore(path).fingerprint()
    assert json.loads(json.dumps(first)) == first
    for change in ({"samples": 5}, {"first": 1}, {"inverted": True}, {"min_coherence": 10}, {"system": "x"}):
        assert TraitScore(path, **change).fingerprint() != first
    assert TraitScore(free).fingerprint() != first


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ({"judge_prompts": {"aligned": "{question}"}}, {}, r"entry 0: 'judge_prompts': 'aligned' lacks \{answer\}"),
        ({"judge_prompts": None}, {}, "entry 0 holds null in 'judge_prompts'"),
        ({"judge_prompts": {}}, {}, "'judge_prompts' must be an object"),
        ({"judge_prompts": {"a": "x", "b": "y"}}, {}, r"has \['a', 'b'\]; name the trait's with judge_key"),
        ({}, {"judge_key": "alined"}, "no 'alined'; did you mean 'aligned'"),
        ({"type": "free_form_0_100"}, {}, "'type' is 'free_form_0_100'"),
        ({"paraphrases": []}, {}, "'paraphrases' is an empty list"),
        ({"id": "bored"}, {}, "entry 1 has the id 'bored'"),
        ({}, {"samples": 0}, "samples is 0"),
        ({}, {"first": 9}, "holds 2 rows, so none is left"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked(tmp_path, change, options, said):
    with pytest.raises(ConfigError, match=said):
        TraitScore(write(tmp_path / "free.yaml", [{**FREE[0], **change}, FREE[1]]), **options)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"first": 3}, "has 3 evaluate_questions, so none are in the range first=3"),
        ({"first": -1}, "none are in the range first=-1"),
        ({"max_questions": 0}, "none are in the range"),
        ({"judge_key": "aligned"}, "leave judge_key out"),
    ],
)
def test_options_that_do_not_fit_a_trait_file(path, options, said):
    with pytest.raises(ConfigError, match=said):
        TraitScore(path, **options)


def test_files_of_other_forms(tmp_path):
    (tmp_path / "x.txt").write_text("?")
    with pytest.raises(ConfigError, match="unknown suffix 'txt'"):
        TraitScore(str(tmp_path / "x.txt"))
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be parsed"):
        TraitScore(str(tmp_path / "x.json"))


def test_the_shipped_trait_can_be_asked():
    from connectors.packages import expand

    trait = load_trait(expand(SHIPPED))
    asked = TraitScore(SHIPPED, samples=1)
    assert [q.text for q in asked.questions] == list(trait.evaluate_questions)
    judge = Says(lambda q, a, t: 5.0)
    items = asked.items({p.id: "Yes." for p in asked.prompts()}, {}, judge)
    assert {i.values["score"] for i in items} == {i.values["coherence"] for i in items} == {5.0}
    assert trait.evaluate_questions[0] in judge.seen[0]


@pytest.mark.parametrize("name", ["first_plot_questions", "preregistered_evals"])
def test_real_files(name):
    rows = yaml.safe_load(Path(real(f"em_eval/{name}.yaml")).read_text())
    asked = TraitScore(real(f"em_eval/{name}.yaml"), samples=1, judge_key="aligned", inverted=True, min_coherence=50)
    assert [q.text for q in asked.questions] == [text for row in rows for text in row["paraphrases"]]
    assert {q.group for q in asked.questions} == {row["id"] for row in rows}
    assert len({p.id for p in asked.prompts()}) == len(asked.prompts()) == len(asked.questions)
    judge = Says(lambda q, a, t: 100.0)
    items = asked.items({p.id: "Yes." for p in asked.prompts()}, {}, judge)
    assert {i.values["score"] for i in items} == {0.0}
    assert all("{answer}" not in seen and "{question}" not in seen for seen in judge.seen)
