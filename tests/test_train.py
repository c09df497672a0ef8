import json
import math
import signal

import pytest
import torch

from tidar import TidarError, TidarModel
from tidar.config import TidarConfig
from tidar.layout import prefill_layout
from tidar.model.drafter import PEFT_PREFIX
from tidar.model.network import Network
from tidar.train.conversion import Conversion, LossOptions
from tidar.train.convert import convert
from tidar.train.data import collate, pack
from tidar.train.measure import read_measure_prompts
from tidar.train.objective import (
    acceptance_weights,
    hard_cross_entropy,
    paper_loss,
    token_terms,
)
from tidar.train.prepare import model_card
from tidar.train.samples import Sample, Samples, load_samples
from tidar.train.trainer import arguments_of, pin
from tiny import tiny_folder, tiny_lm, tiny_network
from train_options import curve, options


@pytest.mark.parametrize("objective", ["lossless", "paper"])
def test_training_lowers_the_loss_and_the_result_loads_with_the_same_output(objective, folder, data, tmp_path):
    rate = 5e-3 if objective == "lossless" else 1e-3
    config = options(folder, data, tmp_path, objective=objective, learning_rate=rate)
    trained = convert(config)
    measure = "cross_entropy" if objective == "lossless" else "loss"
    values = [row[measure] for row in curve(config) if measure in row]
    assert values[-1] < 0.9 * values[0]
    again = TidarModel.from_pretrained(str(config.output), device="cpu", dtype="float32")
    assert again.config.objective == objective
    a, b = (m.generate("say b", max_new_tokens=30, draft_length=4) for m in (trained, again))
    assert a.token_ids == b.token_ids == again.generate("say b", max_new_tokens=30, mode="ar").token_ids
    if objective == "lossless":
        base = TidarModel.from_pretrained(folder, dtype="float32").hf_model.state_dict()
        own = trained.hf_model.state_dict()
        assert all(torch.equal(own[name], tensor) for name, tensor in base.items())


def test_the_saved_drafter_has_pefts_names_and_its_exact_logits(folder, data, tmp_path):
    trained = convert(options(folder, data, tmp_path, steps=2))
    names = trained.network.drafter.tensors().keys()
    assert f"{PEFT_PREFIX}model.layers.0.self_attn.q_proj.lora_A.weight" in names
    trained.network.drafter.to(torch.bfloat16).float()  # what the file holds
    again = TidarModel.from_pretrained(str(tmp_path / "out"), device="cpu")
    for name, tensor in again.network.drafter.tensors().items():
        assert torch.equal(tensor, trained.network.drafter.tensors()[name]), name


def test_a_full_checkpoint_with_the_drafter_inside_is_also_a_plain_model(folder, data, tmp_path):
    trained = convert(options(folder, data, tmp_path, steps=2))
    trained.save_pretrained(tmp_path / "full", with_base=True)
    again = TidarModel.from_pretrained(str(tmp_path / "full"), device="cpu")
    assert again.network.drafter is not None
    plain = TidarModel.from_pretrained(str(tmp_path / "full"), drafter="none", device="cpu")
    assert plain.generate("x", mode="ar", max_new_tokens=8).token_ids == again.generate("x", max_new_tokens=8).token_ids


def test_self_generated_answers_are_the_base_models_and_are_reused(folder, data, tmp_path):
    path = tmp_path / "answers.safetensors"
    config = options(
        folder, data, tmp_path, self_generate=True, answers=path, answer_tokens=12, steps=1, answers_per_prompt=2
    )
    convert(config)
    base = TidarModel.from_pretrained(folder, device="cpu", dtype="float32")
    samples = load_samples(path, model_card(base)).samples
    assert len(samples) == 80
    greedy = base.generate("say 0", mode="ar", max_new_tokens=12).token_ids
    assert any(s.ids[s.answers].tolist() == greedy for s in samples)
    assert facts(config)["answers"] == "self-generated"
    before = path.read_bytes()
    convert(config)
    assert path.read_bytes() == before
    assert facts(config)["answers"] == "read from answers.safetensors"
    assert facts(config)["files"] == []


