"""A Ray cluster of its own with token authentication: join it, submit to it, submit again, submit after a failure."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import ROOT, command, options, scores

pytestmark = pytest.mark.full


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(address of Ray, address of the dashboard, environment of a client) of a head node that asks for a token."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text("a-token-of-at-least-some-length-0123456789")
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    port, dashboard = free_port(), free_port()
    ray = str(Path(sys.executable).parent / "ray")
    parts = ["start", "--head", "--block", "--num-cpus=2", "--object-store-memory=200000000", "--disable-usage-stats"]
    where = [f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"]
    # The suite's own Ray has the usual port; without one of its own this head's agent would take no jobs.
    where += [f"--dashboard-agent-listen-port={free_port()}"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with (tmp_path_factory.mktemp("ray") / "log").open("wb") as log:
        head = subprocess.Popen(
            [ray, *parts, *where],
            env={**os.environ, **env, "PATH": path, "PYTHONPATH": str(ROOT)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            end = time.monotonic() + 120
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{dashboard}/api/version", timeout=2)
                    break
                except urllib.error.HTTPError:
                    break  # it answers: 401 without the token
                except OSError:
                    assert head.poll() is None, Path(log.name).read_text()
                    assert time.monotonic() < end
                    time.sleep(0.5)
            yield f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", env
        finally:
            os.killpg(head.pid, signal.SIGTERM)
            try:
                head.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(head.pid, signal.SIGKILL)


@pytest.fixture
def given(model, tmp_path):
    corpus = tmp_path / "corpus"
    write_jsonl(corpus / "a.jsonl", [conversation(i) for i in range(30)])
    store = tmp_path / "store"
    return options(corpus, model, tmp_path / "out", scorer="[vector_filter]", **{"sink.store": store})


def submit(given: list[str], cluster, *flags: str, **more: str) -> tuple[int, str, str]:
    _, dashboard, env = cluster
    process = command("submit", ["score", *given, "--address", dashboard, *flags], **{**env, **more})
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def test_join_and_submit_with_a_token(cluster, given, tmp_path):
    address, _, env = cluster
    joined = command(
        "score",
        [*given, "cluster=existing", f"cluster.ray_address={address}", f"sink.url={tmp_path / 'joined'}"],
        **env,
    )
    _, err = joined.communicate(timeout=400)
    assert joined.returncode == 0, err
    assert len(scores(tmp_path / "joined", "vector_filter.test.L2")) == 30

    status, out, err = submit(given, cluster, "--wait")
    assert status == 0, out + err
    assert "SUCCEEDED" in out
    assert scores(tmp_path / "out", "vector_filter.test.L2") == scores(tmp_path / "joined", "vector_filter.test.L2")
    status, again, err = submit(list(reversed(given)), cluster)  # the order of options does not matter
    assert status == 0, err
    assert again.split(":")[0] == out.split(":")[0]
    assert "SUCCEEDED (submitted before" in again


def test_a_failed_job_goes_on_when_it_is_submitted_again(cluster, given, tmp_path):
    (tmp_path / "corpus").rename(tmp_path / "away")
    status, out, _ = submit(given, cluster, "--wait")
    assert status == 1
    assert "FAILED" in out
    assert "Traceback" not in out
    (tmp_path / "away").rename(tmp_path / "corpus")
    status, out, err = submit(given, cluster, "--wait")
    assert status == 0, out + err
    assert "it had failed; goes on" in out


def test_without_the_token_the_error_says_what_to_set(cluster, given):
    status, _, err = submit(given, cluster, RAY_AUTH_MODE="disabled")
    assert status == 2
    assert "RAY_AUTH_TOKEN_PATH" in err
    assert "Traceback" not in err


def test_nobody_answers(given, monkeypatch):
    nobody = f"127.0.0.1:{free_port()}"
    process = command("submit", ["score", *given, "--address", f"http://{nobody}"])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"no Ray job server answers at http://{nobody}" in err
