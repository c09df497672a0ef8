"""`tidar serve`: an OpenAI-compatible server, on our own engine or by vLLM."""

from __future__ import annotations

import importlib.util
import ipaddress
import os
import socket
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from tidar.apart import apart
from tidar.cli import options as o
from tidar.errors import TidarError, first_line
from tidar.vllm import Options, command, environment
from tidar.vllm.hooks import installed_version
from tidar.vllm.shapes import Curve

GRACE = 5
"""Seconds that running answers have to end after Ctrl-C."""


def serve(
    folder: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The same as --model.")] = None,
    model: Annotated[
        str | None, typer.Option(help="Model to serve, as of `tidar generate` [default: smollm2-135m].")
    ] = None,
    engine: Annotated[
        str | None,
        typer.Option(
            help="'vllm', or 'local' (this process) [default: vllm where it is installed and MODEL is a folder with "
            "all weights]."
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="'tidar' drafts and verifies, 'ar' is plain decoding.")] = "tidar",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 is the whole network.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[str | None, typer.Option(envvar="TIDAR_API_KEY", help="Key that requests must have.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the model in requests [default: as given].")] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Longest prompt and answer together [default: the model's, at most 4096].")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Most answers decoded together [local: 8].")] = None,
    max_queue: Annotated[
        int | None, typer.Option(help="Answers that may wait [64]; further requests get 429. Local only.")
    ] = None,
    drafter: o.DrafterFolder = None,
    draft_length: o.DraftLength = None,
    outcomes: o.Outcomes = None,
    curve: o.CurveSteps = None,
    alternatives: o.Alternatives = None,
    plan: o.PlanName = None,
    remeasure: o.Remeasure = False,
    device: o.Device = None,
    dtype: o.Dtype = None,
    weights: o.Weights = None,
) -> None:
    """Serve a model by OpenAI's HTTP API. The local engine aims at correctness, not at many users: those want vLLM."""
    if folder is not None and model is not None:
        raise TidarError("give either MODEL or --model")
    model = folder or model or "smollm2-135m"
    if mode not in ("tidar", "ar"):
        raise TidarError(f"mode is {mode!r}, but a server decodes in 'tidar' or 'ar'")
    if api_key == "":
        raise TidarError("the API key is empty: leave it out, or give one")
    if not 0 <= port < 2**16:
        raise TidarError(f"port is {port}, but must be between 0 and 65535")
    o.check_counts(batch_size=batch_size)
    if max_queue is not None and max_queue < 0:
        raise TidarError(f"max-queue is {max_queue}, but must be at least 0")
    if engine is None:
        engine = _default_engine(model)
    own: dict[str, Any] = {"alternatives": alternatives, "plan": plan, "remeasure": remeasure}
    if engine == "vllm":
        _refuse_local(drafter=drafter, device=device, weights=weights, max_queue=max_queue, **own)
        flags = {"host": host, "port": port, "served_model_name": name, "max_model_len": max_model_len, "dtype": dtype}
        steps = Curve.read(curve).entries if curve else None
        shape = Options(mode, draft_length, outcomes, steps, batch_size)  # type: ignore[arg-type]
        _become_vllm(model, flags, api_key, shape)
    if engine != "local":
        raise TidarError(f"engine is {engine!r}, but must be 'local' or 'vllm'")
    if curve:
        raise TidarError("--curve is an option of --engine vllm; the local engine measures what to draft")
    _need("fastapi", "uvicorn", "prometheus_client")
    from tidar.serve.app import create_app
    from tidar.serve.run import run

    listener = _listen(host, port)
    options: dict[str, Any] = {
        "name": name or model,
        "mode": mode,
        "rows": batch_size or 8,
        "waiting": 64 if max_queue is None else max_queue,
        "context": max_model_len,
        "api_key": api_key,
        "hosts": _names(host, listener),
        "draft_length": draft_length,
        "outcomes": outcomes,
    }
    app = apart(lambda: create_app(o.load(model, drafter, device, dtype, weights), **options, **own))
    run(app, listener, GRACE)


def _default_engine(model: str) -> str:
    """vLLM cannot load a drafter alone, nor the model by name."""
    return "vllm" if installed_version() is not None and (Path(model) / "config.json").is_file() else "local"


def _become_vllm(model: str, flags: dict[str, Any], api_key: str | None, options: Options) -> NoReturn:
    """Replace this process by `vllm serve`; the key goes through the environment, which others cannot list."""
    more = [
        text
        for flag, value in flags.items()
        if value is not None
        for text in (f"--{flag.replace('_', '-')}", str(value))
    ]
    key = {} if api_key is None else {"VLLM_API_KEY": api_key}
    argv = command(model, options, tuple(more))
    sys.stderr.flush()
    os.execvpe(argv[0], argv, {**os.environ, **environment(options), **key})


def _refuse_local(**options: Any) -> None:
    for name, value in options.items():
        if value is not None and value is not False:
            raise TidarError(f"--{name.replace('_', '-')} is an option of --engine local, not of vLLM")


def _need(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise TidarError(f"serving needs {', '.join(missing)}: pip install 'tidar[serve]'")


def _listen(host: str, port: int) -> socket.socket:
    """A bound socket, before a model is loaded for nothing."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=128)
    except OSError as error:
        raise TidarError(f"cannot listen on {host}:{port}: {first_line(error)}") from error


def _names(host: str, listener: socket.socket) -> list[str] | None:
    """Host names of requests to a loopback address: a web page that points its own name there is refused."""
    loopback = ipaddress.ip_address(listener.getsockname()[0]).is_loopback
    return ["localhost", "127.0.0.1", "[::1]", host.lower()] if loopback else None
