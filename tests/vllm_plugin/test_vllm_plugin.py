"""The plug-in's own logic, which needs no vLLM: curves, flags, requests, versions."""

import asyncio
import itertools
import json
import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from pydantic import BaseModel

from tidar.bench import serving, shapes
from tidar.errors import TidarError
from tidar.vllm import Options, arguments, engine_options, hooks, metrics
from tidar.vllm.requests import CheckRequests, check_body
from tidar.vllm.settings import wants_drafts
from tidar.vllm.shapes import PLAIN, Curve, Shape, choose_curve
from tidar.vllm.step import Told
from tiny import drafting_folder, tiny_folder


def test_curve_shrinks_to_plain_decoding():
    curve = choose_curve([Shape(8, 8), Shape(8, 4), Shape(8, 2), Shape(4, 2), Shape(4, 1)], 256)
    chosen = [curve.at(requests) for requests in range(1, 257)]
    slots = [shape.slots for shape in chosen]
    assert slots == sorted(slots, reverse=True)
    assert slots[0] >= 24
    assert chosen[-1] == PLAIN
    assert Curve.parse(curve.entries) == curve
    assert all(curve.of_slots(shape.slots) == shape for shape in chosen)


def test_small_models_draft_for_few_requests_only():
    """Their steps take what the host takes, which grows with the requests, whatever is drafted."""
    shapes = [Shape(8, 4), Shape(8, 2), Shape(8, 1), Shape(4, 1)]
    large, small = (choose_curve(shapes, 256, weights=weights) for weights in (16_000_000_000, 270_000_000))
    assert 4 <= small.steps[-1][0] < 16 < large.steps[-1][0] <= choose_curve(shapes, 256).steps[-1][0]


def test_curves_in_words():
    assert Curve.read(["4:8:4", "12:8:2"]).entries == [[4, 8, 4], [12, 8, 2]]
    for entries, says in ((["4-8-4"], "REQUESTS:K:OUTCOMES"), (["4:8"], "draft length"), (["4:8:9"], "cannot draft")):
        with pytest.raises(TidarError, match=says):
            Curve.read(entries)


def test_no_curve_where_tokens_are_dear():
    assert choose_curve([Shape(8, 4)], 8, costs=((1, 1.0), (64, 64.0))) is None


@pytest.mark.parametrize(
    "entries", [[], [[4, 8, 9]], [[4, 1, 1]], [[4, 8, 4], [2, 4, 2]], [[1, 4]], [[1, 8, 2], [2, 6, 3]]]
)
def test_curves_that_cannot_be_meant(entries):
    with pytest.raises(TidarError):
        Curve.parse(entries)


def test_flags(tmp_path):
    folder = drafting_folder(tmp_path)
    flags = arguments(folder, Options(cuda=False, draft_length=4, outcomes=2), ("--port", "1"))
    assert flags[:2] == ["serve", folder]
    assert flags[-2:] == ["--port", "1"]
    given = dict(itertools.pairwise(flags))
    assert json.loads(given["--hf-overrides"]) == {"architectures": ["TidarLlamaForCausalLM"]}
    assert json.loads(given["--diffusion-config"]) == {"canvas_length": 11}
    assert "--no-async-scheduling" in flags
    assert "--middleware" in flags
    assert arguments(folder, Options(mode="ar")) == ["serve", folder]
    on_cuda = engine_options(folder, Options(cuda=True))
    assert (on_cuda["attention_backend"], on_cuda["worker_cls"]) == ("CUSTOM", "tidar.vllm.worker.TidarWorker")
    assert engine_options(folder, Options(cuda=True, curve=((9, 4, 2),)))["diffusion_config"] == {"canvas_length": 11}


@pytest.mark.parametrize("given", [None, "0"])
def test_looking_for_a_gpu_leaves_the_driver_alone(tmp_path, monkeypatch, given):
    name, asked = "PYTORCH_NVML_BASED_CUDA_CHECK", []
    monkeypatch.delenv(name, raising=False)
    if given is not None:
        monkeypatch.setenv(name, given)
    monkeypatch.setattr("torch.cuda.is_available", lambda: asked.append(os.environ[name]) or True)
    assert engine_options(drafting_folder(tmp_path))["async_scheduling"]
    assert asked == ["1"]
    assert os.environ.get(name) == given


