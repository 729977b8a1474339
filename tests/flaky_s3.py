"""An S3 that misbehaves: a proxy before a real server, which refuses, hangs, and loses answers on purpose.

Which request meets which fault depends on a seed, the request, and how often it was made, so that a run can be repeated
and every request gets through in the end.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Fault = Literal["", "500", "503", "409", "hang", "lost", "broken", "vague"]
"""500 InternalError, 503 SlowDown or 409 ConditionalRequestConflict instead of doing anything; `hang`: nothing is done and
nothing answered; `lost`: it is done, and the connection cut before the answer; `broken`: cut within the answer; `vague`:
what is refused is refused without its reason, as some stores do."""

_ERRORS = {"500": "InternalError", "503": "SlowDown", "409": "ConditionalRequestConflict"}


@dataclass(frozen=True)
class Request:
    """One request that reached the proxy. `number` counts equal ones from 1; `status` is what the server behind it said
    (0 where it was not asked)."""

    method: str
    path: str
    exclusive: bool
    number: int
    fault: Fault = ""
    status: int = 0


Plan = Callable[[Request], Fault]


def seeded(seed: int, rates: Mapping[Fault, float], max_in_row: int = 2) -> Plan:
    """Faults at random, each at its rate; at most `max_in_row` for one request."""

    def plan(request: Request) -> Fault:
        if request.number % (max_in_row + 1) == 0:
            return ""
        drawn = random.Random(f"{seed} {request.method} {request.path} {request.number}").random()
        for fault, rate in rates.items():
            if drawn < rate:
                return fault
            drawn -= rate
        return ""

    return plan


class FlakyS3:
    """The proxy.

    Attributes:
        url: its endpoint.
        requests: all that it was asked, in the order in which it was done with them.
        plan: the fault of each request; may be set at any time.
    """

    def __init__(self, server: tuple[str, int], plan: Plan = lambda _: "", hang_seconds: float = 5.0) -> None:
        self._server, self.plan, self._hang_seconds = server, plan, hang_seconds
        self.requests: list[Request] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._lock, self._exclusive, self._end = threading.Lock(), threading.Lock(), threading.Event()
        proxy = self

        class Handler(_Handler):
            flaky = proxy

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FlakyS3:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._http.shutdown()
        self._http.server_close()

    def faults(self) -> Counter[str]:
        """How many requests met each fault."""
        return Counter(request.fault for request in self.requests if request.fault)

    def begin(self, method: str, path: str, exclusive: bool) -> Request:
        with self._lock:
            self._counts[method, path] += 1
            request = Request(method, path, exclusive, self._counts[method, path])
        return Request(method, path, exclusive, request.number, self.plan(request))

    def forward(self, request: Request, headers: Mapping[str, str], body: bytes) -> tuple[int, dict[str, str], bytes]:
        # The server behind looks and writes in two acts; S3 does both in one, which is what a race is about.
        with self._exclusive if request.exclusive else contextlib.nullcontext():
            connection = HTTPConnection(*self._server, timeout=60)
            try:
                connection.request(request.method, request.path, body, dict(headers))
                response = connection.getresponse()
                return response.status, dict(response.getheaders()), response.read()
            finally:
                connection.close()

    def met(self, request: Request, status: int) -> None:
        ended = Request(request.method, request.path, request.exclusive, request.number, request.fault, status)
        with self._lock:
            self.requests.append(ended)

    def hang(self) -> None:
        self._end.wait(self._hang_seconds)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else an answer's body waits for the acknowledgement of its headers
    flaky: FlakyS3

    def _handle(self) -> None:
        assert "Transfer-Encoding" not in self.headers
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        request = self.flaky.begin(self.command, self.path, "If-None-Match" in self.headers)
        if request.fault == "hang":
            self.close_connection = True
            self.flaky.met(request, 0)
            self.flaky.hang()
            return
        status = 0
        try:
            if request.fault in _ERRORS:
                self._refuse(int(request.fault), _ERRORS[request.fault])
                return
            headers = {key: value for key, value in self.headers.items() if key.lower() not in ("expect", "connection")}
            status, answer_headers, answer = self.flaky.forward(request, headers, body)
            if request.fault == "lost":
                self.close_connection = True
                return
            if request.fault == "vague" and status == 412:
                self._refuse(status, "PreconditionFailed")
                return
            self._answer(status, answer_headers, answer, broken=request.fault == "broken")
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client waits no longer
        finally:
            self.flaky.met(request, status)

    def _refuse(self, status: int, code: str) -> None:
        text = f"<Error><Code>{code}</Code><Message>Please try again.</Message></Error>".encode()
        self._answer(status, {"Content-Type": "application/xml"}, text)

    def _answer(self, status: int, headers: Mapping[str, str], body: bytes, broken: bool = False) -> None:
        self.send_response_only(status)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        for key, value in headers.items():
            if key.lower() not in ("connection", "transfer-encoding", "content-length"):
                self.send_header(key, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if broken else body)
        self.close_connection = self.close_connection or broken

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _handle  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing: `requests` tells it."""
