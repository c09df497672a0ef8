"""Servers of their own: small chunks of prompts, sampling, other models, the local engine beside it."""

import os
import socket
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cases import PROMPTS, TIDAR, count, oracle
from engines import Oracle, answers, core, engine, free_blocks, runner
from models import tiny_checkpoint
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from tidar import sampling
from tidar.bench import serving
from tidar.vllm import Options, gated, metrics


def test_prefix_cache_and_chunked_prefill(checkpoint, plain):
    with engine(checkpoint, TIDAR, max_num_batched_tokens=32, enable_prefix_caching=True) as llm:
        start = free_blocks(llm)
        for _ in range(2):
            assert answers(llm, PROMPTS, 60) == plain["greedy"]
        longer = [prompt + answer[:40] for prompt, answer in zip(PROMPTS, plain["greedy"], strict=True)]
        assert answers(llm, longer, 20) == [answer[40:60] for answer in plain["greedy"]]
        assert free_blocks(llm) == start


def test_sampling_follows_the_models_distribution(checkpoint, plain):
    """The second and third tokens of many seeded requests, against what plain decoding would draw them from."""
    draws, prompt = 1536, PROMPTS[0]
    asked = [
        SamplingParams(max_tokens=3, temperature=0.8, min_p=0.1, seed=seed, ignore_eos=True, detokenize=False)
        for seed in range(draws)
    ]
    options = Options(cuda=False, max_num_seqs=32, curve=((32, 4, 1),))
    with engine(checkpoint, options) as llm, oracle(plain).instead(llm):
        outputs = llm.generate([{"prompt_token_ids": prompt}] * draws, asked, use_tqdm=False)
    seen = Counter(tuple(output.outputs[0].token_ids) for output in outputs)
    expected = exact_continuations(checkpoint, prompt, 3, 0.8, 0.1)
    assert seen.keys() <= expected.keys()
    likely = {text: chance * draws for text, chance in expected.items() if chance * draws >= 5}
    rest = draws - sum(likely.values())
    squares = sum((seen[text] - number) ** 2 / number for text, number in likely.items())
    squares += (sum(n for text, n in seen.items() if text not in likely) - rest) ** 2 / max(rest, 1)
    freedom = len(likely)
    assert squares < freedom + 4 * (2 * freedom) ** 0.5, (squares, freedom)


def exact_continuations(folder, prompt, new, temperature, min_p):
    """Every continuation of `new` tokens, with its probability."""
    lm, law = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), dict[tuple[int, ...], float]()
    params = sampling.SamplingParams(temperature, min_p=min_p)
    frontier = {(): 1.0}
    for _ in range(new):
        rows = torch.tensor([[*prompt, *text] for text in frontier])
        with torch.inference_mode():
            probs = params.probabilities(lm(rows).logits[:, -1])
        law = {
            (*text, token): chance * float(row[token])
            for (text, chance), row in zip(frontier.items(), probs, strict=True)
            for token in row.nonzero().flatten().tolist()
        }
        frontier = law
    return law


@pytest.mark.parametrize(("arch", "lossless"), [("qwen2", True), ("qwen3", False), ("olmo2", True)])
def test_other_models(tmp_path, arch, lossless):
    folder = tiny_checkpoint(tmp_path, arch, lossless)
    with engine(folder, Options(mode="ar")) as llm:
        expected = answers(llm, PROMPTS[:3])
    with engine(folder, Options(cuda=False, draft_length=4, outcomes=2)) as llm:
        steps = count(metrics.STEPS)
        assert answers(llm, PROMPTS[:3]) == expected
        assert count(metrics.STEPS) > steps


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_stacked_adapters_draft_the_same(tmp_path, monkeypatch, arch):
    """As on a GPU, where A lies under the layer's weight."""
    folder, drafted = tiny_checkpoint(tmp_path, arch), []

    def leave_unpacked(layer, remove_weight):
        layer.cpu_linear = F.linear

    monkeypatch.setattr("vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm", leave_unpacked)
    for stacked in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(gated, "can_stack", lambda layer, device, stacked=stacked: stacked)
            with engine(folder, Options(cuda=False, draft_length=4, outcomes=2)) as llm:
                state, seen = runner(llm).model_state, []
                judge = state.head.drafts
                state.head.drafts = lambda *given, judge=judge, seen=seen: seen.append(judge(*given)) or seen[-1]
                kinds = {type(module).__name__.partition("Of")[0] for module in state.model.modules()}
                assert ("StackedLinear" if stacked else "GatedLinear") in kinds
                drafted.append((answers(llm, PROMPTS[:3]), torch.cat([d.drafts.flatten() for d in seen])))
    (plain, one), (stacked, other) = drafted
    assert plain == stacked
    assert torch.equal(one, other)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each rank needs a core of its own")
