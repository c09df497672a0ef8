"""A run that is killed and resumed is the run that was not: losses and weights bit for bit."""

import json
import random
import signal
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tidar import TidarError
from tidar.train.blocks import BlockDraw, collate_blocks
from tidar.train.conversion import Conversion
from tidar.train.convert import convert
from tidar.train.data import collate, pack
from tidar.train.samples import Sample, Samples
from tidar.train.stream import Stream, collate_placed
from tidar.train.trainer import last_checkpoint
from train_options import curve, options


def losses(config):
    return [(row["step"], row["loss"], row["grad_norm"]) for row in curve(config) if "loss" in row]


def weights(config):
    (file,) = config.output.glob("*model.safetensors")
    return load_file(file)


class KilledError(Exception):
    """What the machine does to us."""


def kill_after(steps, monkeypatch):
    """Make training draw global random numbers, so that their state matters, and die in the step after `steps`."""
    real, done = Conversion.forward, []

    def forward(self, **batch):
        if len(done) == steps:
            raise KilledError
        done.append(1)
        noise = 1 + 0.01 * (torch.rand(()) + random.random() + np.random.rand())
        output = real(self, **batch)
        return {"loss": output["loss"] * noise}

    monkeypatch.setattr(Conversion, "forward", forward)


@pytest.mark.parametrize("objective", ["lossless", "paper"])
def test_a_killed_and_resumed_run_is_the_uninterrupted_one(objective, folder, data, tmp_path, monkeypatch):
    more = {
        "objective": objective,
        "steps": 10,
        "log_every": 1,
        "save_every": 5,
        "batch_size": 3,
        "learning_rate": 5e-3,
    }
    whole = options(folder, data, tmp_path, output=tmp_path / "whole", **more)
    kill_after(-1, monkeypatch)
    convert(whole)
    parts = options(folder, data, tmp_path, output=tmp_path / "parts", **more)
    monkeypatch.undo()
    kill_after(7, monkeypatch)
    with pytest.raises(KilledError):
        convert(parts)
    monkeypatch.undo()
    kill_after(-1, monkeypatch)
    convert(options(folder, data, tmp_path, output=tmp_path / "parts", resume="auto", **more))
    assert losses(parts) == losses(whole)
    assert len({loss for _, loss, _ in losses(whole)}) == 10
    a, b = weights(whole), weights(parts)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_ctrl_c_leaves_a_checkpoint_that_ends_as_if_nothing_had_happened(folder, data, tmp_path, monkeypatch):
    more = {"steps": 6, "log_every": 1, "batch_size": 3}
    whole = options(folder, data, tmp_path, output=tmp_path / "whole", **more)
    convert(whole)
    real, seen = Conversion.forward, []

    def interrupted(self, **batch):
        seen.append(1)
        if len(seen) == 4:
            signal.raise_signal(signal.SIGINT)
        return real(self, **batch)

    parts = options(folder, data, tmp_path, output=tmp_path / "parts", **more)
    with monkeypatch.context() as patch:
        patch.setattr(Conversion, "forward", interrupted)
        convert(parts)
    assert len(losses(parts)) == 4
    assert (parts.output / "adapter_model.safetensors").exists()
    with pytest.raises(TidarError, match="holds checkpoints of an earlier run"):
        convert(parts)
    convert(
        options(
            folder, data, tmp_path, output=tmp_path / "parts", resume=str(last_checkpoint(parts.checkpoints)), **more
        )
    )
    assert losses(parts) == losses(whole)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rank": 4}, "does not fit this conversion"),
        ({"seed": 5}, "other data or another seed"),
        ({"sequence_length": 48}, "other data or another seed"),
        ({"steps": 2}, "nothing is left to do"),
        ({"learning_rate": 1e-5}, "learning-rate is 1e-05, but the run in .* had None"),
        ({"loss": "hard"}, "loss is hard, but the run in .* had soft"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change, reason, folder, data, tmp_path):
    convert(options(folder, data, tmp_path, steps=2, save_every=2))
    with pytest.raises(TidarError, match=reason):
        convert(options(folder, data, tmp_path, **{"steps": 4, "resume": "auto", **change}))


