"""The server's HTTP side: OpenAI's endpoints over the loop, as a FastAPI application."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import Receive, Scope, Send

from tidar import __version__
from tidar.api import Mode, TidarModel
from tidar.decode.engine import Engine
from tidar.errors import TidarError
from tidar.serve.answers import Choice, Shape, shape_of
from tidar.serve.guard import Guard
from tidar.serve.loop import ClosedError, Deliver, Job, Loop, Piece, QueueFullError
from tidar.serve.metrics import Metrics
from tidar.serve.protocol import AnyRequest, ApiError, ChatRequest, CompletionRequest, ErrorBody
from tidar.serve.service import Service

NOT_JSON = "the body must be a JSON object in UTF-8, with Content-Type: application/json"
MOST_BYTES = 2**20
"""Of a request's body."""
CONTEXT = 4096
"""Longest prompt and answer together, unless the model's context is shorter or the caller says otherwise."""

Tagged = tuple[int, Piece]

ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": text}
    for status, text in {
        400: "A parameter that cannot be honoured, or a body that cannot be read.",
        401: "No or another API key.",
        404: "Another model.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        429: "Too many requests wait.",
        503: "The server has stopped decoding.",
    }.items()
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"application/json": {}, "text/event-stream": {}}, "description": "One answer, or its stream."},
    **ERRORS,
}


class Answers:
    """Pieces of a request's answers, from the loop's thread to the event loop."""

    def __init__(self) -> None:
        self.events, self.pieces = asyncio.get_running_loop(), asyncio.Queue[Tagged]()

    def receiver(self, index: int) -> Deliver:
        def deliver(piece: Piece) -> None:
            with suppress(RuntimeError):  # the event loop has ended, and with it whoever waited
                self.events.call_soon_threadsafe(self.pieces.put_nowait, (index, piece))

        return deliver

    async def until_ended(self, count: int) -> AsyncIterator[Tagged]:
        """Pieces of `count` answers until the last has ended. Raises ApiError where the server failed."""
        while count:
            index, piece = await self.pieces.get()
            if piece.failed is not None:
                raise ApiError(500, piece.failed)
            count -= piece.finish_reason is not None
            yield index, piece


