"""Notices to a real HTTP server on the loopback: signed, repeated, and sent nowhere else."""

from __future__ import annotations

import hashlib
import hmac
import socket
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import trustme

from connectors import webhook
from connectors.webhook import Target, deliver
from curate.errors import DeliveryError

SECRET, BODY = b"s3cret-of-the-test", b'{"status": "fail"}'


class Receiver:
    """Answers with `answers`, one after the other, the last for ever."""

    def __init__(self, *answers: int) -> None:
        self.answers, self.got, self.headers = list(answers), [], {}
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.got.append((self.path, dict(self.headers), body))
                code = receiver.answers.pop(0) if len(receiver.answers) > 1 else receiver.answers[0]
                self.send_response(code)
                for name, value in receiver.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def url(self, host: str = "127.0.0.1", path: str = "/hook?token=t0ken") -> str:
        return f"http://{host}:{self.port}{path}"


@pytest.fixture
def receiver():
    made = []

    def make(*answers: int) -> Receiver:
        made.append(Receiver(*answers))
        return made[-1]

    yield make
    for r in made:
        r.server.shutdown()
        r.server.server_close()


def to(url: str, hosts=("127.0.0.1",), **more) -> Target:
    return Target(url, hosts, more.pop("private", hosts), **{"first_wait": 0.01, "timeout": 5.0, **more})


def test_a_notice_is_signed_so_that_the_receiver_can_tell(receiver):
    r = receiver(200)
    assert deliver(to(r.url()), SECRET, BODY, "000003-x", clock=lambda: 1_800_000_000.7) == 1
    ((path, headers, body),) = r.got
    assert (path, body) == ("/hook?token=t0ken", BODY)
    assert headers["X-Curate-Timestamp"] == "1800000000"
    signed = headers["X-Curate-Timestamp"].encode() + b"." + body
    expected = "v1=" + hmac.new(SECRET, signed, hashlib.sha256).hexdigest()
    assert hmac.compare_digest(headers["X-Curate-Signature"], expected)
    assert headers["X-Curate-Delivery"] == "000003-x"
    assert headers["Host"] == f"127.0.0.1:{r.port}"
    assert SECRET.decode() not in str(r.got)


def test_a_server_that_stumbles_is_asked_again_with_the_same_delivery(receiver):
    r = receiver(500, 503, 429, 204)
    assert deliver(to(r.url()), SECRET, BODY, "d") == 4
    assert [h["X-Curate-Delivery"] for _, h, _ in r.got] == ["d"] * 4


def test_it_ends_after_so_many_attempts_and_shows_nothing_secret(receiver):
    r = receiver(500)
    with pytest.raises(DeliveryError, match=r"127\.0\.0\.1 answered 500 \(after 3 attempts\)") as e:
        deliver(to(r.url(), attempts=3), SECRET, BODY, "d")
    assert len(r.got) == 3
    assert "t0ken" not in str(e.value)


@pytest.mark.parametrize("code", [400, 401, 404, 410])
def test_a_refusal_is_final(receiver, code):
    r = receiver(code)
    with pytest.raises(DeliveryError, match=f"answered {code}"):
        deliver(to(r.url()), SECRET, BODY, "d")
    assert len(r.got) == 1


def test_redirects_are_not_followed(receiver):
    target, r = receiver(200), receiver(307)
    r.headers["Location"] = target.url()
    with pytest.raises(DeliveryError, match="a redirect, which is not followed"):
        deliver(to(r.url()), SECRET, BODY, "d")
    assert target.got == []


def test_proxies_of_the_environment_are_not_used(receiver, monkeypatch):
    proxy, r = receiver(200), receiver(200)
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
    deliver(to(r.url()), SECRET, BODY, "d")
    assert (len(r.got), len(proxy.got)) == (1, 0)


@pytest.mark.parametrize(
    ("target", "said"),
    [
        (to("https://evil.example/x", ("hooks.example.com",)), r"may not send to evil\.example: add it to"),
        (to("https://example.com.evil.example/x", ("*.example.com", "example.com")), "may not send to"),
        (to("https://hooks.example.com@evil.example/x", ("hooks.example.com",)), "holds credentials"),
        (to("https://user:pw@hooks.example.com/x", ("hooks.example.com",)), "holds credentials"),
        (to("http://hooks.example.com/x", ("hooks.example.com",), private=()), "by https alone"),
        (to("ftp://hooks.example.com/x", ("hooks.example.com",)), "scheme 'ftp'"),
        (to("hooks.example.com/x", ("hooks.example.com",)), "scheme ''"),
        (to("https://h:99999/", ("h",)), "is no URL"),
    ],
)
def test_addresses_that_are_not_allowed(target, said, monkeypatch):
    monkeypatch.setattr(webhook.socket, "getaddrinfo", lambda *a, **k: pytest.fail("a name server was asked"))
    with pytest.raises(DeliveryError, match=said) as e:
        deliver(target, SECRET, BODY, "d")
    assert "pw" not in str(e.value).split("allowed")[0].split()