def test_two_ranks_say_what_one_says(tmp_path, monkeypatch):
    folder, said = tiny_checkpoint(tmp_path, "qwen3"), list[tuple[list[list[int]], list[list[int]]]]()
    for ranks in (1, 2):
        cores = sorted(os.sched_getaffinity(0))[:ranks]
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "|".join(map(str, cores)))
        with engine(folder, TIDAR, tensor_parallel_size=ranks) as llm:
            plain = answers(llm, PROMPTS[:3], 24, extra_args={"tidar": False})
            said.append((answers(llm, PROMPTS[:3], 24), plain))
            one = llm.collective_rpc(lambda w: w.model_runner.model_state.verdicts is w.model_runner.model_state.inputs)
            assert one == [ranks == 1] * ranks  # ranks talk to each other after the model: not in a graph of ours
            if ranks > 1:  # one would be this process, and judge like this for all tests that follow
                assert serving.one(llm, 8, None, 40, 2, 1)["tokens_per_step"] < 2
                llm.collective_rpc(serving.fix_acceptance, args=(0.9,))
                assert serving.one(llm, 8, None, 40, 2, 1)["tokens_per_step"] > 2
                kept = llm.collective_rpc(lambda worker: worker.model_runner.model_state.drafts.tokens.tolist())
                assert kept[0] == kept[1]
    assert said[0] == said[1]
    assert said[0][0] == said[0][1]


def test_layers_on_two_ranks():
    """Gathered or split in every way that vLLM's Transformers backend knows; verdicts and embeddings are everyone's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "VLLM_DIST_IDENT": port}
    command = [sys.executable, str(Path(__file__).with_name("layers_of_two.py"))]
    ranks = [
        subprocess.Popen(command, env={**os.environ, **where, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert all(text.endswith("same\n") for text in said), said


def test_drafts_are_the_local_engines(checkpoint):
    """Not only exact but as good: the same forwards per answer as tidar's own decoder."""
    from tidar import TidarModel
    from tidar.decode.engine import Engine, Limits
    from tidar.decode.step import Plan

    local = TidarModel.from_pretrained(checkpoint, device="cpu", dtype="float32")
    [*_, updates] = Engine(local.network, Plan(4, outcomes=2)).run([PROMPTS[0]], Limits(60))
    with engine(checkpoint, Options(cuda=False, draft_length=4, outcomes=2)) as llm, torch.inference_mode():
        steps, tokens = count(metrics.STEPS), count(metrics.TOKENS)
        assert answers(llm, PROMPTS[:1], 60)[0] == updates[0].answer.token_ids
        forwards = count(metrics.STEPS) - steps
    # A prompt's forward drafts here but not there, so the first step of vLLM's has nothing to judge.
    assert abs(forwards + 1 - updates[0].answer.forwards) <= 2, (forwards, updates[0].answer.forwards, tokens)


@pytest.mark.parametrize("tight", [0, 3])
def test_drafting_preempts_no_one(checkpoint, tight):
    """In a KV cache that just holds what plain decoding needs, or less than that."""
    prompts, new, said, preempted = PROMPTS[:3], 180, list[list[list[int]]](), list[int]()
    blocks = 1 + sum(-(-(len(prompt) + new) // 32) for prompt in prompts) - tight
    for options in (Options(mode="ar", max_num_seqs=8), TIDAR):
        with engine(checkpoint, options, num_gpu_blocks_override=blocks, enable_prefix_caching=False) as llm:
            preempt, steps, seen = core(llm).scheduler._preempt_request, count(metrics.STEPS), list[object]()

            def counted(request, *given, preempt=preempt, seen=seen, **more):
                seen.append(request)
                return preempt(request, *given, **more)

            core(llm).scheduler._preempt_request = counted
            texts = [prompt + answer for prompt, answer in zip(prompts, said[0], strict=True)] if said else []
            with Oracle(texts).instead(llm) if said else nullcontext():
                said.append(answers(llm, prompts, new))
            assert (count(metrics.STEPS) > steps) == (options.mode == "tidar")
            preempted.append(len(seen))
    assert said[0] == said[1]
    assert preempted[1] <= preempted[0]
    assert (preempted[0] > 0) == (tight > 0)
