"""What a request may say, checked before vLLM sees it: a 400 that names what cannot be honoured.

vLLM drops fields of a body that it does not know. So "tidar" in the body (what `extra_body={"tidar": false}` sends) is
moved to where vLLM hands it on, and what nobody would honour is refused.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any, get_type_hints

from tidar.errors import TidarError
from tidar.vllm.settings import drafting_switch

PATHS = ("/v1/completions", "/v1/chat/completions", "/v1/responses")
"""Routes on which every field is checked."""
OTHER_PATHS = (
    "/v1/messages", "/v1/chat/completions/batch", "/inference/v1/generate", "/invocations", "/cohere/v2/chat",
)  # fmt: skip
"""Other routes that generate: clients of other APIs send fields that vLLM ignores, so only ours are checked."""
SWITCH = "tidar"
ONLY_LOCAL = ("trust", "draft_length", "outcomes", "alternatives", "plan")
"""Options of tidar's own engine that a shared server fixes at its start."""

Scope = dict[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RefusedError(TidarError):
    """A parameter that cannot be honoured."""

    def __init__(self, param: str, reason: str) -> None:
        super().__init__(reason)
        self.param = param


def check_body(body: dict[str, Any], known: frozenset[str] | None = None, strict: bool = True) -> dict[str, Any]:
    """The body as vLLM should see it. Raises RefusedError.

    Args:
        known: the fields that vLLM has; None if that cannot be told.
        strict: refuse all other fields, and not only what is ours.
    """
    extra = body.get("vllm_xargs") or {}
    if not isinstance(extra, dict):
        raise RefusedError("vllm_xargs", "vllm_xargs must be an object")
    for name in ONLY_LOCAL:
        if name in body or name in extra:
            raise RefusedError(name, f"{name} is fixed when the server starts, and not for each request")
    for name, value in body.items():
        if strict and known is not None and value is not None and name not in {SWITCH, *known}:
            raise RefusedError(name, f"parameter '{name}' is not supported: vLLM would ignore it")
    given = [place[SWITCH] for place in (body, extra) if place.get(SWITCH) is not None]
    if not given:
        return body
    if known is not None and "vllm_xargs" not in known:
        raise RefusedError(SWITCH, "vLLM does not hand 'tidar' on from this route: use /v1/chat/completions")
    try:
        wanted = {drafting_switch(value) for value in given}
    except TidarError as error:
        raise RefusedError(SWITCH, str(error)) from error
    if len(wanted) > 1:
        raise RefusedError(SWITCH, "tidar is given twice, once as true and once as false")
    # vLLM's own check of vllm_xargs knows no truth values.
    passed = {**extra, SWITCH: int(wanted.pop())}
    return {**{name: value for name, value in body.items() if name != SWITCH}, "vllm_xargs": passed}


class CheckRequests:
    """ASGI middleware for `vllm serve --middleware`."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST" or scope["path"] not in (*PATHS, *OTHER_PATHS):
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
                checked = check_body(body, known_fields(scope), scope["path"] in PATHS)
            except RefusedError as error:
                await _refuse(send, error)
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


def known_fields(scope: Scope) -> frozenset[str] | None:
    """Names of the body's fields that the endpoint of a request has; None where it cannot be told."""
    for route in getattr(scope.get("app"), "routes", []):
        if getattr(route, "path", None) == scope["path"] and "POST" in (route.methods or ()):
            model = get_type_hints(route.endpoint).get("request")
            fields = getattr(model, "model_fields", None)
            if fields:
                return frozenset(fields) | {str(field.alias) for field in fields.values() if field.alias}
    return None


async def _refuse(send: Send, reason: RefusedError) -> None:
    error = {"message": str(reason), "type": "BadRequestError", "param": reason.param, "code": 400}
    text = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": text})
