"""The local server, as clients see it."""

import json
import re
import threading
from contextlib import suppress

import httpx
import openai
import pytest
from starlette.testclient import TestClient

from openai_suite import MESSAGES, PROMPTS, OpenAISuite, Served
from serving import running, wait_until
from tidar import TidarError, TidarModel
from tidar.decode.engine import Engine
from tidar.serve import guard
from tidar.serve.app import create_app
from tiny import CONTEXT, drafting_folder, tiny_folder

PLAN = {"draft_length": 4, "outcomes": 2, "alternatives": 3}
REFUSED = {
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "logit_bias": {"5": 1},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "response_format": {"type": "json_object"},
    "user": "me",
    "best_of": 2,
    "store": True,
    "no_such_thing": 1,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> TidarModel:
    folder = drafting_folder(tmp_path_factory.mktemp("drafting"))
    return TidarModel.from_pretrained(folder, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def app(model):
    return create_app(model, name="tiny", rows=6, waiting=100, **PLAN)


@pytest.fixture(scope="module")
def served(app):
    with running(app) as url:
        yield Served(url + "/v1", "tiny", CONTEXT, refused=REFUSED)


@pytest.fixture
def idle_afterwards(served, app):
    """No row hangs, whatever the case did."""
    yield
    loop = app.state.service.loop
    wait_until(lambda: loop.running == loop.queued == 0)


pytestmark = pytest.mark.usefixtures("idle_afterwards")


class TestLocal(OpenAISuite):
    pass


def post(served, path="completions", **body):
    body = json.dumps({"model": "tiny"} | body)
    return httpx.post(f"{served.url}/{path}", content=body, headers={"Content-Type": "application/json"}, timeout=60)


@pytest.mark.parametrize("prompt", PROMPTS[:2])
@pytest.mark.parametrize("options", [{"temperature": 0}, {"temperature": 0.9, "top_p": 0.9, "seed": 5}])
def test_answers_are_those_of_generate(served, model, prompt, options):
    wanted = model.generate(prompt, raw=True, max_new_tokens=24, **options, **PLAN)
    answer = served.complete(prompt, **options)
    assert answer.choices[0].text == wanted.text
    assert answer.usage.forwards == wanted.forwards
    assert answer.usage.tokens_per_forward == round(wanted.tokens_per_forward, 4)
    chat = served.chat([{"role": "user", "content": prompt}], **options)
    assert chat.choices[0].message.content == model.generate(prompt, max_new_tokens=24, **options, **PLAN).text


def test_plain_mode_serves_the_same_folder(model):
    with TestClient(create_app(model, name="tiny", mode="ar")) as client:
        body = {"model": "tiny", "prompt": "x", "temperature": 0, "max_tokens": 24}
        answer = client.post("/v1/completions", json=body).json()
        assert answer["choices"][0]["text"] == model.generate("x", raw=True, mode="ar", max_new_tokens=24).text
        assert answer["usage"]["tokens_per_forward"] == 1
        refused = client.post("/v1/completions", json=body | {"tidar": True})
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "tidar"


def test_drafts_that_a_seed_forbids_are_refused_not_left_out(model, monkeypatch):
    app = create_app(model, name="tiny", rows=1)  # its plan is "auto"
    monkeypatch.setattr(app.state.service.loop.planner, "prepare", lambda *args: None)
    body = {"model": "tiny", "prompt": "x", "seed": 1, "tidar": True}
    with TestClient(app) as client:
        refused = client.post("/v1/completions", json=body)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tidar")


def test_neutral_values_of_what_is_not_there_are_fine(served):
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "user": None}
    assert served.text("x", extra_body=neutral) == served.text("x")
    # Python finds that False equals 0, and True 1.
    assert post(served, prompt="x", frequency_penalty=False).status_code == 400


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": [["x"]]}),
        ("prompt", {"prompt": [10**6]}),
        ("prompt", {"prompt": "x" * CONTEXT}),
        ("prompt", {}),
        ("model", {"model": None, "prompt": "x"}),
        ("stop", {"prompt": "x", "stop": [""]}),
        ("stop", {"prompt": "x", "stop": ["a"] * 17}),
        ("n", {"prompt": ["x"] * 100, "n": 100}),
        ("max_tokens", {"prompt": "x", "max_tokens": CONTEXT}),
        ("logprobs", {"prompt": "x", "echo": True, "logprobs": 1}),
        ("stream_options", {"prompt": "x", "stream_options": {}}),
        ("stream_options", {"prompt": "x", "stream": True, "stream_options": {"x": 1}}),
        ("vllm_xargs", {"prompt": "x", "tidar": False, "vllm_xargs": {"tidar": True}}),
        ("temperature", {"prompt": "x", "temperature": "1"}),
        ("seed", {"prompt": "x", "seed": 2**63}),
        ("é", {"prompt": "x", "é": 1}),
        ("messages", {"messages": []}),
        ("messages", {"messages": [{"role": "tool", "content": "x"}]}),
        ("messages", {"messages": [{"role": "user", "content": "x", "name": "me"}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "\ud800"}]}),
        ("top_logprobs", {"messages": MESSAGES, "top_logprobs": 1}),
        ("max_tokens", {"messages": MESSAGES, "max_tokens": 1, "max_completion_tokens": 2}),
        ("max_completion_tokens", {"messages": MESSAGES, "max_completion_tokens": CONTEXT}),
    ],
)
def test_errors_name_the_parameter(served, param, body):
    answer = post(served, "chat/completions" if "messages" in body else "completions", **body)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == param
    assert param.split("_")[0] in error["message"]


