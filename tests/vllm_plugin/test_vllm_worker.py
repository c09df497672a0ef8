"""What is refused at start, and which of a step's CUDA graphs vLLM records, asked of its own class without a GPU."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.config.compilation import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu_worker import Worker

from tidar.errors import TidarError
from tidar.vllm.sampler import TidarSampler
from tidar.vllm.state import check_supported
from tidar.vllm.step import Buffers, Drafts
from tidar.vllm.worker import TidarWorker, add_uniform

FULL, PIECEWISE = CUDAGraphMode.FULL, CUDAGraphMode.PIECEWISE


def manager(length: int):
    sizes = [1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)]
    made = object.__new__(CudaGraphManager)
    parts = {"speculative_config": None, "cache_config": SimpleNamespace(use_kda_recoverssm=False)}
    vars(made).update(
        vllm_config=SimpleNamespace(**parts, parallel_config=SimpleNamespace(data_parallel_size=1)),
        compilation_config=SimpleNamespace(cudagraph_capture_sizes=sizes, max_cudagraph_capture_size=512),
        cudagraph_mode=CUDAGraphMode.FULL_AND_PIECEWISE,
        max_num_reqs=32, decode_query_len=length, lora_capture_cases=[0], use_breakable_cg=False,
        varlen_decode=False, ubatch_runner=None, _lora_dispatch_map={}, _max_lora_case=0,
        _candidates={}, _capture_descs={}, _graphs_captured=True,
    )  # fmt: skip
    made._init_candidates()
    return made


def test_every_shape_has_full_graphs():
    made, lengths = manager(40), (1, 16, 40)
    pieces = list(made._capture_descs[PIECEWISE])
    assert made.dispatch(3, 3, 1, 0).cg_mode == PIECEWISE  # what vLLM would do by itself
    add_uniform(made, lengths)
    captured = [desc.num_tokens for desc in made._capture_descs[FULL]]
    assert captured == sorted(captured, reverse=True)
    assert len(set(made._capture_descs[FULL])) == len(captured)
    assert made._capture_descs[PIECEWISE] == pieces
    assert made.decode_query_len == 40
    for length in lengths:
        for requests in range(1, min(32, 512 // length) + 1):
            chosen = made.dispatch(requests, requests * length, length, 0)
            assert chosen.cg_mode == FULL
            assert chosen.uniform_token_count == length
            assert chosen.num_tokens == chosen.num_reqs * length >= requests * length
            assert chosen in made._capture_descs[FULL]
    assert made.dispatch(2, 41, None, 0).cg_mode == PIECEWISE
    assert made.dispatch(2, 48, 24, 0).cg_mode == PIECEWISE


def test_prompts_as_long_as_a_steps_slots_are_chains_in_its_graph():
    """vLLM chooses a graph by its size alone, so a prompt may run through one that was recorded for drafting."""
    buffers = Buffers(32, 4, torch.float32, torch.device("cpu"))
    buffers.seen_by_all = False  # as on a GPU

    def filled(lengths, full_graph):
        buffers.enter.fill_(-1)
        batch = SimpleNamespace(num_scheduled_tokens=np.array(lengths), num_reqs=len(lengths), num_tokens=sum(lengths))
        buffers.fill_plain(batch, full_graph)
        return buffers.enter[: sum(lengths)].tolist(), buffers.exit[: sum(lengths)].tolist()

    enter, exit_ = filled([8, 8], True)
    assert enter == [*range(8), *range(8)]
    assert exit_ == [8] * 16
    assert filled([8, 8], False)[0] == [-1] * 16  # FlashAttention runs it
    assert filled([1, 1], True)[0] == [-1] * 2  # the graph of plain decoding


def test_who_decodes_plainly_has_nothing_to_judge_next():
    drafts = Drafts.empty(6, 4, torch.device("cpu"))
    drafts.count[:] = 4
    drafted = np.array([True, True, True, False, True, False])
    made = object.__new__(TidarSampler)
    vars(made).update(state=SimpleNamespace(drafts=drafts, drafted=drafted))
    batch = SimpleNamespace(idx_mapping_np=np.array([4, 3, 0, 1]))
    made._forget(batch, np.array([0, 1, 3]))
    assert drafts.count.tolist() == [4, 1, 4, 4, 1, 4]  # 3 was not known to have any
    assert drafted.tolist() == [True, False, True, False, False, False]


@pytest.mark.parametrize(("measured", "counted"), [(60, 90), (100, 100)])
def test_what_the_plug_in_holds_is_not_left_for_the_cache(monkeypatch, measured, counted):
    held = iter((10, 100))
    made = object.__new__(TidarWorker)
    made.model_runner = SimpleNamespace()

    def load(worker, *, load_dummy_weights):
        assert load_dummy_weights
        worker.model_runner.model_memory_usage = measured

    monkeypatch.setattr(Worker, "load_model", load)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda: next(held))
    made.load_model(load_dummy_weights=True)
    assert made.model_runner.model_memory_usage == counted


@pytest.mark.parametrize(
    ("part", "name", "value", "said"),
    [
        ("model_config", "uses_mrope", True, "M-RoPE"),
        ("model_config", "enable_prompt_embeds", True, "prompt embeddings"),
        ("parallel_config", "pipeline_parallel_size", 2, "pipeline"),
        ("cache_config", "cache_dtype", "fp8_e4m3", "KV cache"),
        (None, "speculative_config", object(), "--speculative-config"),
        (None, "lora_config", object(), "--enable-lora"),
    ],
)
def test_what_drafting_cannot_do_is_refused_by_name(part, name, value, said):
    config = SimpleNamespace(
        parallel_config=SimpleNamespace(pipeline_parallel_size=1, decode_context_parallel_size=1, data_parallel_size=1),
        cache_config=SimpleNamespace(cache_dtype="auto"),
        model_config=SimpleNamespace(uses_mrope=False, enable_prompt_embeds=False),
        lora_config=None,
        speculative_config=None,
    )
    check_supported(config)
    setattr(getattr(config, part) if part else config, name, value)
    with pytest.raises(TidarError, match=said):
        check_supported(config)
