"""`generate(custom_generate=...)` is generate, only faster: same output, same options or a clear refusal."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tidar import TidarModel
from tidar.decode.engine import Engine
from tidar.decode.hf import make_custom_generate
from tidar.decode.step import Plan
from tidar.errors import TidarError
from tidar.model.network import Network
from tidar.sampling import SamplingParams
from tiny import ARCHITECTURES, PROMPTS, continuations, generate, network_of, plain_of


def left_padded() -> tuple[Tensor, Tensor]:
    """PROMPTS as generate takes them: ids and attention mask."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in PROMPTS])
    return ids, torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])


def custom(network: Network, draft_length: int = 4) -> Callable[..., Tensor]:
    return make_custom_generate(network, lambda params: Plan(draft_length, params))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_output_is_that_of_generate(arch):
    """For a left-padded batch whose rows end at different times."""
    options = {"max_new_tokens": 24, "eos_token_id": continuations(arch)[0][10], "pad_token_id": 0}
    output = generate(network_of(arch).lm, *left_padded(), custom_generate=custom(network_of(arch)), **options)
    assert output.equal(generate(plain_of(arch), *left_padded(), **options))


def test_without_a_padding_id_ended_rows_are_padded_with_the_end_of_sequence():
    network = network_of("llama")
    options = {"max_new_tokens": 24, "eos_token_id": continuations("llama")[0][10]}
    output = generate(network.lm, *left_padded(), custom_generate=custom(network), **options)
    assert output.equal(generate(plain_of("llama"), *left_padded(), **options))


@pytest.mark.parametrize(
    ("options", "params"),
    [
        ({"do_sample": True, "temperature": 0.7}, SamplingParams(0.7, top_k=50, top_p=1.0)),  # generate's own defaults
        ({"do_sample": True, "top_k": 0, "top_p": 0.5, "min_p": 0.1}, SamplingParams(1.0, top_p=0.5, min_p=0.1)),
        ({"do_sample": False}, SamplingParams()),
    ],
    ids=["defaults", "truncated", "greedy"],
)
def test_tokens_are_chosen_as_generate_was_asked_to(options, params):
    network, seen = network_of("llama"), []

    def plan(params: SamplingParams) -> Plan:
        seen.append(replace(params, seed=0))
        return Plan(4, params)

    decoding = make_custom_generate(network, plan)
    generate(network.lm, *left_padded(), max_new_tokens=3, custom_generate=decoding, **options)
    assert seen == [params]


def test_global_seed_decides_the_sample():
    network, runs = network_of("llama"), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        options = {"do_sample": True, "max_new_tokens": 9, "custom_generate": custom(network)}
        runs.append(generate(network.lm, *left_padded(), **options))
    assert runs[0].equal(runs[1])
    assert not runs[0].equal(runs[2])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.2},
        {"num_beams": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": True, "typical_p": 0.5},
        {"suppress_tokens": [1]},
        {"max_time": 5.0},
        {"return_dict_in_generate": True},
    ],
    ids=lambda options: list(options)[-1],
)
def test_options_that_cannot_be_honoured_are_refused(options):
    network = network_of("llama")
    with pytest.raises(TidarError, match="cannot honour"):
        generate(network.lm, *left_padded(), max_new_tokens=3, custom_generate=custom(network), **options)


def test_method_of_another_model_is_refused():
    with pytest.raises(TidarError, match="another model"):
        generate(network_of("qwen2").lm, *left_padded(), max_new_tokens=3, custom_generate=custom(network_of("llama")))


def test_the_plan_is_that_of_the_model(monkeypatch):
    model, given, real = TidarModel(network_of("llama"), None), [], Engine.__init__

    def engine(self, network, plan, *rest):
        given.append(plan)
        real(self, network, plan, *rest)

    monkeypatch.setattr(Engine, "__init__", engine)
    for options in ({"plan": "fixed"}, {"draft_length": 3, "outcomes": 2, "alternatives": 1}, {"mode": "ar"}):
        generate(model.hf_model, *left_padded(), max_new_tokens=3, custom_generate=model.custom_generate(**options))
    params = SamplingParams()
    assert given == [Plan(4, params), Plan(3, params, 2, 1), Plan(1, params)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"plan": "best"}, "plan is 'best'"),
        ({"draft_length": 4, "alternatives": 99}, "alternatives is 99"),
        ({"outcomes": 2, "plan": "auto"}, "fix the plan"),
    ],
)
def test_plans_that_cannot_be_honoured_are_refused_before_anything_runs(options, message):
    with pytest.raises(TidarError, match=message):
        TidarModel(network_of("llama"), None).custom_generate(**options)


def test_options_of_plan_that_make_no_sense_here_are_refused_by_name():
    with pytest.raises(TypeError, match="remeasure"):
        TidarModel(network_of("llama"), None).custom_generate(remeasure=True)
