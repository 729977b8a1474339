"""What stands before the application: who may ask, how large a body may be, and how long it may take to arrive.

A body is read whole here, against a size and a deadline, so that no part behind this one ever waits for a client. One
that is too large is read to its end and thrown away piece by piece: a server that closed at once would cut off its
client, which is still sending, before the answer that says why.
"""

from __future__ import annotations

import asyncio
import enum
import hashlib
import hmac
from collections.abc import Sequence
from pathlib import Path

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from relevance_ray.errors import UserError
from relevance_ray.serving.refusals import TOO_MANY, refusal

_STRANGERS_SECONDS = 1.0
_BODIES_HELD = 20
"""All bodies held at once may be as large as so many of the largest."""
OPEN_PATHS = ("/", "/health")
"""Asked without a token: what a load balancer and a browser ask first, which tells nothing of the model."""


class Tokens:
    """Bearer tokens, kept and compared as digests, all of them each time: how long a refusal takes tells nothing."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(token.encode()).digest() for token in tokens]

    @classmethod
    def read(cls, path: str) -> Tokens:
        """Of a file with a token a line; empty lines and lines that begin with # are skipped.

        Raises:
            UserError: no such file, or one without a token, or with one that no header can carry.
        """
        try:
            lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read serve.tokens_file {path}: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.startswith("#") and not (line.isascii() and line.isprintable() and " " not in line):
                raise UserError(f"{path}, line {number} is no token; write one a line, in ASCII and without spaces")
        tokens = [line for line in lines if line and not line.startswith("#")]
        if not tokens:
            raise UserError(f"{path} holds no token; write one a line, or unset serve.tokens_file")
        return cls(tokens)

    def admit(self, authorization: bytes) -> bool:
        """Whether an Authorization header carries one of the tokens."""
        kind, _, token = authorization.strip().partition(b" ")
        given = hashlib.sha256(token.strip()).digest()
        known = [hmac.compare_digest(given, digest) for digest in self._digests]
        return kind.lower() == b"bearer" and any(known)


class Guard:
    """An ASGI application in front of another.

    Args:
        app: the one behind.
        tokens: who may ask; None for everybody.
        max_body_bytes: a larger body is answered 413.
        body_seconds: a body that takes longer to arrive is answered 408.
    """

    def __init__(self, app: ASGIApp, tokens: Tokens | None, max_body_bytes: int, body_seconds: float) -> None:
        self.app, self.tokens = app, tokens
        self.max_body_bytes, self.body_seconds = max_body_bytes, body_seconds
        self._held_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        held = _Held()
        try:
            await self._answer(scope, receive, send, held)
        finally:
            self._held_bytes -= held.num_bytes

    async def _answer(self, scope: Scope, receive: Receive, send: Send, held: _Held) -> None:
        path, headers = scope["path"], dict(scope["headers"])
        known = self.tokens is None or path in OPEN_PATHS or self.tokens.admit(headers.get(b"authorization", b""))
        if known:
            body = await self._read(receive, self.max_body_bytes, self.body_seconds, held)
        else:  # what a stranger still sends is thrown away, and not for long
            body = await self._read(receive, 0, min(self.body_seconds, _STRANGERS_SECONDS), held)
        if body is _Unread.GONE:
            return
        if not known:
            said = "give a valid token, as the header Authorization: Bearer TOKEN"
            answer = refusal(path, said, 401, {"WWW-Authenticate": "Bearer"})
        elif body is _Unread.LATE:
            said = f"the body did not arrive within {self.body_seconds:g} s"
            answer = refusal(path, said, 408, {"Connection": "close"})
        elif body is _Unread.LARGE:
            answer = refusal(path, f"the body is larger than {self.max_body_bytes:,} bytes; send fewer products", 413)
        elif body is _Unread.CROWDED:
            said = "the server holds as many large requests as it can; try again in 1 s"
            answer = refusal(path, said, TOO_MANY, {"Retry-After": "1"})
        elif headers.get(b"content-encoding", b"identity").strip().lower() not in (b"", b"identity"):
            answer = refusal(path, "the body is compressed; send it as it is", 415)
        else:
            assert isinstance(body, bytes)
            await self.app(scope, _replay(body, receive), send)
            return
        await answer(scope, receive, send)

    async def _read(self, receive: Receive, max_bytes: int, seconds: float, held: _Held) -> bytes | _Unread:
        parts: list[bytes] = []
        size = 0
        crowded = False
        try:
            async with asyncio.timeout(seconds):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":
                        return _Unread.GONE
                    part, more = message.get("body", b""), message.get("more_body", False)
                    size += len(part)
                    crowded = crowded or self._held_bytes + len(part) > _BODIES_HELD * self.max_body_bytes
                    if size > max_bytes or crowded:
                        parts.clear()
                        self._held_bytes -= held.num_bytes
                        held.num_bytes = 0
                    else:
                        parts.append(part)
                        held.num_bytes += len(part)
                        self._held_bytes += len(part)
        except TimeoutError:
            return _Unread.LARGE if size > max_bytes else _Unread.LATE
        if size > max_bytes:
            return _Unread.LARGE
        return _Unread.CROWDED if crowded else b"".join(parts)


class _Held:
    """How many bytes of a request's body are in memory."""

    num_bytes = 0


class _Unread(enum.Enum):
    """Why there is no body."""

    GONE, LATE, LARGE = "the client went away", "it did not arrive in time", "it is too large"
    CROWDED = "too many others are held"


def _replay(body: bytes, receive: Receive) -> Receive:
    """`receive` of a request whose body was read already."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message
