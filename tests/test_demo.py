import asyncio
import json
import re
import socket
import threading
import time

import httpx
import pytest
import uvicorn
from fastapi import FastAPI

from tidar import TidarModel
from tidar.decode.record import gather
from tidar.demo.page import TYPES, page_file, trace_page
from tidar.demo.routes import Desk, Run, demo_router
from tiny import drafting_folder, tiny_folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TidarModel.from_pretrained(drafting_folder(tmp_path_factory.mktemp("tiny")), device="cpu", dtype="float32")


def client(model):
    app = FastAPI()
    app.include_router(demo_router(model, "tiny"))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:9")


def ask(model, method, path, **options):
    async def one():
        async with client(model) as http:
            return await http.request(method, path, **options)

    return asyncio.run(one())


def events(text):
    return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n") if line]


def test_the_page_is_small_and_asks_nobody_else():
    files = [page_file(name) for name in TYPES]
    assert sum(len(text.encode()) for text in files) < 300_000
    addresses = [a for text in files for a in re.findall(r"""(?:https?:)?//[a-z0-9.]+\.[a-z]+[^\s"']*""", text)]
    assert addresses == ["http://www.w3.org/2000/svg"]  # a namespace
    assert not any(
        sink in text for text in files for sink in ("innerHTML", "insertAdjacentHTML", "document.write", "eval(")
    )


def test_files_are_served_with_a_policy(model):
    for name, kind in {**TYPES, "": TYPES["index.html"]}.items():
        answer = ask(model, "GET", f"/demo/{name}")
        assert (answer.status_code, answer.headers["content-type"]) == (200, kind)
        assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert ask(model, "GET", "/demo/routes.py").status_code == 404
    assert ask(model, "GET", "/demo/..%2froutes.py").status_code == 404
    assert ask(model, "GET", "/demo").headers["location"] == "demo/"


def test_a_run_tells_what_a_trace_holds(model):
    wanted = {"prompt": "hi", "draft_length": 4, "max_new_tokens": 9}
    answer = ask(model, "POST", "/demo/run", json=wanted)
    assert answer.headers["content-type"].startswith("text/event-stream")
    told = events(answer.text)
    run = gather(model.trace("hi", draft_length=4, max_new_tokens=9))
    steps = [event for event in told if event["event"] == "step"]
    assert [s["tokens"] for s in steps] == json.loads(json.dumps([s["tokens"] for s in run["steps"]]))
    end = next(event for event in told if event["event"] == "end")
    assert {k: end[k] for k in ("token_ids", "forwards", "text", "acceptance_lengths")} == {
        k: run[k] for k in ("token_ids", "forwards", "text", "acceptance_lengths")
    }
    thrown = {event["index"]: event["outcomes"] for event in told if event["event"] == "discarded"}
    assert all(run["steps"][i]["outcomes"] == o for i, o in thrown.items())
    assert len(thrown) == len(steps) - 1


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": "x" * 300}, "the model's context is 128"),
        ({"prompt": "hi", "draft_length": 0}, "draft length is 0"),
        ({"prompt": "hi", "temperature": -1}, "temperature is -1.0"),
        ({"prompt": "hi", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "hi", "mode": "ar", "trust": 0.5}, "trust below 1"),
    ],
)
def test_what_cannot_run_is_said_in_words(model, wanted, said):
    answer = ask(model, "POST", "/demo/run", json=wanted)
    assert answer.status_code == 400
    assert said in answer.json()["error"]


def test_a_model_without_drafter_says_so(tmp_path):
    plain = TidarModel.from_pretrained(tiny_folder(tmp_path), device="cpu")
    assert ask(plain, "GET", "/demo/model").json()["can_draft"] is False
    assert "has no drafter" in ask(plain, "POST", "/demo/run", json={"prompt": "hi"}).json()["error"]
    assert ask(plain, "POST", "/demo/run", json={"prompt": "hi", "mode": "ar"}).status_code == 200


