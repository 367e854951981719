"""An OpenAI-compatible server on loopback that judges by a known rule, and misbehaves when told to."""

import json
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SHOWN = re.compile(
    r"=== (?P<mark>\w+) (?:request|post) ===\n(?P<prompt>.*?)\n"
    r"=== (?P=mark) (?:answer|summary) A ===\n(?P<a>.*?)\n"
    r"=== (?P=mark) (?:answer|summary) B ===\n(?P<b>.*?)\n=== (?P=mark) end ===",
    re.DOTALL,
)


@dataclass
class Reply:
    """What is sent: or, with `drop`, only half of it; with `after`, late; with `drip`, so many seconds for each byte.

    `drip_head` drips from the first line on, else the body alone is dripped.
    """

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    drop: bool = False
    after: float = 0.0
    drip: float = 0.0
    drip_head: bool = False


def completion(text: str | None, finish: str = "stop", **message: Any) -> Reply:
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
    usage = {"prompt_tokens": 100, "completion_tokens": 7}
    return Reply(json.dumps({"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}).encode())


def shown(request: dict) -> re.Match:
    """The texts that a judge was shown."""
    found = SHOWN.search(request["messages"][-1]["content"])
    assert found, request
    return found


def goods(text: str) -> int:
    return text.split().count("good")


def judge(request: dict) -> Reply:
    """The answer with more words `good`."""
    texts = shown(request)
    a, b = goods(texts["a"]), goods(texts["b"])
    word = "A" if a > b else "B" if b > a else "tie"
    return completion(f"Comparison: {a} against {b}.\nPreferred: {word}")


class Server:
    """`with Server(rule) as server`: `rule(request, number)` gets the request's body and its number, from 0.

    `other(method, path, body)` answers what is no chat completion.
    """

    def __init__(
        self,
        rule: Callable[[dict, int], Reply] = lambda request, number: judge(request),
        port: int = 0,
        other: Callable[[str, str, bytes], Reply] | None = None,
    ):
        self.requests: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.running = self.most_running = self.answered = 0
        self.tries: Counter[str] = Counter()
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # headers and body are two writes, and the second would wait 40 ms

            def do_POST(self):
                content = self.rfile.read(int(self.headers.get("content-length", 0)))
                if other is not None and not self.path.endswith("/chat/completions"):
                    with lock:
                        server.headers.append(dict(self.headers))
                        reply = other(self.command, self.path, content)
                    self.answer(reply)
                    return
                body = json.loads(content)
                with lock:
                    number = len(server.requests)
                    server.requests.append(body)
                    server.headers.append(dict(self.headers))
                    server.times.append(time.monotonic())
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                try:
                    self.answer(rule(body, number))
                    server.answered += 1
                finally:
                    with lock:
                        server.running -= 1

            def answer(self, reply: Reply) -> None:
                time.sleep(reply.after)
                if reply.drop:
                    self.close_connection = True
                    self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + reply.body[:20])
                    self.wfile.flush()
                    self.connection.shutdown(socket.SHUT_RDWR)
                    return
                self.send_response(reply.status)
                for name, value in {"Content-Type": "application/json", **reply.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body)))
                head = b"".join(self._headers_buffer) + b"\r\n"
                self._headers_buffer = []
                if not reply.drip:
                    self.wfile.write(head)
                    self.wfile.write(reply.body)
                    return
                if not reply.drip_head:
                    self.wfile.write(head)
                for byte in head + reply.body if reply.drip_head else reply.body:
                    self.wfile.write(bytes([byte]))
                    time.sleep(reply.drip)

            do_GET = do_CONNECT = do_POST

            def log_message(self, *arguments):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 64

            def handle_error(self, request, client_address):  # a client that has gone away is part of the game
                pass

        self._server = Quiet(("127.0.0.1", port), Handler)
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self) -> "Server":
        self._thread.start()
        return self

    def __exit__(self, *exception) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