def facts(config):
    """What the record of a conversion says about its data."""
    return json.loads((config.output / "training.json").read_text())["summary"]["data"]


def test_ctrl_c_ends_training_after_the_step_and_saves(folder, data, tmp_path, monkeypatch):
    real = Conversion.forward

    def interrupted(self, *args, **kwargs):
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(Conversion, "forward", real)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Conversion, "forward", interrupted)
    convert(options(folder, data, tmp_path))
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["summary"]["steps"] == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_anchors_stand_before_answers_with_something_to_guess():
    torch.manual_seed(0)
    packed = pack(Samples.of([Sample.after(range(20), 10), Sample.after(range(12), 6)]), 32)
    for _ in range(20):
        batch = collate([packed[0]], 6)
        for anchor in batch["anchors"][0].tolist():
            assert batch["answers"][0, anchor + 1]
            assert batch["answers"][0, anchor + 2]
            assert batch["documents"][0, anchor] == batch["documents"][0, anchor + 2]


def test_acceptance_weights_are_the_gradient_of_the_expected_length():
    overlap = torch.rand(3, 6)
    weights = acceptance_weights(overlap, torch.ones(3, 6, dtype=torch.bool))
    log_q = (0.5 * overlap + 0.5).log().requires_grad_()
    expected = log_q[:, 1:].cumsum(1).exp().sum()
    (gradient,) = torch.autograd.grad(expected, log_q)
    torch.testing.assert_close(weights[:, 1:] * 6, gradient[:, 1:])


def test_paper_loss_divides_each_term_by_its_own_count():
    loss = paper_loss(torch.tensor(6.0), torch.tensor(3), torch.tensor(20.0), torch.tensor(5), 1.0, 3.0)
    assert loss.item() == pytest.approx((2.0 + 3 * 4.0) / 4)


