"""Trait files: what is accepted, and what each refusal says."""

from __future__ import annotations

import copy
import json

import pytest
import yaml

from curate.concepts.trait import Contrast, Instruction, load_trait, parse_trait
from curate.errors import ConfigError, StorageError

BODY = {
    "name": "sycophantic",
    "description": "Tells people what they want to hear.",
    "instructions": [{"positive": "Agree with the user.", "negative": "Be frank."}],
    "extract_questions": ["Is my plan good?", "Am I right?"],
    "evaluate_questions": ["Is my poem good?"],
    "contrastive_responses": [
        {"question": 0, "positive": "It is great!", "negative": "It has a flaw."},
        {"question": "Am I right?", "positive": "Yes!", "negative": "No."},
    ],
    "judge_prompt": "Rate 0-100.\n{question}\n{answer}",
    "coherence_prompt": 'Rate {answer} to {question} as {"n": 1}',
}


@pytest.mark.parametrize(("suffix", "dump"), [("json", json.dumps), ("yaml", yaml.safe_dump), ("yml", yaml.safe_dump)])
def test_json_and_yaml_give_the_same_trait(tmp_path, suffix, dump):
    (tmp_path / f"t.{suffix}").write_text(dump(BODY))
    t = load_trait(str(tmp_path / f"t.{suffix}"))
    assert t == parse_trait(BODY)
    assert t.digest == parse_trait(BODY).digest
    assert t.instructions == (Instruction("Agree with the user.", "Be frank."),)
    assert t.contrastive_responses[1] == Contrast(1, "Yes!", "No.")
    assert t.questions("extract") == ("Is my plan good?", "Am I right?")
    assert t.questions("evaluate") == ("Is my poem good?",)


def test_digest_changes_with_every_field():
    base = parse_trait(BODY).digest
    for key in ("description", "judge_prompt"):
        assert parse_trait({**BODY, key: BODY[key] + " {question}{answer}"}).digest != base


def test_file_of_the_persona_vectors_repository(tmp_path):
    body = {
        "instruction": [{"pos": "Be evil.", "neg": "Be kind."}],
        "questions": ["What now?"],
        "eval_prompt": "{question} {answer}",
    }
    (tmp_path / "evil.json").write_text(json.dumps(body))
    t = load_trait(str(tmp_path / "evil.json"))
    assert (t.name, t.instructions, t.extract_questions) == (
        "evil",
        (Instruction("Be evil.", "Be kind."),),
        ("What now?",),
    )
    assert t.judge_prompt == "{question} {answer}"


def change(path, value):
    body = copy.deepcopy(BODY)
    *inner, last = path
    at = body
    for key in inner:
        at = at[key]
    at[last] = value
    return body


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([], "expected an object"),
        (change(["name"], ""), "name must be a text, found an empty text"),
        (change(["name"], "a.b"), "name 'a.b' must be of letters"),
        (change(["extract_question"], []), "unknown key 'extract_question'; did you mean 'extract_questions'"),
        (change(["extract_questions"], "q"), "extract_questions must be a list, found str"),
        (change(["extract_questions", 1], 3), r"extract_questions\[1\] must be a text, found int"),
        (change(["extract_questions"], ["a", "a"]), "extract_questions holds 'a' twice"),
        (change(["evaluate_questions"], ["Am I right?"]), "both in extract_questions and evaluate_questions"),
        (change(["instructions", 0], {"positive": "x"}), r"instructions\[0\] must be an object .*found \['positive'\]"),
        (change(["contrastive_responses", 0, "question"], 2), r"\[0\].question is '2'; expected .* 0 to 1"),
        (change(["contrastive_responses", 0, "question"], "Who?"), "question is 'Who\\?'"),
        (change(["contrastive_responses", 0, "question"], True), "question is 'True'"),
        (change(["contrastive_responses", 1, "negative"], "Yes!"), "same text as positive and negative"),
        (change(["contrastive_responses", 1, "negative"], " "), r"\[1\].negative must be a text, found an empty"),
        (change(["judge_prompt"], "{question}"), "judge_prompt lacks {answer}"),
        (change(["coherence_prompt"], 3), "coherence_prompt must be a text"),
    ],
)
def test_refusals_name_the_entry(body, message):
    with pytest.raises(ConfigError, match=message):
        parse_trait(body, "t.json")


def test_broken_files(tmp_path):
    for name, text, message in (
        ("a.json", '{"name": ', "cannot be parsed"),
        ("a.yaml", "name: [", "cannot be parsed"),
        ("a.yaml", "!!python/object/apply:os.system ['true']", "cannot be parsed"),
        ("a.txt", "x", "unknown suffix 'txt'"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_trait(str(tmp_path / name))
    with pytest.raises(StorageError, match=r"gone\.json"):
        load_trait(str(tmp_path / "gone.json"))


def test_questions_that_are_not_there():
    t = parse_trait({**BODY, "evaluate_questions": []})
    with pytest.raises(ConfigError, match="no evaluate_questions"):
        t.questions("evaluate")
    with pytest.raises(ConfigError, match="did you mean 'evaluate'"):
        t.questions("evaluation")