def test_auto_starts_anew_where_there_is_no_checkpoint_and_old_ones_are_deleted(folder, data, tmp_path):
    config = options(folder, data, tmp_path, steps=4, save_every=1, keep_checkpoints=2, resume="auto")
    convert(config)
    assert sorted(p.name for p in config.checkpoints.iterdir()) == ["checkpoint-3", "checkpoint-4"]


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    for step, complete in ((9, True), (10, True), (11, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if complete:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").touch()
    assert last_checkpoint(tmp_path).name == "checkpoint-10"
    assert last_checkpoint(tmp_path / "none") is None


def test_every_epoch_has_every_row_once_in_another_order():
    stream = Stream(list(range(7)), 3, 0, 21)
    epochs = [[stream[7 * e + i].row for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 3
    assert [Stream(list(range(7)), 4, 0, 7)[i].row for i in range(7)] != epochs[0]


def test_a_place_has_its_row_and_anchors_whatever_came_before():
    packed = pack(Samples.of(Sample.after(range(30), 4) for _ in range(12)), 32)
    later, all_ = Stream(packed, 1, 9, 5), Stream(packed, 1, 0, 14)

    def batch(stream, *places):
        return collate_placed(lambda rows: collate(rows, 4), [stream[p] for p in places])

    torch.manual_seed(1)
    together = batch(all_, 9, 10)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    alone = batch(later, 1)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in alone.items():
        assert torch.equal(tensor[0], together[name][1]), name
    assert not torch.equal(together["anchors"][0], together["anchors"][1])
    assert not torch.equal(batch(Stream(packed, 2, 9, 5), 1)["anchors"], alone["anchors"])


@pytest.mark.parametrize(("tiled", "budget"), [(False, 4), (True, 0), (True, 3)])
def test_shown_tokens_and_chosen_tiles_are_a_function_of_the_place(tiled, budget):
    packed = pack(Samples.of(Sample.after(range(30), 4) for _ in range(12)), 32)
    draw = partial(collate_placed, BlockDraw(4, budget, tiled, random=True))
    both = [collate_blocks(draw, [Stream(packed, 1, 0, 20)[p] for p in places]) for places in ((9, 10), (10, 11))]
    for name in both[0]:
        assert torch.equal(both[0][name][1], both[1][name][0]), name
    assert not torch.equal(both[0]["shown"][0], both[0]["shown"][1])
    assert ("anchors" in both[0]) == bool(budget)


def test_the_curve_is_in_the_record_of_the_whole_run(folder, data, tmp_path):
    config = options(folder, data, tmp_path, steps=2, save_every=2, log_every=2)
    convert(config)
    convert(options(folder, data, tmp_path, steps=4, save_every=2, log_every=1, resume="auto"))
    record = json.loads((config.output / "training.json").read_text())
    assert [row["step"] for row in record["curve"] if "loss" in row] == [2, 3, 4]
    assert record["rows_consumed"] == 4 * 4


def test_a_resumed_run_reads_its_generated_answers_again(folder, data, tmp_path, monkeypatch):
    more = {"self_generate": True, "answer_tokens": 12, "save_every": 2}
    convert(options(folder, data, tmp_path, steps=2, **more))

    def again(*args):
        raise AssertionError("sampled anew")

    monkeypatch.setattr("tidar.train.prepare.generate_answers", again)
    convert(options(folder, data, tmp_path, steps=3, resume="auto", **more))
    more["answer_tokens"] = 13
    with pytest.raises(TidarError, match=r"answers\.safetensors holds answers to other prompts, or by other options"):
        convert(options(folder, data, tmp_path, steps=4, resume="auto", **more))
    assert (tmp_path / "out" / "answers.safetensors").exists()
