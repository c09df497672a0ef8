"""`tidar demo`: the page that shows a model's steps, on this machine alone."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from typing import Annotated

import typer

from tidar.apart import apart
from tidar.api import TidarModel
from tidar.cli import options as o
from tidar.cli.files import model_name
from tidar.errors import TidarError

HOST = "127.0.0.1"


def demo(
    model: o.Model = "smollm2-135m",
    port: Annotated[int, typer.Option(help="Port on 127.0.0.1; 0 takes a free one.")] = 8765,
    drafter: o.DrafterFolder = None,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Open a local web page that shows an answer appear step by step."""
    try:
        import uvicorn
        from fastapi import FastAPI
        from fastapi.responses import RedirectResponse
        from starlette.middleware.trustedhost import TrustedHostMiddleware

        from tidar.demo.routes import demo_router
    except ImportError as error:
        raise TidarError(f"the demo needs {error.name}: pip install 'tidar[serve]'") from error
    listening = listen(port)
    loaded = apart(lambda: warm(o.load(model, drafter, device, dtype, weights)))
    app = FastAPI(title="tidar demo", docs_url=None, redoc_url=None, openapi_url=None)
    # Another site's name that points here (DNS rebinding) is refused.
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[HOST, "localhost"])
    app.include_router(demo_router(loaded, model_name(model)))
    app.get("/", include_in_schema=False)(lambda: RedirectResponse("/demo/"))
    print(f"http://{HOST}:{listening.getsockname()[1]}/demo/   (Ctrl-C stops it)", file=sys.stderr, flush=True)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
    logging.getLogger("uvicorn.error").addFilter(_is_news)
    uvicorn.Server(config).run(sockets=[listening])


def _is_news(record: logging.LogRecord) -> bool:
    """Ctrl-C ends runs that are under way: uvicorn reports that, and each of them, as an error."""
    cancelled = record.exc_info is not None and isinstance(record.exc_info[1], asyncio.CancelledError)
    return not cancelled and "timeout graceful shutdown exceeded" not in record.getMessage()


def listen(port: int) -> socket.socket:
    """A socket on the loopback interface; raises TidarError before anything is loaded."""
    if not 0 <= port < 65536:
        raise TidarError(f"port is {port}, but must be between 0 and 65535")
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port))
    except OSError as error:
        raise TidarError(f"port {port} cannot be used ({error.strerror}): choose another with --port") from error
    return listening


def warm(model: TidarModel) -> TidarModel:
    """The model, which has answered once: the first answer on the page waits for no measurement and no compilation."""
    for mode in ("tidar", "ar") if model.network.can_draft else ("ar",):
        model.generate("Hello", mode=mode, max_new_tokens=2)
    return model
