"""The judge's key stays where it was given: not in errors, reasons, cached answers or recipes, whatever servers say."""

from __future__ import annotations

import json
import logging

import pytest

from curate.errors import ConfigError
from curate.evaluation.openai_judge import OpenAIJudge
from tests.evaluation.server import Reply, completion, serve

KEY = "sk-canary-0123456789abcdef"
GOOD = completion([("50", {"50": 1.0})])


def judge(url: str, tmp_path, monkeypatch, **settings) -> OpenAIJudge:
    monkeypatch.setenv("CANARY_KEY", KEY)
    cache = str(tmp_path / "cache")
    return OpenAIJudge("m", url, api_key_env="CANARY_KEY", attempts=1, backoff=0.0, cache_url=cache, **settings)


@pytest.mark.parametrize(
    "reply",
    [
        Reply({"error": {"message": f"Incorrect API key provided: {KEY}"}}, 401),
        Reply({"error": {"message": f"the key {KEY} may not"}}, 403),
        Reply({"error": {"message": f"Bearer {KEY} knows no such model"}}, 404),
        Reply({"error": {"message": f"authorization: Bearer {KEY}"}}, 400),
        Reply({"error": {"message": f"{'x' * 140} {KEY}"}}, 500),
        Reply(f"<html>{'y' * 130} {KEY}</html>".encode()),
        Reply(completion([("x", {"x": 1.0})], text=f"You said {KEY}")),
        Reply({"choices": [{"message": {"content": f"key {KEY}"}}]}),
    ],
    ids=lambda r: str(r.status) if isinstance(r.body, bytes) or "error" in r.body else "answer",
)
def test_a_server_that_repeats_the_key(reply, tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.DEBUG, logger="curate")
    with serve(lambda body, n: reply) as endpoint:
        asked = judge(endpoint.url, tmp_path, monkeypatch)
        try:
            told = repr(asked.score([("q", "a")], "{question} {answer}"))
        except ConfigError as e:
            told = str(e)
        assert endpoint.requests[0][0]["authorization"] == f"Bearer {KEY}"  # it was sent, and there alone it is
    written = "".join(p.read_text() for p in tmp_path.rglob("*") if p.is_file())
    for text in (told, caplog.text, written, json.dumps(asked.fingerprint())):
        assert "sk-canary" not in text


@pytest.mark.parametrize(
    "url",
    ["http://me:sk-canary@host/v1", "htp://me:sk-canary@host/v1", "https://host/v1?api-key=sk-canary", "sk-canary"],
)
def test_a_secret_in_the_address_is_refused(url, tmp_path, monkeypatch):
    with pytest.raises(ConfigError) as e:
        judge(url, tmp_path, monkeypatch)
    assert "judge.base_url" in str(e.value)
    assert "sk-canary" not in str(e.value) or url == "sk-canary"  # a word alone may be anything


def test_what_it_says_is_otherwise_as_it_was(tmp_path, monkeypatch):
    with serve(lambda body, n: GOOD) as endpoint:
        (found,) = judge(endpoint.url, tmp_path, monkeypatch).score([("q", "a")], "{question} {answer}")
    assert found.value == 50.0
