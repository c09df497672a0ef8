"""`tidar serve` as users start and stop it."""

import importlib.util
import os
import re
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest

from openai_suite import Served
from serving import wait_until
from tidar.cli import serve
from tidar.errors import TidarError
from tiny import CONTEXT, drafting_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drafting_folder(tmp_path_factory.mktemp("drafting"))


@contextmanager
def process(*args, **environment):
    """A running `tidar serve`, where it is, and its stderr so far."""
    command = [sys.executable, "-m", "tidar.cli.main", "serve", *args, "--port", "0", "--device", "cpu"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | environment)
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(iter(server.stderr.readline, "")))
    reader.start()
    try:
        said = r"tidar: serving (\S+) at (http://127.0.0.1:\d+)/v1 \(Ctrl-C stops\)"
        wait_until(lambda: server.poll() is not None or re.search(said, "".join(lines)), 120)
        yield server, re.search(said, "".join(lines))[2], lines
    finally:
        server.kill()
        server.wait()
        reader.join()


def test_it_serves_until_ctrl_c_and_lets_answers_end(run, folder):
    with process(folder, "--plan", "fixed", "--name", "tiny", TIDAR_API_KEY="secret") as (server, url, lines):
        served = Served(url + "/v1", "tiny", CONTEXT, "secret")
        assert httpx.get(url + "/v1/models").status_code == 401
        port = url.rsplit(":", 1)[1]
        code, out, err = run("serve", folder, "--port", port)
        assert (code, out) == (2, "")
        assert err.startswith(f"tidar: cannot listen on 127.0.0.1:{port}: ")
        stream = iter(served.complete("x", max_tokens=40, stream=True))
        texts = [next(stream).choices[0].text]
        server.send_signal(signal.SIGINT)
        texts += [chunk.choices[0].text for chunk in stream]
        assert server.wait(20) in (130, -signal.SIGINT)
        assert "Traceback" not in "".join(lines)
    assert len("".join(texts)) > 10


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--model", "other"], "either MODEL or --model"),
        (["--mode", "block-diffusion"], "decodes in 'tidar' or 'ar'"),
        (["--engine", "other"], "'local' or 'vllm'"),
        (["--port", "65536"], "port is 65536"),
        (["--api-key", ""], "API key is empty"),
        (["--batch-size", "0"], "batch-size is 0"),
        (["--max-queue", "-1"], "max-queue is -1"),
        (["--max-model-len", str(CONTEXT + 1)], f"between 2 and {CONTEXT}"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["--engine", "vllm", "--drafter", "x"], "--drafter is an option of --engine local"),
        (["--engine", "local", "--curve", "4:8:4"], "--curve is an option of --engine vllm"),
        (["--engine", "vllm", "--curve", "4-8"], "REQUESTS:K:OUTCOMES"),
        (["--engine", "vllm", "--plan", "fixed"], "--plan is an option of --engine local"),
        (["--engine", "vllm", "--max-queue", "0"], "--max-queue is an option of --engine local"),
    ],
)
def test_bad_options_are_one_line(run, folder, args, says):
    code, out, err = run("serve", folder, "--port", 0, *args)
    assert (code, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1 or "Loading" in err


@pytest.mark.parametrize(
    ("error", "code", "says"), [(TidarError("no room"), 2, "tidar: no room\n"), (KeyboardInterrupt(), 130, "")]
)
def test_a_start_that_fails_is_one_line_and_ctrl_c_ends_it(run, monkeypatch, folder, error, code, says):
    def fail(self, *args):
        raise error

    monkeypatch.setattr("tidar.decode.planner.AutoPlanner.prepare", fail)
    got, out, err = run("serve", folder, "--engine", "local", "--device", "cpu", "--port", 0)
    assert (got, out) == (code, "")
    assert err.endswith(says)
    assert "Traceback" not in err


def test_what_is_not_installed_is_named(run, monkeypatch, folder):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "uvicorn" else find(name))
    says = "tidar: serving needs uvicorn: pip install 'tidar[serve]'\n"
    assert run("serve", folder, "--engine", "local") == (2, "", says)


def test_vllm_must_be_installed_and_tested(run, monkeypatch, folder):
    for found, says in ((None, "vLLM is not installed"), ("0.11.0", "vLLM 0.11.0 is outside the tested range")):
        monkeypatch.setattr("tidar.vllm.hooks.installed_version", lambda found=found: found)
        code, out, err = run("serve", folder, "--engine", "vllm")
        assert (code, out) == (2, "")
        assert says in err
        assert "pip install" in err


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("script", [True, False])
def test_vllm_is_given_its_flags(run, monkeypatch, folder, tmp_path, named, script):
    """Where it is installed it is the default. The key is not among the arguments, which everybody can list."""
    became = []
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    if script:
        (tmp_path / "vllm").touch()
    monkeypatch.setattr("tidar.vllm.hooks.installed_version", lambda: "0.26.0")
    monkeypatch.setattr("tidar.cli.serve.installed_version", lambda: "0.26.0")
    monkeypatch.setattr(sys.modules["tidar.vllm.command"], "version", lambda name: "0.26.0")

    def become(file, argv, environment):
        became.append((file, argv, environment))
        raise SystemExit(0)

    monkeypatch.setattr(os, "execvpe", become)
    engine = ["--engine", "vllm"] if named else []
    options = ["--mode", "ar", "--port", 81, "--api-key", "secret", "--name", "tiny"]
    assert run("serve", folder, *engine, *options, "--batch-size", 3, "--dtype", "float32")[0] == 0
    [(file, argv, environment)] = became
    assert file == argv[0]
    began = [str(tmp_path / "vllm")] if script else [sys.executable, "-P", "-m", "vllm.entrypoints.cli.main"]
    assert argv == [
        *began,
        *("serve", str(folder), "--max-num-seqs", "3", "--host", "127.0.0.1", "--port", "81"),
        *("--served-model-name", "tiny", "--dtype", "float32"),
    ]
    assert environment["VLLM_API_KEY"] == "secret"
    assert not any("secret" in argument for argument in argv)


def test_vllm_is_the_default_only_for_what_it_can_load(monkeypatch, folder):
    found = "0.26.0"
    monkeypatch.setattr("tidar.cli.serve.installed_version", lambda: found)
    whole, drafter = str(folder), str(Path(folder) / "drafter")
    assert [serve._default_engine(model) for model in (whole, drafter, "smollm2-135m")] == ["vllm", "local", "local"]
    found = None
    assert serve._default_engine(whole) == "local"


@pytest.mark.parametrize(
    ("host", "address", "loopback"), [("alias", "127.0.0.1", True), ("::1", "::1", True), ("alias", "0.0.0.0", False)]
)
def test_other_names_are_refused_wherever_only_this_machine_listens(host, address, loopback):
    names = serve._names(host, SimpleNamespace(getsockname=lambda: (address, 80)))
    assert names == (["localhost", "127.0.0.1", "[::1]", host] if loopback else None)
