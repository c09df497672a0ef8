"""What a request may say about drafting, checked before vLLM sees it: a 400 that names what cannot be honoured.

vLLM drops fields of a body that it does not know. So "tidar" in the body (what `extra_body={"tidar": false}` sends) is
moved to where vLLM hands it on, and what nobody would honour is refused.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

from tidar.errors import TidarError
from tidar.vllm.settings import drafting_switch

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
SWITCH = "tidar"
ONLY_LOCAL = ("trust", "draft_length", "outcomes", "alternatives", "plan")
"""Options of tidar's own engine that a shared server fixes at its start."""

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


def check_body(body: dict[str, Any]) -> dict[str, Any]:
    """The body as vLLM should see it. Raises TidarError for what cannot be honoured."""
    extra = body.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        raise TidarError("vllm_xargs must be an object")
    named = [name for name in ONLY_LOCAL if name in body or name in extra]
    if named:
        raise TidarError(f"{', '.join(named)}: fixed when the server starts, and not for each request")
    given = [place[SWITCH] for place in (body, extra) if SWITCH in place]
    if not given:
        return body
    if len({drafting_switch(value) for value in given}) > 1:
        raise TidarError("tidar is given twice, once as true and once as false")
    # vLLM's own check of vllm_xargs knows no truth values.
    passed = {**extra, SWITCH: int(drafting_switch(given[0]))}
    return {**{name: value for name, value in body.items() if name != SWITCH}, "vllm_xargs": passed}


class CheckRequests:
    """ASGI middleware for `vllm serve --middleware`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in PATHS:
            await self.app(scope, receive, send)
            return
        raw = await _read(receive)
        if raw is None:
            return
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError):
            body = None  # vLLM says what is wrong with it
        if isinstance(body, dict):
            try:
                checked = check_body(body)
            except TidarError as error:
                await _refuse(send, str(error))
                return
            if checked is not body:
                raw = json.dumps(checked).encode()
                headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
                scope = {**scope, "headers": [*headers, (b"content-length", str(len(raw)).encode())]}
        await self.app(scope, _replay(raw, receive), send)


async def _read(receive: Receive) -> bytes | None:
    """A request's whole body; None if the client has gone."""
    parts = list[bytes]()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body"):
            return b"".join(parts)


def _replay(raw: bytes, receive: Receive) -> Receive:
    """Receives the body once, then whatever else the client does."""
    pending = [raw]

    async def again() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        return await receive()

    return again


async def _refuse(send: Send, reason: str) -> None:
    error = {"message": reason, "type": "BadRequestError", "param": SWITCH, "code": 400}
    text = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": text})
