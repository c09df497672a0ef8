import json
import signal

import pytest
import torch

from tidar import TidarError, TidarModel
from tidar.model.drafter import PEFT_PREFIX
from tidar.train.conversion import Conversion
from tidar.train.convert import TrainConfig, convert
from tidar.train.data import Sample, collate, pack, read_samples
from tidar.train.objective import (
    acceptance_weights,
    chunked,
    hard_cross_entropy,
    paper_loss,
    soft_cross_entropy,
)
from tidar.train.samples import load_samples, save_samples
from tiny import tiny_folder, tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = [{"prompt": f"say {c}", "answer": c * 12 + " and " + c * 8} for c in "abcdefgh"]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def options(folder, data, tmp_path, **more):
    base = {
        "model": folder,
        "output": tmp_path / "out",
        "data": [data],
        "self_generate": False,
        "block_size": 4,
        "rank": 8,
        "sampler_width": 16,
        "steps": 60,
        "batch_size": 4,
        "sequence_length": 64,
        "anchors": 8,
        "log_every": 10,
        "device": "cpu",
    }
    return TrainConfig(**{**base, **more})


@pytest.mark.parametrize("objective", ["lossless", "paper"])
def test_training_lowers_the_loss_and_the_result_loads_with_the_same_output(objective, folder, data, tmp_path):
    rate = 5e-3 if objective == "lossless" else 1e-3
    config = options(folder, data, tmp_path, objective=objective, learning_rate=rate)
    if objective == "paper":
        lm = TidarModel.from_pretrained(folder).hf_model
        lm.resize_token_embeddings(lm.config.vocab_size + 1)  # the mask token: a row that the tokenizer does not use
        lm.save_pretrained(tmp_path / "base")
        TidarModel.from_pretrained(folder).tokenizer.save_pretrained(tmp_path / "base")
        config.model = str(tmp_path / "base")
    trained = convert(config)
    curve = json.loads((config.output / "training.json").read_text())["curve"]
    measure = "cross_entropy" if objective == "lossless" else "loss"
    values = [row[measure] for row in curve if measure in row]
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
    samples = load_samples(path)
    assert len(samples) == 16
    base = TidarModel.from_pretrained(folder, device="cpu")
    greedy = base.generate("say a", mode="ar", max_new_tokens=12).token_ids
    assert any(s.ids[s.answer :] == greedy for s in samples)
    before = path.read_bytes()
    convert(config)
    assert path.read_bytes() == before


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


def test_packing_keeps_documents_whole_and_marks_answers():
    samples = [Sample(list(range(1, n + 1)), n // 2) for n in (30, 20, 14, 33, 64, 3, 90)]
    packed = pack(samples, 64)
    found = []
    for ids, documents, answers in zip(packed.ids, packed.documents, packed.answers, strict=True):
        for d in sorted(set(documents[documents >= 0])):
            where = documents == d
            found.append((ids[where].tolist(), int(answers[where].argmax())))
        assert not answers[documents < 0].any()
    assert sorted(found) == sorted((s.ids[:64], s.answer) for s in samples)


def test_no_answer_that_fits_is_an_error():
    with pytest.raises(TidarError, match="no training sample"):
        pack([Sample(list(range(50)), 48)], 32)


def test_anchors_stand_before_answers_with_something_to_guess():
    torch.manual_seed(0)
    packed = pack([Sample(list(range(20)), 10), Sample(list(range(12)), 6)], 32)
    for _ in range(20):
        batch = collate([packed[0]], 6)
        for anchor in batch["anchors"][0].tolist():
            assert batch["answers"][0, anchor + 1]
            assert batch["answers"][0, anchor + 2]
            assert batch["documents"][0, anchor] == batch["documents"][0, anchor + 2]


def test_chunks_change_neither_loss_nor_gradient():
    head = torch.nn.Linear(8, 19)
    student, teacher = torch.randn(23, 8, requires_grad=True), torch.randn(23, 8)
    results = []
    for chunk, recompute in ((100, False), (7, False), (7, True)):
        terms = chunked(
            lambda s, t: tuple(soft_cross_entropy(head(s), head(t).detach())), chunk, recompute, student, teacher
        )
        (gradient,) = torch.autograd.grad(terms[0].sum(), student)
        results.append([*terms, gradient])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_soft_cross_entropy_is_its_definition():
    student, teacher = torch.randn(5, 11), torch.randn(5, 11)
    terms = soft_cross_entropy(student, teacher)
    p, q = teacher.softmax(-1), student.softmax(-1)
    torch.testing.assert_close(terms.loss, -(p * q.log()).sum(-1))
    torch.testing.assert_close(terms.overlap, torch.minimum(p, q).sum(-1))
    same = soft_cross_entropy(teacher, teacher)
    torch.testing.assert_close(same.overlap, torch.ones(5))


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
    packed = pack([Sample(torch.randint(97, (n,)).tolist(), n // 3) for n in (30, 21, 25, 11)], 32)
    torch.manual_seed(1)
    batch = collate([packed[i] for i in range(len(packed))], 4)
    counts = module.counts(batch)
    whole = module(num_items_in_batch=counts, **batch)["loss"]
    parts = sum(
        module(num_items_in_batch=counts, **{k: v[i : i + 1] for k, v in batch.items()})["loss"]
        for i in range(len(packed))
    )
    torch.testing.assert_close(whole, parts)


def test_hard_cross_entropy_is_torchs():
    logits, labels = torch.randn(4, 7), torch.tensor([0, 3, 6, 2])
    torch.testing.assert_close(
        hard_cross_entropy(logits, labels).mean(), torch.nn.functional.cross_entropy(logits, labels)
    )


def test_samples_survive_the_disk(tmp_path):
    samples = [Sample([5, 6, 7], 1), Sample([1], 0), Sample(list(range(40)), 30)]
    save_samples(tmp_path / "s.safetensors", samples)
    assert load_samples(tmp_path / "s.safetensors") == samples
    (tmp_path / "bad").write_text("no")
    with pytest.raises(TidarError, match="does not hold"):
        load_samples(tmp_path / "bad")


def test_rows_without_an_answer_are_named(tmp_path, folder):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(TidarError, match="line 2"):
        read_samples(path, TidarModel.from_pretrained(folder).tokenizer)
