"""Whatever is sent to the local server: it answers, never with 5xx, and no row hangs."""

import json
import random
import socket
import time
from contextlib import suppress

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, status_code_conformance

from serving import running, wait_until
from tidar import TidarModel
from tidar.serve.app import MOST_BYTES, create_app
from tiny import drafting_folder

PATHS = ["/v1/completions", "/v1/chat/completions"]
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance]
BODIES = [
    {"model": "tiny", "prompt": "x", "max_tokens": 3, "stop": ["a"], "n": 2, "seed": 1, "temperature": 0.5},
    {"model": "tiny", "messages": [{"role": "user", "content": "é"}], "max_tokens": 3, "logprobs": True},
]
patiently = settings(max_examples=25, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = drafting_folder(tmp_path_factory.mktemp("drafting"))
    model = TidarModel.from_pretrained(folder, device="cpu", dtype="float32")
    return create_app(model, name="tiny", rows=4, draft_length=4, alternatives=2)


@pytest.fixture(scope="module")
def url(app):
    with running(app) as address:
        yield address


@pytest.fixture(autouse=True)
def idle_afterwards(app, url):
    yield
    loop = app.state.service.loop
    wait_until(lambda: loop.running == loop.queued == 0)
    answer = httpx.post(url + PATHS[0], json=BODIES[0])
    assert answer.status_code == 200


@pytest.fixture(scope="module")
def schema(url):
    return schemathesis.openapi.from_url(url + "/openapi.json")


OPERATIONS = [*((path, "POST") for path in PATHS), *((path, "GET") for path in ("/v1/models", "/health", "/metrics"))]


@pytest.mark.parametrize("generated", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
@given(data=st.data())
@patiently
def test_what_the_schema_allows_and_forbids(schema, path, method, generated, data):
    if method == "GET" and generated == GenerationMode.NEGATIVE:
        return  # nothing about them can be wrong
    case = data.draw(schema[path][method].as_strategy(generation_mode=generated))
    if isinstance(case.body, dict):  # mostly of a length that is answered, by the model that is there
        case.body["model"] = "tiny"
        for name in ("max_tokens", "max_completion_tokens"):
            if type(case.body.get(name)) is int:
                case.body[name] %= 9
        if isinstance(case.body.get("prompt"), list):  # generated token ids are seldom any of its
            case.body["prompt"] = "x"
    case.validate_response(case.call(), checks=CHECKS)


def send(url, path, body: bytes, kind="application/json") -> httpx.Response:
    return httpx.post(url + path, content=body, headers={"Content-Type": kind}, timeout=60)


def assert_told(answer):
    assert answer.status_code < 500
    if answer.status_code != 200:
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


@given(st.sampled_from(PATHS), st.binary(max_size=200))
@patiently
def test_bytes(url, path, body):
    assert send(url, path, body).status_code == 400


@given(st.sampled_from([0, 1]), st.integers(0, 10**6), st.binary(min_size=1, max_size=4), st.integers(0, 4))
@patiently
def test_broken_requests(url, which, place, bytes_, removed):
    body = json.dumps(BODIES[which], ensure_ascii=False).encode()
    place %= len(body)
    assert_told(send(url, PATHS[which], body[:place] + bytes_ + body[place + removed :]))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data(), st.sampled_from([0, 1]))
@patiently
def test_any_value_anywhere(url, data, which):
    """Python writes NaN, Infinity, huge numbers and halves of characters, which a strict client would not."""
    body = dict(BODIES[which])
    names = [*body, "top_p", "top_k", "min_p", "stream", "tidar", "vllm_xargs", "echo", "logit_bias", "tools", "user"]
    body[data.draw(st.sampled_from(names))] = data.draw(anything)
    assert_told(send(url, PATHS[which], json.dumps(body).encode()))


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model": "tiny", "prompt": ' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"model": "tiny", "prompt": "x", "seed": ' + b"9" * 10_000 + b"}",
        b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "tiny", "prompt": "\xff\xfe"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "x", "\\udfff": 1}',
        b'{"model": "\\udfff", "prompt": "x"}',
        b"\xef\xbb\xbf{}",
        b"null",
        b"",
        b'{"model": "tiny", "prompt": "x"}' + b" " * MOST_BYTES,
        b'{"model": "tiny", "prompt": ["' + b"x" * (MOST_BYTES - 100) + b'"]}',
    ],
)
def test_bodies_that_break_parsers(url, body):
    answer = send(url, PATHS[0], body)
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""])
def test_only_json_is_read(url, kind):
    """A web page may send the others anywhere, without asking."""
    assert send(url, PATHS[0], json.dumps(BODIES[0]).encode(), kind).status_code == 400


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/", "/v1/models/other", "/v1/models/../../etc/passwd", "/v1/%ff", "//"]
)
def test_other_paths(url, path):
    assert httpx.get(url + path).status_code == 404


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS"])
def test_other_methods(url, method):
    assert httpx.request(method, url + PATHS[0]).status_code == 405


def test_bytes_that_are_no_http(url):
    host, port = url.removeprefix("http://").split(":")
    chance = random.Random(0)
    request = f"POST {PATHS[0]} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: "
    wholes = [
        request.encode() + tail for tail in (b"-1\r\n\r\n", b"9" * 30 + b"\r\n\r\n", b"x\r\n\r\n", b"5\r\n\r\n{}")
    ]
    for data in [*wholes, *(chance.randbytes(200) for _ in range(20))]:
        with socket.create_connection((host, int(port)), timeout=5) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            with suppress(OSError):
                assert b" 500 " not in connection.recv(1000).split(b"\r\n")[0]


def raw(host: str, body: bytes) -> bytes:
    head = (
        f"POST {PATHS[0]} HTTP/1.1",
        f"Host: {host}",
        "Content-Type: application/json",
        f"Content-Length: {len(body)}",
    )
    return "\r\n".join((*head, "", "")).encode() + body


def test_clients_that_never_read(app, url):
    """Their rows end all the same, and the server goes on."""
    loop = app.state.service.loop
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": ["x"] * 8, "max_tokens": 60, "stream": True}).encode()
    held = []
    for _ in range(3):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
        connection.connect((host, int(port)))
        connection.sendall(raw(host, body))
        held.append(connection)
    wait_until(lambda: loop.running > 0)
    wait_until(lambda: loop.running == loop.queued == 0)
    assert httpx.post(url + PATHS[0], json=BODIES[0]).status_code == 200
    for connection in held:
        connection.close()


def test_clients_that_send_slowly(url):
    host, port = url.removeprefix("http://").split(":")
    body = json.dumps(BODIES[0]).encode()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        for byte in raw(host, body):
            connection.sendall(bytes([byte]))
            time.sleep(0.001)
        assert b" 200 " in connection.recv(1000).split(b"\r\n")[0]
