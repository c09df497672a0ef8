"""The demo's part of a local server: the page, and runs as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field

from tidar.api import TidarModel
from tidar.decode.record import Event
from tidar.demo.describe import describe
from tidar.demo.page import POLICY, TYPES, page_file
from tidar.errors import TidarError, first_line

HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


class Run(BaseModel):
    """What the page asks for; fields as in `TidarModel.stream`."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(max_length=1_000_000)]
    mode: Literal["tidar", "ar"] = "tidar"
    draft_length: int | None = None
    outcomes: int | None = None
    temperature: float = 0.0
    trust: float = 1.0
    max_new_tokens: int = 128
    seed: int = 0


def demo_router(model: TidarModel, name: str) -> APIRouter:
    """The demo's routes, to be mounted on a local server's app.

    Args:
        model: what answers.
        name: how the page calls it.
    """
    router = APIRouter(prefix="/demo", include_in_schema=False, route_class=_Route)
    desk = Desk(model)

    @router.get("")
    def without_slash() -> Response:
        return RedirectResponse("demo/")

    @router.get("/")
    def index() -> Response:
        return file("index.html")

    @router.get("/model")
    def facts() -> dict[str, Any]:
        return describe(model, name)

    @router.get("/{name}")
    def file(name: str) -> Response:
        if name not in TYPES:
            raise HTTPException(404)
        return Response(page_file(name), headers=HEADERS, media_type=TYPES[name])

    @router.post("/run")
    async def run(request: Request, wanted: Run) -> Response:
        refuse_other_sites(request)
        try:
            events = await desk.begin(wanted)
        except TidarError as error:
            return JSONResponse({"error": str(error)}, 400)
        return StreamingResponse(desk.serve(events), media_type="text/event-stream", headers=HEADERS)

    return router


class _Route(APIRoute):
    """Says in one line what is wrong with a body, in words that UTF-8 can spell whatever the body holds."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def checked(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                first = error.errors()[0]
                text = f"{' '.join(map(str, first['loc'][1:])) or 'the request'}: {first['msg']}"
                return JSONResponse({"error": text.encode("utf-8", "replace").decode()}, 400)

        return checked


def refuse_other_sites(request: Request) -> None:
    """A page from elsewhere may not use the model of whoever looks at it."""
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != request.headers.get("host"):
        raise HTTPException(403, "this page is from another site")


class Desk:
    """Lets one run at a time use the model; the others wait their turn.

    All work on the model happens in one thread, so that a run that is given up has ended before the next one begins.
    """

    def __init__(self, model: TidarModel) -> None:
        self.model = model
        self.thread = ThreadPoolExecutor(1, "tidar-demo")
        self.turn = asyncio.Lock()

    async def begin(self, wanted: Run) -> Iterator[Event]:
        """The run's events, not yet begun. Raises TidarError for what cannot be run, at once."""
        options = wanted.model_dump()
        prompt = options.pop("prompt")
        if not prompt.strip():
            raise TidarError("the prompt is empty")
        begin = partial(self.model.trace, prompt, **options)
        return await asyncio.get_running_loop().run_in_executor(self.thread, begin)

    async def serve(self, events: Iterator[Event]) -> AsyncIterator[str]:
        """The run as server-sent events; closing this, as a closed browser tab does, ends it."""
        if self.turn.locked():
            yield _message({"event": "waiting"})
        async with self.turn:
            loop = asyncio.get_running_loop()
            try:
                while (event := await loop.run_in_executor(self.thread, next, events, None)) is not None:
                    yield _message({"event": event.event, **asdict(event)})
            except TidarError as error:
                yield _message({"event": "error", "message": str(error)})
            except Exception as error:
                yield _message({"event": "error", "message": f"the server failed: {first_line(error)}"})
                raise
            finally:
                self.thread.submit(events.close)  # type: ignore[attr-defined]


def _message(event: dict[str, Any]) -> str:
    return f"data: {json.dumps(event)}\n\n"