def names(monkeypatch, *addresses: str) -> None:
    """A name server that gives every name these addresses."""

    def answer(host: str, port: int, *_: object, **__: object) -> list:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (a, port)) for a in addresses]

    monkeypatch.setattr(webhook.socket, "getaddrinfo", answer)


@pytest.mark.parametrize(
    ("addresses", "private", "said"),
    [
        (["10.1.2.3"], (), "in a private network"),
        (["93.184.216.34", "192.168.0.9"], (), r"192\.168\.0\.9, in a private network"),
        (["127.0.0.1"], (), "in a private network"),
        (["::1"], (), "in a private network"),
        (["::ffff:10.0.0.1"], (), "in a private network"),
        (["100.64.0.1"], (), "in a private network"),
        (["169.254.169.254"], ("h.example",), "metadata services"),
        (["0.0.0.0"], ("h.example",), "where no webhook is"),
    ],
)
def test_what_a_name_resolves_to_is_looked_at(monkeypatch, addresses, private, said):
    names(monkeypatch, *addresses)
    with pytest.raises(DeliveryError, match=said):
        deliver(to("https://h.example/x", ("h.example",), private=private), SECRET, BODY, "d")


def test_http_is_for_loopback_alone(monkeypatch):
    names(monkeypatch, "10.1.2.3")
    with pytest.raises(DeliveryError, match="http is for loopback alone"):
        deliver(to("http://h.example/x", ("h.example",)), SECRET, BODY, "d")


def test_the_address_that_was_checked_is_the_one_that_is_connected_to(receiver, monkeypatch):
    """A name server that answers otherwise the second time changes nothing."""
    r = receiver(200)
    names(monkeypatch, "127.0.0.1")
    deliver(to(r.url("h.example"), ("h.example",)), SECRET, BODY, "d")
    ((_, headers, _),) = r.got
    assert headers["Host"] == f"h.example:{r.port}"


@pytest.fixture
def https(receiver, monkeypatch, tmp_path):
    """A receiver on https, by a certificate for `names_in_it`, of an authority that `trusted` says is ours."""
    names(monkeypatch, "127.0.0.1")  # where it listens, whatever else this machine calls localhost

    def make(*names_in_it: str, trusted: bool = True) -> tuple[Receiver, list[str | None]]:
        authority, asked = trustme.CA(), []
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        authority.issue_cert(*names_in_it).configure_cert(context)
        context.sni_callback = lambda _, name, __: asked.append(name)
        found = receiver(204)
        found.server.socket = context.wrap_socket(found.server.socket, server_side=True)
        if trusted:
            authority.cert_pem.write_to_path(tmp_path / "authority.pem")
            monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "authority.pem"))
        return found, asked

    return make


def secure(found: Receiver, **more) -> Target:
    url = found.url("localhost").replace("http:", "https:")
    return to(url, hosts=["localhost"], **more)


def test_https_is_verified_under_the_name_that_was_allowed(https):
    found, asked = https("localhost")
    assert deliver(secure(found), SECRET, BODY, "d1") == 1
    assert asked == ["localhost"]
    ((_, headers, body),) = found.got
    assert headers["Host"] == f"localhost:{found.port}"
    assert body == BODY


@pytest.mark.parametrize(
    ("named", "trusted", "said"),
    [
        (["hooks.example.com"], True, "Hostname mismatch"),
        (["localhost"], False, "unable to get local issuer certificate"),
    ],
)
def test_a_certificate_that_is_not_trusted_ends_it_in_words(https, named, trusted, said):
    found, _ = https(*named, trusted=trusted)
    with pytest.raises(DeliveryError, match=rf"certificate of localhost is not trusted: .*{said}.*SSL_CERT_FILE") as e:
        deliver(secure(found), SECRET, BODY, "d1")
    assert "after 1 attempt" in str(e.value)
    assert found.got == []


@pytest.mark.parametrize("text", [None, "no certificate"])
def test_authorities_that_cannot_be_read_end_it_in_words(https, tmp_path, monkeypatch, text):
    found, _ = https("localhost")
    place = tmp_path / "mine.pem"
    if text is not None:
        place.write_text(text)
    monkeypatch.setenv("SSL_CERT_FILE", str(place))
    with pytest.raises(DeliveryError, match=rf"cannot be read from SSL_CERT_FILE='{place}' .*PEM.*after 1 attempt"):
        deliver(secure(found), SECRET, BODY, "d1")
    assert found.got == []


def test_a_host_that_is_away_is_told_apart():
    with pytest.raises(DeliveryError, match=r"127\.0\.0\.1 does not answer \(ConnectError\) \(after 2 attempts\)"):
        deliver(to("http://127.0.0.1:9/x", attempts=2), SECRET, BODY, "d")
