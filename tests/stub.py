"""A small real HTTP server with faults: it answers like an OpenAI-compatible one, or whatever a test tells it to."""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Reply:
    """What to send: a body, a status, headers, after so many seconds. No body: hang up without an answer."""

    body: bytes | None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0


@dataclass(frozen=True)
class Seen:
    """One request as it came."""

    method: str
    path: str
    headers: dict[str, str]
    body: dict


def completion(text: str, finish_reason: str = "stop", **more: object) -> Reply:
    """A completion as servers of /v1/completions send it; `more` are further fields of its choice."""
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason} | more
    return Reply(json.dumps({"id": "cmpl-1", "object": "text_completion", "choices": [choice]}).encode())


class Stub:
    """`with Stub(answer) as stub`: a server at `stub.url`; `answer(number, body)` replies to the number-th POST."""

    def __init__(self, answer: Callable[[int, dict], Reply], models: Reply = Reply(b'{"data": [{"id": "stub"}]}')):
        self.answer, self.models = answer, models
        self.seen: list[Seen] = []
        self.most_at_once = 0
        self._at_once, self._lock, self._closing = 0, threading.Lock(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    @property
    def posts(self) -> list[Seen]:
        """The requests for completions."""
        return [seen for seen in self.seen if seen.method == "POST"]

    def __enter__(self) -> "Stub":
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def take(self, method: str, path: str, headers: dict[str, str], body: dict) -> Reply:
        """Note a request and decide the reply, after its delay (which ends when the stub is closed)."""
        with self._lock:
            self.seen.append(Seen(method, path, headers, body))
            number = len(self.posts) - 1
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        reply = self.models if method == "GET" else self.answer(number, body)
        self._closing.wait(reply.seconds)
        with self._lock:
            self._at_once -= 1
        return reply

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.reply(stub.take("GET", self.path, dict(self.headers), {}))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.reply(stub.take("POST", self.path, dict(self.headers), body))

            def reply(self, reply: Reply) -> None:
                if reply.body is None:
                    return
                self.send_response(reply.status)
                for name, value in ({"Content-Length": str(len(reply.body))} | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(reply.body)

            def log_message(self, *words: object) -> None:
                pass

        return Handler


def closed_port() -> str:
    """The URL of a server that is no more."""
    with Stub(lambda number, body: completion("")) as stub:
        return stub.url