def test_folders_that_cannot_draft(tmp_path):
    with pytest.raises(TidarError, match=r"config\.json"):
        arguments(str(tmp_path), Options(cuda=False))
    with pytest.raises(TidarError, match="--mode ar"):
        arguments(tiny_folder(tmp_path), Options(cuda=False))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (Options(mode="ar", draft_length=4), "mode 'ar' drafts nothing"),
        (Options(mode="ar", outcomes=4), "mode 'ar' drafts nothing"),
        (Options(mode="ar", curve=((4, 4, 2),)), "mode 'ar' drafts nothing"),
        (Options(mode="other"), "mode is 'other'"),
        (Options(draft_length=4, curve=((4, 4, 2),)), "give the curve, or those"),
        (Options(draft_length=0), "draft length is 0"),
        (Options(outcomes=0), "outcomes is 0"),
        (Options(outcomes=-1), "outcomes is -1"),
    ],
)
def test_options_that_nobody_would_honour(tmp_path, options, says):
    with pytest.raises(TidarError, match=says):
        engine_options(drafting_folder(tmp_path), options)


@pytest.mark.parametrize("off", [False, 0, "false", "off"])
def test_switch_reaches_vllm(off):
    assert check_body({"prompt": "a", "tidar": off}) == {"prompt": "a", "vllm_xargs": {"tidar": 0}}
    assert check_body({"vllm_xargs": {"tidar": off, "x": 1}}) == {"vllm_xargs": {"tidar": 0, "x": 1}}


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"tidar": "maybe"}, "tidar"),
        ({"tidar": True, "vllm_xargs": {"tidar": 0}}, "tidar"),
        ({"trust": 0.5}, "trust"),
        ({"vllm_xargs": {"draft_length": 4}}, "draft_length"),
        ({"vllm_xargs": [1], "tidar": True}, "vllm_xargs"),
        ({"vllm_xargs": 5}, "vllm_xargs must be"),
        ({"vllm_xargs": "no plan"}, "vllm_xargs must be"),
    ],
)
def test_refusals_name_the_field(body, named):
    with pytest.raises(TidarError, match=named):
        check_body(body)


def test_a_route_that_cannot_hand_the_switch_on():
    known = frozenset({"prompt"})
    with pytest.raises(TidarError, match="not hand 'tidar' on"):
        check_body({"prompt": "a", "tidar": False}, known, strict=False)
    assert check_body({"prompt": "a", "tidar": None, "other": 1}, known, strict=False)["other"] == 1
    passed = check_body({"tidar": False, "other": 1}, known | {"vllm_xargs"}, strict=False)
    assert passed == {"other": 1, "vllm_xargs": {"tidar": 0}}
    with pytest.raises(TidarError, match="other"):
        check_body({"other": 1}, known)


@pytest.mark.parametrize(
    ("path", "says"), [("/v1/completions", b"'other'"), ("/v1/messages", None), ("/tokenize", None)]
)
def test_routes_of_other_apis_may_have_fields_of_their_own(path, says):
    async def endpoint(request: Messages):
        """What a route calls."""

    routes = [SimpleNamespace(path=path, methods=["POST"], endpoint=endpoint)]
    scope = {"type": "http", "method": "POST", "path": path, "headers": [], "app": SimpleNamespace(routes=routes)}
    assert sent_back(scope, {"other": 1}) == (says is not None and [says])
    assert sent_back(scope, {"trust": 0.5}) == (path != "/tokenize" and [b"trust"])


class Messages(BaseModel):
    prompt: str = ""


def sent_back(scope, body):
    """What of the body a refusal names; False if the route saw it."""
    raw, said, seen = json.dumps(body).encode(), [], []

    async def receive():
        return {"type": "http.request", "body": raw}

    async def send(message):
        said.append(message.get("body", b""))

    async def app(scope, receive, send):
        seen.append((await receive())["body"])

    asyncio.run(CheckRequests(app)(scope, receive, send))
    assert bool(seen) != bool(said)
    return not seen and [name for name in (b"'other'", b"trust") if name in b"".join(said)]


def test_a_body_too_deep_to_read_is_left_to_vllm():
    raw = b"[" * 100_000
    messages, seen = iter([{"type": "http.request", "body": raw}]), []

    async def receive():
        return next(messages)

    async def app(scope, receive, send):
        seen.append((await receive())["body"])

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    asyncio.run(CheckRequests(app)(scope, receive, None))
    assert seen == [raw]


@pytest.mark.parametrize(
    ("version", "good"), [("0.25.1", False), ("0.26.0", True), ("0.32.4", True), ("0.33.0", False)]
)
def test_versions(monkeypatch, version, good):
    monkeypatch.setattr(hooks, "installed_version", lambda: version)
    if good:
        hooks.check_version()
    else:
        with pytest.raises(TidarError, match="pip install"):
            hooks.check_version()


