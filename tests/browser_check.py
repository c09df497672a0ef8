"""A real browser drives the demo page and a trace file: `make test-browser`. Skipped where there is no Chromium."""

import os
import shutil
import socket
import threading
import time
from dataclasses import replace

import pytest

pytest.importorskip("playwright", reason="pip install playwright")

import uvicorn
from fastapi import FastAPI
from playwright.sync_api import Error, Page, expect, sync_playwright

from tidar import TidarModel
from tidar.decode.record import Step, gather
from tidar.demo.describe import describe
from tidar.demo.page import trace_page
from tidar.demo.routes import demo_router
from tiny import drafting_folder

EVIL = "<img src=x onerror=\"document.title='broken'\"><b>bold</b></script>"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        path = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
        try:
            launched = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        except Error as error:
            pytest.skip(f"no browser: {error.message.splitlines()[0]}")
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return TidarModel.from_pretrained(drafting_folder(tmp_path_factory.mktemp("tiny")), device="cpu", dtype="float32")


class Served:
    """A server that can be ended, over a model whose forwards take `pause` seconds each."""

    def __init__(self, model, monkeypatch):
        self.pause, self.evil, self.steps = 0.01, False, 0
        real = model.trace

        def slow(*arguments, **options):
            events = real(*arguments, **options)
            return (self.changed(event) for event in events)

        monkeypatch.setattr(model, "trace", slow, raising=False)
        app = FastAPI()
        app.include_router(demo_router(model, "tiny"))
        listening = socket.socket()
        listening.bind(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listening.getsockname()[1]}/demo/"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listening]}, daemon=True)
        self.thread.start()

    def changed(self, event):
        if isinstance(event, Step):
            self.steps += 1
            time.sleep(self.pause)
            if self.evil:
                return replace(event, tokens=[replace(t, text=EVIL, piece=EVIL) for t in event.tokens])
        return event

    def end(self):
        self.server.should_exit = True
        self.thread.join(10)


@pytest.fixture
def served(model, monkeypatch):
    server = Served(model, monkeypatch)
    yield server
    server.end()


@pytest.fixture
def page(browser, served):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(served.address)
    expect(page.locator("#model")).to_contain_text("tiny")
    yield page
    assert [text for text in said if "Failed to load resource" not in text] == []
    assert {url.split("/")[2].split(":")[0] for url in asked if not url.startswith("data:")} == {"127.0.0.1"}
    context.close()


def answer(page: Page, prompt: str = "hello", length: int = 24, draft_length: str = "4") -> None:
    """Run a prompt and wait for the end."""
    begin(page, prompt, length, draft_length)
    expect(page.locator("#run")).to_have_text("Run", timeout=20_000)


def begin(page: Page, prompt: str = "hello", length: int = 24, draft_length: str = "4") -> None:
    page.fill("#prompt", prompt)
    page.fill("#max_new_tokens", str(length))
    if page.locator("#draft_length").is_visible():
        page.select_option("#draft_length", draft_length)
    page.click("#run")


def text_of(page: Page, lane: str = "#main-lane") -> str:
    return page.locator(f"{lane} .answer").evaluate("answer => answer.textContent")


def test_type_run_and_watch_it_finish(page, model):
    answer(page)
    wanted = model.generate("hello", max_new_tokens=24, draft_length=4)
    assert text_of(page) == text_of(page, "#rival-lane") == wanted.text
    facts = page.locator("#main-lane .facts").inner_text()
    assert facts.startswith(f"{wanted.new_tokens} tokens · {wanted.forwards} forwards")
    assert f"{wanted.tokens_per_forward:.2f} tokens per forward" in facts
    expect(page.locator("#rival-lane .legend")).to_contain_text("Token for token the same answer")
    expect(page.locator("#where")).to_have_text(f"forward {wanted.forwards} of {wanted.forwards}")
    bars = page.locator("#histogram div").all_inner_texts()
    lengths = wanted.acceptance_lengths
    assert [int(bar or 0) for bar in bars] == [lengths.count(n + 1) for n in range(4)]


