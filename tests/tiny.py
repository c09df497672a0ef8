"""Tiny random causal LMs, with and without a drafter: sharp enough that argmaxes are decided by wide margins."""

import json
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tidar import TidarModel
from tidar.config import TidarConfig
from tidar.model import attention
from tidar.model.drafter import Drafter, DrafterSpec
from tidar.model.network import Network

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma", "gpt_neox", "gpt_bigcode")
"""gpt_bigcode stands for learned absolute positions: there is no embedding past the context's end."""
VOCABULARY, CONTEXT = 97, 128


def tiny_lm(
    arch: str,
    seed: int = 0,
    *,
    vocabulary: int = VOCABULARY,
    spread: float = 0.4,
    attn_implementation: str = attention.NAME,
    tied: bool = False,
) -> PreTrainedModel:
    """A frozen random causal LM of 2 layers in float32 without special tokens; `spread` is its initializer_range."""
    grouped = {} if arch in ("gpt_neox", "gpt_bigcode") else {"num_key_value_heads": 2, "head_dim": 8}
    config = AutoConfig.for_model(
        arch,
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        **({"tie_word_embeddings": True} if tied else {}),
        **grouped,
    )
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation, dtype=torch.float32)
    return lm.eval().requires_grad_(False)


def tiny_network(
    arch: str,
    draft: bool = True,
    seed: int = 0,
    block_size: int = 4,
    targets: list[str] | None = None,
    **options: object,
) -> Network:
    """`tiny_lm` as a Network; with `draft`, behind a drafter whose every part is random, so that it really acts."""
    lm = tiny_lm(arch, seed, **options)
    if not draft:
        return Network(lm).eval()
    drafter = Drafter(lm, DrafterSpec(4, 8.0, targets, sampler_width=8))
    silent = [p for name, p in drafter.named_parameters() if "lora_B" in name or name == "sampler_head.out.weight"]
    for parameter in (*silent, drafter.mask_embedding):
        torch.nn.init.normal_(parameter, std=0.3)
    return Network(lm, drafter, TidarConfig(block_size=block_size)).eval()


network_of = cache(tiny_network)
"""The network of an architecture, shared by tests that leave it as it is."""

plain_of = cache(lambda arch: tiny_lm(arch, attn_implementation="eager"))
"""Its base model as transformers alone would have it."""


def some_prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [some_prompt(length, seed) for seed, length in enumerate((6, 1, 17, 2, 9))]


def generate(lm: PreTrainedModel, ids: Tensor, mask: Tensor | None = None, **options: object) -> Tensor:
    """transformers' generate, greedy unless told otherwise."""
    mask = torch.ones_like(ids) if mask is None else mask
    return lm.generate(ids, attention_mask=mask, **{"do_sample": False, **options})


@cache
def continuations(arch: str, new: int = 100) -> list[list[int]]:
    """Greedy continuations of PROMPTS by the plain model and transformers' generate, one prompt at a time."""
    rows = [torch.tensor([prompt]) for prompt in PROMPTS]
    return [generate(plain_of(arch), row, max_new_tokens=new)[0, row.shape[1] :].tolist() for row in rows]


def tiny_folder(
    folder: Path, arch: str = "llama", chat: bool = True, mask_token: bool = False, tied: bool = False
) -> str:
    """A model folder as users have them: weights, and a byte-level tokenizer with a chat template and an end token.

    With `mask_token` the vocabulary has one more row, free for the paper's objective; `tied`: one embedding for both.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(["<pad>", "<end>", *alphabet])}
    tokens = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token="<end>", pad_token="<pad>")
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m['role'][0] + m['content'] + '\n' }}{% endfor %}"
    tiny_lm(arch, vocabulary=len(vocabulary) + mask_token, tied=tied).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def drafting_folder(folder: Path, mask_token: bool = False, context: int = CONTEXT) -> str:
    """Such a folder with a drafter of blocks of 4 inside."""
    file = Path(tiny_folder(folder, mask_token=mask_token)) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": context}))
    model = TidarModel.from_pretrained(str(folder), device="cpu")
    drafter = Drafter(model.hf_model, DrafterSpec(rank=4, sampler_width=8))
    drafter.save(folder / "drafter", str(folder), TidarConfig(block_size=4))
    return str(folder)
