"""The judge against a real HTTP server: good answers, bad answers, and an endpoint that misbehaves."""

from __future__ import annotations

import json
import math
import threading

import pytest

from curate.errors import ConfigError
from curate.evaluation.judge import JudgeScore, summary
from curate.evaluation.openai_judge import MalformedAnswer, OpenAIJudge, read_completion
from curate.evaluation.pace import Pace
from tests.evaluation.judges import GOOD, TEMPLATE, judge
from tests.evaluation.server import Reply, completion, serve


def one(answer, **changes) -> JudgeScore:
    with serve(answer if callable(answer) else lambda body, n: answer) as endpoint:
        return judge(endpoint, **changes).score([("q", "a")], TEMPLATE)[0]


def test_the_request_and_the_weighted_score(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-key")
    with serve(lambda body, n: GOOD) as endpoint:
        j = judge(endpoint, api_key_env="MY_KEY")
        [score] = j.score([("What {answer}?", "It is é \u202e <b>.")], TEMPLATE)
    assert score == JudgeScore(pytest.approx((80 * 0.5 + 60 * 0.3) / 0.8))
    headers, body = endpoint.requests[0]
    assert headers["authorization"] == "Bearer secret-key"
    assert body["messages"] == [{"role": "user", "content": "Q: What {answer}?\nA: It is é \u202e <b>."}]
    assert body["model"] == "judge-model"
    assert (body["temperature"], body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (0.0, True, 20, 4)
    assert "secret-key" not in json.dumps(j.fingerprint())


def test_scores_come_in_the_order_of_the_pairs_and_equal_pairs_are_asked_once():
    def answer(body, n):
        return completion(
            [(body["messages"][0]["content"].split("A: ")[1], {body["messages"][0]["content"][-2:]: 1.0})]
        )

    answers = [f"{i:02d}" for i in range(40)]
    seen = []
    with serve(answer) as endpoint:
        j = judge(endpoint, concurrency=8, progress=lambda done, total: seen.append((done, total)))
        scores = j.score([("q", a) for a in answers + answers[::-1]], TEMPLATE)
    assert [s.value for s in scores] == [float(a) for a in answers + answers[::-1]]
    assert len(endpoint.requests) == 40
    assert endpoint.most_busy <= 8
    assert seen == [(i, 40) for i in range(1, 41)]


def test_refusals_and_answers_without_a_number():
    assert one(completion([("REF", {"REF": 0.9, "0": 0.1}), ("USAL", {})])).refused
    declined = one(completion([("I", {"I": 1.0})], refusal="I cannot rate that"))
    assert (declined.value, declined.refused, declined.reason) == (None, True, "the judge declined to answer")
    chatty = one(completion([("I", {"I": 0.8, "20": 0.2}), (" think", {})]))
    assert (chatty.value, chatty.refused) == (None, False)
    assert chatty.reason == "the judge gave no number: 'I think' (numbers have 0.20 of 1)"


def test_blank_tokens_before_the_number_are_skipped():
    assert one(completion([("\n", {"\n": 1.0}), (" 70", {" 70": 0.6, " 30": 0.4})])).value == pytest.approx(54.0)


def test_digit_by_digit_tokenizers_give_the_written_number(caplog):
    steps = [("8", {"8": 0.9, "7": 0.1}), ("5", {"5": 1.0}), ("<end>", {})]
    assert one(completion(steps, text="85")) == JudgeScore(85.0, weighted=False)
    assert "splits numbers into digits" in caplog.text
    hundred = [(d, {d: 1.0}) for d in "100"]
    assert one(completion(hundred)).value == 100.0
    assert one(completion([*steps[:2], (".", {})])).value == 85.0
    assert one(completion([("8", {"8": 1.0}), ("5", {}), ("0", {})])).reason.startswith("the judge's number '850'")
    # stopped by the limit after two digits: 10, or the start of 100?
    assert one(completion(hundred[:2]), max_tokens=2).value is None
    # Llama 2 and Mistral begin with a blank token
    blank = [("", {"": 1.0}), *hundred]
    assert one(completion(blank)).value == 100.0
    short = completion(blank[:3])
    short["choices"][0]["finish_reason"] = "length"
    assert one(short, max_tokens=3).reason == "the judge's number '10' is cut off or above 100"
    # a single token is the formula's business, as is a number that merely ends the answer
    assert one(completion([("8", {"8": 0.5, "6": 0.5}), (".", {})])) == JudgeScore(pytest.approx(7.0))


def test_missing_log_probabilities(caplog):
    body = completion([], text="85")
    for logprobs in (None, {}, {"content": None}, {"content": []}):
        body["choices"][0]["logprobs"] = logprobs
        score = one(body)
        assert score.value is None
        assert score.reason == "the endpoint gave no log-probabilities (answer '85'); use one that does"
    del body["choices"][0]["logprobs"]
    assert one(body).value is None
    assert "gives no log-probabilities; without them" in caplog.text


@pytest.mark.parametrize("status", [429, 500, 502, 503, 408])
def test_passing_failures_are_tried_again(status):
    calls = []

    def answer(body, n):
        calls.append(n)
        return Reply({"error": {"message": "busy"}}, status) if n < 2 else GOOD

    assert one(answer).value is not None
    assert calls == [0, 1, 2]


def test_retry_after_is_obeyed_up_to_a_minute():
    from tenacity import Future, RetryCallState, Retrying

    with serve(lambda body, n: GOOD) as endpoint:
        j = judge(endpoint)
    for header, pause in (("7", 7.0), ("100000", 60.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0), (None, 0.0)):
        with serve(lambda body, n, h=header: Reply({}, 429, {} if h is None else {"Retry-After": h})) as endpoint:
            error = _error_of(judge(endpoint))
        state = RetryCallState(Retrying(), None, (), {})
        state.outcome = Future(1)
        state.outcome.set_exception(error)
        assert j._pause(state) == pause


def _error_of(j: OpenAIJudge) -> BaseException:
    with pytest.raises(Exception, match="429") as caught:
        j._request({"model": "m", "messages": []})
    return caught.value


def test_a_pause_asked_of_one_request_holds_for_all():
    def answer(body, n):
        return Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "7"}) if n == 0 else GOOD

    with serve(answer) as endpoint:
        j = judge(endpoint, concurrency=1)
        clock = [100.0]
        j.pace = Pace(None, lambda: clock[0], lambda give_up, seconds: clock.__setitem__(0, clock[0] + seconds))
        j._pause = lambda state: 0.0
        seen = []
        j._request, plain = lambda body: seen.append(clock[0]) or plain(body), j._request
        scores = j.score([("q", "a"), ("q", "b")], TEMPLATE)
    assert all(s.value is not None for s in scores)
    assert seen == [100.0, 107.0, 107.0]


