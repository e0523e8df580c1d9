"""The schedule's launcher against a local server that answers as the API of Kubernetes does, over HTTPS."""

from __future__ import annotations

import datetime
import importlib.util
import ipaddress
import json
import ssl
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.deploy.rendered import KUBERNETES, one

_spec = importlib.util.spec_from_file_location("launch", KUBERNETES / "schedule/launch.py")
launch = importlib.util.module_from_spec(_spec)
sys.modules["launch"] = launch  # dataclasses look their module up
_spec.loader.exec_module(launch)

HOME = "/apis/ray.io/v1/namespaces/curate/rayjobs"
DONE = {"jobDeploymentStatus": "Complete", "jobStatus": "SUCCEEDED"}
FAILED = {"jobDeploymentStatus": "Failed", "jobStatus": "FAILED", "reason": "AppFailed", "message": "exit status 2"}
PATTERN = {
    "apiVersion": "ray.io/v1",
    "kind": "RayJob",
    "metadata": {"name": "curate-schedule", "labels": {"app.kubernetes.io/part-of": "curate"}, "resourceVersion": "7"},
    "spec": {
        "suspend": True,
        "entrypoint": "curate run",
        "backoffLimit": 1,
        "rayClusterSpec": {"rayVersion": "2.60.0"},
    },
    "status": {"jobDeploymentStatus": "Suspended"},
}


class Cluster:
    """RayJobs by name; a made one goes through `states`, one a look."""

    def __init__(self, states, jobs=()):
        self.jobs = {"curate-schedule": json.loads(json.dumps(PATTERN)), **dict(jobs)}
        self.states, self.posted, self.seen, self.broken = list(states), [], [], []

    def answer(self, method, path, body, token):
        self.seen.append(f"{method} {path}")
        if token != "Bearer s3cret":
            return 401, {"message": "Unauthorized"}
        if self.broken:
            return self.broken.pop(0), {"message": "etcd leader changed"}
        where = urlsplit(path)
        if method == "POST":
            name = body["metadata"]["name"]
            if name in self.jobs:
                return 409, {"reason": "AlreadyExists"}
            self.posted.append(body)
            self.jobs[name] = body
            return 201, body
        if where.path == HOME:
            key, value = parse_qs(where.query)["labelSelector"][0].split("=")
            return 200, {"items": [j for j in self.jobs.values() if j["metadata"].get("labels", {}).get(key) == value]}
        name = where.path.removeprefix(HOME + "/")
        if name not in self.jobs:
            return 404, {"reason": "NotFound"}
        job = self.jobs[name]
        if name != "curate-schedule" and self.states:
            job = self.jobs[name] = {**job, "status": self.states.pop(0)}
        return 200, job


def certificate(folder):
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "kubernetes")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(minutes=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "ca.crt").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(pem)


@pytest.fixture(scope="module")
def account(tmp_path_factory):
    folder = tmp_path_factory.mktemp("account")
    certificate(folder)
    (folder / "token").write_text("s3cret\n")
    return folder


@pytest.fixture
def serve(account):
    """Start a server of a Cluster; gives the launcher's Api."""
    servers = []

    def start(cluster):
        class Handler(BaseHTTPRequestHandler):
            def _do(self):
                size = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(size)) if size else None
                code, out = cluster.answer(self.command, self.path, body, self.headers["Authorization"])
                text = json.dumps(out).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_GET = do_POST = _do

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(account / "ca.crt", account / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        url = f"https://127.0.0.1:{server.server_port}"
        return launch.Api(url, "curate", account / "token", account / "ca.crt", patience=5.0, pause=0.01)

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


NAME = "curate-schedule-29387520-ray"


def go(api):
    return launch.launch(api, "curate-schedule", "curate-schedule-29387520", "u-1", every=0.001)


def test_makes_a_job_after_the_pattern_and_waits_for_it(serve, capsys):
    cluster = Cluster([{}, {"jobDeploymentStatus": "Initializing"}, {"jobDeploymentStatus": "Running"}, DONE])
    assert go(serve(cluster)) == 0
    (made,) = cluster.posted
    assert made["metadata"] == {
        "name": NAME,
        "labels": {"app.kubernetes.io/part-of": "curate", "curate/pattern": "curate-schedule"},
        "ownerReferences": [
            {"apiVersion": "batch/v1", "kind": "Job", "name": "curate-schedule-29387520", "uid": "u-1"}
        ],
    }
    assert made["spec"] == {k: v for k, v in PATTERN["spec"].items() if k != "suspend"}
    assert "status" not in made
    states = [json.loads(line).get("deployment") for line in capsys.readouterr().out.splitlines()]
    assert states == [None, "", "Initializing", "Running", "Complete"]


def test_a_failed_job_fails_it_and_says_why(serve, capsys):
    assert go(serve(Cluster([{"jobDeploymentStatus": "Retrying"}, FAILED]))) == 2
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["event"], last["reason"], last["message"]) == ("failed", "AppFailed", "exit status 2")