@pytest.mark.parametrize(
    ("asked", "drafts"),
    [
        ({}, True),
        ({"extra_args": {"tidar": 1}}, True),
        ({"extra_args": {"tidar": 0}}, False),
        ({"extra_args": {"tidar": "off"}}, False),
        ({"logprobs": 0}, False),
    ],
)
def test_who_drafts(asked, drafts):
    params = SimpleNamespace(**{"extra_args": None, "logprobs": None, **asked})
    assert wants_drafts(SimpleNamespace(sampling_params=params, use_structured_output=False)) == drafts
    assert not wants_drafts(SimpleNamespace(sampling_params=params, use_structured_output=True))


def test_benchmark_on_random_weights(tmp_path, monkeypatch):
    kind, sizes = shapes.RANDOM["random:smollm2-135m"]
    monkeypatch.setitem(shapes.RANDOM, "random:smollm2-135m", (kind, {**sizes, "num_hidden_layers": 1}))
    folder = serving.write_random("random:smollm2-135m", tmp_path)
    assert engine_options(folder, Options(cuda=True))["hf_overrides"] == {"architectures": ["TidarLlamaForCausalLM"]}
    with pytest.raises(TidarError, match="share of drafts"):
        next(serving.measure(serving.Load("random:smollm2-135m")))


STAND_IN = """
import json, sys
given = json.loads(sys.argv[1])
print("a line of vLLM's", flush=True)
print("RESULT", json.dumps({"machine": {"device": "none"}, given["mode"] + "_start_s": 1.0}), flush=True)
for number, line in enumerate(sys.stdin):
    with open(sys.argv[2], "a") as turns:
        turns.write(given["mode"] + line)
    if given["mode"] == "tidar" and number == int(sys.argv[3]):
        sys.exit(3)
    print("RESULT", json.dumps({"tokens_per_s": (5, 7, 1, 3)[number % 4]}), flush=True)
"""


def stand_ins(monkeypatch, turns, end):
    def command(given):
        return [sys.executable, "-c", STAND_IN, json.dumps(given), str(turns), str(end)]

    monkeypatch.setattr(serving, "_command", command)
    return serving.measure(serving.Load("folder", concurrency=(1, 4), rounds=2, repeats=3))


def test_benchmark_takes_turns(monkeypatch, tmp_path):
    *_, result = stand_ins(monkeypatch, tmp_path / "turns", -1)
    passes = [
        f"{mode}[{requests}, {rounds}]" for requests in (1, 4) for rounds in (1, 2, 2, 2) for mode in serving.MODES
    ]
    assert (tmp_path / "turns").read_text().split("\n")[:-1] == passes
    rows = [(row["mode"], row["concurrency"], row["tokens_per_s"]) for row in result["rows"]]
    assert rows == [("ar", 1, 3), ("tidar", 1, 3), ("ar", 4, 3), ("tidar", 4, 3)]
    assert result["rows"][0]["all_tokens_per_s"] == [7, 1, 3]  # without the one that warms up
    assert result["conditions"]["device"] == "none"
    assert result["tidar_start_s"] == 1.0


def test_benchmark_keeps_what_it_has_where_a_contestant_ends(monkeypatch, tmp_path):
    results = []
    with pytest.raises(TidarError, match="mode 'tidar' ended with code 3"):
        results.extend(stand_ins(monkeypatch, tmp_path / "turns", 5))
    assert [row["concurrency"] for row in results[-1]["rows"]] == [1, 1]


class Event:
    """Stands for one of a GPU."""

    def record(self):
        """Nothing to wait for."""

    synchronize = record


def test_metrics_of_the_last_steps_are_there_though_no_more_steps_come(monkeypatch):
    def count(counter):
        return counter.collect()[0].samples[0].value

    monkeypatch.setattr(metrics, "EVERY", 0.05)
    monkeypatch.setattr("torch.cuda.Event", Event)
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    counters = metrics.STEPS, metrics.TOKENS, metrics.MISSES
    before = [count(counter) for counter in counters]
    counted = metrics.Metrics(Curve(((4, Shape(4, 2)),)), SimpleNamespace(type="cuda"))
    others = metrics.Metrics(Curve(((4, Shape(4, 2)),)), SimpleNamespace(type="cuda"), counts=False)
    for accepted, drafted in ((1, 1), (3, 4), (2, 4)):
        decision = SimpleNamespace(result=torch.tensor([[accepted, drafted, 0, *[5] * 4]]))
        for one in (counted, others):
            one.record(Told.of(decision, Shape(4, 2), torch.tensor([[0, 2]])).counts)
    deadline = time.monotonic() + 10
    while count(metrics.STEPS) < before[0] + 3 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [count(c) - b for c, b in zip(counters, before, strict=True)] == [3, 6, 1]
