"""What any server of ours must do, asked through the official client. A test class per engine inherits these cases.

The class gives a fixture `served`.
"""

import asyncio
import os
import random
import re
import urllib.request
from dataclasses import dataclass, field
from functools import cached_property

import openai
import pytest

MESSAGES = [{"role": "user", "content": "Count to twenty."}]
PROMPTS = ["The sea is", "One, two, three,", "def add(a, b):", "x", "Once upon a time there was a king who"]


def alive(root: str) -> bool:
    """Whether the server at this address answers."""
    try:
        return urllib.request.urlopen(f"{root}/health", timeout=2).status == 200
    except OSError:
        return False


def metric(root: str, name: str) -> float:
    """A counter of its metrics page, all labels together."""
    page = urllib.request.urlopen(f"{root}/metrics").read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in page.splitlines() if re.match(rf"{name}(\{{|\s)", line))


@dataclass
class Served:
    """A running server: where it is, and what its engine refuses beyond what every engine must."""

    url: str
    model: str
    context: int
    api_key: str = "none"
    refused: dict[str, object] = field(default_factory=dict)

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key=self.api_key, max_retries=0, timeout=120)

    def complete(self, prompt, **options):
        options = {"max_tokens": 24, "temperature": 0} | options
        return self.client.completions.create(model=self.model, prompt=prompt, **options)

    def chat(self, messages=MESSAGES, **options):
        options = {"max_tokens": 24, "temperature": 0} | options
        return self.client.chat.completions.create(model=self.model, messages=messages, **options)

    def text(self, prompt, **options) -> str:
        return self.complete(prompt, **options).choices[0].text


