"""`tidar bench` measures what it says, writes it down and draws it."""

import json

import pytest
import torch
from matplotlib import pyplot

from tidar import TidarModel
from tidar.bench import machine, shapes, slots, speed
from tidar.decode.step import Plan
from tidar.errors import TidarError
from tiny import CONTEXT, tiny_folder, tiny_network


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny")


def test_slots_are_measured_written_and_drawn(run, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "STEPS", ((1, 0, 0), (4, 2, 3)))
    out = tmp_path / "deep" / "slots-1.5b"
    options = ("--tokens", 4, "--tokens", 1, "--prefix", 40, "--prefix", 8, "--device", "cpu", "--dtype", "float32")
    options += ("--weights", "int8")
    code, shown, _ = run("bench", "slots", "--model", folder, "--no-drafter", "--out", out, *options)
    assert code == 0
    assert all(heading in shown for heading in ("AR", "GB/s", "warm-up"))
    result = json.loads(out.with_name("slots-1.5b.json").read_text())
    assert out.with_name("slots-1.5b.png").read_bytes().startswith(b"\x89PNG")
    assert result["weights"] == "int8"
    # In this order, whatever was asked for: a GPU's runner keeps its largest state, and attention reads all its room.
    assert [curve["prefix"] for curve in result["curves"]] == [8, 40]
    for curve in result["curves"]:
        assert [p["tokens"] for p in curve["forward"]] == [1, 4]
        assert [(s["draft_length"], s["outcomes"], s["slots"]) for s in curve["steps"]] == [(1, 0, 1), (4, 2, 15)]
        assert all(p["ms"] > 0 and p["gb_per_s"] >= 0 and p["roofline_ms"] > 0 for p in curve["forward"])
        assert all(s["gb_per_s"] >= 0 and s["warm_up_s"] > 0 for s in (*curve["steps"], *curve["forward"]))
        assert curve["steps"][0]["ar_steps"] == 1
    assert {"command", "device", "dtype", "commit", "torch"} <= result["conditions"].keys()


def test_training_is_measured_and_written(run, folder, tmp_path):
    out = tmp_path / "train"
    sizes = ("--sequence-length", 32, "--accumulate", 1, "--steps", 8, "--block-size", 4, "--device", "cpu")
    code, shown, _ = run("bench", "train", "--model", folder, "--out", out, *sizes)
    assert code == 0
    assert "time a token" in shown
    rows = json.loads(out.with_name("train.json").read_text())["rows"]
    assert [row["objective"] for row in rows] == ["ar", "paper", "lossless"]
    assert rows[0]["time_per_token"] == 1
    assert all(row["tokens_per_second"] > 0 and row["peak_memory_gib"] > 0 for row in rows)
    assert rows[1]["model_mflop_per_token"] > 1.8 * rows[0]["model_mflop_per_token"]
    assert not any(path.is_dir() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--objective", "guess"), "objective"), (("--steps", 4), "steps"), (("--batch-size", 0), "batch")],
)
def test_training_that_cannot_be_measured_is_one_line(options, word, run, folder, tmp_path):
    code, _, errors = run("bench", "train", "--model", folder, "--out", tmp_path / "train", *options)
    assert code == 2
    assert word in errors


def test_speed_is_measured_written_and_drawn(run, folder, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "what?"}\n{"prompt": "why, and how?"}\n{"prompt": "left out"}\n')
    options = ("--batch", 1, "--batch", 2, "--repeats", 1, "--max-new-tokens", 5, "--device", "cpu")
    command = ("bench", "speed", "--model", folder, "--prompts", f"mine={prompts}:2", "--out", tmp_path / "speed")
    code, shown, _ = run(*command, *options, "--dtype", "float32")
    assert code == 0
    assert "tokens/s" in shown
    assert "mine, batch 2" in shown
    assert "GB/s" in shown
    assert "warm-up" in shown
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert {(r["contestant"], r["batch"]) for r in rows} == {
        *(("ar", 1), ("ar", 2)),
        *(("transformers generate", 1), ("transformers prompt lookup", 1)),
    }
    for row in rows:
        assert row["set"] == "mine"
        assert row["identical_to_ar"] == row["prompts"] == 2
        assert row["new_tokens"] <= 10
        assert row["tokens_per_s"] > 0
        assert row["first_token_ms"] > 0
        assert row["warm_up_s"] > 0
        assert row["rows"] == row["batch"]


