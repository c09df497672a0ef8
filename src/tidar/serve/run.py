"""Runs an application on a socket until Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI

from tidar.serve.service import Service

PATIENCE = 5
"""Seconds that clients have to read the end of their answers, once it is there."""


class _Server(uvicorn.Server):
    """Says when it is ready; ends running answers itself, so that their clients are told."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            _say(f"serving {self.service.name} at {url}/v1 (Ctrl-C stops)")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self.service.loop.running:
            _say(f"running answers have {self.grace:g} seconds to end (Ctrl-C again does not wait)")
        ending = asyncio.create_task(self._end_answers())
        await super().shutdown(sockets)
        ending.cancel()

    async def _end_answers(self) -> None:
        await asyncio.sleep(self.grace)
        await asyncio.to_thread(self.service.loop.stop)


def _say(text: str) -> None:
    print(f"tidar: {text}", file=sys.stderr, flush=True)


def run(app: FastAPI, listener: socket.socket, grace: float) -> None:
    """Serve; after Ctrl-C no request is taken, and running ones have `grace` seconds to end."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        lifespan="on",
        timeout_graceful_shutdown=int(grace) + PATIENCE,
    )
    app.state.service.loop.start()  # may measure for a minute, which Ctrl-C ends here, but not under uvicorn
    _Server(config, app.state.service, grace).run(sockets=[listener])
