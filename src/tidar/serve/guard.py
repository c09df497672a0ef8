"""What a request must pass before it is read: its size, how long it takes to arrive, and the API key."""

from __future__ import annotations

import asyncio
import os
import secrets

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tidar.serve.metrics import Metrics
from tidar.serve.protocol import ApiError

OPEN = ("/health", "/metrics")
BODY_SECONDS = 30.0
"""A body must have arrived by then."""


class Guard:
    """ASGI middleware: 401 without the key (but for OPEN paths), 413 for large bodies, 408 for slow ones.

    The whole body is read before the application sees it, so it is never more than `most_bytes` of memory.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, most_bytes: int, metrics: Metrics) -> None:
        self.app, self.api_key, self.most_bytes, self.metrics = app, api_key, most_bytes, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN:
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(_endpoint(scope["path"]), str(message["status"])).inc()
            await send(message)

        try:
            self._check_key(Headers(scope=scope))
            async with asyncio.timeout(BODY_SECONDS):
                body = await self._body(Headers(scope=scope), receive)
        except (ApiError, TimeoutError) as error:
            refusal = error if isinstance(error, ApiError) else ApiError(408, "the request took too long to arrive")
            await JSONResponse(refusal.body(), refusal.status, {"Connection": "close"})(scope, receive, counted)
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), counted)

    def _check_key(self, headers: Headers) -> None:
        if self.api_key is None:
            return
        given = headers.get("authorization", "").removeprefix("Bearer ")
        if not secrets.compare_digest(given.encode("latin-1"), os.fsencode(self.api_key)):  # the bytes of both
            raise ApiError(
                401, "the API key is missing or wrong: send 'Authorization: Bearer KEY'", None, "invalid_api_key"
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body, None if the client left before it was complete. Raises ApiError."""
        too_large = ApiError(413, f"the request has more than {self.most_bytes} bytes", None, "request_too_large")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > self.most_bytes:
            raise too_large
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self.most_bytes:
                raise too_large
            if not message.get("more_body", False):
                return b"".join(parts)


def _endpoint(path: str) -> str:
    """A path as a label: a bounded number of them."""
    return path if path in ("/v1/completions", "/v1/chat/completions") else "other"


def _replay(body: bytes, receive: Receive) -> Receive:
    """Gives the body at once, then whatever comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def give() -> Message:
        return waiting.pop() if waiting else await receive()

    return give
