"""Self-generation: the answers are the engine's, an interrupted job goes on, and the command keeps what it has."""

import itertools
import json

import pytest

from tidar import TidarError, TidarModel
from tidar.cli import main as cli
from tidar.decode import bulk
from tidar.decode.engine import Engine, Limits
from tidar.decode.step import Plan
from tidar.sampling import SamplingParams
from tidar.train import selfgen
from tidar.train.prepare import model_card
from tidar.train.samples import ModelCard, load_samples
from tidar.train.selfgen import Generation, generate_answers, readable, tasks_of
from tiny import some_prompt, tiny_folder, tiny_network

MODEL = ModelCard("tiny", 97)
PROMPTS = [some_prompt(length, length) for length in (3, 9, 1, 14, 6, 30, 2)]
HOW = Generation(
    temperatures=(0.0, 0.9), answers=2, max_new_tokens=12, max_prompt_tokens=20, batch_size=3, seed=5, seconds=None
)


@pytest.fixture(scope="module")
def network():
    network = tiny_network("llama", draft=False)
    network.lm.generation_config.eos_token_id = [5, 17, 60, 80]
    return network


def test_answers_are_the_engines_at_every_temperature(network, tmp_path, capsys):
    stored = generate_answers(network, PROMPTS, HOW, tmp_path / "a.safetensors", MODEL)
    assert "1 prompts over 20 tokens left out" in capsys.readouterr().err
    assert stored.jobs.tolist() == sorted(n for n in range(14) if n % 7 != 5)
    assert stored.origin.complete
    for place, temperature in enumerate(HOW.temperatures):
        # The engine numbers the rows of a job itself: given all of them, a row is a task's number.
        params = SamplingParams(temperature, seed=HOW.seed + place)
        expected = {}
        for updates in Engine(network, Plan(1, params)).run(PROMPTS * 2, Limits(12, network.eos_ids)):
            expected.update({u.answer.row: u.answer.token_ids for u in updates})
        mine = [task for task in tasks_of(PROMPTS, HOW) if task.temperature == place]
        assert len(mine) == 6
        for task in mine:
            ids, answers = stored.samples[stored.jobs.tolist().index(task.number)]
            assert ids[~answers].tolist() == PROMPTS[task.prompt]
            assert ids[answers].tolist() == expected[task.number]
    rows = list(readable(stored, len(PROMPTS), HOW))
    assert [(row.prompt, row.temperature) for row in rows[:3]] == [(0, 0.0), (1, 0.9), (2, 0.0)]
    assert rows[-1].token_ids == stored.samples[11].ids[stored.samples[11].answers].tolist()


def interrupted_after(chunks, monkeypatch):
    """Ctrl-C in the middle of bulk decoding, once."""
    real, left = bulk.decode_bulk, itertools.count(chunks, -1)

    def decode(*args):
        for chunk in real(*args):
            yield chunk
            if next(left) == 0:
                raise KeyboardInterrupt

    monkeypatch.setattr(bulk, "decode_bulk", decode)


