import json
import sys

import pytest

from tidar import TidarModel
from tidar.cli.main import main
from tidar.config import TidarConfig
from tidar.model.drafter import Drafter, DrafterSpec
from tiny import tiny_folder, tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model folder with a drafter inside."""
    path = tmp_path_factory.mktemp("tiny")
    model = TidarModel.from_pretrained(tiny_folder(path), device="cpu")
    drafter = Drafter(model.hf_model, DrafterSpec(rank=4, sampler_width=8))
    drafter.save(path / "drafter", str(path), TidarConfig(block_size=4))
    return str(path)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*args):
        monkeypatch.setattr(sys, "argv", ["tidar", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


FIELDS = [
    "prompt",
    "text",
    "token_ids",
    "new_tokens",
    "forwards",
    "tokens_per_forward",
    "acceptance_lengths",
    "seconds",
    "finish_reason",
]


def test_json_has_the_promised_fields_and_nothing_else_on_stdout(run, folder, tmp_path):
    rows = [{"prompt": "one"}, {"turns": ["two", "later"]}, {"messages": [{"role": "user", "content": "three"}]}]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    code, out, _ = run(
        "generate", "--prompts", file, "--model", folder, "--json", "--max-new-tokens", 9, "--device", "cpu"
    )
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [list(r) for r in records] == [list(FIELDS)] * 3
    assert [r["prompt"] for r in records] == ["one", "two", [{"role": "user", "content": "three"}]]
    for r in records:
        assert r["new_tokens"] == len(r["token_ids"]) == 1 + sum(r["acceptance_lengths"])
        assert r["forwards"] == 1 + len(r["acceptance_lengths"])
        assert r["finish_reason"] in ("stop", "length")


def test_modes_agree_and_the_template_is_applied_unless_raw(run, folder):
    def tokens(*more):
        code, out, _ = run(
            "generate", "hello", "--model", folder, "--json", "--max-new-tokens", 12, "--device", "cpu", *more
        )
        assert code == 0
        return json.loads(out)["token_ids"]

    assert tokens() == tokens("--mode", "ar") == tokens("--draft-length", 3)
    assert tokens("--raw") == tokens("--raw", "--mode", "ar") != tokens()
    assert tokens("--temperature", 1, "--seed", 1) == tokens("--temperature", 1, "--seed", 1)
    assert tokens("--temperature", 1, "--seed", 1) != tokens("--temperature", 1, "--seed", 2)


def test_one_prompt_streams_to_stdout_and_statistics_go_to_stderr(run, folder):
    code, out, err = run("generate", "hi", "--model", folder, "--max-new-tokens", 5, "--device", "cpu")
    assert code == 0
    assert "tokens per forward" in err
    assert "tokens per forward" not in out


BAD = {
    "no prompt": (["generate"], "PROMPT"),
    "empty prompt": (["generate", "  ", "--model", "{folder}"], "empty"),
    "missing file": (["generate", "--prompts", "{tmp}/none.jsonl"], "cannot read"),
    "bad json": (["generate", "--prompts", "{tmp}/bad.jsonl"], "line 2"),
    "no field": (["generate", "--prompts", "{tmp}/field.jsonl"], "line 1"),
    "empty row": (["generate", "--prompts", "{tmp}/empty.jsonl"], "line 1"),
    "not utf-8": (["generate", "--prompts", "{tmp}/latin.jsonl"], "UTF-8"),
    "unknown model": (["generate", "x", "--model", "no/such-model"], "unknown model"),
    "not a model": (["generate", "x", "--model", "{tmp}"], "config.json"),
    "too long": (["generate", "x" * 300, "--model", "{folder}"], "context is 128"),
    "temperature": (["generate", "x", "--model", "{folder}", "--temperature", "-1"], "temperature is -1"),
    "top-p": (["generate", "x", "--model", "{folder}", "--top-p", "2"], "top_p is 2"),
    "trust": (["generate", "x", "--model", "{folder}", "--trust", "3"], "trust is 3"),
    "draft length": (["generate", "x", "--model", "{folder}", "--draft-length", "0"], "draft length is 0"),
    "tokens": (["generate", "x", "--model", "{folder}", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "mode": (["generate", "x", "--model", "{folder}", "--mode", "fast"], "mode is 'fast'"),
    "empty stop": (["generate", "x", "--model", "{folder}", "--stop", ""], "stop"),
    "device": (["generate", "x", "--model", "{folder}", "--device", "quantum"], "device 'quantum'"),
    "dtype": (["generate", "x", "--model", "{folder}", "--dtype", "int3"], "dtype is 'int3'"),
    "no drafter": (["generate", "x", "--model", "{folder}", "--drafter", "none"], "no drafter"),
    "batch size": (["generate", "x", "--json", "--model", "{folder}", "--batch-size", "0"], "batch size is 0"),
    "no data": (["train", "--model", "{folder}", "--output", "{tmp}/o"], "no training data"),
    "bad layer": (
        ["train", "--model", "{folder}", "--output", "{tmp}/o", "--data", "{tmp}/ok.jsonl", "--target", "nope"],
        "nope",
    ),
    "no free token": (
        ["train", "--model", "{folder}", "--output", "{tmp}/o", "--data", "{tmp}/ok.jsonl", "--objective", "paper"],
        "no free token",
    ),
    "objective": (
        ["train", "--model", "{folder}", "--output", "{tmp}/o", "--objective", "magic"],
        "objective is 'magic'",
    ),
    "steps": (["train", "--model", "{folder}", "--output", "{tmp}/o", "--steps", "0"], "steps is 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, run, folder, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "field.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "empty.jsonl").write_text('{"prompt": " "}\n')
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (tmp_path / "ok.jsonl").write_text('{"prompt": "a"}\n')
    args, wanted = BAD[case]
    args = [a.replace("{folder}", folder).replace("{tmp}", str(tmp_path)) for a in args]
    more = [] if args[0] == "train" or "--device" in args else ["--device", "cpu"]
    if args[0] == "train" and "--data" in args:
        more = ["--answer-tokens", "4"]
    code, out, err = run(*args, *more)
    lines = [line for line in err.splitlines() if line.startswith("tidar: ")]
    assert code == 2, err
    assert out == ""
    assert len(lines) == 1
    assert wanted in lines[0]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arch", "options", "wanted"),
    [
        ("mistral", {"sliding_window": 8}, "sliding"),
        ("gemma2", {}, "sliding"),
        ("t5", {"num_layers": 1, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2}, "encoder-decoder"),
    ],
)
def test_models_that_cannot_work_are_refused_in_one_sentence(arch, options, wanted, run, tmp_path):
    from transformers import AutoConfig

    AutoConfig.for_model(arch, **options).save_pretrained(tmp_path)
    code, _, err = run("generate", "x", "--model", tmp_path)
    assert code == 2
    assert wanted in err
    assert len(err.strip().splitlines()) == 1


def test_a_model_whose_positions_cannot_be_set_is_refused_by_the_probe(run, tmp_path):
    from transformers import BloomConfig, BloomForCausalLM

    BloomForCausalLM(BloomConfig(vocab_size=99, hidden_size=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    code, _, err = run("generate", "x", "--model", tmp_path, "--mode", "ar")
    assert code == 2
    assert str(tmp_path) in err


def test_chat_keeps_the_conversation_and_leaves_at_end_of_input(run, folder, monkeypatch):
    lines = iter(["hello", "", "again", "/new", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    seen = []
    real = TidarModel.stream

    def stream(self, messages, **options):
        seen.append([m["role"] for m in messages])
        return real(self, messages, **options)

    monkeypatch.setattr(TidarModel, "stream", stream)
    code, _, err = run("chat", "--model", folder, "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0
    assert seen == [["user"], ["user", "assistant", "user"]]
    assert err.count("tokens per forward") == 2


def test_ctrl_c_in_a_chat_stops_the_answer_only(run, folder, monkeypatch):
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    def stream(self, messages, **options):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(TidarModel, "stream", stream)
    code, out, _ = run("chat", "--model", folder, "--device", "cpu")
    assert code == 0
    assert "[stopped]" in out


def test_a_folder_without_a_tokenizer_loads_but_cannot_take_text(run, tmp_path):
    tiny_lm("llama").save_pretrained(tmp_path)
    assert TidarModel.from_pretrained(str(tmp_path), device="cpu").tokenizer is None
    code, _, err = run("generate", "x", "--model", tmp_path, "--mode", "ar")
    assert code == 2
    assert "no tokenizer" in err
