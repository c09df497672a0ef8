"""Runs an application on a socket until Ctrl-C."""

from __future__ import annotations

import logging
import socket
import sys

import uvicorn
from fastapi import FastAPI


class _Server(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            host, port = sockets[0].getsockname()[:2]
            url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
            name = self.config.app.state.service.name  # type: ignore[union-attr]
            print(f"tidar: serving {name} at {url}/v1 (Ctrl-C stops)", file=sys.stderr, flush=True)


def run(app: FastAPI, listener: socket.socket, grace: int) -> None:
    """Serve; after Ctrl-C no request is taken, and running ones have `grace` seconds to end."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    config = uvicorn.Config(
        app, log_config=None, access_log=False, timeout_graceful_shutdown=grace, server_header=False, lifespan="on"
    )
    _Server(config).run(sockets=[listener])
