"""The judge's settings, its cache, and what is wrong from the first request on."""

from __future__ import annotations

import logging
import socket

import pytest

from curate.errors import ConfigError, StorageError
from curate.evaluation.judge import check_ready
from curate.evaluation.openai_judge import OpenAIJudge
from tests.evaluation.judges import GOOD, TEMPLATE, Says, judge
from tests.evaluation.server import Reply, completion, serve


def test_answers_without_log_probabilities_are_not_kept(tmp_path):
    bare = completion([], text="85")
    with serve(lambda body, n: bare if n == 0 else GOOD) as endpoint:
        j = judge(endpoint, cache_url=str(tmp_path))
        assert j.score([("q", "a")], TEMPLATE)[0].value is None
        assert j.score([("q", "a")], TEMPLATE)[0].value is not None  # the server has been set right


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the key in OPENAI_API_KEY \(status 401\)"),
        (403, r"refuses the key in OPENAI_API_KEY \(status 403\)"),
        (404, "does not know the model 'judge-model' or the path"),
    ],
)
def test_wrong_settings_stop_the_call_at_once(status, message):
    with serve(lambda body, n: Reply({"error": {"message": "no"}}, status)) as endpoint:
        with pytest.raises(ConfigError, match=message):
            judge(endpoint, concurrency=2).score([("q", str(i)) for i in range(50)], TEMPLATE)
    assert len(endpoint.requests) < 10


def test_wrong_path_says_so():
    with serve(lambda body, n: GOOD) as endpoint:
        with pytest.raises(ConfigError, match=r"judge\.base_url ends in /v1"):
            judge(endpoint, base_url=endpoint.url.removesuffix("/v1")).score([("q", "a")], TEMPLATE)


def test_nobody_listening():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{s.getsockname()[1]}/v1"
        j = OpenAIJudge("m", base_url=url, attempts=2, backoff=0.0)
        with pytest.raises(ConfigError, match=rf"the judge at {url} cannot be reached .*Check judge.base_url"):
            j.score([("q", str(i)) for i in range(5)], TEMPLATE)


def test_cache_asks_only_for_what_is_missing(tmp_path):
    cache = str(tmp_path / "cache")
    fail = {"b"}

    def answer(body, n):
        if body["messages"][0]["content"][-1] in fail:
            return Reply({"error": {"message": "no"}}, 500)
        return GOOD

    pairs = [("q", "a"), ("q", "b"), ("q", "c")]
    with serve(answer) as endpoint:
        first = judge(endpoint, cache_url=cache).score(pairs, TEMPLATE)
        assert [s.value is None for s in first] == [False, True, False]
        fail.clear()
        asked = len(endpoint.requests)
        second = judge(endpoint, cache_url=cache).score(pairs, TEMPLATE)
        assert endpoint.prompts[asked:] == ["Q: q\nA: b"]  # failures are not kept
        assert (second[0], second[2]) == (first[0], first[2])
        asked = len(endpoint.requests)
        judge(endpoint, cache_url=cache).score(pairs, TEMPLATE)
        assert len(endpoint.requests) == asked
        judge(endpoint, cache_url=cache, top_logprobs=5).score(pairs[:1], TEMPLATE)
        assert len(endpoint.requests) == asked + 1  # other settings, another answer


def test_broken_cache_files_are_asked_again(tmp_path, caplog):
    with serve(lambda body, n: GOOD) as endpoint:
        j = judge(endpoint, cache_url=str(tmp_path))
        expected = j.score([("q", "a")], TEMPLATE)
        [file] = [p for p in tmp_path.rglob("*.json")]
        for content in ("{", '{"text": 1}', "[]"):
            file.write_text(content)
            assert j.score([("q", "a")], TEMPLATE) == expected
    assert len(endpoint.requests) == 4
    assert "asking again" in caplog.text


def test_unwritable_cache_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with serve(lambda body, n: GOOD) as endpoint, pytest.raises(StorageError, match="file"):
        judge(endpoint, cache_url=str(tmp_path / "file")).score([("q", "a")], TEMPLATE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "the judge needs a key: set the environment variable OPENAI_API_KEY"),
        ({"api_key_env": "OTHER"}, "environment variable OTHER"),
        ({"base_url": "localhost:8000"}, r"expected http\(s\)://host"),
        ({"base_url": "http://me:pw@localhost/v1"}, "holds a password"),
        ({"top_logprobs": 21}, "judge.top_logprobs is 21; it must be from 1 to 20"),
        ({"max_tokens": 0}, "judge.max_tokens is 0"),
        ({"concurrency": 0}, "judge.concurrency is 0"),
        ({"timeout": 0}, "judge.timeout is 0"),
        ({"model": ""}, "judge.model is empty"),
        ({"requests_per_minute": 0}, "judge.requests_per_minute is 0; it must be more than 0, or null"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        OpenAIJudge(**{"model": "m", **settings})
    assert "pw" not in str(caught.value)


def test_empty_template_is_refused():
    with serve(lambda body, n: GOOD) as endpoint, pytest.raises(ConfigError, match="has no judge prompt"):
        judge(endpoint).score([("q", "a")], "")


def test_the_key_is_never_logged(monkeypatch, caplog):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serve(lambda body, n: Reply({"error": {"message": "no"}}, 401)) as endpoint:
        with pytest.raises(ConfigError) as caught:
            judge(endpoint).score([("q", "a")], TEMPLATE)
    assert "sk-very-secret" not in str(caught.value) + caplog.text


def test_a_judge_is_ready_or_says_why_not(tmp_path):
    with serve(lambda body, n: GOOD) as endpoint:
        j = judge(endpoint, cache_url=str(tmp_path))
        check_ready(j)
        check_ready(j)
    assert len(endpoint.requests) == 2  # an answer that is cached says nothing of today's key
    assert not list(tmp_path.rglob("*.json"))
    check_ready(None)
    check_ready(Says(lambda question, answer, template: 50.0))


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (Reply({"error": {"message": "no"}}, 401), r"refuses the key in OPENAI_API_KEY \(status 401\)"),
        (Reply({"error": {"message": "no"}}, 404), "does not know the model 'judge-model'"),
        (Reply({"error": {"message": "busy"}}, 503), r"\(model 'judge-model'\) does not answer: status 503: .*busy"),
        (completion([], text="50"), "gives no log-probabilities"),
    ],
)
def test_what_is_wrong_is_said_before_the_work(reply, message):
    with serve(lambda body, n: reply) as endpoint, pytest.raises(ConfigError, match=message):
        check_ready(judge(endpoint))
