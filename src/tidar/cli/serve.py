"""`tidar serve`: an OpenAI-compatible server, on our own engine or by vLLM."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from typing import Annotated, Any

import typer

from tidar.cli import options as o
from tidar.errors import TidarError, first_line

GRACE = 5
"""Seconds that running answers have to end after Ctrl-C."""


def serve(
    folder: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to serve, as of `tidar generate` [default: smollm2-135m].")
    ] = None,
    engine: Annotated[str, typer.Option(help="'local' (this process) or 'vllm'.")] = "local",
    mode: Annotated[str, typer.Option(help="'tidar' drafts and verifies, 'ar' is plain decoding.")] = "tidar",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(envvar="TIDAR_API_KEY", help="Key that requests to /v1 must have.")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests [default: as given].")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and answer together [default: the model's, at most 4096].")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Answers decoded together.")] = 8,
    max_queue: Annotated[int, typer.Option(help="Answers that may wait; further requests get 429.")] = 64,
    drafter: o.DrafterFolder = None,
    draft_length: o.DraftLength = None,
    outcomes: o.Outcomes = None,
    alternatives: o.Alternatives = None,
    plan: o.PlanName = "auto",
    remeasure: o.Remeasure = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Serve a model by OpenAI's HTTP API. The local engine aims at correctness, not at many users: those want vLLM."""
    if folder is not None and model is not None:
        raise TidarError("give either MODEL or --model")
    model = folder or model or "smollm2-135m"
    given: dict[str, Any] = {
        "draft_length": draft_length,
        "outcomes": outcomes,
        "alternatives": alternatives,
        "plan": plan,
        "remeasure": remeasure,
    }
    if engine == "vllm":
        local = {**given, "drafter": drafter, "device": device, "weights": weights}
        _refuse_local(local | {"plan": None if plan == "auto" else plan})
        _serve_by_vllm(
            model,
            mode=mode,
            host=host,
            port=port,
            api_key=api_key,
            name=name,
            max_model_len=max_model_len,
            batch_size=batch_size,
            dtype=dtype,
        )
    if engine != "local":
        raise TidarError(f"engine is {engine!r}, but must be 'local' or 'vllm'")
    o.check_counts(batch_size=batch_size)
    if max_queue < 0 or not 0 <= port < 2**16:
        raise TidarError(f"max-queue is {max_queue} and port {port}, but they must be at least 0, and port below 65536")
    if mode not in ("tidar", "ar"):
        raise TidarError(f"mode is {mode!r}, but a server decodes in 'tidar' or 'ar'")
    if api_key == "":
        raise TidarError("the API key is empty: leave it out, or give one")
    _need("fastapi", "uvicorn", "prometheus_client", extra="serve")
    listener = _listen(host, port)
    loaded = o.load(model, drafter, device, dtype, weights)
    from tidar.serve.app import create_app
    from tidar.serve.run import run

    app = create_app(
        loaded,
        name=name or model,
        mode=mode,  # type: ignore[arg-type]
        rows=batch_size,
        waiting=max_queue,
        context=max_model_len,
        api_key=api_key,
        hosts=_names(host),
        **given,
    )
    run(app, listener, GRACE)


def _serve_by_vllm(model: str, **options: Any) -> None:
    """Become `vllm serve`."""
    _need("vllm", extra="vllm")
    try:
        from tidar.vllm.command import arguments  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise TidarError(f"vLLM is installed, but the plug-in for it cannot be used: {first_line(error)}") from error
    argv = ["vllm", *arguments(model, **options)]
    sys.stderr.flush()
    os.execvp(argv[0], argv)


def _refuse_local(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if value:
            raise TidarError(f"--{name.replace('_', '-')} is an option of --engine local; vLLM does not have it")


def _need(*packages: str, extra: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise TidarError(f"serving needs {', '.join(missing)}: pip install 'tidar[{extra}]'")


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before a model is loaded for nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise TidarError(f"cannot listen on {host}:{port}: {first_line(error)}") from error


def _names(host: str) -> list[str] | None:
    """Host names of requests to a loopback address: a web page that points its own name there is refused."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    return ["localhost", "127.0.0.1", "[::1]", host] if loopback else None
