"""What tests inside vLLM share: prompts, shapes, and drafts that mostly stand."""

from engines import Oracle
from models import CONTEXT, some_prompt

from tidar.vllm import Options

PROMPTS = [some_prompt(length, seed) for seed, length in enumerate((5, 1, 40, 2, 17, 33, 64))]
EDGE = [some_prompt(CONTEXT - left, left) for left in (1, 2, 5, 12, 30)]
TIDAR = Options(cuda=False, max_num_seqs=8, curve=((3, 4, 3), (6, 4, 1)))
"""Three shapes: up to three requests, up to six, plain decoding beyond."""
PROCESSED = (
    {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": 0.2},
    {"logit_bias": {7: 4.0}, "allowed_token_ids": list(range(100))},
    {"min_tokens": 5, "stop_token_ids": list(range(0, 256, 3))},
)


def count(counter):
    return counter._value.get()


def oracle(plain):
    return Oracle([prompt + answer for prompt, answer in zip(PROMPTS, plain["greedy"], strict=True)])