@pytest.mark.parametrize("chunks", [2, 9])
def test_an_interrupted_job_goes_on_where_it_stopped(chunks, network, tmp_path, monkeypatch, capsys):
    whole, path = tmp_path / "whole.safetensors", tmp_path / "a.safetensors"
    generate_answers(network, PROMPTS, HOW, whole, MODEL)
    interrupted_after(chunks, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        generate_answers(network, PROMPTS, HOW, path, MODEL)
    part = load_samples(path, MODEL)
    assert part.origin.interrupted
    assert 0 < len(part.samples) < 12
    decoded = []
    real = bulk.decode_bulk
    monkeypatch.setattr(bulk, "decode_bulk", lambda *args: decoded.extend(args[2]) or real(*args))
    generate_answers(network, PROMPTS, HOW, path, MODEL)
    assert len(decoded) == 12 - len(part.samples)
    assert path.read_bytes() == whole.read_bytes()
    assert f"continues after {len(part.samples)} of 12 answers" in capsys.readouterr().err


def test_what_is_finished_is_saved_along_the_way(network, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    monkeypatch.setattr(selfgen, "SAVE_EVERY", 0.0)
    seen = []

    def watched(*args, real=bulk.decode_bulk):
        for chunk in real(*args):
            yield chunk
            seen.append(path.exists() and load_samples(path, MODEL).origin.interrupted)

    monkeypatch.setattr(bulk, "decode_bulk", watched)
    generate_answers(network, PROMPTS, HOW, path, MODEL)
    assert any(seen)
    assert not load_samples(path, MODEL).origin.interrupted


@pytest.mark.parametrize("change", [{"seed": 6}, {"temperatures": (0.5,)}, {"max_new_tokens": 13}, {"answers": 1}])
def test_answers_by_other_options_are_not_mixed(change, network, tmp_path):
    path = tmp_path / "a.safetensors"
    generate_answers(network, PROMPTS, HOW, path, MODEL)
    with pytest.raises(TidarError, match="other prompts, or by other options"):
        generate_answers(network, PROMPTS, Generation(**{**vars(HOW), **change}), path, MODEL)


def test_a_finished_job_is_not_done_again_and_time_and_batch_do_not_matter(network, tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    generate_answers(network, PROMPTS, HOW, path, MODEL)
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(bulk, "decode_bulk", None)
    generate_answers(network, PROMPTS, Generation(**{**vars(HOW), "batch_size": 2, "seconds": 9.0}), path, MODEL)
    assert path.stat().st_mtime_ns == before


def test_time_ends_a_job_that_is_then_not_wanted_further(network, tmp_path, monkeypatch):
    path, how = tmp_path / "a.safetensors", Generation(**{**vars(HOW), "seconds": 1e-9, "max_new_tokens": 1})
    stored = generate_answers(network, PROMPTS, how, path, MODEL)
    assert 0 < len(stored.samples) < 12
    assert not stored.origin.complete
    assert not stored.origin.interrupted


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


def run(monkeypatch, *args):
    monkeypatch.setattr("sys.argv", ["tidar", "generate-data", *map(str, args)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code


def test_the_command_writes_answers_that_training_reads(folder, tmp_path, monkeypatch, capsys):
    prompts, out, rows = tmp_path / "p.jsonl", tmp_path / "a.safetensors", tmp_path / "a.jsonl"
    prompts.write_text('{"prompt": "one"}\nnothing\n{"messages": [{"role": "user", "content": "two"}]}\n')
    args = ["--model", folder, "--data", prompts, "--output", out, "--jsonl", rows, "--device", "cpu"]
    args += ["--max-new-tokens", 6, "--temperature", 0, "--temperature", 1]
    assert run(monkeypatch, *args) == 2
    assert capsys.readouterr().err.startswith(f"tidar: {prompts}, line 2: not valid JSON")
    assert not out.exists()
    assert run(monkeypatch, *args, "--skip-bad-rows") == 0
    assert "1 bad rows skipped, the first: " in capsys.readouterr().err
    model = TidarModel.from_pretrained(folder, device="cpu")
    samples = load_samples(out, model_card(model)).samples
    greedy = model.generate("one", mode="ar", max_new_tokens=6)
    assert samples[0].ids[samples[0].answers].tolist() == greedy.token_ids
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert written[0] == {"prompt": "one", "answer": greedy.text, "temperature": 0.0}
    assert written[1]["prompt"] == [{"role": "user", "content": "two"}]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--temperature", -1], "temperature is -1"),
        (["--answers-per-prompt", 0], "answers-per-prompt is 0"),
        (["--row-limit", 0], "row-limit is 0"),
        (["--minutes", 0], "minutes is 0"),
        (["--batch-size", -1], "batch-size is -1"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(options, reason, folder, tmp_path, monkeypatch, capsys):
    args = ["--model", folder, "--data", tmp_path / "p.jsonl", "--output", tmp_path / "a.safetensors"]
    assert run(monkeypatch, *args, *options) == 2
    assert f"tidar: {reason}" in capsys.readouterr().err