@pytest.mark.parametrize(
    "extreme", [{"temperature": 1e300}, {"temperature": 1e-300}, {"top_p": 1e-300}, {"seed": -(2**63)}]
)
def test_extreme_values_are_honoured(served, extreme):
    assert post(served, prompt="x", **({"temperature": 1.0} | extreme)).status_code == 200


@pytest.mark.parametrize(("tokens", "new"), [(5, 16), (CONTEXT - 3, 3)])
def test_a_completion_has_16_tokens_or_what_fits(served, tokens, new):
    answer = served.complete([5] * tokens, max_tokens=openai.NOT_GIVEN, temperature=0)
    assert answer.usage.completion_tokens == new


def test_an_answer_can_be_sent_back(served):
    said = served.chat().choices[0].message.model_dump()
    assert served.chat([*MESSAGES, said, *MESSAGES]).choices[0].message.role == "assistant"


def test_a_model_without_chat_template_completes_only(tmp_path):
    plain = TidarModel.from_pretrained(tiny_folder(tmp_path, chat=False), device="cpu", dtype="float32")
    with TestClient(create_app(plain, name="tiny", mode="ar")) as client:
        assert client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}).status_code == 200
        refused = client.post("/v1/chat/completions", json={"model": "tiny", "messages": MESSAGES})
        assert refused.status_code == 400
        assert "chat template" in refused.json()["error"]["message"]
    with pytest.raises(TidarError, match="no drafter"):
        create_app(plain, name="tiny")


def test_a_key_is_needed_but_for_health_and_metrics(model):
    app = create_app(model, name="tiny", api_key="opensesame", **PLAN)
    with TestClient(app) as client:
        for headers in ({}, {"Authorization": "Bearer opensesam"}, {"Authorization": "Bearer é"}):
            encoded = {name: value.encode() for name, value in headers.items()}
            answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "x"}, headers=encoded)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
        assert client.get("/v1/models", headers={"Authorization": "Bearer opensesame"}).status_code == 200
        assert client.get("/openapi.json").status_code == 401
        assert client.get("/health").status_code == client.get("/metrics").status_code == 200


def test_a_key_may_have_any_characters(model):
    app = create_app(model, name="tiny", api_key="schlüssel", **PLAN)
    with TestClient(app) as client:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            assert client.get("/v1/models", headers={"Authorization": f"Bearer {key}".encode()}).status_code == status


def test_only_named_hosts_are_answered(model):
    with TestClient(create_app(model, name="tiny", hosts=["127.0.0.1"], **PLAN)) as client:
        assert client.get("http://127.0.0.1:80/v1/models").status_code == 200
        assert client.get("http://page.example/v1/models").status_code == 400


