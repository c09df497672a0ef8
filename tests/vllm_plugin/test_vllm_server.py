"""`vllm serve` with the plug-in, over HTTP, through the official client."""

import os
import socket
import subprocess
import time
from pathlib import Path

import openai
import pytest
from models import tiny_checkpoint

from openai_suite import Served, VLLMSuite, alive, metric
from tidar.vllm import Options, command, environment
from tiny import tiny_folder

START = 180  # seconds


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Its address; `vllm serve` takes most of a minute to start on two cores."""
    folder = tmp_path_factory.mktemp("served")
    tiny_folder(folder)  # for its tokenizer
    tiny_checkpoint(folder, vocabulary=258)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = Options(cuda=False, max_num_seqs=8, draft_length=4, outcomes=2)
    more = ("--port", str(port), "--host", "127.0.0.1", "--served-model-name", "tiny", "--max-model-len", "200")
    whole = command(str(folder), options, (*more, "--dtype", "float32", "--enforce-eager", "--block-size", "32"))
    own = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", **environment(options)}
    log = open(folder / "log", "w+")  # noqa: SIM115
    process = subprocess.Popen(whole, env={**os.environ, **own}, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    deadline = time.monotonic() + START
    try:
        while not alive(address):
            said = Path(log.name).read_text()[-3000:]
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)


ASKED = {"model": "tiny", "prompt": "hello", "max_tokens": 40, "temperature": 0.0}


def test_switch_streaming_and_metrics(client, server):
    drafted = client.completions.create(**ASKED)
    steps = metric(server, "tidar_steps_total")
    assert steps > 0
    assert metric(server, "tidar_tokens_total") >= steps
    assert metric(server, "tidar_judged_total") >= metric(server, "tidar_accepted_total")
    assert metric(server, "vllm:spec_decode_num_drafts_total") == 0  # vLLM has no page for drafts without their model
    assert metric(server, "vllm:generation_tokens_total") > 0
    for off in ({"tidar": False}, {"vllm_xargs": {"tidar": 0}}):
        plain = client.completions.create(**ASKED, extra_body=off)
        assert plain.choices[0].text == drafted.choices[0].text
        assert plain.usage.completion_tokens == drafted.usage.completion_tokens
    assert metric(server, "tidar_steps_total") == steps
    parts = [chunk.choices[0].text for chunk in client.completions.create(**ASKED, stream=True)]
    assert "".join(parts) == drafted.choices[0].text


def test_chat_stop_n_seed_logprobs(client):
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 30}
    drawn = [client.chat.completions.create(**chat, n=2, seed=5, temperature=1.0) for _ in range(2)]
    assert [c.message.content for c in drawn[0].choices] == [c.message.content for c in drawn[1].choices]
    assert len(drawn[0].choices) == 2
    told = client.chat.completions.create(**chat, temperature=0.0, logprobs=True, top_logprobs=2).choices[0]
    assert len(told.logprobs.content) == 30
    whole = client.completions.create(**ASKED).choices[0].text
    stop = whole[len(whole) // 2]
    cut = client.completions.create(**ASKED, stop=[stop]).choices[0]
    assert cut.finish_reason == "stop"
    assert cut.text == whole[: whole.index(stop)]


@pytest.mark.parametrize("body", [{"tidar": "maybe"}, {"trust": 0.5}, {"vllm_xargs": {"draft_length": 3}}])
def test_refusals(client, body):
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**ASKED, extra_body=body)
    assert next(iter(body)) in str(refused.value) or "draft_length" in str(refused.value)


def test_refusals_on_a_route_of_another_api(client):
    asked = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
    with pytest.raises(openai.BadRequestError, match="draft_length"):
        client.post("/messages", cast_to=object, body={**asked, "draft_length": 3})
    assert client.post("/messages", cast_to=object, body={**asked, "metadata": {}, "unheard_of": 1})["content"]


class TestOpenAI(VLLMSuite):
    """The cases that our own server must pass as well."""

    @pytest.fixture
    def served(self, server):
        refused = {"trust": 0.5, "draft_length": 4, "outcomes": 2, "alternatives": 1, "plan": "fixed"}
        refused |= {"no_such_thing": 1}  # which vLLM would ignore
        return Served(f"{server}/v1", "tiny", 200, refused=refused)

    @pytest.mark.skip(reason="Triton's interpreter cannot run vLLM's kernel for top-k and top-p, and the server ends")
    def test_the_narrowest_truncation_is_greedy(self):
        """Hides that of the suite."""