def test_a_stopped_job_is_no_success(serve):
    assert go(serve(Cluster([{"jobDeploymentStatus": "Complete", "jobStatus": "STOPPED"}]))) == 2


def test_started_again_it_goes_on_with_the_job_that_is_there(serve):
    there = {"metadata": {"name": NAME, "labels": {"curate/pattern": "curate-schedule"}}, "spec": {}}
    cluster = Cluster([{"jobDeploymentStatus": "Running"}, DONE], {NAME: there})
    assert go(serve(cluster)) == 0
    assert cluster.posted == []


@pytest.mark.parametrize(
    ("status", "expected"), [({"jobDeploymentStatus": "Running"}, 0), ({}, 0), (DONE, 1), (FAILED, 1)]
)
def test_another_one_at_work_is_not_overlapped(serve, status, expected):
    other = {"metadata": {"name": "by-hand", "labels": {"curate/pattern": "curate-schedule"}}, "status": status}
    cluster = Cluster([DONE], {"by-hand": other})
    assert go(serve(cluster)) == 0
    assert len(cluster.posted) == expected


def test_a_removed_job_is_a_failure(serve):
    cluster = Cluster([{"jobDeploymentStatus": "Running"}])
    taken = cluster.answer

    def answer(method, path, body, token):
        if not cluster.states:
            cluster.jobs.pop(NAME, None)
        return taken(method, path, body, token)

    cluster.answer = answer
    api = serve(cluster)
    cluster.jobs[NAME] = {"metadata": {"name": NAME}}
    assert go(api) == 2


def test_an_api_server_that_stumbles_is_asked_again(serve):
    cluster = Cluster([DONE])
    cluster.broken = [500, 503, 429]
    assert go(serve(cluster)) == 0
    assert len(cluster.posted) == 1


def test_no_answer_for_too_long_is_an_error(serve):
    cluster = Cluster([])
    cluster.broken = [503] * 1000
    with pytest.raises(launch.ApiError, match=r"no answer in 0 s: 503 .*etcd leader changed"):
        go(replace(serve(cluster), patience=0.05))


def test_a_refusal_is_an_error_at_once_and_shows_no_token(serve, tmp_path):
    (tmp_path / "token").write_text("another")
    cluster = Cluster([])
    with pytest.raises(launch.ApiError, match="401") as e:
        go(replace(serve(cluster), token=tmp_path / "token"))
    assert len(cluster.seen) == 1
    assert "another" not in str(e.value)


def test_a_server_of_another_authority_gets_no_token(serve, tmp_path):
    certificate(tmp_path)
    cluster = Cluster([])
    with pytest.raises(launch.ApiError, match="CERTIFICATE_VERIFY_FAILED"):
        go(replace(serve(cluster), authority=tmp_path / "ca.crt", patience=0.05))
    assert cluster.seen == []


def test_no_pattern_is_an_error(serve):
    cluster = Cluster([])
    del cluster.jobs["curate-schedule"]
    with pytest.raises(launch.ApiError, match="there is no RayJob curate-schedule in the namespace curate"):
        go(serve(cluster))


def test_the_program_reads_its_place_from_the_pod(serve, account, monkeypatch, capsys):
    cluster = Cluster([DONE])
    api = serve(cluster)
    (account / "namespace").write_text("curate")
    monkeypatch.setattr(launch, "ACCOUNT", account)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT_HTTPS", api.server.rsplit(":", 1)[1])
    monkeypatch.setattr(sys, "argv", ["launch.py", "--pattern=curate-schedule", "--every=0.001"])
    variables = one("overlays/cpu", "CronJob")["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"][0][
        "env"
    ]
    assert [v["name"] for v in variables] == ["JOB_NAME", "JOB_UID"]
    for variable in variables:
        monkeypatch.setenv(variable["name"], "curate-schedule-1")
    assert launch.main() == 0
    assert "curate-schedule-1-ray" in cluster.jobs
