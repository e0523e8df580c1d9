"""A chat-completions endpoint over real HTTP, in a thread, that answers what a test tells it to."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """`body` as JSON, or as it is when it is bytes. `hold`: wait for this event first (a server that hangs)."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hold: threading.Event | None = None
    cut: bool = False


def completion(steps: list[tuple[str, dict[str, float]]], text: str | None = None, **message: Any) -> dict[str, Any]:
    """A chat completion whose tokens are `steps`: (token, {candidate: probability})."""
    content = [
        {"token": t, "logprob": 0.0, "top_logprobs": [{"token": c, "logprob": math.log(p)} for c, p in top.items()]}
        for t, top in steps
    ]
    said = "".join(t for t, _ in steps) if text is None else text
    choice = {"index": 0, "message": {"role": "assistant", "content": said, **message}, "finish_reason": "stop"}
    return {"id": "x", "object": "chat.completion", "choices": [{**choice, "logprobs": {"content": content}}]}


class Endpoint:
    """`answer(request, n)` gives the reply to the n-th request (from 0); `requests` keeps (headers, body)."""

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply | dict[str, Any]]) -> None:
        self.answer = answer
        self.requests: list[tuple[dict[str, str], dict[str, Any]]] = []
        self.busy, self.most_busy = 0, 0
        self.lock = threading.Lock()
        self.url = ""

    @property
    def prompts(self) -> list[str]:
        return [body["messages"][0]["content"] for _, body in self.requests]


@contextmanager
def serve(answer: Callable[[dict[str, Any], int], Reply | dict[str, Any]]) -> Iterator[Endpoint]:
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with endpoint.lock:
                n = len(endpoint.requests)
                endpoint.requests.append(({k.lower(): v for k, v in self.headers.items()}, body))
                endpoint.busy += 1
                endpoint.most_busy = max(endpoint.most_busy, endpoint.busy)
            try:
                reply = endpoint.answer(body, n)
                reply = reply if isinstance(reply, Reply) else Reply(reply)
                if self.path != "/v1/chat/completions":
                    reply = Reply({"error": {"message": f"no such path {self.path}"}}, 404)
                if reply.hold is not None:
                    reply.hold.wait(10)
            finally:
                with endpoint.lock:
                    endpoint.busy -= 1
            raw = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            try:
                self.send_response(reply.status)
                for k, v in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(k, v)
                self.send_header("Content-Length", str(len(raw) + (10 if reply.cut else 0)))
                self.end_headers()
                self.wfile.write(raw)
                if reply.cut:
                    self.close_connection = True
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True  # the client gave up, as the timeout test wants

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    endpoint.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