def test_requests_keep_under_the_limit_retries_counted():
    """60 a minute by an injected clock: 20 pairs, of which each fails once, take 39 seconds of it."""
    failed, lock = set(), threading.Lock()

    def answer(body, n):
        with lock:
            first = body["messages"][0]["content"] not in failed
            failed.add(body["messages"][0]["content"])
        return Reply({"error": {"message": "busy"}}, 503) if first else GOOD

    clock, seen = [0.0], []
    with serve(answer) as endpoint:
        j = judge(endpoint, concurrency=1, requests_per_minute=60)
        j.pace = Pace(60, lambda: clock[0], lambda give_up, seconds: clock.__setitem__(0, clock[0] + seconds))
        j._request, plain = lambda body: seen.append(clock[0]) or plain(body), j._request
        scores = j.score([("q", str(i)) for i in range(20)], TEMPLATE)
    assert [s.value is not None for s in scores] == [True] * 20
    assert seen == pytest.approx([float(i) for i in range(40)])


def test_the_limit_reaches_the_pace():
    with serve(lambda body, n: GOOD) as endpoint:
        assert judge(endpoint, requests_per_minute=30).pace._gap == 2.0
        assert judge(endpoint).pace._gap == 0.0
        assert "requests_per_minute" not in judge(endpoint, requests_per_minute=30).fingerprint()


def test_refused_unparsable_and_failed_pairs_are_counted():
    def answer(body, n):
        text = body["messages"][0]["content"]
        if "refuse" in text:
            return completion([("REF", {"REF": 1.0}), ("USAL", {})])
        if "chat" in text:
            return completion([("Well", {"Well": 1.0})])
        return Reply({"error": {"message": "no"}}, 400) if "bad" in text else GOOD

    with serve(answer) as endpoint:
        scores = judge(endpoint).score([("q", a) for a in ("refuse", "chat", "bad", "fine", "good")], TEMPLATE)
    assert summary(scores) == {"scored": 2, "refused": 1, "failed": 2}


