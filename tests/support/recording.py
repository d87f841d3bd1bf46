"""A loopback server that keeps every request and gives made-up answers, in SGLang's and OpenAI's shapes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Recorder:
    """Requests in the order of their arrival. ``bodies`` parses them, ``raw`` compares them byte by byte."""

    url: str
    requests: list[tuple[str, str, str, bytes]] = field(default_factory=list)  # method, path, type, body

    def clear(self) -> None:
        self.requests.clear()

    def raw(self) -> list[tuple[str, str, str, bytes]]:
        """All requests, sorted, for forks and batches send from many threads; random state ids blanked."""
        return sorted((*head, re.sub(rb'"[0-9a-f]{32}"', b'"id"', body)) for *head, body in self.requests)

    def bodies(self, path: str = "/generate") -> list[dict[str, Any]]:
        return [json.loads(body) for _, at, _, body in self.requests if at == path]

    def adapters(self) -> list[str | None]:
        """``lora_path`` of each ``/generate`` request."""
        return [body.get("lora_path") for body in self.bodies()]

    def models(self, path: str) -> list[str]:
        return [body["model"] for body in self.bodies(path)]


def _number(*parts: Any) -> float:
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big") / 2**32


def _generated(body: dict[str, Any], prompt: Any) -> dict[str, Any]:
    """One answer of ``/generate``: it depends on prompt and adapter, so that mixing them up shows."""
    seed = _number(prompt, body.get("lora_path"))
    return {
        "text": f" {body.get('lora_path', 'base')}-{seed:.4f}.",
        "meta_info": {
            "prompt_tokens": len(prompt),
            "cached_tokens": 0,
            "input_token_logprobs": [[-1.0 - seed, 5, "~"], [-0.5 - seed, 6, "~"]],
            "output_token_logprobs": [],
        },
    }


class _Handler(BaseHTTPRequestHandler):
    recorder: Recorder

    def log_message(self, *args: Any) -> None:
        pass

    def _send(self, payload: Any) -> None:
        data = json.dumps(payload).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, chunks: list[Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for chunk in [*map(json.dumps, chunks), "[DONE]"]:
            self.wfile.write(f"data: {chunk}\n\n".encode())

    def _answer(self, body: bytes) -> None:
        kind = self.headers.get("Content-Type", "")
        self.recorder.requests.append((self.command, self.path, kind, body))
        if self.path == "/get_model_info":
            self._send({"model_path": "recorded"})
        elif self.path == "/generate":
            self._generate(json.loads(body))
        elif self.path.startswith("/v1/"):
            self._openai(json.loads(body))
        else:
            self._send({})

    def _generate(self, body: dict[str, Any]) -> None:
        prompt = body.get("text", body.get("input_ids"))
        if isinstance(prompt, list):
            self._send([_generated(body, one) for one in prompt])
        elif body.get("stream"):
            whole = _generated(body, prompt)
            self._stream([{**whole, "text": whole["text"][:cut]} for cut in (3, 6, None)])
        else:
            self._send(_generated(body, prompt))

    def _openai(self, body: dict[str, Any]) -> None:
        chat = self.path == "/v1/chat/completions"
        text = f"{body['model']} answered."
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        head = {"id": "1", "created": 1, "model": body["model"], "usage": usage}
        if body.get("stream"):
            parts = [text[:4], text[4:]]
            chunks = [{"delta": {"content": part}} if chat else {"text": part} for part in parts]
            kind = "chat.completion.chunk" if chat else "text_completion"
        else:
            chunks = [{"message": {"role": "assistant", "content": text}} if chat else {"text": text}]
            kind = "chat.completion" if chat else "text_completion"
        answers = [
            {**head, "object": kind, "choices": [{"index": 0, "finish_reason": "stop", **chunk}]}
            for chunk in chunks
        ]
        if body.get("stream"):
            self._stream(answers)
        else:
            self._send(answers[0])

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0))))


@contextlib.contextmanager
def recording_server() -> Iterator[Recorder]:
    """Serve on a free loopback port inside the block."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.recorder = Recorder(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield handler.recorder
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