def test_no_page_of_another_origin_may_read(served):
    answer = httpx.get(served.url + "/models", headers={"Origin": "http://page.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_large_bodies_are_refused_before_they_are_read(model):
    app = create_app(model, name="tiny", most_bytes=1000, **PLAN)
    with running(app) as url:
        told = httpx.post(url + "/v1/completions", json={"model": "tiny", "prompt": "x" * 2000})
        streamed = httpx.post(url + "/v1/completions", content=(b"x" * 100 for _ in range(50)))
    for answer in (told, streamed):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"


def test_slow_bodies_are_refused(served, monkeypatch):
    monkeypatch.setattr(guard, "BODY_SECONDS", 0.2)
    hold = threading.Event()

    def slowly():
        yield b'{"model": '
        hold.wait(1)
        yield b'"tiny"}'

    assert httpx.post(served.url + "/completions", content=slowly()).status_code == 408


def test_a_full_queue_is_429(model, monkeypatch):
    app = create_app(model, name="tiny", rows=1, waiting=0, **PLAN)
    with running(app) as url:
        one = Served(url + "/v1", "tiny", CONTEXT)
        with one.complete("x", max_tokens=100, stream=True) as stream:
            next(iter(stream))
            with pytest.raises(openai.RateLimitError):
                one.complete("x", n=1)
        wait_until(lambda: app.state.service.loop.running == 0)
        assert one.text("x")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_row(served, app, stream):
    loop = app.state.service.loop
    cancelled = loop.metrics.ended.labels("cancelled")._value.get
    before = cancelled()
    body = {"model": "tiny", "prompt": ["x"] * 40, "max_tokens": 120, "stream": stream}
    with (
        suppress(httpx.ReadTimeout),
        httpx.stream("POST", served.url + "/completions", json=body, timeout=0.1) as answer,
    ):
        next(answer.iter_lines())
    wait_until(lambda: loop.running == loop.queued == 0)
    assert cancelled() > before


def test_a_failure_is_told_in_both_ways(model, monkeypatch):
    app = create_app(model, name="tiny", **PLAN)
    with running(app) as url:
        broken = Served(url + "/v1", "tiny", CONTEXT)
        with monkeypatch.context() as patch:
            patch.setattr(app.state.service.loop.runner, "step", lambda *args: 1 / 0)
            with pytest.raises(openai.InternalServerError):
                broken.complete("x")
            with pytest.raises(openai.APIError, match="failed"):
                list(broken.complete("x", stream=True))
        assert broken.text("x")


def test_a_stop_is_told(model):
    app = create_app(model, name="tiny", **PLAN)
    with running(app) as url:
        stopped = Served(url + "/v1", "tiny", CONTEXT)
        stream = iter(stopped.complete("x", max_tokens=120, stream=True))
        next(stream)
        app.state.service.loop.stop()
        with pytest.raises(openai.APIError, match="has stopped before"):
            list(stream)
        with pytest.raises(openai.InternalServerError, match="has stopped decoding"):
            stopped.complete("x")
        assert httpx.get(url + "/health").status_code == 503


def test_metrics_count_what_happened(model):
    with TestClient(create_app(model, name="tiny", rows=2, **PLAN)) as client:
        assert client.get("/health").json() == {"status": "ok", "running": 0, "waiting": 0}
        answer = client.post("/v1/completions", json={"model": "tiny", "prompt": "hello", "temperature": 0}).json()
        client.post("/v1/completions", json={})
        wait_until(lambda: client.get("/health").json()["running"] == 0)
        lines = client.get("/metrics").text.splitlines()
    told = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    forwards, tokens = answer["usage"]["forwards"], answer["usage"]["completion_tokens"]
    expected = {
        'tidar_requests_total{path="/v1/completions",status="200"}': 1,
        'tidar_requests_total{path="/v1/completions",status="400"}': 1,
        "tidar_prompt_tokens_total": 5,
        "tidar_generated_tokens_total": tokens,
        'tidar_forwards_total{kind="prefill"}': 1,
        'tidar_forwards_total{kind="step"}': forwards - 1,
        "tidar_acceptance_length_count": forwards - 1,
        "tidar_running_rows": 0,
        "tidar_waiting_rows": 0,
        f'tidar_answers_total{{reason="{answer["choices"][0]["finish_reason"]}"}}': 1,
    }
    assert {name: float(told[name]) for name in expected} == expected
    assert float(told["tidar_acceptance_length_sum"]) >= tokens - 1


def test_events_are_what_the_format_says(served):
    body = {"model": "tiny", "messages": MESSAGES, "stream": True, "max_tokens": 5}
    answer = httpx.post(served.url + "/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = re.findall(r"data: (.*)\n\n", answer.text)
    assert "".join(f"data: {event}\n\n" for event in events) == answer.text
    assert events[-1] == "[DONE]"
    assert all(json.loads(event)["object"] == "chat.completion.chunk" for event in events[:-1])


@pytest.mark.parametrize(
    "options", [{"rows": 0}, {"waiting": -1}, {"context": 1}, {"context": CONTEXT + 1}, {"mode": "block-diffusion"}]
)
def test_options_that_cannot_be_meant(model, options):
    with pytest.raises(TidarError):
        create_app(model, name="tiny", **options)


def test_the_engine_can_still_be_used_beside_a_server(served, model):
    assert isinstance(model.engine(), Engine)
    assert model.generate("x", raw=True, max_new_tokens=24).text == served.text("x")