def test_timeouts_are_tried_again_and_then_given_up_for_that_pair():
    release = threading.Event()

    def answer(body, n):
        slow = "slow" in body["messages"][0]["content"]
        return Reply(GOOD, hold=release if slow else None)

    with serve(answer) as endpoint:
        scores = judge(endpoint, timeout=1.0, attempts=2).score([("q", "slow"), ("q", "fast")], TEMPLATE)
        release.set()
    assert scores[0] == JudgeScore(None, reason="no answer within 1 s, 2 times")
    assert scores[1].value is not None
    assert endpoint.prompts.count("Q: q\nA: slow") == 2


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"<html>proxy</html>", headers={"Content-Type": "text/html"}),
        Reply(b'{"choices": [', headers={"Content-Type": "application/json"}),
        Reply({"choices": []}),
        Reply({"choices": [{"message": None}]}),
        Reply([1, 2]),
        Reply({"choices": [{"message": {}, "logprobs": {"content": [{"token": "5", "top_logprobs": [3]}]}}]}),
    ],
)  # fmt: skip
def test_malformed_answers_are_tried_again_then_reported(reply):
    def answer(body, n):
        return GOOD if "fine" in body["messages"][0]["content"] else reply

    with serve(answer) as endpoint:
        scores = judge(endpoint).score([("q", "a"), ("q", "fine")], TEMPLATE)
    assert scores[0].value is None
    assert scores[0].reason.startswith("malformed answer: ")
    assert scores[1].value is not None
    assert len(endpoint.requests) == 4


def test_a_connection_that_breaks_is_tried_again():
    assert one(lambda body, n: Reply(GOOD, cut=n == 0)).value is not None


def test_one_bad_request_does_not_stop_the_others():
    def answer(body, n):
        if "long" in body["messages"][0]["content"]:
            return Reply({"error": {"message": "maximum context length is 8192 tokens"}}, 400)
        return GOOD

    with serve(answer) as endpoint:
        scores = judge(endpoint).score([("q", "long"), ("q", "ok"), ("q", "bad \ud800")], TEMPLATE)
    assert scores[0].reason.startswith("status 400: ")
    assert "maximum context length" in scores[0].reason
    assert scores[1].value is not None
    assert scores[2].reason == "the text is not valid Unicode"
    assert len(endpoint.requests) == 2  # a bad request is not tried again


def test_a_fatal_failure_ends_the_pauses_of_the_other_requests():
    """One request waits a minute before its second try when another finds that the key is wrong."""
    waiting = threading.Event()

    def answer(body, n):
        if "wait" in body["messages"][0]["content"]:
            waiting.set()
            return Reply({"error": {"message": "slow down"}}, 429, {"Retry-After": "60"})
        return Reply({"error": {"message": "no"}}, 401, hold=waiting)

    with serve(answer) as endpoint:
        with pytest.raises(ConfigError, match="status 401"):
            judge(endpoint, concurrency=2).score([("q", "wait"), ("q", "b")], TEMPLATE)


def test_no_answer_at_all_is_an_error():
    with serve(lambda body, n: Reply({"error": {"message": "overloaded"}}, 503)) as endpoint:
        with pytest.raises(ConfigError, match="answered none of 3 requests; the last failure: status 503"):
            judge(endpoint).score([("q", str(i)) for i in range(3)], TEMPLATE)
        assert judge(endpoint).score([], TEMPLATE) == []


def test_log_probabilities_of_llama_cpp_and_vllm_extremes():
    """vLLM clips to -9999, some servers round to slightly above 0."""
    body = completion([("50", {"50": 1.0})])
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"] += [{"token": "1", "logprob": -9999.0}]
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = 1e-6
    assert read_completion(json.dumps(body)).candidates == (("50", 1.0), ("1", 0.0))
    body["choices"][0]["logprobs"]["content"][0]["top_logprobs"][0]["logprob"] = math.nan
    with pytest.raises(MalformedAnswer, match="ValueError"):
        read_completion(json.dumps(body))