@pytest.fixture
def measure_speed(run, folder, tmp_path):
    """`tidar bench speed` on one prompt, some two tokens: exit code, stderr and rows written."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what?"}\n')

    def call(*options):
        command = ("bench", "speed", "--model", folder, "--prompts", f"mine={tmp_path}/prompts.jsonl", *options)
        sizes = ("--device", "cpu", "--repeats", 1, "--max-new-tokens", 2, "--out", tmp_path / "speed")
        code, _, err = run(*command, *sizes)
        file = tmp_path / "speed.json"
        return code, err, json.loads(file.read_text())["rows"] if file.exists() else None

    return call


def test_speed_of_some_contestants(measure_speed):
    code, _, rows = measure_speed("--batch", 1, "--only", "ar")
    assert code == 0
    assert [(row["contestant"], row["identical_to_ar"]) for row in rows] == [("ar", 1)]
    code, err, _ = measure_speed("--batch", 1, "--only", "ar", "--only", "lookup")
    assert code == 2
    assert "'lookup'" in err
    assert "transformers prompt lookup" in err


@pytest.mark.parametrize("batches", [("--batch", 4), ("--batch", 4, "--batch", 1)])
def test_a_contestant_that_does_not_run_at_these_batch_sizes_is_refused(batches, measure_speed):
    code, err, rows = measure_speed(*batches, "--only", "transformers prompt lookup", "--only", "ar")
    assert code == 2
    assert err.startswith("tidar: --only 'transformers prompt lookup' is no contestant at batch 4")
    assert "'ar', 'transformers generate' (" in err
    assert err.count("\n") == 1
    assert rows is None


def test_passes_take_turns_and_learn_apart(monkeypatch):
    """So that what slows the machine for a while slows every contestant; peers, which are slow, run alone."""
    model, ran = TidarModel(tiny_network("llama"), None), []

    def contestant(name):
        def run(prompts, batch, new):
            learned = model.network.learned
            learned[name] = learned.get(name, 0) + 1
            assert learned.keys() == {name}
            ran.append((name, len(prompts), new))
            return speed.Run(1.0, [[1]] * len(prompts), None)

        return run

    names = ("ar", "tidar auto", "transformers generate")
    monkeypatch.setattr(speed, "contestants", lambda *_: {name: contestant(name) for name in names})
    *_, result = speed.measure(model, "tiny", {"a": ["x"] * 3}, [2], 8, 2, True, 3)
    assert [row["contestant"] for row in result["rows"]] == list(names)
    one = [(name, 2, 8) for name in names[:2]]
    both = [(name, 3, 8) for name in names[:2]]
    first = [(name, 2, 1) for name in names[:2]]
    assert ran[:10] == [*one, *both, *both, *first, *first]
    assert {name for name, *_ in ran[10:]} == {"transformers generate"}
    assert model.network.learned == {}


def test_answers_are_compared_with_those_of_plain_decoding_only(measure_speed):
    code, _, rows = measure_speed("--batch", 1, "--only", "transformers generate")
    assert code == 0
    assert "identical_to_ar" not in rows[0]


def test_a_batch_that_prompts_do_not_fill_says_its_rows(measure_speed):
    code, err, rows = measure_speed("--batch", 1, "--batch", 4, "--no-peers")
    assert code == 0
    assert err.count("mine: batch 4 has 1 of 4 rows, for there are no more prompts\n") == 1
    assert [(row["batch"], row["rows"]) for row in rows] == [(1, 1), (4, 1)]


def test_where_memory_ends_what_was_measured_is_kept(measure_speed, monkeypatch):
    def generate(self, prompts, batch_size, **options):
        if batch_size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, prompts, batch_size=batch_size, **options)

    real = TidarModel.generate
    monkeypatch.setattr(TidarModel, "generate", generate)
    code, err, rows = measure_speed("--batch", 1, "--batch", 2)
    assert code == 2
    assert err.splitlines()[-1] == (
        "tidar: out of memory with batch 2: lower --batch; what was measured so far is kept"
    )
    assert [row["batch"] for row in rows] == [1]


def test_slots_say_at_which_batch_memory_ends(run, folder, tmp_path, monkeypatch):
    def time_step(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(slots, "time_step", time_step)
    command = ("bench", "slots", "--model", folder, "--no-drafter", "--device", "cpu", "--prefix", 8, "--tokens", 4)
    code, _, err = run(*command, "--batch", 64, "--out", tmp_path / "x")
    assert code == 2
    assert err.startswith("tidar: out of memory with batch 64 and a prefix of 8: lower --batch")


def test_a_model_that_cannot_draft_says_why_one_step_is_timed(run, folder, tmp_path):
    command = ("bench", "slots", "--model", folder, "--device", "cpu", "--prefix", 8, "--tokens", 4)
    code, _, err = run(*command, "--out", tmp_path / "x")
    assert code == 0
    assert "has no drafter, so of the steps only the plain one is timed; --no-drafter" in err
    assert len(json.loads((tmp_path / "x.json").read_text())["curves"][0]["steps"]) == 1


def test_bars_of_a_run_that_was_cut_off_stand_beside_their_names(tmp_path, monkeypatch):
    drawn = list[pyplot.Figure]()
    monkeypatch.setattr(pyplot, "close", drawn.append)
    row = {"batch": 1, "rows": 1, "tokens_per_s": 2.0}
    rows = [row | {"set": "a", "contestant": name} for name in ("ar", "tidar auto", "transformers generate")]
    rows.append(row | {"set": "b", "contestant": "tidar auto"})
    speed.plot({"rows": rows, "model": "m", "conditions": {"device": "d", "dtype": "float32"}}, tmp_path / "speed.png")
    first, second = drawn[0].axes
    assert [label.get_text() for label in first.get_yticklabels()] == ["ar", "tidar auto", "transformers generate"]
    assert [bar.get_y() + bar.get_height() / 2 for bar in second.patches] == pytest.approx([1])
    assert first.get_ylim() == second.get_ylim()


@pytest.mark.parametrize("ending", [".json", ".png"])
@pytest.mark.parametrize("command", [("slots",), ("speed", "--prompts", "a=b.jsonl")])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(command, ending, run, folder, tmp_path):
    (tmp_path / f"x{ending}").mkdir()
    code, _, err = run("bench", *command, "--model", folder, "--out", tmp_path / "x", "--device", "cpu")
    assert code == 2
    assert err == f"tidar: cannot write {tmp_path}/x{ending}: it is a folder\n"
    assert [path.name for path in tmp_path.iterdir()] == [f"x{ending}"]


@pytest.mark.parametrize(
    "options",
    [
        ("slots", "--model", "random:nothing"),
        ("slots", "--tokens", 0),
        ("slots", "--prefix", CONTEXT),
        ("slots", "--weights", "int3"),
        ("speed", "--prompts", "no-equals-sign"),
        ("slots", "--model", "random:smollm2-135m", "--dtype", "float13"),
        ("speed", "--prompts", "a=b.jsonl", "--repeats", 0),
        ("speed", "--prompts", "a=b.jsonl:0"),
        ("speed", "--prompts", "a={prompts}:1", "--prompts", "a={prompts}"),
        ("slots", "--out", ""),
    ],
)
def test_impossible_measurements_are_refused_in_one_line(options, run, folder, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what?"}\n')
    kind, *rest = (str(option).replace("{prompts}", str(tmp_path / "prompts.jsonl")) for option in options)
    model = () if "--model" in rest else ("--model", folder)
    out = () if "--out" in rest else ("--out", tmp_path / "x")
    code, _, err = run("bench", kind, *model, *rest, *out, "--device", "cpu")
    assert code == 2
    assert len([line for line in err.splitlines() if line.startswith("tidar: ")]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_bytes_of_a_forward_are_those_of_its_weights_and_cache():
    network = tiny_network("llama", draft=False)
    attention, mlp, norms = 32 * 32 * 2 + 2 * 32 * 16, 3 * 32 * 64, 2 * 32
    head = network.lm.get_output_embeddings().weight.numel()
    assert shapes.weight_bytes(network) == 4 * (2 * (attention + mlp + norms) + 32 + head)
    assert shapes.cache_bytes(network, 10) == 4 * 2 * 2 * 2 * 8 * 10


def test_random_models_have_the_shape_of_their_namesakes(monkeypatch):
    kind, sizes = shapes.RANDOM["random:smollm2-135m"]
    monkeypatch.setitem(shapes.RANDOM, "random:smollm2-135m", (kind, {**sizes, "num_hidden_layers": 1}))
    for drafter in (True, False):
        network = shapes.build("random:smollm2-135m", drafter, "cpu", "float32")
        assert network.can_draft
        assert (network.drafter is not None) == drafter
        assert min(slots.time_step(network, Plan(2), 4)) > 0
    with pytest.raises(TidarError, match="there are"):
        shapes.build("random:gpt-5", True, None, None)


def test_median_seconds_leaves_out_the_warmup():
    calls = []
    seconds = machine.median_seconds(lambda: calls.append(1), torch.device("cpu"), repeats=3, warmups=2)
    assert len(calls) == 5
    assert 0 <= seconds < 0.1


def test_what_was_measured_survives_an_interruption(run, folder, tmp_path, monkeypatch):
    seconds = iter([0.5, 0.75])

    def time_step(*arguments):
        try:
            return slots.Timed(next(seconds), 1.0)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(slots, "time_step", time_step)
    out = tmp_path / "slots"
    options = ("--no-drafter", "--out", out, "--device", "cpu", "--prefix", 8, "--tokens", 4)
    code, _, _ = run("bench", "slots", "--model", folder, *options)
    assert code != 0
    (curve,) = json.loads(out.with_suffix(".json").read_text())["curves"]
    assert [step["ar_steps"] for step in curve["steps"]] == [1.0, 1.5]


def test_a_peer_that_fails_leaves_the_models_attention_as_it_was(folder, monkeypatch):
    model = TidarModel.from_pretrained(folder, device="cpu", dtype="float32")
    before = model.hf_model.config._attn_implementation

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.hf_model, "generate", fail)
    with pytest.raises(RuntimeError):
        speed.transformers_generate(model)(["what?"], 1, 2)
    assert model.hf_model.config._attn_implementation == before
