"""Submission: attempts at a piece of work, by Ray's own client over HTTP. For a cluster see jobs/test_cluster."""

from __future__ import annotations

import json

import pytest

from curate.errors import ConfigError, WorkerError
from curate.runtime import jobs
from jobs import submit as command
from tests.runtime.job_server import JobServer, serve

WORK = "curate-score-0123456789abcdef"


@pytest.fixture
def server():
    with serve() as running:
        yield running


@pytest.fixture
def client(server: JobServer):
    return jobs.client(server.url)


def submitted(client, **more) -> tuple[str, str]:
    return jobs.submit(client, WORK, "python -m jobs.score", **more)


def test_attempts_at_one_work(server, client):
    assert submitted(client, metadata={"work": WORK}) == (WORK, "PENDING")
    assert submitted(client) == (WORK, "PENDING (submitted before)")
    server.end(WORK, "FAILED")
    assert submitted(client)[0] == f"{WORK}-2"
    server.end(f"{WORK}-2", "STOPPED")
    name, said = submitted(client)
    assert name == f"{WORK}-3"
    assert "it had stopped; goes on with what is missing" in said
    server.end(name, "SUCCEEDED")
    assert submitted(client)[0] == name
    assert submitted(client)[1].startswith("SUCCEEDED (submitted before")
    assert submitted(client, again=True) == (f"{WORK}-4", "PENDING (attempt 4)")
    assert [a.id for a in jobs.attempts(client, WORK)] == [WORK, f"{WORK}-2", f"{WORK}-3", f"{WORK}-4"]
    assert jobs.attempts(client, WORK)[0].metadata == {"work": WORK}


def test_another_work_is_not_an_attempt_at_this_one(server, client):
    jobs.submit(client, "curate-score-01", "true")
    jobs.submit(client, "curate-score-01-extra", "true")
    assert [a.id for a in jobs.attempts(client, "curate-score-01")] == ["curate-score-01"]


def test_two_who_submit_in_the_same_moment_get_one_job(server, client):
    submitted(client)
    server.hidden.add(WORK)  # as seen by one who listed just before
    assert submitted(client) == (WORK, "PENDING (submitted before)")
    assert list(server.jobs) == [WORK]


@pytest.mark.parametrize(
    ("name", "found"), [(WORK, [WORK, f"{WORK}-2"]), (f"{WORK}-2", [f"{WORK}-2"]), (f"{WORK}-1", [WORK])]
)
def test_finding_by_name(server, client, name, found):
    submitted(client)
    server.end(WORK, "FAILED")
    submitted(client)
    assert [a.id for a in jobs.find(client, name)] == found


def test_a_name_that_is_not_there(client):
    with pytest.raises(ConfigError, match="it has none at all"):
        jobs.find(client, WORK)
    submitted(client)
    with pytest.raises(ConfigError, match=f"no job '{WORK[:-1]}'; did you mean '{WORK}'"):
        jobs.find(client, WORK[:-1])


@pytest.mark.parametrize("drops", [0, 2])
def test_a_log_is_followed_once_whatever_the_connection_does(server, client, drops, monkeypatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    submitted(client)
    server.logs[WORK] = "".join(f"line {i}\n" for i in range(200))
    server.end(WORK, "SUCCEEDED")
    server.drops = drops
    assert "".join(jobs.follow(client, WORK)) == server.logs[WORK]
    assert jobs.log(client, WORK) == server.logs[WORK]


def test_a_log_that_cannot_be_followed(server, client, monkeypatch):
    monkeypatch.setattr(jobs.time, "sleep", lambda seconds: None)
    submitted(client)
    server.logs[WORK] = "one\ntwo\n"
    server.drops = 100
    with pytest.raises(WorkerError, match="cannot be followed"):
        list(jobs.follow(client, WORK))


def test_stop(server, client):
    submitted(client)
    assert jobs.stop(client, WORK) == "STOPPED"


# the command


def run(monkeypatch, capsys, server: JobServer, *given: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["curate submit", *given, "--address", server.url])
    with pytest.raises(SystemExit) as ended:
        command.main()
    out = capsys.readouterr()
    return int(ended.value.code or 0), out.out, out.err


def options(tmp_path) -> list[str]:
    return ["source=files", "source.url=s3://b/x", f"sink.url={tmp_path}/out", f"sink.store={tmp_path}/s"]


def test_a_job_from_submission_to_its_end(server, monkeypatch, capsys, tmp_path):
    def call(*given: str) -> tuple[int, str, str]:
        return run(monkeypatch, capsys, server, *given)

    assert call("list") == (0, "nothing was submitted to this cluster\n", "")
    status, out, _ = call("score", *options(tmp_path))
    assert status == 0
    name = out.split(":")[0]
    assert server.jobs[name]["entrypoint"].startswith("python -m jobs.score source=files source.url=s3://b/x")
    assert server.jobs[name]["metadata"] == {"work": name, "job": "score"}
    assert call("status", name)[0] == 1
    server.logs[name] = "said\n"
    assert call("logs", name)[:2] == (0, "said\n")
    assert call("stop", name)[:2] == (0, f"{name}: STOPPED\n")
    assert call("stop", name)[:2] == (0, f"{name}: STOPPED already\n")
    assert call("logs", name, "--follow")[:2] == (0, "said\n")
    assert call("score", *options(tmp_path))[1].startswith(f"{name}-2: PENDING (attempt 2: it had stopped")
    assert [line.split()[:2] for line in call("list")[1].splitlines()] == [[name, "STOPPED"], [f"{name}-2", "PENDING"]]
    server.end(f"{name}-2", "SUCCEEDED")
    status, out, _ = call("status", name, "--json")
    assert status == 0
    assert [(a["id"], a["state"]) for a in json.loads(out)] == [(name, "STOPPED"), (f"{name}-2", "SUCCEEDED")]
    assert call("score", *options(tmp_path))[1].startswith(f"{name}-2: SUCCEEDED (submitted before")
    assert call("score", "--again", *options(tmp_path))[1] == f"{name}-3: PENDING (attempt 3)\n"


def test_recurring_work_is_run_each_time(server, monkeypatch, capsys, tmp_path):
    first = run(monkeypatch, capsys, server, "audit", *options(tmp_path))[1].split(":")[0]
    assert run(monkeypatch, capsys, server, "audit", *options(tmp_path))[1].startswith(f"{first}: PENDING (submitted")
    server.end(first, "SUCCEEDED")
    assert run(monkeypatch, capsys, server, "audit", *options(tmp_path))[1] == f"{first}-2: PENDING (attempt 2)\n"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["scor"], "no job 'scor' to submit; did you mean 'score'"),
        (["submit"], "no job 'submit' to submit"),
        (["score", "sink.url=out", "sink.store=/s"], "'out', a relative path"),
        (["logs", "nothing"], "knows no job 'nothing'"),
    ],
)
def test_what_is_wrong_is_said(server, monkeypatch, capsys, given, said):
    status, _, err = run(monkeypatch, capsys, server, *given)
    assert status == 2
    assert said in err