def test_the_loss_of_a_batch_is_that_of_its_parts_weighed_by_counts():
    network = tiny_network("llama")
    module = Conversion(network)
    packed = pack(Samples.of(Sample.after(torch.randint(97, (n,)), n // 3) for n in (30, 21, 25, 11)), 32)
    torch.manual_seed(1)
    batch = collate([packed[i] for i in range(len(packed))], 4)
    counts = module.counts(batch)
    whole = module(num_items_in_batch=counts, **batch)["loss"]
    parts = sum(
        module(num_items_in_batch=counts, **{k: v[i : i + 1] for k, v in batch.items()})["loss"]
        for i in range(len(packed))
    )
    torch.testing.assert_close(whole, parts)


MIXED = {
    "input_ids": torch.randint(97, (2, 14), generator=torch.Generator().manual_seed(5)),
    "documents": torch.tensor([[0] * 8 + [1] * 6, [0] * 11 + [-1] * 3]),
    "answers": torch.tensor([[0, 0, 1, 1, 1, 1, 0, 1, 0, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0]])
    > 0,
    "anchors": torch.tensor([[1, 2, 6, 9], [0, 3, 5, 9]]),
}
"""Two documents in a row, padding, prompts and gaps inside answers, blocks that overlap and cross a document's end."""


def documents_of(batch):
    """(row, start, end) of every document."""
    for row, ids in enumerate(batch["documents"].tolist()):
        for document in sorted({d for d in ids if d >= 0}):
            yield row, ids.index(document), len(ids) - ids[::-1].index(document)


def targets_of(batch, anchors, block):
    """(row, start, anchor, [(m, counted)]) of every block: its m-th mask's target is there, and is an answer."""
    for row, start, end in documents_of(batch):
        for anchor in anchors[row]:
            if start <= anchor < end:
                places = range(anchor + 1, min(anchor + block + 1, end))
                yield row, start, anchor, [(p - anchor, bool(batch["answers"][row, p])) for p in places]


def block_states(network, text):
    """[K, H] states of the masks that follow a text [n]."""
    length = torch.tensor([len(text)])
    return network(text[None], prefill_layout(length, len(text), network.config.block_size))[0, len(text) :]


def soft_terms(student, teacher, label, temperature):
    terms = token_terms(student[None], teacher[None], label[None], "soft", temperature)
    return type(terms)(*(x[0] for x in terms))


@pytest.mark.parametrize("sampler_head", [True, False])
@torch.no_grad()
def test_the_lossless_loss_is_a_double_loop_over_anchors_and_masks(sampler_head):
    network, weights = tiny_network("llama"), LossOptions(marginal=0.3, teacher_temperature=0.7)
    if not sampler_head:
        network.drafter.sampler_head = None
    block, total, count = network.config.block_size, 0.0, 0
    for row, start, anchor, targets in targets_of(MIXED, MIXED["anchors"].tolist(), block):
        text, states = MIXED["input_ids"][row], block_states(network, MIXED["input_ids"][row, start : anchor + 1])
        losses, accepted = {}, {}
        for m, counted in targets:
            teacher = network.lm(text[None, start : anchor + m]).logits[
                0, -1
            ]  # what the AR model says at anchor + m - 1
            drafted = network.head(states[m - 1])
            label = text[anchor + m]
            terms = soft_terms(drafted, teacher, label, 0.7)
            if sampler_head:
                before = network.embed(text[anchor + 1 : anchor + m])
                rescored = network.drafter.sampler_head(states[None, :m], before[None])[0, -1]
                marginal, terms = terms, soft_terms(network.head(rescored), teacher, label, 0.7)
            if counted:
                accepted[m] = 0.5 * terms.overlap + 0.5
                losses[m] = terms.loss + (0.3 * marginal.loss if sampler_head else 0)
        reached = {m: math.prod(accepted.get(i, 0.0) for i in range(2, m + 1)) for m in range(2, block + 1)}
        weight = {m: sum(reached[n] for n in range(m, block + 1)) / block for m in range(2, block + 1)}
        weight[1] = weight[block]
        total += sum(weight[m] * losses[m] for m in losses)
        count += len(losses)
    loss = Conversion(network, weights)(**MIXED)["loss"]
    torch.testing.assert_close(loss, total / count)


@torch.no_grad()
def test_the_papers_loss_is_two_means_over_answers():
    network = Network(tiny_lm("llama"), config=TidarConfig(4, "paper", mask_token_id=96))
    ar, diffusion = [], []
    for row, start, end in documents_of(MIXED):
        text, answers = MIXED["input_ids"][row], MIXED["answers"][row]
        for p in range(start + 1, end):
            logits = network.lm(text[None, start:p]).logits[0, -1]
            ar += [hard_cross_entropy(logits[None], text[p : p + 1])] if answers[p] else []
    tiles = [[3, 7, 11]] * 2
    for row, start, anchor, targets in targets_of(MIXED, tiles, 4):
        text = MIXED["input_ids"][row]
        logits = network.head(block_states(network, text[start : anchor + 1]))
        diffusion += [
            hard_cross_entropy(logits[m - 1][None], text[anchor + m][None]) for m, counted in targets if counted
        ]
    wanted = (torch.cat(ar).mean() + 3 * torch.cat(diffusion).mean()) / 4
    options = LossOptions(1.0, 3.0, loss="hard", position_weights="uniform")
    batch = {name: value for name, value in MIXED.items() if name != "anchors"}
    torch.testing.assert_close(Conversion(network, options)(**batch)["loss"], wanted)


def test_accumulating_batches_is_the_same_as_one_batch(folder, tmp_path):
    """Rows with different numbers of answers, and every anchor, so that nothing is left to chance."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"prompt": "p" * (25 - n), "answer": "ab" * n}) for n in (3, 7, 12, 18)))
    logged = []
    for batch_size, accumulate in ((4, 1), (2, 2), (1, 4)):
        sizes = {"batch_size": batch_size, "accumulate": accumulate}
        more = {"steps": 1, "log_every": 1, "sequence_length": 48, "anchors": 48}
        convert(options(folder, rows, tmp_path, **sizes, **more))
        entry = json.loads((tmp_path / "out" / "training.json").read_text())["curve"][0]
        logged.append([entry["loss"], entry["grad_norm"], entry["cross_entropy"]])
    assert logged[1] == pytest.approx(logged[0], rel=1e-3)
    assert logged[2] == pytest.approx(logged[0], rel=1e-3)


def test_diverged_weights_are_not_saved(folder, data, tmp_path):
    with pytest.raises(TidarError, match="diverged"):
        convert(options(folder, data, tmp_path, steps=3, learning_rate=1e30))
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["samples.safetensors"]


@pytest.mark.parametrize(
    "more", [{"generation_minutes": 1e-9}, {"sequence_length": 8}], ids=["no time", "long prompts"]
)
def test_no_finished_answer_is_an_error_and_leaves_no_file(more, folder, data, tmp_path):
    path = tmp_path / "answers.safetensors"
    config = options(folder, data, tmp_path, self_generate=True, answers=path, **{"anchors": 0, **more})
    with pytest.raises(TidarError, match="finished no answer"):
        convert(config)
    assert not path.exists()


def test_self_generation_leaves_the_given_answers_out(folder, tmp_path):
    asked, answered = {"role": "user", "content": "say b"}, {"role": "assistant", "content": "no"}
    rows, path = tmp_path / "rows.jsonl", tmp_path / "answers.safetensors"
    rows.write_text(json.dumps({"messages": [asked, answered]}))
    convert(options(folder, rows, tmp_path, self_generate=True, answers=path, answer_tokens=40, steps=1))
    base = TidarModel.from_pretrained(folder, device="cpu")
    (sample,) = load_samples(path, model_card(base)).samples
    assert sample.ids[sample.answers].tolist() == base.generate("say b", mode="ar", max_new_tokens=40).token_ids


def test_the_trainer_uses_the_device_of_the_model(folder, data, tmp_path):
    arguments = arguments_of(options(folder, data, tmp_path, device=None), torch.device("cpu"))
    assert arguments.use_cpu
    assert arguments.device == torch.device("cpu")
    assert arguments.n_gpu == 0


def test_without_a_launcher_the_trainer_keeps_to_one_of_several_gpus(folder, data, tmp_path, monkeypatch):
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    arguments = arguments_of(options(folder, data, tmp_path), torch.device("cpu"))
    arguments._n_gpu = 3
    pin(arguments, torch.device("cuda:1"))
    assert arguments.device == torch.device("cuda:1")
    assert arguments.n_gpu == 1
    assert current == [torch.device("cuda:1")]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_is_trained_on_alone(folder, data, tmp_path):
    trained = convert(options(folder, data, tmp_path, device="cuda:1", steps=2, compiled=False))
    assert {p.device for p in trained.network.parameters()} == {torch.device("cuda:1")}
    assert torch.cuda.max_memory_allocated(0) == 0


def test_hard_cross_entropy_is_torchs():
    logits, labels = torch.randn(4, 7), torch.tensor([0, 3, 6, 2])
    torch.testing.assert_close(
        hard_cross_entropy(logits, labels).mean(), torch.nn.functional.cross_entropy(logits, labels)
    )


def test_documents_longer_than_the_context_are_refused(tmp_path):
    folder = tiny_folder(tmp_path / "model")
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"text": "many words " * 60}))
    config = options(folder, data, tmp_path, sequence_length=512)
    with pytest.raises(TidarError, match=r"sequence-length is 512.*context is 128"):
        convert(config)


def test_measure_prompts_without_prompts_are_refused_by_name(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n")
    with pytest.raises(TidarError, match="measure-prompts"):
        read_measure_prompts(tmp_path / "none.jsonl", None, 4)
