"""A judge behind any OpenAI-compatible chat endpoint that gives log-probabilities (OpenAI, vLLM, llama.cpp, …).

In: an endpoint, a model name and pairs to score. Out: JudgeScores by the weighted formula of
`curate.evaluation.judge`. Knows nothing of traits. The answer is read at its first visible token, temperature 0.

Requests start at most `requests_per_minute` times a minute, retries counted, evenly spaced. Failures: 429, 5xx,
timeouts and malformed answers are tried again with growing pauses (a server's Retry-After is obeyed up to a minute, by
all requests and not only by the one that was told); a pair that still fails, or that the endpoint refuses as a bad
request, gets no value and the reason, and its neighbours go on. A wrong key, model or address fails at once, naming
it; so does a call in which not a single pair was answered. Answers are cached as they come, so that calling again asks
only for what is missing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

import openai
from tenacity import RetryCallState, Retrying, retry_if_exception, wait_random_exponential
from tenacity.nap import sleep_using_event
from tenacity.stop import stop_after_attempt, stop_when_event_set

from connectors.redaction import shown
from curate.errors import ConfigError
from curate.evaluation.judge import JudgeScore, fill, not_unicode, parse_number, score_of, short
from curate.evaluation.judge_cache import JudgeCache, content_key
from curate.evaluation.pace import Pace

log = logging.getLogger(__name__)
_MAX_PAUSE_S = 60.0


class MalformedAnswer(Exception):
    """The endpoint said 200, but what it sent is not a chat completion."""


class _Fatal(Exception):
    """No pair of this call can succeed: `args[0]` is the message for the user."""


@dataclass(frozen=True)
class Answer:
    """What is kept of a completion: its text, its first tokens, and the (token, probability) list at the first one.
    `cut`: it was ended by max_tokens."""

    text: str
    tokens: tuple[str, ...]
    candidates: tuple[tuple[str, float], ...]
    refusal: bool = False
    cut: bool = False

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(body: dict[str, Any]) -> Answer:
        candidates = tuple((str(t), float(p)) for t, p in body["candidates"])
        tokens = tuple(map(str, body["tokens"]))
        return Answer(str(body["text"]), tokens, candidates, bool(body["refusal"]), bool(body["cut"]))


class OpenAIJudge:
    """See the module's docstring.

    Args:
        base_url: the endpoint up to `/v1`; None for OpenAI's own. model: the name the endpoint knows.
        api_key_env: the environment variable that holds the key; may be unset for endpoints other than OpenAI's.
        max_tokens: length of the answer. 1 is enough where 0-100 are single tokens (OpenAI, Llama 3); the default 4
            lets digit-by-digit tokenizers (Qwen, Gemma; Llama 2 and Mistral, which put a blank before) finish the
            number, whose first digit would else be its score.
        top_logprobs: candidates per token, at most 20. concurrency: requests under way at once.
        timeout: seconds for one request. attempts: tries in all. backoff: scale of the pauses between them, seconds.
        requests_per_minute: None = no limit.
        cache_url: folder or URL of stored answers; None = no cache. progress: called with (done, total).

    Raises:
        ConfigError: on construction, for a missing key, a URL with credentials in it, or a number out of range.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        max_tokens: int = 4,
        top_logprobs: int = 20,
        concurrency: int = 16,
        timeout: float = 60.0,
        attempts: int = 6,
        backoff: float = 1.0,
        requests_per_minute: int | None = None,
        cache_url: str | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        for what, value, low, high in (
            ("max_tokens", max_tokens, 1, 16),
            ("top_logprobs", top_logprobs, 1, 20),
            ("concurrency", concurrency, 1, 1024),
            ("attempts", attempts, 1, 100),
        ):
            if not low <= value <= high:
                raise ConfigError(f"judge.{what} is {value}; it must be from {low} to {high}")
        if not timeout > 0:
            raise ConfigError(f"judge.timeout is {timeout}; it must be more than 0 seconds")
        if requests_per_minute is not None and not requests_per_minute > 0:
            raise ConfigError(f"judge.requests_per_minute is {requests_per_minute}; it must be more than 0, or null")
        if not model:
            raise ConfigError("judge.model is empty; name the model that the endpoint serves")
        url = urlsplit(base_url or "https://api.openai.com/v1")
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ConfigError(f"judge.base_url is {shown(base_url or '')!r}; expected http(s)://host[:port]/v1")
        if url.username or url.password:
            raise ConfigError(f"judge.base_url holds a password; put the key into the variable {api_key_env} instead")
        if url.query or url.fragment:
            raise ConfigError(
                f"judge.base_url has a query or fragment ({url.scheme}://{url.netloc}{url.path}?…); give it without, "
                f"and put a key into the variable {api_key_env}"
            )
        key = os.environ.get(api_key_env, "")
        if not key and url.hostname == "api.openai.com":
            raise ConfigError(
                f"the judge needs a key: set the environment variable {api_key_env}, name another one with "
                f"judge.api_key_env, give judge.base_url of a server of your own, or set judge=none"
            )
        self._api_key_env, self._key, self._progress = api_key_env, key, progress
        self.model, self.base_url = model, url.geturl().rstrip("/")
        self.max_tokens, self.top_logprobs, self.concurrency = max_tokens, top_logprobs, concurrency
        self._attempts, self._backoff, self._timeout = attempts, backoff, timeout
        self._cache = JudgeCache(cache_url) if cache_url else None
        # Retries are ours (tenacity): the client's own would multiply them.
        self._client = openai.OpenAI(api_key=key or "none", base_url=self.base_url, timeout=timeout, max_retries=0)
        self._warned, self._bare = threading.Event(), threading.Event()
        self.pace = Pace(requests_per_minute)

    def fingerprint(self) -> dict[str, Any]:
        """See Judge."""
        return {
            "judge": "openai",
            "base_url": self.base_url,
            "model": self.model,
            "max_tokens": self.max_tokens,
            "top_logprobs": self.top_logprobs,
        }

    def ready(self) -> None:
        """Ask one question, past the cache: what is wrong with key, address, model or server is said now, and not after
        the hours in which a model answers.

        Raises:
            ConfigError: as `score`, or the endpoint gives no log-probabilities.
        """
        try:
            got = self._ask("Answer with the number 50 and nothing else.", threading.Event(), cached=False)
        except _Fatal as e:
            raise ConfigError(str(e)) from e.__cause__
        where = f"the judge at {self.base_url} (model {self.model!r})"
        if not isinstance(got, Answer):
            raise ConfigError(f"{where} does not answer: {got}")
        if not got.candidates and not got.refusal:
            raise ConfigError(f"{where} gives no log-probabilities, without which there is no score; use one that does")

    def score(self, pairs: Sequence[tuple[str, str]], prompt_template: str) -> list[JudgeScore]:
        """One JudgeScore a pair, in order; equal pairs are asked once.

        Raises:
            ConfigError: the endpoint cannot be reached, refuses the key, does not know the model, or answered no
                pair at all. StorageError: the cache cannot be used.
        """
        if not prompt_template:
            raise ConfigError("the trait has no judge prompt; add judge_prompt and coherence_prompt, or set judge=none")
        prompts = [fill(prompt_template, question, answer) for question, answer in pairs]
        wanted = list(dict.fromkeys(prompts))
        scores: dict[str, JudgeScore] = {}
        answered, failure = 0, ""
        give_up = threading.Event()  # ends the pauses of the others when the call has failed or is interrupted
        pool = ThreadPoolExecutor(self.concurrency, thread_name_prefix="judge")
        try:
            futures = {pool.submit(self._ask, prompt, give_up): prompt for prompt in wanted}
            for done, future in enumerate(as_completed(futures), start=1):
                got = future.result()
                if isinstance(got, Answer):
                    answered += 1
                    scores[futures[future]] = self._read(got)
                else:
                    failure = got
                    scores[futures[future]] = JudgeScore(None, reason=got)
                if self._progress:
                    self._progress(done, len(wanted))
        except _Fatal as e:
            raise ConfigError(str(e)) from e.__cause__
        finally:
            give_up.set()
            pool.shutdown(wait=True, cancel_futures=True)
        if wanted and not answered:
            raise ConfigError(
                f"the judge at {self.base_url} (model {self.model!r}) answered none of {len(wanted)} requests; the "
                f"last failure: {failure}"
            )
        return [scores[p] for p in prompts]

    def _ask(self, prompt: str, give_up: threading.Event, cached: bool = True) -> Answer | str:
        """The answer to one prompt, or the reason why there is none."""
        if reason := not_unicode(prompt):
            return reason
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": self.max_tokens,
            "temperature": 0.0,
            "logprobs": True,
            "top_logprobs": self.top_logprobs,
            "seed": 0,
        }
        cache = self._cache if cached else None
        key = content_key({"base_url": self.base_url, "body": body}) if cache else ""
        if cache and (stored := cache.get(key)) is not None:
            try:
                return Answer.from_json(stored)
            except (KeyError, TypeError, ValueError):
                log.warning("the judge's cached answer %s is of another form; asking again", key)
        again = Retrying(
            stop=stop_after_attempt(self._attempts) | stop_when_event_set(give_up),
            sleep=sleep_using_event(give_up),
            wait=self._pause,
            retry=retry_if_exception(_passes),
            reraise=True,
        )
        try:
            answer: Answer = again(self._in_turn, body, give_up)
        except (openai.AuthenticationError, openai.PermissionDeniedError) as e:
            raise _Fatal(
                f"the judge at {self.base_url} refuses the key in {self._api_key_env} (status {e.status_code})"
            ) from e
        except openai.NotFoundError as e:
            raise _Fatal(
                f"the judge at {self.base_url} does not know the model {self.model!r} or the path (status 404): "
                f"{self._said(e.message)}. Check judge.model, and that judge.base_url ends in /v1."
            ) from e
        except openai.APITimeoutError:
            return f"no answer within {self._timeout:g} s, {self._attempts} times"
        except openai.APIConnectionError as e:
            raise _Fatal(
                f"the judge at {self.base_url} cannot be reached ({type(e.__cause__ or e).__name__}: "
                f"{self._said(str(e.__cause__ or e))}). Check judge.base_url; what was answered so far is "
                f"{'cached' if self._cache else 'lost, since judge.cache_url is not set'}."
            ) from e
        except openai.APIStatusError as e:
            return f"status {e.status_code}: {self._said(e.message)}"
        except MalformedAnswer as e:
            return f"malformed answer: {e}"
        # Not what came without log-probabilities: a server that is set right has to be asked again.
        if cache and (answer.tokens or answer.refusal):
            cache.put(key, answer.to_json())
        return answer

    def _without_key(self, text: str) -> str:
        """What a server said; some repeat the key that they refuse."""
        return text.replace(self._key, "…") if self._key else text

    def _said(self, text: str) -> str:
        return short(self._without_key(text))

    def _in_turn(self, body: dict[str, Any], give_up: threading.Event) -> Answer:
        """One request, when its turn comes; what the server says of waiting holds for all that come after."""
        self.pace.wait(give_up)
        try:
            return self._request(body)
        except openai.APIStatusError as e:
            self.pace.hold(_retry_after(e))
            raise

    def _request(self, body: dict[str, Any]) -> Answer:
        # The raw text, since the client's own models let wrong shapes through.
        raw = self._client.chat.completions.with_raw_response.create(**body)
        return read_completion(self._without_key(raw.http_response.text))

    def _read(self, answer: Answer) -> JudgeScore:
        if answer.refusal:
            return JudgeScore(None, refused=True, reason="the judge declined to answer")
        written = _written_number(answer.tokens)
        if written is not None:
            if not self._warned.is_set():
                self._warned.set()
                log.warning(
                    "the judge %r splits numbers into digits, so its log-probabilities are not those of whole "
                    "numbers; its written numbers are used as they are",
                    self.model,
                )
            number = parse_number(written)
            ended = answer.cut or len(written) == self.max_tokens
            if number is None or (ended and len(written) < 3 and len(answer.tokens) == len(written)):
                return JudgeScore(None, reason=f"the judge's number {written!r} is cut off or above 100")
            return JudgeScore(float(number), weighted=False)
        if not answer.candidates:
            if not self._bare.is_set():
                self._bare.set()
                log.warning("the judge at %s gives no log-probabilities; without them there is no score", self.base_url)
            said = f"the endpoint gave no log-probabilities (answer {short(answer.text)!r}); use one that does"
            return JudgeScore(None, reason=said)
        return score_of(answer.candidates, answer.text)

    def _pause(self, state: RetryCallState) -> float:
        """Exponential with jitter, or what the server asks for, if more."""
        pause = wait_random_exponential(multiplier=self._backoff, max=_MAX_PAUSE_S)(state)
        error = state.outcome.exception() if state.outcome else None
        return max(pause, _retry_after(error)) if isinstance(error, openai.APIStatusError) else pause


