"""A checkpoint's drafter in a model that vLLM has loaded: where its tensors go, and what turns a block into drafts."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

from tidar.errors import TidarError, first_line
from tidar.kernels.draft import Drafted, Walk, draft, draft_plain
from tidar.kernels.launch import available
from tidar.model.drafter import PEFT_PREFIX, WEIGHTS_FILE, StoredDrafter
from tidar.model.network import Network
from tidar.model.propose import CANDIDATES, fold_head, propose
from tidar.model.sampler_head import SamplerHead
from tidar.sampling import SamplingParams
from tidar.vllm.checkpoint import Checkpoint
from tidar.vllm.gated import GatedEmbedding, gate_embedding, gate_linear, on_all_ranks
from tidar.vllm.twin import share_weights

GREEDY = SamplingParams()


def read_tensors(stored: StoredDrafter) -> dict[str, Tensor]:
    try:
        return load_file(stored.folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise TidarError(f"{stored.folder / WEIGHTS_FILE} is missing or damaged: {first_line(error)}") from error


def install(model: nn.Module, stored: StoredDrafter, tensors: dict[str, Tensor], gate: Tensor) -> None:
    """Gate the layers of a vLLM model that a drafter adapts, in place, or those of its twin.

    Args:
        model: a causal LM of vLLM, native or from its Transformers backend.
        stored, tensors: the drafter.
        gate: [most tokens, 1], in the model's dtype; 1 at mask tokens.

    Raises:
        TidarError: for a layer that this model does not have.
    """
    body, prefix = model, ""
    for twin in getattr(model, "twins", ()):
        share_weights(twin, model.get_submodule("model"))
        body, prefix = twin, "model."
    modules = {prefix + name: module for name, module in body.named_modules()}
    scaling = stored.spec.alpha / stored.spec.rank
    stacked: dict[str, list[tuple[Any, Tensor, Tensor]]] = {}
    for name in tensors:
        if not name.endswith(".lora_A.weight"):
            continue
        stem = name.removesuffix(".lora_A.weight")
        path, shard = _place(modules, getattr(model, "packed_modules_mapping", {}), stem.removeprefix(PEFT_PREFIX))
        part = shard, tensors[name], tensors[f"{stem}.lora_B.weight"] * scaling
        stacked.setdefault(path, []).append(part)
    for path, parts in stacked.items():
        gate_linear(cast(LinearBase, modules[path]), parts, gate)
    gate_embedding(input_embedding(body), tensors["mask_embedding"], gate)


def _place(modules: dict[str, nn.Module], packed: dict[str, list[str]], path: str) -> tuple[str, Any]:
    """The layer of a checkpoint's path: its own, or one that stacks several, and which part of it."""
    if isinstance(modules.get(path), LinearBase):
        return path, None
    parent, _, name = path.rpartition(".")
    for stack, names in packed.items():
        if name in names and isinstance(modules.get(f"{parent}.{stack}"), LinearBase):
            shards: Any = ["q", "k", "v"] if stack == "qkv_proj" else range(len(names))
            return f"{parent}.{stack}", shards[names.index(name)]
    raise TidarError(f"the drafter adapts {path}, which this model of vLLM does not have as a linear layer")


def input_embedding(model: nn.Module) -> VocabParallelEmbedding:
    embeddings = [module for module in model.modules() if isinstance(module, VocabParallelEmbedding)]
    found = [module for module in embeddings if not isinstance(module, ParallelLMHead)]
    if len(found) != 1:
        raise TidarError(f"{type(model).__name__} has {len(found)} input embeddings, but a drafter needs one")
    return found[0]


class _Output:
    """The output embedding as `propose` reads it: all rows of the vocabulary, on every rank."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        self.out_features = len(weight)


class DraftHead:
    """Turns a block's mask states into drafts; stands for a `Network` towards `model.propose`.

    Drafts are the likeliest tokens, at every temperature: verification is exact whatever is proposed.
    """

    fused = None

    def __init__(
        self, model: nn.Module, checkpoint: Checkpoint, tensors: dict[str, Tensor], dtype: torch.dtype
    ) -> None:
        self.embedding, self.lm, self.dtype = input_embedding(model), self, dtype
        self.vocabulary = int(checkpoint.entry["vocab_size"])
        self.device = self.embedding.weight.device
        self.drafter: DraftHead | None = None
        self.sampler_head: SamplerHead | None = None
        self.output: _Output | None = None
        self.inputs: Tensor | None = None
        width = checkpoint.drafter.spec.sampler_width if checkpoint.drafter is not None else 0
        if width:
            self.output = self._whole_output(model)
            self.sampler_head, self.drafter = self._head(tensors, width), self
        self.walk: Walk | None = None
        if self.sampler_head is not None and on_all_ranks(available(self.device)):  # they fold it together
            self.inputs = self._whole_input(model)
            self.walk, self.inputs = fold_head(cast(Network, self)), None

    def _head(self, tensors: dict[str, Tensor], width: int) -> SamplerHead:
        prefix = "sampler_head."
        head = SamplerHead(self.embedding.embedding_dim, width).to(self.device, self.dtype)
        head.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        return head.requires_grad_(False)

    def _whole_output(self, model: nn.Module) -> _Output:
        layer: Any = model.get_submodule("lm_head")
        weight, bias = layer.weight.data, getattr(layer, "bias", None)
        if get_tensor_model_parallel_world_size() > 1:
            weight = tensor_model_parallel_all_gather(weight, 0)
            bias = None if bias is None else tensor_model_parallel_all_gather(bias, 0)
        return _Output(weight[: self.vocabulary], None if bias is None else bias[: self.vocabulary])

    def _whole_input(self, model: nn.Module) -> Tensor | None:
        """All rows of the input embedding, if ranks have a part of them each.

        Looking all rows up through the layer would have both ranks compile its masking, and meet once a chunk of rows.
        """
        weight: Tensor = self.embedding.weight
        if get_tensor_model_parallel_world_size() == 1:
            return None
        if self.output is not None and model.get_submodule("lm_head").weight is weight:  # they are tied
            return self.output.weight
        return tensor_model_parallel_all_gather(weight.data, 0)

    def get_output_embeddings(self) -> _Output | None:
        return self.output

    def embed(self, ids: Tensor) -> Tensor:
        if self.inputs is not None:
            return F.embedding(ids, self.inputs)
        layer: Any = self.embedding
        return layer.lookup(ids) if isinstance(layer, GatedEmbedding) else layer(ids)

    def drafts(self, block: Tensor, logits: Tensor, first: Tensor) -> Drafted:
        """Draft from one block a request.

        Args:
            block: [B, K, H] final hidden states of its masks.
            logits: [B, K-1, V] of all but the first of them.
            first: [B] the verified next tokens.
        """
        unknown = torch.full_like(first, -1)
        if available(self.device) and self.walk is not None:
            return draft(self.walk, block, logits, first, unknown, CANDIDATES)
        if available(self.device) and self.sampler_head is None:
            return draft_plain(logits, first, unknown)
        proposal = propose(cast(Network, self), block, logits, first, unknown, GREEDY, None)
        return Drafted(proposal.drafts, proposal.confidence, proposal.alternatives)
