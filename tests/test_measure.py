"""Decoding while a model trains counts what the decoder counts, and leaves no trace; the card says what was counted."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.models.llama.modeling_llama import LlamaMLP

from tidar import TidarError, TidarModel
from tidar.config import TidarConfig
from tidar.decode.engine import Engine, Limits
from tidar.decode.step import Plan
from tidar.model.network import Network
from tidar.train.callbacks import describe, flat
from tidar.train.conversion import Conversion, LossOptions, decoder_layers
from tidar.train.convert import convert
from tidar.train.measure import measure
from tidar.train.throughput import model_flops, peak_flops
from tiny import PROMPTS, VOCABULARY, tiny_lm, tiny_network
from train_options import curve, options


def test_it_counts_what_the_decoder_counts():
    network, limits = tiny_network("llama"), Limits(20)
    for found in measure(Conversion(network), PROMPTS, [2, 4], limits):
        answers = [answer_of(network, prompt, found.draft_length) for prompt in PROMPTS]
        assert found.tokens == sum(a.new_tokens for a in answers) == 20 * len(PROMPTS)
        assert found.forwards == sum(a.forwards for a in answers)
        gains = [gain for a in answers for gain in a.acceptance_lengths]
        wanted = [sum(gain >= m for gain in gains) / len(gains) for m in range(2, found.draft_length + 1)]
        assert found.acceptance == pytest.approx(wanted)
        assert 0 < found.acceptance[0] < 1


def answer_of(network, prompt, draft_length):
    *_, (update,) = Engine(network, Plan(draft_length)).run([prompt], Limits(20))
    return update.answer


def test_it_leaves_training_as_it_was():
    network = tiny_network("llama")
    module = Conversion(network)
    module.train()
    layers = decoder_layers(network)
    for layer in layers:
        layer._compiled_call_impl = layer._call_impl  # stands for a compiled layer
    places = [p.data_ptr() for p in module.parameters()]
    random = torch.get_rng_state()
    measure(module, PROMPTS, [4], Limits(8))
    assert module.training
    assert network.lm.training
    assert all(layer._compiled_call_impl is not None for layer in layers)
    assert [p.data_ptr() for p in module.parameters()] == places
    assert network.fused is None
    assert network.runner is None
    assert torch.equal(torch.get_rng_state(), random)


def test_layers_still_run_again_after_a_measurement():
    network = tiny_network("llama")
    module = Conversion(network, gradient_checkpointing=True).train()
    measure(module, PROMPTS, [4], Limits(4))
    runs = []
    network.backbone.layers[0].mlp.register_forward_pre_hook(lambda *_: runs.append(1))
    module(**batch_of(16, 2))["loss"].backward()
    assert len(runs) == 3  # the clean half, the blocks, and those again


@pytest.mark.parametrize("objective", ["ar", "paper", "block-diffusion"])
def test_each_term_is_in_the_log_by_itself(objective):
    network = Network(tiny_lm("llama").requires_grad_(True), config=TidarConfig(4, objective, mask_token_id=96))
    module, batch = Conversion(network, LossOptions(1.0, 3.0, loss="hard", position_weights="uniform")), batch_of(16, 2)
    losses = [module(**batch)["loss"].item() for _ in range(2)]
    metrics = module.pop_metrics()
    ar, diffusion = metrics.get("ar_cross_entropy", 0), metrics.get("cross_entropy", 0)
    wanted = {"ar": ar, "paper": (ar + 3 * diffusion) / 4, "block-diffusion": diffusion}[objective]
    assert losses[0] == losses[1] == pytest.approx(wanted, abs=1e-3)
    assert ("ar_cross_entropy" in metrics, "match" in metrics) == (objective != "block-diffusion", objective != "ar")
    assert module.pop_metrics() == {}


@pytest.mark.parametrize("objective", ["lossless", "paper"])
def test_the_losses_do_not_notice_and_the_card_says_what_was_measured(objective, folder, data, tmp_path):
    plain = options(folder, data, tmp_path, output=tmp_path / "plain", objective=objective, steps=6, log_every=1)
    convert(plain)
    measuring = {"measure_prompts": data, "measure_every": 2, "measure_count": 3, "measure_tokens": 10}
    lengths = {"measure_draft_lengths": [2, 4]}
    watched = options(folder, data, tmp_path, objective=objective, steps=6, log_every=1, **measuring, **lengths)
    model = convert(watched)
    losses = [[row["loss"] for row in curve(config) if "loss" in row] for config in (plain, watched)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
    rows = [row for row in curve(watched) if "tokens_per_forward_k4" in row]
    assert [row["step"] for row in rows] == [2, 4, 6]
    answers = [model.generate(f"say {n}", max_new_tokens=10, draft_length=4) for n in range(3)]
    wanted = sum(a.new_tokens for a in answers) / sum(a.forwards for a in answers)
    assert rows[-1]["tokens_per_forward_k4"] == pytest.approx(wanted, abs=1e-3)
    record = json.loads((watched.output / "training.json").read_text())
    assert [m["draft_length"] for m in record["measured"]] == [2, 4]
    assert len(record["files"]["rows.jsonl"]["sha256"]) == 64
    card = (watched.output / "README.md").read_text()
    assert f"| 4 | **{wanted:.2f}** |" in card
    assert "first 3 prompts" in card
    assert "Nothing was" in (plain.output / "README.md").read_text()


def test_prompts_that_cannot_be_measured_are_refused_before_training(folder, data, tmp_path):
    long, bad = tmp_path / "long.jsonl", tmp_path / "bad.jsonl"
    long.write_text(json.dumps({"prompt": "x" * 200}))
    bad.write_text('{"text": 1}')
    for file, reason in ((long, "a prompt of 20. tokens, but the model's context is 128"), (bad, "line 1: no prompt")):
        with pytest.raises(TidarError, match=reason):
            convert(options(folder, data, tmp_path, measure_prompts=file))
    assert not (tmp_path / "out").exists()


def test_with_base_the_folder_is_a_plain_checkpoint_with_the_drafter_inside(folder, data, tmp_path):
    config = options(folder, data, tmp_path, steps=2, with_base=True)
    convert(config)
    plain = TidarModel.from_pretrained(str(config.output), drafter="none", device="cpu")
    both = TidarModel.from_pretrained(str(config.output), device="cpu")
    answer = both.generate("say 1", max_new_tokens=8)
    assert both.network.drafter is not None
    assert plain.generate("say 1", max_new_tokens=8, mode="ar").token_ids == answer.token_ids


@pytest.mark.parametrize("objective", ["lossless", "paper"])
def test_layers_that_run_again_give_the_same_gradients(objective, folder, data, tmp_path, monkeypatch):
    calls, real = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: calls.append(1) or real(self, x))
    runs, called = [], []
    for again in (False, True):
        config = options(
            folder, data, tmp_path, objective=objective, steps=2, log_every=1, gradient_checkpointing=again
        )
        calls.clear()
        convert(config)
        called.append(len(calls))
        runs.append([[row["loss"], row["grad_norm"]] for row in curve(config) if "loss" in row])
    assert runs[1] == [pytest.approx(row, rel=1e-5) for row in runs[0]]
    assert called[1] == called[0] + 2 * 2  # two steps, two layers


def batch_of(length, blocks):
    """One row of one document, all of it answer."""
    ids = torch.randint(VOCABULARY, (1, length))
    return {
        "input_ids": ids,
        "documents": torch.zeros_like(ids),
        "answers": torch.ones_like(ids, dtype=torch.bool),
        "anchors": torch.arange(0, blocks * 4, 4)[None] % length,
    }


def counted_flops(module, batch):
    with FlopCounterMode(display=False) as counter:
        module(**batch)["loss"].backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("objective", ["lossless", "paper", "ar", "block-diffusion"])
def test_model_flops_are_what_torch_counts(objective):
    """But for attention, which torch does not count on a CPU."""
    length, blocks = 64, 8
    batch = batch_of(length, blocks)
    if objective != "lossless":
        network = Network(tiny_lm("llama").requires_grad_(True), config=TidarConfig(4, objective, mask_token_id=96))
    else:
        network = tiny_network("llama")
    module = Conversion(network)
    counted = counted_flops(module, batch)
    with_attention = model_flops(module, length, blocks)
    network.lm.config.num_attention_heads = 0
    without = model_flops(module, length, blocks)
    assert without == pytest.approx(counted, rel=0.02)
    pairs = length * length / 2, 4 * (blocks if objective != "ar" else 0) * (length / 2 + 4)
    passes = (1, 2) if objective == "lossless" else (3, 3)
    attention = sum(4 * 32 * 2 * n * times for n, times in zip(pairs, passes, strict=True))
    assert with_attention - without == pytest.approx(attention)


def test_an_unknown_device_has_no_peak():
    assert peak_flops(torch.device("cpu")) is None


def test_a_log_line_and_what_reporters_get():
    entry = {"loss": 1.23456, "match": [0.5, 0.25], "tokens_per_second": 123456.7, "epoch": 0.1, "step": 3}
    assert describe(entry, 9, 61.0) == (
        "step 3/9 · loss 1.235 · match 0.50 0.25 · tokens_per_second 123,457 · left 00:01:01"
    )
    assert flat(entry) == {
        "loss": 1.23456,
        "match/1": 0.5,
        "match/2": 0.25,
        "tokens_per_second": 123456.7,
        "epoch": 0.1,
        "step": 3,
    }
