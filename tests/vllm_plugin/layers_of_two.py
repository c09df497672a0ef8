"""One rank of two (gloo): RANK and MASTER_PORT are set; says "same" where its layers give what whole ones give."""

import faulthandler
import os
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from tidar.vllm import drafter, gated

faulthandler.dump_traceback_later(200, exit=True)  # should both wait for each other
torch.set_num_threads(1)
RANK, TOKENS, WIDE, NARROW, LOW, WORDS = int(os.environ["RANK"]), 5, 64, 32, 4, 200


def a_gated_layer(kind: type, sizes: tuple[int, int], **how: bool) -> None:
    """A layer with a LoRA on two ranks, against the whole product."""
    torch.manual_seed(0)
    inputs, outputs = sizes
    weight, x, gate = torch.randn(outputs, inputs), torch.randn(TOKENS, inputs), (torch.rand(TOKENS, 1) > 0.5).float()
    a, b = torch.randn(LOW, inputs), torch.randn(outputs, LOW)
    layer = kind(inputs, outputs, bias=False, **how)
    layer.weight_loader(layer.weight, weight)
    layer.quant_method.process_weights_after_loading(layer)
    gated.gate_linear(layer, [(None, a, b)], gate)
    given = x.chunk(2, -1)[RANK] if kind is RowParallelLinear and layer.input_is_parallel else x
    wanted = F.linear(x, weight) + gate * F.linear(F.linear(x, a), b)
    if kind is ColumnParallelLinear and not layer.gather_output:
        wanted = wanted.chunk(2, -1)[RANK]
    y = layer(given)[0]
    if kind is RowParallelLinear and not layer.reduce_results:
        torch.distributed.all_reduce(y)
    torch.testing.assert_close(y, wanted, atol=1e-3, rtol=1e-3)


def a_verdict() -> None:
    """A kernel that runs on one rank only is used on none; nor is any, where one rank cannot compile."""
    for compiles, works, used in ((True, RANK == 0, False), (RANK == 0, True, False), (True, True, True)):
        gated.available = lambda device, compiles=compiles: compiles
        gated.kernel_works_here = lambda device, dtype, works=works: works
        gated.kernel_works.cache_clear()
        assert gated.kernel_works(torch.device("cpu"), torch.float32) == used


def whole_embeddings(tied: bool) -> None:
    """All rows are on every rank, and no rank looks them up through the layer."""
    torch.manual_seed(1)
    rows, others = torch.randn(WORDS, NARROW), torch.randn(WORDS, NARROW)
    embedding, output = VocabParallelEmbedding(WORDS, NARROW), ParallelLMHead(WORDS, NARROW)
    embedding.weight_loader(embedding.weight, rows)
    output.weight_loader(output.weight, others)
    model = nn.Module()
    model.embed_tokens, model.lm_head = embedding, output.tie_weights(embedding) if tied else output
    entry, spec = {"vocab_size": WORDS}, SimpleNamespace(sampler_width=4)
    folded = []

    def fold(head: drafter.DraftHead) -> None:
        ids = torch.arange(WORDS)
        folded.append((head.embed(ids), head.get_output_embeddings().weight))

    drafter.available, drafter.fold_head = lambda device: True, fold
    drafter.DraftHead._head = lambda *given: object()
    embedding.forward = None
    checkpoint = SimpleNamespace(entry=entry, drafter=SimpleNamespace(spec=spec))
    head = drafter.DraftHead(model, checkpoint, {}, torch.float32)
    assert torch.equal(folded[0][0], rows)
    assert torch.equal(folded[0][1], rows if tied else others)
    assert head.inputs is None


config = VllmConfig()
with set_current_vllm_config(config):
    init_distributed_environment(2, RANK, "env://", RANK, "gloo")
    initialize_model_parallel(2)
    a_gated_layer(ColumnParallelLinear, (WIDE, NARROW))
    a_gated_layer(ColumnParallelLinear, (WIDE, NARROW), gather_output=True)
    a_gated_layer(RowParallelLinear, (WIDE, NARROW))
    a_gated_layer(RowParallelLinear, (WIDE, NARROW), input_is_parallel=False)
    a_gated_layer(RowParallelLinear, (WIDE, NARROW), reduce_results=False)
    whole_embeddings(False)
    whole_embeddings(True)
    a_verdict()
print("same", flush=True)
