"""A small endpoint that speaks OpenAI's chat protocol over HTTP, and misbehaves where a test asks it to.

Its model is simple but real: the more of the query's words stand in the product, the likelier the best grade.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Fault = Callable[[dict[str, Any], int], "tuple[int, dict[str, str]] | None"]
"""From a request and how often the same one came before: the status and headers to refuse it with, or None."""


class ChatEndpoint:
    """Serves while it is entered.

    Args:
        fault: which requests are refused.
        delay: seconds before each answer.
        write: what is answered to the last message where no grade is asked for; by default that message.

    Attributes:
        requests: every body that came.
        most_at_once: the most requests that were under way together.
    """

    def __init__(
        self, fault: Fault | None = None, delay: float = 0.0, write: Callable[[str], str] | None = None
    ) -> None:
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._seen: Counter[str] = Counter()
        self._at_once = 0
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    endpoint.requests.append(body)
                    endpoint.times.append(time.monotonic())
                    key = json.dumps(body["messages"])
                    before = endpoint._seen[key]
                    endpoint._seen[key] += 1
                    endpoint._at_once += 1
                    endpoint.most_at_once = max(endpoint.most_at_once, endpoint._at_once)
                time.sleep(delay)
                refusal = fault(body, before) if fault is not None else None
                with endpoint._lock:
                    endpoint._at_once -= 1
                if refusal is not None and refusal[0] == 0:
                    self.close_connection = True  # a connection lost without an answer
                    return
                status, headers, answer = (200, {}, _answer(body)) if refusal is None else (*refusal, _refused(refusal))
                if write is not None and refusal is None:
                    answer["choices"][0]["message"]["content"] = write(body["messages"][-1]["content"])
                data = json.dumps(answer).encode()
                self.send_response(status)
                for name, value in {
                    **headers,
                    "Content-Type": "application/json",
                    "Content-Length": str(len(data)),
                }.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    def __enter__(self) -> ChatEndpoint:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def overlap(query: str, product: str) -> float:
    """Share of the query's words that stand in the product."""
    words = query.lower().split()
    return sum(word in product.lower() for word in words) / len(words)


def _answer(body: dict[str, Any]) -> dict[str, Any]:
    text = body["messages"][-1]["content"]
    logprobs = None
    if body.get("logprobs"):
        query, product = (line.split(": ", 1)[1] for line in text.splitlines()[:2])
        letters = [line[0] for line in body["messages"][0]["content"].splitlines() if line[1:2] == ":"]
        logits = [-abs(place / (len(letters) - 1) - overlap(query, product)) * 4 for place in range(len(letters))]
        total = math.log(sum(map(math.exp, logits)))
        top = [{"token": f" {name}", "logprob": value - total} for name, value in zip(letters, logits, strict=True)]
        if "unsure" in product:
            top = top[1:]
        best = max(top, key=lambda entry: entry["logprob"])
        logprobs = {"content": [{**best, "top_logprobs": top}]}
        text = best["token"]
    elif "response_format" in body:
        schema = body["response_format"]["json_schema"]["schema"]
        text = json.dumps(dict.fromkeys(schema["properties"], "x"))
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "stop", "logprobs": logprobs}],
        "usage": {"prompt_tokens": 7, "completion_tokens": 1, "total_tokens": 8},
    }


def _refused(refusal: tuple[int, dict[str, str]]) -> dict[str, Any]:
    return {"error": {"message": f"refused with {refusal[0]}", "type": "error"}}