def read_completion(text: str) -> Answer:
    """Parse the body of a chat completion. The first token that is not blank is the one that is scored.

    Raises:
        MalformedAnswer: not JSON, or not of a completion's shape. Log-probabilities that are absent are no error.
    """
    try:
        choice = json.loads(text)["choices"][0]
        message = choice["message"]
        content = (choice.get("logprobs") or {}).get("content") or []
        steps = [
            (str(s["token"]), [(str(c["token"]), _probability(c["logprob"])) for c in s.get("top_logprobs") or []])
            for s in content
        ]
        refusal = bool(message.get("refusal")) or choice.get("finish_reason") == "content_filter"
        cut = choice.get("finish_reason") == "length"
        said = str(message.get("content") or "")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as e:
        raise MalformedAnswer(f"{type(e).__name__} in {short(text)!r}") from e
    start = next((i for i, (token, _) in enumerate(steps) if token.strip()), 0)
    candidates = steps[start][1] if steps else []
    return Answer(said, tuple(token for token, _ in steps[start:]), tuple(candidates), refusal, cut)


def _retry_after(error: openai.APIStatusError) -> float:
    """Seconds that the server asks to wait, at most a minute; 0 where it says nothing, or an HTTP date."""
    try:
        return min(max(float(error.response.headers.get("retry-after", 0)), 0.0), _MAX_PAUSE_S)
    except ValueError:
        return 0.0


def _probability(logprob: Any) -> float:
    value = math.exp(min(float(logprob), 0.0))
    if not math.isfinite(value):
        raise ValueError(f"log-probability {logprob!r}")
    return value


def _written_number(tokens: Sequence[str]) -> str | None:
    """The number spelt over several tokens at the start of the answer; None when it ends with the first token."""
    if len(tokens) < 2 or not tokens[0].strip().isdigit() or not tokens[1][:1].isdigit():
        return None
    digits = re.match(r"\d+", "".join(tokens).strip())
    return digits[0] if digits else None


def _passes(error: BaseException) -> bool:
    """Whether trying again can help."""
    if isinstance(error, openai.APIStatusError):
        return error.status_code in (408, 409, 425, 429) or error.status_code >= 500
    return isinstance(error, openai.APIConnectionError | MalformedAnswer)