def test_steps_are_scrubbed_by_buttons_keys_and_slider(page):
    answer(page)
    where = page.locator("#where")
    total = int(where.inner_text().split()[-1])
    page.click("#previous")
    expect(where).to_have_text(f"forward {total - 1} of {total}")
    page.locator("#where").click()  # out of any field
    page.evaluate("() => document.activeElement.blur()")
    page.keyboard.press("ArrowLeft")
    expect(where).to_have_text(f"forward {total - 2} of {total}")
    expect(page.locator("#detail h2")).to_contain_text(f"Forward {total - 2} of {total}")
    page.focus("#scrub")
    page.keyboard.press("Home")
    expect(where).to_have_text(f"forward 1 of {total}")
    expect(page.locator("#detail")).to_contain_text("The prefill reads")
    assert page.locator("#main-lane .token:not(.ahead)").count() == 1
    page.keyboard.press("ArrowRight")
    assert page.locator("#detail .blocks li").count() == 4
    assert page.locator("#detail .blocks li.right").count() == 1
    assert "told when" not in page.locator("#detail .blocks").inner_text()


def test_it_plays(page):
    answer(page)
    page.click("#previous")
    page.focus("#scrub")
    page.keyboard.press("Home")
    page.select_option("#speed", "1")
    page.click("#play")
    expect(page.locator("#main-lane .token.ahead")).to_have_count(0, timeout=10_000)
    expect(page.locator("#play")).to_have_attribute("aria-label", "Play")


def test_a_token_shows_its_step_and_probabilities(page):
    answer(page)
    token = page.locator("#main-lane .token").nth(5)
    token.hover()
    tip = page.locator("#tip")
    for word in ("committed by", "forward", "drafter", "AR", "%"):
        expect(tip).to_contain_text(word)
    page.mouse.move(5, 5)
    expect(tip).to_be_hidden()
    token.focus()
    expect(tip).to_be_visible()
    page.keyboard.press("ArrowRight")
    expect(tip).to_contain_text("committed by")
    assert page.locator("#main-lane .token:focus").count() == 1
    page.keyboard.press("Escape")
    expect(tip).to_be_hidden()


def test_the_layout_is_drawn_and_told(page):
    answer(page)
    canvas = page.locator("#layout")
    drawn = "canvas => new Set(canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data).size"
    assert canvas.evaluate(drawn) > 5
    canvas.focus()
    page.keyboard.press("ArrowDown")
    expect(page.locator("#layout-caption")).to_contain_text("Draft 1, at position")
    for _ in range(5):
        page.keyboard.press("ArrowDown")
    expect(page.locator("#layout-caption")).to_contain_text(
        "of the block for “1 stands”, at position",
    )
    expect(page.locator("#layout-caption")).to_contain_text("draft 1 and all of its own block")


def test_plain_mode(page, model):
    page.select_option("#mode", "ar")
    expect(page.locator("#draft_length")).to_be_hidden()
    answer(page, length=8)
    assert text_of(page) == model.generate("hello", mode="ar", max_new_tokens=8).text
    expect(page.locator("#rival-lane")).to_be_hidden()
    expect(page.locator("#detail")).to_contain_text("Plain decoding")


def test_controls_reach_the_engine(page, model):
    page.fill("#temperature", "0.9")
    page.fill("#trust", "0.5")
    expect(page.locator("#hint")).to_contain_text("no longer exactly")
    page.uncheck("#race")
    answer(page, draft_length="3")
    wanted = model.generate("hello", max_new_tokens=24, draft_length=3, temperature=0.9, trust=0.5)
    assert text_of(page) == wanted.text
    page.fill("#trust", "1")
    page.select_option("#outcomes", "1")
    answer(page, draft_length="3")
    page.click("#previous")
    assert page.locator("#detail .blocks li").count() == 1


def test_a_phone(page):
    page.set_viewport_size({"width": 360, "height": 740})
    answer(page)
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.locator("#main-lane .token").nth(3).click()
    box = page.locator("#tip").bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= 360
    expect(page.locator("#play")).to_be_in_viewport()


def test_light_and_dark(page):
    colour = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != light
    page.click("#theme")
    page.emulate_media(color_scheme="light")
    assert page.evaluate(colour) == light


def test_an_empty_and_a_long_prompt(page, served):
    page.click("#run")
    expect(page.locator("#notice")).to_have_text("Write a prompt first.")
    page.fill("#prompt", "hello")
    page.fill("#max_new_tokens", "0")
    page.click("#run")
    expect(page.locator("#notice")).to_contain_text("Longest answer")
    answer(page, prompt="x" * 200)
    expect(page.locator("#notice")).to_contain_text("the model's context is 128: shorten it.")
    expect(page.locator("#stage")).to_be_hidden()
    answer(page)
    expect(page.locator("#notice")).to_be_hidden()


def test_the_server_is_gone(page, served):
    served.end()
    answer(page)
    expect(page.locator("#notice")).to_contain_text("The server does not answer. Start `tidar demo` again")


