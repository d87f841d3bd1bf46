"""An HTTP server that answers ``/generate`` as SGLang streams it, at once, with the same tokens: for clients' tests."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

ANSWER = (7, 8)


class AnsweringServer(ThreadingHTTPServer):
    """``requests``: bodies in the order in which they came. ``refuse``: answer 500 with this text from now on."""

    request_queue_size = 256
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[dict[str, Any]] = []
        self.refuse: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: AnsweringServer

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        refused = self.server.refuse
        self.send_response(200 if refused is None else 500)
        self.end_headers()
        if refused is not None:
            self.wfile.write(refused.encode())
            return
        for count in range(1, len(ANSWER) + 1):
            about = {
                "completion_tokens": count,
                "cached_tokens": len(body["input_ids"]) // 2,
                "cached_tokens_details": {"device": 3, "host": 2, "storage_backend": None},
            }
            chunk = {"output_ids": ANSWER[:count], "meta_info": about}
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def answering_server() -> Iterator[AnsweringServer]:
    """A server on a free loopback port, ended with the block."""
    with AnsweringServer() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
