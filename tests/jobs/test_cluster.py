"""A Ray cluster of two nodes with token authentication: join it, submit to it, see after what was submitted, submit
again after a failure, scrape its metrics."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import conversation, write_jsonl
from tests.jobs.helpers import ROOT, command, options, scores

pytestmark = pytest.mark.full


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


RAY = str(Path(sys.executable).parent / "ray")


@dataclass(frozen=True)
class Running:
    """A cluster: addresses of Ray and of its dashboard, Ray's folder, what a client needs in its environment."""

    address: str
    dashboard: str
    folder: Path
    env: dict[str, str]


def answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError:
        return True  # 401 without the token
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head and a second node, which ask for a token. What workers write to their logs is JSON."""
    token = tmp_path_factory.mktemp("auth") / "token"
    token.write_text("a-token-of-at-least-some-length-0123456789")
    env = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    port, dashboard, metrics = free_port(), free_port(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="curate-ray-", dir="/tmp"))  # sockets lie in it: a short name
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    logs = tmp_path_factory.mktemp("ray")
    common = ["--block", "--object-store-memory=200000000", "--disable-usage-stats"]
    nodes: list[subprocess.Popen] = []

    def start(name: str, *flags: str) -> subprocess.Popen:
        with (logs / name).open("wb") as log:
            # The suite's own Ray has the usual port; without one of its own a node's agent would take no jobs.
            listen = f"--dashboard-agent-listen-port={free_port()}"
            around = {**os.environ, **env, "PATH": path, "PYTHONPATH": str(ROOT), "CURATE_LOG": "json"}
            node = subprocess.Popen(
                [RAY, "start", *flags, *common, listen], env=around, stdout=log, stderr=log, start_new_session=True
            )
        nodes.append(node)
        return node

    def wait(ready: Callable[[], bool], node: subprocess.Popen, name: str) -> None:
        end = time.monotonic() + 120
        while not ready():
            assert node.poll() is None, (logs / name).read_text()
            assert time.monotonic() < end, (logs / name).read_text()
            time.sleep(0.5)

    try:
        where = [
            f"--port={port}",
            f"--dashboard-port={dashboard}",
            "--dashboard-host=127.0.0.1",
            f"--temp-dir={folder}",
        ]
        head = start("head", "--head", "--num-cpus=1", *where, f"--metrics-export-port={metrics}")
        wait(lambda: answers(f"http://127.0.0.1:{dashboard}/api/version"), head, "head")
        second = start("second", f"--address=127.0.0.1:{port}", "--num-cpus=2")
        wait(lambda: "Ray runtime started" in (logs / "second").read_text(), second, "second")
        yield Running(f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}", folder, env)
    finally:
        for node in reversed(nodes):
            os.killpg(node.pid, signal.SIGTERM)
        for node in nodes:
            try:
                node.wait(timeout=30)
            except subprocess.TimeoutExpired:
                os.killpg(node.pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def given(model, tmp_path):
    corpus = tmp_path / "corpus"
    write_jsonl(corpus / "a.jsonl", [conversation(i) for i in range(30)])
    store = tmp_path / "store"
    return options(corpus, model, tmp_path / "out", scorer="[vector_filter]", **{"sink.store": store})


def submit(given: list[str], cluster: Running, *flags: str, **more: str) -> tuple[int, str, str]:
    process = command("submit", ["score", *given, "--address", cluster.dashboard, *flags], **{**cluster.env, **more})
    out, err = process.communicate(timeout=400)
    return process.returncode, out, err


def see_after(cluster: Running, verb: str, *given: str) -> tuple[int, str]:
    process = command("submit", [verb, *given, "--address", cluster.dashboard], **cluster.env)
    out, err = process.communicate(timeout=100)
    return process.returncode, out + err


def test_join_and_submit_with_a_token(cluster, given, tmp_path):
    joined = command(
        "score",
        [*given, "cluster=existing", f"cluster.ray_address={cluster.address}", f"sink.url={tmp_path / 'joined'}"],
        **cluster.env,
    )
    _, err = joined.communicate(timeout=400)
    assert joined.returncode == 0, err
    assert len(scores(tmp_path / "joined", "vector_filter.test.L2")) == 30

    status, out, err = submit(given, cluster, "--wait")
    assert status == 0, out + err
    assert "SUCCEEDED" in out
    assert scores(tmp_path / "out", "vector_filter.test.L2") == scores(tmp_path / "joined", "vector_filter.test.L2")
    name = out.split(":")[0]
    # Each of the two drivers and their workers counted at the exporter of its node.
    counted = [scraped(url) for url in endpoints(cluster)]
    assert sum(c.get("ray_curate_rows_total", 0) for c in counted) == 60
    for what in ("tokens", "flops", "bytes_read", "bytes_written", "worker_starts"):
        assert sum(c.get(f"ray_curate_{what}_total", 0) for c in counted) > 0
    written = sum(f.stat().st_size for f in (tmp_path / "out").rglob("*.parquet"))
    assert sum(c.get("ray_curate_bytes_written_total", 0) for c in counted) > 2 * written

    status, again, err = submit(list(reversed(given)), cluster)  # the order of options does not matter
    assert status == 0, err
    assert again.split(":")[0] == name
    assert "SUCCEEDED (submitted before" in again

    status, told = see_after(cluster, "status", name, "--json")
    (attempt,) = json.loads(told)
    assert (status, attempt["state"], attempt["id"]) == (0, "SUCCEEDED", name)
    assert attempt["metadata"] == {"work": name, "job": "score"}
    # The log has the driver's lines, which name the run as the job is called.
    status, log = see_after(cluster, "logs", name)
    lines = [json.loads(x) for x in log.splitlines() if x.startswith('{"time"')]
    assert {x["run"] for x in lines} == {name}
    assert [x["rows"] for x in lines if x["event"] == "score: done"] == [30]
    # And so do the actors' own logs, wherever they ran: each unit is named once.
    logs = cluster.folder.glob("session_latest/logs/worker-*.err")
    said = [x for f in logs for x in f.read_text().splitlines() if x.startswith('{"time"')]
    mine = [x for x in map(json.loads, said) if x["run"] == name and x["event"] == "committed"]
    assert sorted(x["unit"] for x in mine) == ["a.jsonl:0-10", "a.jsonl:10-20", "a.jsonl:20-30"]
    assert {(x["job"], x["stage"]) for x in mine} == {("score", "score")}


def test_through_ray_job_submit(cluster, given, tmp_path):
    """Ray's own command, which knows nothing of ours; and its id is seen by ours."""
    env = {**os.environ, **cluster.env, "RAY_API_SERVER_ADDRESS": cluster.dashboard}
    words = ["job", "submit", "--submission-id", "by-hand", "--", "python", "-m", "jobs.score"]
    done = subprocess.run([RAY, *words, *given], env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(scores(tmp_path / "out", "vector_filter.test.L2")) == 30
    status, told = see_after(cluster, "status", "by-hand")
    assert status == 0
    assert "SUCCEEDED" in told


def test_a_failed_job_goes_on_as_another_attempt(cluster, given, tmp_path):
    (tmp_path / "corpus").rename(tmp_path / "away")
    status, out, _ = submit(given, cluster, "--wait")
    assert status == 1
    assert "FAILED" in out
    assert "Traceback" not in out
    name = out.split(":")[0]
    (tmp_path / "away").rename(tmp_path / "corpus")
    status, out, err = submit(given, cluster, "--wait")
    assert status == 0, out + err
    assert out.startswith(f"{name}-2: PENDING (attempt 2: it had failed; goes on")
    status, told = see_after(cluster, "status", name)
    assert status == 0
    first, second = (line for line in told.splitlines() if line.startswith(name))
    assert first.split()[:2] == [name, "FAILED"]
    assert second.split()[:2] == [f"{name}-2", "SUCCEEDED"]
    assert "score: done" in see_after(cluster, "logs", name)[1]  # the newest
    assert "score: done" not in see_after(cluster, "logs", f"{name}-1")[1]


def test_a_job_that_runs_is_stopped(cluster, given, tmp_path):
    write_jsonl(tmp_path / "corpus" / "b.jsonl", [conversation(i) for i in range(60_000)])  # minutes
    sink = tmp_path / "long"
    status, out, err = submit([*given, f"sink.url={sink}"], cluster)
    assert status == 0, err
    name = out.split(":")[0]
    end = time.monotonic() + 200
    while not list(sink.glob("scores/parts/*/*.parquet")):
        assert time.monotonic() < end, see_after(cluster, "logs", name)
        time.sleep(0.5)
    status, told = see_after(cluster, "stop", name)
    assert (status, told.strip()) == (0, f"{name}: STOPPED")
    status, told = see_after(cluster, "status", name)
    assert status == 1
    assert "STOPPED" in told
    done = command("status", [str(sink)])
    text, err = done.communicate(timeout=60)
    assert done.returncode == 1, err
    assert re.search(r"score +[\d,]+ of 60,030 rows", text)


def endpoints(cluster: Running) -> list[str]:
    """The exporters of all nodes, as Prometheus finds them: a process's counts are at its own node's."""
    found = json.loads((cluster.folder / "prom_metrics_service_discovery.json").read_text())
    return [f"http://{target}" for group in found for target in group["targets"]]


def scraped(url: str) -> dict[str, float]:
    """Our metrics at an exporter: the sum over all labels, by name."""
    out: dict[str, float] = {}
    with urllib.request.urlopen(f"{url}/metrics", timeout=10) as answer:
        for line in answer.read().decode().splitlines():
            if m := re.match(r"(ray_curate_\w+)\{[^}]*\} ([\d.e+-]+)", line):
                out[m[1]] = out.get(m[1], 0.0) + float(m[2])
    return out


def test_without_the_token_the_error_says_what_to_set(cluster, given):
    status, _, err = submit(given, cluster, RAY_AUTH_MODE="disabled")
    assert status == 2
    assert "RAY_AUTH_TOKEN_PATH" in err
    assert "Traceback" not in err


def test_nobody_answers(given):
    nobody = f"127.0.0.1:{free_port()}"
    process = command("submit", ["list", "--address", f"http://{nobody}"])
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert f"no Ray job server answers at http://{nobody}" in err
