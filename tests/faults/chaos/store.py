"""A store that fails: an HTTP proxy before the tests' S3 server that errs, dawdles and cuts answers off, from a seed.

In: the endpoint behind it, a kind of fault, a seed. Out: an Endpoint with the same buckets, and how often it failed.
Errors come before a request is passed on and after it (the write is done and its answer is lost), one by one and in
outages of many requests, longer than any client's patience.
"""

from __future__ import annotations

import http.client
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar
from urllib.parse import urlsplit

from tests.s3_server import Endpoint

FAULTS = {
    "errors": "requests answered with 500 or 503, or not at all, before or after they took effect",
    "outages": "the same to many requests in a row",
    "slow": "answers that come late, a little at a time",
    "truncated": "bodies that end before their length",
}
SHARE = {"errors": 0.15, "outages": 0.01, "slow": 0.2, "truncated": 0.25}
OUTAGE_REQUESTS = 60
_HOP = {"connection", "transfer-encoding", "content-length", "date", "server"}


class Proxy(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, behind: str, kind: str, seed: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.kind, self.seed = urlsplit(behind).netloc, kind, seed
        self.faults = self.requests = self.out = 0
        self.turn = threading.Lock()

    def fault(self, method: str) -> random.Random | None:
        """Whether this request fails: how is drawn from what is answered."""
        with self.turn:
            self.requests += 1
            draw = random.Random(f"{self.seed}/{self.requests}")
            hit = draw.random() < SHARE[self.kind] and (self.kind != "truncated" or method == "GET")
            if self.kind == "outages":
                self.out = OUTAGE_REQUESTS if hit and not self.out else max(0, self.out - 1)
                hit = self.out > 0
            self.faults += hit
            return draw if hit else None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy
    ERRORS: ClassVar = ((500, "InternalError"), (503, "SlowDown"), (503, "ServiceUnavailable"))

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: thousands of requests."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except ConnectionError:  # the client has given this one up
            self.close_connection = True

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        draw = self.server.fault(self.command)
        failing = draw is not None and self.server.kind in ("errors", "outages")
        if failing and draw is not None and draw.random() < 0.5:
            self.refuse(draw)
            return
        status, headers, content = self.passed_on(body)
        if draw is None:
            self.give(status, headers, content)
        elif failing:
            self.refuse(draw)  # it took effect, and nobody learns of it
        elif self.server.kind == "slow":
            time.sleep(draw.uniform(0, 0.4))
            self.give(status, headers, content, pieces=4)
        else:
            self.give(status, headers, content, cut=int(len(content) * draw.random()))

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = answer

    def passed_on(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.server.behind, timeout=60)
        try:
            headers = {k: v for k, v in self.headers.items() if k.lower() not in ("connection", "expect")}
            connection.request(self.command, self.path, body, headers)
            found = connection.getresponse()
            return found.status, found.getheaders(), found.read()
        finally:
            connection.close()

    def refuse(self, draw: random.Random) -> None:
        if draw.random() < 0.34:  # not a word
            self.close_connection = True
            return
        status, code = draw.choice(self.ERRORS)
        text = f'<?xml version="1.0"?><Error><Code>{code}</Code><Message>chaos</Message></Error>'.encode()
        self.give(status, [("Content-Type", "application/xml")], b"" if self.command == "HEAD" else text)

    def give(
        self, status: int, headers: list[tuple[str, str]], content: bytes, cut: int | None = None, pieces: int = 1
    ) -> None:
        self.send_response(status)
        length = dict((k.lower(), v) for k, v in headers).get("content-length", str(len(content)))
        for name, value in headers:
            if name.lower() not in _HOP:
                self.send_header(name, value)
        self.send_header("Content-Length", length if self.command == "HEAD" else str(len(content)))
        self.end_headers()
        whole = content if cut is None else content[:cut]
        step = max(1, -(-len(whole) // pieces))
        for at in range(0, len(whole), step):
            self.wfile.write(whole[at : at + step])
            self.wfile.flush()
            if pieces > 1:
                time.sleep(0.02)
        if cut is not None and cut < len(content):
            self.close_connection = True


@contextmanager
def failing(behind: Endpoint, kind: str, seed: str) -> Iterator[tuple[Endpoint, Proxy]]:
    """The proxy, in a thread."""
    proxy = Proxy(behind.url, kind, seed)
    thread = threading.Thread(target=proxy.serve_forever, daemon=True)
    thread.start()
    try:
        yield Endpoint(f"http://127.0.0.1:{proxy.server_address[1]}"), proxy
    finally:
        proxy.shutdown()
        proxy.server_close()
        thread.join()
