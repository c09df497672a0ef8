"""Structured output beside drafts. Triton's interpreter cannot run vLLM's kernel for it; a twin stands for it."""

import re

import pytest
import torch
from cases import TIDAR, count
from engines import GREEDY, answers, engine
from models import tiny_checkpoint
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams
from vllm.v1.worker.gpu import structured_outputs

from tidar.vllm import Options, metrics
from tiny import tiny_folder

NUMBER, CHOICES = r"[0-9]{12}-[a-f]{8}", ["positive, and very much so", "negative"]
PROMPTS = [list(range(40, 40 + length)) for length in (5, 17, 33)]


class BitmaskTwin:
    """`_apply_grammar_bitmask_kernel`: a logit whose bit is not set becomes -inf."""

    def __getitem__(self, grid):
        return self.run

    def run(self, logits, stride, places, starts, bitmask, words, vocabulary, MASK_STRIDE, BLOCK_SIZE):  # noqa: N803
        for bits, place in zip(bitmask, places[: len(bitmask)].tolist(), strict=True):
            row, position = divmod(place, MASK_STRIDE)
            if position < starts[row + 1] - starts[row]:
                allowed = (bits[:, None] >> torch.arange(32) & 1).flatten()[:vocabulary].bool()
                logits[starts[row] + position].masked_fill_(~allowed, float("-inf"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(structured_outputs, "_apply_grammar_bitmask_kernel", BitmaskTwin())
    tiny_folder(tmp_path)  # for its tokenizer
    return tiny_checkpoint(tmp_path, vocabulary=258)


def test_structured_output_beside_drafts(folder):
    wishes = [StructuredOutputsParams(regex=NUMBER), StructuredOutputsParams(choice=CHOICES)]
    asked = [SamplingParams(temperature=0.0, max_tokens=60, structured_outputs=wish) for wish in wishes]
    free, said = SamplingParams(max_tokens=60, **GREEDY), []
    for options in (Options(mode="ar", max_num_seqs=8), TIDAR):
        with engine(folder, options, skip_tokenizer_init=False) as llm:
            alone = answers(llm, PROMPTS[:1], 60)
            steps = count(metrics.STEPS)
            prompts = [{"prompt_token_ids": prompt} for prompt in (*PROMPTS, PROMPTS[0])]
            outputs = llm.generate(prompts, [free, *asked, free], use_tqdm=False)
            number, choice = (output.outputs[0].text for output in outputs[1:3])
            assert re.fullmatch(NUMBER, number)
            assert choice in CHOICES
            tokens = [list(output.outputs[0].token_ids) for output in outputs]
            assert tokens[0] == tokens[3] == alone[0]
            said.append(tokens)
            assert (count(metrics.STEPS) > steps) == (options.mode == "tidar")
    assert said[0] == said[1]