def piece_of(text: str) -> str:
    """Up to three characters that are not at a text's beginning, none of them half a character."""
    pieces = [text[i : i + size] for size in (3, 2, 1) for i in range(len(text) // 3, len(text) - size)]
    return next(piece for piece in pieces if "\ufffd" not in piece)


class OpenAISuite:
    def test_it_lists_its_model(self, served):
        assert [model.id for model in served.client.models.list()] == [served.model]
        assert served.client.models.retrieve(served.model).id == served.model

    def test_another_model_does_not_exist(self, served):
        with pytest.raises(openai.NotFoundError):
            served.client.completions.create(model="another", prompt="x")

    def test_a_completion_is_as_long_as_asked_and_counted(self, served):
        answer = served.complete("The sea is", max_tokens=7)
        assert answer.object == "text_completion"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 7
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 7

    def test_chat_answers_as_assistant(self, served):
        for limit in ("max_tokens", "max_completion_tokens"):
            answer = served.chat(**{"max_tokens": openai.NOT_GIVEN, limit: 5})
            assert answer.object == "chat.completion"
            assert answer.choices[0].message.role == "assistant"
            assert answer.usage.completion_tokens <= 5

    def test_messages_may_be_lists_of_text_parts(self, served):
        parts = [{"role": "user", "content": [{"type": "text", "text": MESSAGES[0]["content"]}]}]
        assert served.chat(parts).choices[0].message.content == served.chat().choices[0].message.content

    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_a_streamed_completion_is_the_whole_one(self, served, prompt):
        chunks = list(served.complete(prompt, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == served.text(prompt)
        assert [c.choices[0].finish_reason for c in chunks][-1] in ("stop", "length")
        assert len({c.id for c in chunks}) == 1

    def test_a_streamed_chat_is_the_whole_one(self, served):
        chunks = list(served.chat(stream=True))
        assert chunks[0].choices[0].delta.role == "assistant"
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == served.chat().choices[0].message.content

    def test_a_stream_ends_with_its_usage_if_asked(self, served):
        chunks = list(served.complete("The sea is", stream=True, stream_options={"include_usage": True}))
        assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == served.complete("The sea is").usage.completion_tokens
        assert all(c.usage is None for c in served.complete("The sea is", stream=True))

    @pytest.mark.parametrize("stream", [False, True])
    def test_a_stop_string_ends_before_itself(self, served, stream):
        whole = served.text("The sea is")
        stop = piece_of(whole)
        answer = served.complete("The sea is", stop=["not in there", stop], stream=stream)
        choices = [c.choices[0] for c in answer] if stream else answer.choices
        assert "".join(c.text for c in choices) == whole[: whole.index(stop)]
        assert choices[-1].finish_reason == "stop"
        assert served.text("The sea is", stop=stop) == whole[: whole.index(stop)]

    def test_n_answers_differ_and_are_numbered(self, served):
        answer = served.complete("The sea is", n=3, temperature=1, seed=1)
        assert [c.index for c in answer.choices] == [0, 1, 2]
        assert len({c.text for c in answer.choices}) == 3

    def test_n_answers_stream_side_by_side(self, served):
        texts = ["", "", ""]
        for chunk in served.complete("The sea is", n=3, temperature=1, seed=1, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
        assert texts == [c.text for c in served.complete("The sea is", n=3, temperature=1, seed=1).choices]

    def test_several_prompts_are_answered_in_order(self, served):
        answers = served.complete(PROMPTS[:3], n=1).choices
        assert [c.index for c in answers] == [0, 1, 2]
        assert [c.text for c in answers] == [served.text(prompt) for prompt in PROMPTS[:3]]

    def test_a_seed_gives_its_answer_again(self, served):
        one, again, other = (served.text("x", temperature=1, seed=seed) for seed in (5, 5, 6))
        assert one == again != other

    def test_without_a_seed_answers_differ(self, served):
        assert len({served.text("x", temperature=1) for _ in range(3)}) > 1

    @pytest.mark.parametrize("narrow", [{"top_p": 1e-6}, {"top_k": 1}, {"min_p": 1.0}])
    def test_the_narrowest_truncation_is_greedy(self, served, narrow):
        named = {k: v for k, v in narrow.items() if k == "top_p"}
        extra = {k: v for k, v in narrow.items() if k != "top_p"}
        assert served.text("x", temperature=1, seed=3, extra_body=extra, **named) == served.text("x")

    def test_log_probabilities_of_a_completion(self, served):
        choice = served.complete("The sea is", logprobs=2).choices[0]
        said = choice.logprobs
        assert len(said.tokens) == len(said.token_logprobs) == len(said.top_logprobs) == len(said.text_offset)
        for chosen, likeliest in zip(said.token_logprobs, said.top_logprobs, strict=True):
            assert chosen >= max(likeliest.values()) - 1e-3  # greedy; of tokens with the same text one is told
            assert chosen <= 0

    def test_log_probabilities_of_a_chat(self, served):
        answer = served.chat(logprobs=True, top_logprobs=2, temperature=1, seed=2)
        content = answer.choices[0].logprobs.content
        assert len(content) == answer.usage.completion_tokens
        assert all(len(token.top_logprobs) >= 2 and token.logprob <= 0 for token in content)

    def test_log_probabilities_come_in_a_stream_too(self, served):
        whole = served.chat(logprobs=True).choices[0].logprobs.content
        chunks = [c.choices[0].logprobs for c in served.chat(logprobs=True, stream=True)]
        streamed = [token for said in chunks if said is not None for token in said.content]
        assert [t.token for t in streamed] == [t.token for t in whole]
        assert [t.logprob for t in streamed] == pytest.approx([t.logprob for t in whole], abs=1e-3)

    def test_they_do_not_depend_on_drafting(self, served):
        one, other = (
            served.complete("x", logprobs=1, extra_body={"vllm_xargs": {"tidar": on}}).choices[0].logprobs
            for on in (True, False)
        )
        assert one.tokens == other.tokens
        assert one.token_logprobs == pytest.approx(other.token_logprobs, abs=1e-3)

    def test_echo_repeats_the_prompt(self, served):
        text = served.text("The sea is", echo=True)
        assert text == "The sea is" + served.text("The sea is")
        chunks = served.complete("The sea is", echo=True, stream=True)
        assert "".join(c.choices[0].text for c in chunks) == text

    @pytest.mark.parametrize("extra", [{"tidar": False}, {"vllm_xargs": {"tidar": False}}])
    def test_drafting_can_be_switched_off_without_a_trace(self, served, extra):
        for prompt in PROMPTS:
            assert served.text(prompt, extra_body=extra) == served.text(prompt)

    @pytest.mark.parametrize(
        ("param", "value"),
        [("temperature", -1), ("top_p", 1.5), ("n", 0), ("max_tokens", -1), ("logprobs", 500), ("max_tokens", 10**6)],
    )
    def test_impossible_values_are_refused(self, served, param, value):
        with pytest.raises(openai.BadRequestError):
            served.complete("x", **{param: value})

    def test_what_cannot_be_honoured_is_refused_by_name(self, served):
        for param, value in served.refused.items():
            for call in (served.complete, served.chat):
                with pytest.raises(openai.BadRequestError) as error:
                    call(**({"prompt": "x"} if call == served.complete else {}), extra_body={param: value})
                assert error.value.param == param
                assert param in error.value.message

    def test_a_prompt_that_is_too_long_is_refused(self, served):
        with pytest.raises(openai.BadRequestError):
            served.complete([5] * (served.context + 1))

    def test_an_answer_may_fill_the_context(self, served):
        prompt = [5] * (served.context - 3)
        assert served.complete(prompt, max_tokens=3).usage.prompt_tokens == served.context - 3
        with pytest.raises(openai.BadRequestError):
            served.complete(prompt, max_tokens=4)

    def test_fifty_requests_with_random_cancellations(self, served):
        """Whoever stays gets all of its answer, once."""
        wanted = {prompt: served.text(prompt, max_tokens=40) for prompt in PROMPTS}
        results = asyncio.run(_storm(served, 50))
        stayed = [(prompt, text) for prompt, text, cancelled in results if not cancelled]
        assert 10 < len(stayed) < 45
        assert all(text == wanted[prompt] for prompt, text in stayed)
        assert all(wanted[prompt].startswith(text) for prompt, text, cancelled in results if cancelled)
        assert served.text("x", max_tokens=40) == wanted["x"]


async def _storm(served: Served, requests: int) -> list[tuple[str, str, bool]]:
    """(prompt, text, whether it was cancelled) of requests that begin at random times; some leave early."""
    chance = random.Random(0)
    async with openai.AsyncOpenAI(base_url=served.url, api_key=served.api_key, max_retries=0, timeout=120) as client:

        async def ask(number: int, delay: float, patience: int | None) -> tuple[str, str, bool]:
            prompt, text = PROMPTS[number % len(PROMPTS)], ""
            await asyncio.sleep(delay)
            options = {"model": served.model, "prompt": prompt, "max_tokens": 40, "temperature": 0}
            if patience == 0:
                task = asyncio.ensure_future(client.completions.create(**options))
                await asyncio.sleep(0.02)
                task.cancel()
                return prompt, "", True
            async with await client.completions.create(**options, stream=True) as stream:
                async for count, chunk in _numbered(stream):
                    text += chunk.choices[0].text
                    if count == patience:
                        return prompt, text, True
            return prompt, text, False

        jobs = [
            ask(number, chance.random(), chance.choice([None, None, 0, chance.randrange(1, 12)]))
            for number in range(requests)
        ]
        return await asyncio.gather(*jobs)


async def _numbered(stream):
    count = 0
    async for chunk in stream:
        count += 1
        yield count, chunk


class VLLMSuite(OpenAISuite):
    """The cases as vLLM answers them."""

    def test_it_lists_its_model(self, served):  # and has no page for each
        assert [model.id for model in served.client.models.list()] == [served.model]

    def test_an_answer_may_fill_the_context(self, served):  # and what does not fit is cut
        prompt = [5] * (served.context - 3)
        assert served.complete(prompt, max_tokens=3).usage.completion_tokens == 3


@pytest.fixture(scope="session")
def running():
    """A server that runs somewhere."""
    url, key = os.environ["TIDAR_SERVER"], os.environ.get("TIDAR_API_KEY", "none")
    card = openai.OpenAI(base_url=url, api_key=key).models.list().data[0]
    return Served(url, card.id, card.max_model_len, key)


class TestServer(OpenAISuite):
    """TIDAR_SERVER=http://127.0.0.1:8000/v1 pytest tests/openai_suite.py::TestServer; of vLLM: ::TestVLLMServer."""

    @pytest.fixture
    def served(self, running):
        return running


class TestVLLMServer(VLLMSuite):
    """The same of a server by vLLM."""

    @pytest.fixture
    def served(self, running):
        return running
