"""The fused backbone says what the stock modules say, and its Triton kernels what their eager twins say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tidar.decode.cache import RowCache
from tidar.decode.engine import Engine, Limits
from tidar.decode.runner import fuse
from tidar.decode.step import Plan
from tidar.kernels.launch import available, compiles
from tidar.layout import prefill_layout, step_layout
from tiny import PROMPTS, continuations, some_prompt, tiny_network

LLAMA_LIKE = ("llama", "qwen2", "qwen3")


@pytest.mark.parametrize("arch", LLAMA_LIKE)
@pytest.mark.parametrize("draft", [True, False])
@settings(max_examples=10)
@given(st.data())
def test_fused_backbone_equals_stock_modules(arch, draft, data):
    """A batch of rows with prefixes of their own, then a step behind them."""
    network = tiny_network(arch, draft)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
    length = data.draw(st.integers(1, 4))
    outcomes = sorted(data.draw(st.sets(st.integers(1, length), max_size=length))) if draft else []
    prompts = torch.tensor([some_prompt(max(lengths), i) for i in range(len(lengths))])
    drafts = torch.tensor([some_prompt(length, 9 + i) for i in range(len(lengths))])
    twin = network.build_fused()
    assert twin is not None
    said = []
    with torch.no_grad():
        for network.fused in (None, twin):
            cache = RowCache(len(lengths), 64, network.device)
            layout = prefill_layout(torch.tensor(lengths), max(lengths), 0)
            cache.reserve(layout.size)
            network(prompts, layout, cache, fused=True)
            cache.lengths.copy_(torch.tensor(lengths))
            layout = step_layout(length, outcomes).after(cache.lengths)
            cache.reserve(layout.size)
            said.append(network(drafts, layout, cache, fused=True))
    torch.testing.assert_close(said[1], said[0], atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("arch", LLAMA_LIKE)
@pytest.mark.parametrize(("draft_length", "outcomes"), [(1, None), (4, None), (5, 2)])
def test_fused_greedy_output_is_that_of_generate(arch, draft_length, outcomes):
    network = tiny_network(arch)
    fuse(network)
    assert network.fused is not None
    answers = {}
    for updates in Engine(network, Plan(draft_length, outcomes=outcomes)).run(PROMPTS, Limits(16), 3):
        answers.update({u.answer.row: u.answer.token_ids for u in updates})
    assert [answers[i] for i in range(len(PROMPTS))] == [c[:16] for c in continuations(arch)]


@pytest.mark.parametrize("arch", ["gemma", "gpt_neox", "gpt_bigcode"])
def test_other_architectures_keep_their_modules(arch):
    network = tiny_network(arch)
    fuse(network)
    assert network.fused is None


def test_a_model_that_behaves_differently_keeps_its_modules():
    network = tiny_network("llama")
    for layer in network.backbone.layers:
        layer.self_attn.register_forward_hook(lambda module, inputs, output: (-output[0], *output[1:]))
    fuse(network)
    assert network.fused is None


def test_where_a_kernel_fails_the_stock_modules_run(monkeypatch, capsys):
    failure = RuntimeError("out of resource: shared memory")

    def fails(*given):
        raise failure

    network = tiny_network("llama")
    monkeypatch.setattr("tidar.model.packed.PackedBackbone.__call__", fails)
    fuse(network)
    assert network.fused is None
    assert capsys.readouterr().err.endswith("slow without them: out of resource: shared memory\n")
    for memory in (
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
        torch.OutOfMemoryError("CUDA out of memory"),
    ):
        failure = memory
        with pytest.raises(RuntimeError, match=r"ALLOC_FAILED|out of memory"):
            fuse(network)
        assert network.fused is None
    assert not capsys.readouterr().err


def test_where_no_kernel_compiles_none_is_used(monkeypatch, capsys):
    """As without a C compiler."""

    class Mark:
        def __getitem__(self, grid):
            raise FileNotFoundError("no C compiler\nfound")

    monkeypatch.setattr("tidar.kernels.launch._mark", Mark(), raising=False)
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: None)
    compiles.cache_clear()
    assert not available(torch.device("cuda", 7))
    assert not available(torch.device("cuda", 7))
    assert capsys.readouterr().err.splitlines() == [
        "Triton's kernels do not run here, decoding is slow without them: no C compiler"
    ]
    compiles.cache_clear()


def test_stock_modules_keep_working_beside_the_fused_twin(tmp_path):
    network, untouched = tiny_network("llama"), tiny_network("llama")
    ids = torch.tensor([some_prompt(9)])
    fuse(network)
    assert network.lm(ids).logits.equal(untouched.lm(ids).logits)
    network.lm.save_pretrained(tmp_path)
    weights = network.backbone.layers[0].self_attn
    assert weights.q_proj.weight.untyped_storage().data_ptr() == weights.k_proj.weight.untyped_storage().data_ptr()


def test_kernels_are_the_twins_of_eager_code():
    """In Triton's interpreter, which has to be chosen before Triton is imported."""
    pytest.importorskip("triton")
    script = Path(__file__).parent / "kernel_twins.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "twins agree" in done.stdout