def test_unknown_fields_and_other_sites_are_refused(model):
    assert ask(model, "POST", "/demo/run", json={"prompt": "hi", "top_z": 1}).status_code == 400
    other = {"origin": "https://example.com"}
    assert ask(model, "POST", "/demo/run", json={"prompt": "hi"}, headers=other).status_code == 403
    same = {"origin": "http://127.0.0.1:9"}
    assert ask(model, "POST", "/demo/run", json={"prompt": "hi", "max_new_tokens": 1}, headers=same).status_code == 200
    text = {"content-type": "text/plain"}  # what a form of another site could send
    assert ask(model, "POST", "/demo/run", content='{"prompt": "hi"}', headers=text).status_code == 400


def test_a_second_run_waits_for_its_turn(model):
    async def two():
        desk = Desk(model)
        first = desk.serve(await desk.begin(Run(prompt="one", draft_length=4, max_new_tokens=4)))
        second = desk.serve(await desk.begin(Run(prompt="two", draft_length=4, max_new_tokens=4)))
        assert '"start"' in await anext(first)
        assert '"waiting"' in await anext(second)
        following = asyncio.ensure_future(anext(second))
        rest = [message async for message in first]
        assert not following.done()
        assert '"discarded"' in rest[-1]
        assert '"start"' in await following
        assert '"end"' in "".join([message async for message in second])

    asyncio.run(two())


def test_a_failure_is_said_before_it_is_raised(model, monkeypatch):
    def broken(*arguments, **options):
        raise RuntimeError("out of memory\nand more")
        yield

    monkeypatch.setattr(model, "trace", broken, raising=False)

    async def one():
        desk = Desk(model)
        messages = desk.serve(await desk.begin(Run(prompt="one")))
        assert events(await anext(messages)) == [{"event": "error", "message": "the server failed: out of memory"}]
        with pytest.raises(RuntimeError, match="out of memory"):
            await anext(messages)
        assert not desk.turn.locked()

    asyncio.run(one())


def test_a_run_that_is_given_up_ends_and_lets_the_next_one_in(model):
    async def leave():
        desk = Desk(model)
        events = await desk.begin(Run(prompt="one", max_new_tokens=100))
        first = desk.serve(events)
        await anext(first)
        await anext(first)
        await first.aclose()
        assert not desk.turn.locked()
        await asyncio.get_running_loop().run_in_executor(desk.thread, lambda: None)
        assert events.gi_frame is None  # ended, not abandoned

    asyncio.run(leave())


@pytest.fixture
def served(model, monkeypatch):
    """A real server; the forwards that it has run."""
    ran = []
    real = TidarModel.trace

    def slow(self, *arguments, **options):
        for event in real(self, *arguments, **options):
            ran.append(event.event)
            time.sleep(0.02)
            yield event

    monkeypatch.setattr(TidarModel, "trace", slow)
    app = FastAPI()
    app.include_router(demo_router(model, "tiny"))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}", ran
    server.should_exit = True
    thread.join(10)


def test_a_closed_tab_stops_its_decode(served):
    address, ran = served
    wanted = {"prompt": "one", "mode": "ar", "max_new_tokens": 100}
    with httpx.Client() as http, http.stream("POST", f"{address}/demo/run", json=wanted) as stream:
        next(stream.iter_text())
    time.sleep(0.3)
    after = len(ran)
    time.sleep(0.3)
    assert after == len(ran) < 40


def test_the_page_with_a_trace_cannot_be_broken_out_of():
    evil = "</script><script>alert(1)</script><!--"
    page = trace_page({"prompt": evil, "runs": []})
    assert page.count("<script>") == 1
    assert evil not in page
    policy = re.search(r'content="(default-src [^"]*)"', page)[1]
    assert "unsafe" not in policy
    assert "script-src 'sha256-" in policy


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (r'{"prompt": "\ud800"}', "prompt: "),
        (r'{"prompt": "x", "mode": "\ud800"}', "mode: "),
        (r'{"prompt": "x", "\ud800": 1}', "the request: "),
        ('{"prompt": 5, "temperature": NaN}', "prompt: "),
        ("[", ""),
        ("", ""),
    ],
)
def test_bodies_that_cannot_be_read_are_refused_in_a_line(model, body, says):
    answer = ask(model, "POST", "/demo/run", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(says)


@pytest.mark.parametrize(("port", "said"), [("70000", "port is 70000"), ("taken", "cannot be used")])
def test_ports_that_cannot_be_used(run, port, said):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, err = run("demo", "--port", taken.getsockname()[1] if port == "taken" else port)
    assert code == 2
    assert said in err