def create_app(
    model: TidarModel,
    *,
    name: str | None = None,
    mode: Mode = "tidar",
    rows: int = 8,
    waiting: int = 64,
    context: int | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] | None = None,
    most_bytes: int = MOST_BYTES,
    **planning: Any,
) -> FastAPI:
    """An OpenAI-compatible server for a model. It decodes from its start to its end (ASGI lifespan).

    Args:
        model: what answers; it needs a tokenizer, and nobody else may decode with it meanwhile.
        name: how requests call it; default its base's name.
        mode: "tidar", or "ar" for no drafts at all.
        rows: answers decoded together.
        waiting: answers that may wait for a place; further requests get 429.
        context: longest prompt and answer together, in tokens; default the model's, at most 4096.
        api_key: bearer token that everything but /health and /metrics asks for.
        hosts: names that requests may address the server by; any by default. A server without a key should name its
            own: a web page cannot reach it then by a name of the page's.
        most_bytes: of a request's body.
        **planning: what forwards do: the arguments of `TidarModel.plan` beside mode and params.

    Raises:
        TidarError: for a model or options that cannot be served.
    """
    loop = _loop(model, mode, planning, rows, waiting, context)
    service = Service(model, name or model.base, loop)
    app = FastAPI(title="tidar", version=__version__, lifespan=_lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    app.add_middleware(Guard, api_key=api_key, most_bytes=most_bytes, metrics=loop.metrics)
    if hosts is not None:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    _handle_errors(app)
    _add_routes(app, service)
    return app


def _loop(
    model: TidarModel, mode: Mode, planning: dict[str, Any], rows: int, waiting: int, context: int | None
) -> Loop:
    longest = model.network.max_positions
    for name, value, least in (("rows", rows, 1), ("waiting", waiting, 0)):
        if value < least:
            raise TidarError(f"{name} is {value}, but must be at least {least}")
    if model.tokenizer is None:
        raise TidarError("this model folder has no tokenizer, so it cannot be served")
    if context is not None and not 2 <= context <= (longest or context):
        raise TidarError(f"max-model-len is {context}, but must be between 2 and {longest or 'any number'}")
    engine = model.engine(mode, **planning)
    if not isinstance(engine, Engine):
        raise TidarError(f"mode is {mode!r}, but a server decodes in 'tidar' or 'ar'")
    return Loop(
        model.network,
        model.tokenizer,
        engine.planner,
        rows=rows,
        waiting=waiting,
        context=context or min(CONTEXT, longest or CONTEXT),
        metrics=Metrics(),
    )


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    loop: Loop = app.state.service.loop
    await asyncio.to_thread(loop.start)
    try:
        yield
    finally:
        await asyncio.to_thread(loop.stop)


def _add_routes(app: FastAPI, service: Service) -> None:
    loop = service.loop

    @app.get("/health")
    def health() -> Response:
        status = "ok" if loop.open else "stopped"
        body = {"status": status, "running": loop.running, "waiting": loop.queued}
        return JSONResponse(body, 200 if loop.open else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(loop.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", responses=ERRORS)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [service.card()]}

    @app.get("/v1/models/{name:path}", responses=ERRORS)
    def model(name: str) -> dict[str, Any]:
        service.check_name(name)
        return service.card()

    @app.post("/v1/completions", responses=ANSWERS)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        return await _answer(service, body, request)

    @app.post("/v1/chat/completions", responses=ANSWERS)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await _answer(service, body, request)


async def _answer(service: Service, body: AnyRequest, request: Request) -> Response:
    answers = Answers()
    jobs, choices = await asyncio.to_thread(service.jobs, body, answers.receiver)
    shape = shape_of(body, service.name, service.tokenizer)
    try:
        service.loop.submit(jobs)
    except QueueFullError:
        raise ApiError(429, "too many requests are waiting: try again later", None, "queue_full") from None
    except ClosedError:
        raise ApiError(503, "the server has stopped decoding") from None
    if body.stream:
        return _Stream(_chunks(choices, answers, shape, body.includes_usage), service.loop, jobs)
    try:
        await _while_connected(request, _collect(choices, answers))
    finally:
        service.loop.cancel(jobs)
    return JSONResponse(shape.whole(choices))


class _Stream(StreamingResponse):
    """Server-sent events; however they end, the rows that made them are free then."""

    def __init__(self, events: AsyncIterator[str], loop: Loop, jobs: list[Job]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.loop, self.jobs = loop, jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.loop.cancel(self.jobs)


async def _collect(choices: list[Choice], answers: Answers) -> None:
    async for index, piece in answers.until_ended(len(choices)):
        choices[index].add(piece)


async def _while_connected(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, unless the client leaves before it is done."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ApiError(499, "the client has left")  # nobody reads this
        await working
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _chunks(choices: list[Choice], answers: Answers, shape: Shape, usage: bool) -> AsyncIterator[str]:
    extra = {"usage": None} if usage else {}
    try:
        for choice in choices:
            for chunk in shape.start(choice):
                yield _event(chunk | extra)
        async for index, piece in answers.until_ended(len(choices)):
            choices[index].add(piece)
            if (chunk := shape.chunk(choices[index], piece)) is not None:  # type: ignore[assignment]
                yield _event(chunk | extra)
        if usage:
            yield _event(shape.last(choices))
    except ApiError as refusal:
        yield _event(refusal.body())
    yield "data: [DONE]\n\n"


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _handle_errors(app: FastAPI) -> None:
    """Every error in OpenAI's shape."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return JSONResponse(error.body(), error.status)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = [part for part in first["loc"] if part != "body"]
        if not where or first["type"] == "json_invalid":
            return await refused(request, ApiError(400, NOT_JSON))
        param, message = str(where[0]), f"{_path(where)}: {first['msg']}"
        if param == "prompt" and len(where) > 1:  # said of one form of several
            message = "prompt must be a text, a list of token ids, or a list of either, and not empty"
        return await refused(request, ApiError(400, message, param, "invalid_value"))

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        message = NOT_JSON if error.status_code == 400 else str(error.detail)
        return await refused(request, ApiError(error.status_code, message))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return await refused(request, ApiError(500, "the server failed; its log says why"))


def _path(where: Sequence[Any]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