def test_the_server_goes_while_it_runs(page, served):
    served.pause = 0.1
    begin(page)
    expect(page.locator("#main-lane .token")).not_to_have_count(0)
    served.end()
    expect(page.locator("#notice")).to_contain_text("The connection to the server broke", timeout=10_000)
    expect(page.locator("#run")).to_have_text("Run")
    assert text_of(page)


def test_stop_and_a_closed_tab_end_the_decode(page, served, browser):
    served.pause = 0.05
    begin(page, length=100)
    expect(page.locator("#main-lane .token")).not_to_have_count(0)
    page.click("#run")
    expect(page.locator("#notice")).to_have_text("Stopped.")
    assert ended(served)
    other = browser.new_page()
    other.goto(served.address)
    begin(other, length=100)
    expect(other.locator("#main-lane .token")).not_to_have_count(0)
    other.close()
    assert ended(served)


def ended(served) -> bool:
    """Whether no more forwards run."""
    time.sleep(0.4)
    before = served.steps
    time.sleep(0.4)
    return served.steps == before


def test_a_second_user_waits(page, served, browser):
    served.pause = 0.05
    begin(page, length=30)
    expect(page.locator("#main-lane .token")).not_to_have_count(0)
    other = browser.new_page()
    other.goto(served.address)
    begin(other, length=4)
    expect(other.locator("#notice")).to_contain_text("Another run is using the model")
    expect(other.locator("#main-lane .token")).to_have_count(4, timeout=20_000)
    expect(other.locator("#notice")).to_be_hidden()
    other.close()


def test_output_is_text_never_html(page, served):
    served.evil = True
    answer(page, length=6)
    assert EVIL in text_of(page)
    page.locator("#main-lane .token").nth(2).hover()
    assert page.locator("#stage img, #stage b >> text=bold, #tip img").count() == 0
    assert page.title() != "broken"


def test_a_trace_file(browser, model, tmp_path):
    prompt = EVIL + "</script><script>document.title='broken'</script>"
    runs = [
        gather(model.trace("hello", mode=m, max_new_tokens=12, **o))
        for m, o in (("tidar", {"draft_length": 4}), ("ar", {}))
    ]
    for step in runs[0]["steps"]:
        for token in step["tokens"]:
            token["piece"] = token["text"] = EVIL
    document = {**describe(model, "tiny"), "prompt": prompt, "settings": {"temperature": 0, "trust": 1}, "runs": runs}
    (tmp_path / "trace.html").write_text(trace_page(document))
    page, asked, said = browser.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: said.append(message.text))
    page.goto(f"file://{tmp_path}/trace.html")
    assert page.locator("#asked").inner_text() == prompt
    assert text_of(page) == EVIL * 12
    expect(page.locator("#composer")).to_be_hidden()
    page.click("#previous")
    page.click("#play")
    expect(page.locator("#main-lane .token.ahead")).to_have_count(0)
    assert page.title() == "tidar: watch one step"
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == said == []
    page.close()


def test_the_first_token_is_as_fast_as_in_the_terminal(page, model):
    answer(page)
    began = time.perf_counter()
    next(iter(model.stream("hello", draft_length=4)))
    terminal = time.perf_counter() - began
    clock = """() => new Promise(done => {
        const answer = document.querySelector("#main-lane .answer"), began = performance.now();
        const told = new MutationObserver(() => answer.firstChild && done(performance.now() - began));
        told.observe(answer, {childList: true});
        document.querySelector("#run").click();
    })"""
    assert page.evaluate(clock) / 1000 < terminal + 0.25


def test_the_newest_tokens_of_a_long_answer_stay_in_sight(page):
    answer(page, length=40)
    lane = page.locator("#main-lane .answer")
    lane.evaluate("e => { e.style.width = '3em'; e.style.maxHeight = '4em' }")
    assert lane.evaluate("e => e.scrollHeight > 2 * e.clientHeight")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowRight")
    seen = "e => { const box = e.getBoundingClientRect(), last = [...e.children].at(-1).getBoundingClientRect();"
    assert lane.evaluate(seen + " return last.top >= box.top - 1 && last.bottom <= box.bottom + 1 }")
    page.locator("#scrub").evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input', { bubbles: true })) }")
    first = "e => { const box = e.getBoundingClientRect(), first = e.children[0].getBoundingClientRect();"
    assert lane.evaluate(first + " return first.top >= box.top - 1 }")
