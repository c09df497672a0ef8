import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from tidar import TidarModel
from tidar.decode.engine import Answer, Update
from tiny import drafting_folder, tiny_folder, tiny_lm


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return drafting_folder(tmp_path_factory.mktemp("tiny"))


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


GENERATE = ["generate", "--model", "{folder}", "--max-new-tokens", "4"]
TRAIN = ["train", "--model", "{folder}", "--output", "{tmp}/o", "--answer-tokens", "4", "--data", "{tmp}/ok.jsonl"]
FILES = {
    "ok.jsonl": '{"prompt": "a"}\n',
    "bad.jsonl": '{"prompt": "a"}\n{"prompt": \n',
    "field.jsonl": '{"text": "a"}\n',
    "empty.jsonl": '{"prompt": " "}\n',
    "latin.jsonl": b'{"prompt": "\xe9"}\n',
    "half.jsonl": '{"prompt": "a"}\n{"prompt": "b\\ud800", "answer": "c"}\n',
    "strings.jsonl": '{"messages": ["hi"]}\n',
    "answers only.jsonl": '{"messages": [{"role": "assistant", "content": "hi"}]}\n',
    "long.jsonl": '{"prompt": "a"}\n\n{"prompt": "' + "x" * 200 + '", "answer": "c"}\n',
}
BAD = {
    "no prompt": (["generate"], "PROMPT"),
    "empty prompt": ([*GENERATE, "  "], "empty"),
    "missing file": ([*GENERATE, "--prompts", "{tmp}/none.jsonl"], "cannot read"),
    "bad json": ([*GENERATE, "--prompts", "{tmp}/bad.jsonl"], "line 2"),
    "no field": ([*GENERATE, "--prompts", "{tmp}/field.jsonl"], "line 1"),
    "empty row": ([*GENERATE, "--prompts", "{tmp}/empty.jsonl"], "line 1"),
    "not utf-8": ([*GENERATE, "--prompts", "{tmp}/latin.jsonl"], "UTF-8"),
    "half a character": ([*GENERATE, "--prompts", "{tmp}/half.jsonl"], "half.jsonl, line 2: the text holds half"),
    "strings for messages": ([*GENERATE, "--prompts", "{tmp}/strings.jsonl"], "line 1"),
    "answers without a question": ([*GENERATE, "--prompts", "{tmp}/answers only.jsonl"], "line 1: no prompt"),
    "too long in a file": (
        [*GENERATE, "--prompts", "{tmp}/long.jsonl"],
        "long.jsonl, line 3: the prompt has 202 tokens",
    ),
    "unknown model": (["generate", "x", "--model", "no/such-model"], "unknown model"),
    "why unknown": (["generate", "x", "--model", "no/such-model"], "in reach ("),
    "not a model": (["generate", "x", "--model", "{tmp}"], "config.json"),
    "too long": ([*GENERATE, "x" * 300], "context is 128"),
    "temperature": ([*GENERATE, "x", "--temperature", "-1"], "temperature is -1"),
    "top-p": ([*GENERATE, "x", "--top-p", "2"], "top_p is 2"),
    "trust": ([*GENERATE, "x", "--trust", "3"], "trust is 3"),
    "trust in ar": ([*GENERATE, "x", "--trust", "0.5", "--mode", "ar"], "trust below 1"),
    "draft length": ([*GENERATE, "x", "--draft-length", "0"], "draft length is 0"),
    "long drafts": ([*GENERATE, "x", "--draft-length", "129"], "draft length is 129, but must be between 1 and 128"),
    "tokens": ([*GENERATE, "x", "--max-new-tokens", "0"], "max_new_tokens is 0"),
    "mode": ([*GENERATE, "x", "--mode", "fast"], "mode is 'fast'"),
    "block diffusion": ([*GENERATE, "x", "--mode", "block-diffusion"], "mode 'block-diffusion' decodes models of"),
    "decoder": ([*GENERATE, "x", "--decoder", "fixed-2"], "it is an option of 'block-diffusion'"),
    "bad decoder": ([*GENERATE, "x", "--mode", "block-diffusion", "--decoder", "best"], "decoder is 'best'"),
    "empty stop": ([*GENERATE, "x", "--stop", ""], "stop"),
    "device": ([*GENERATE, "x", "--device", "quantum"], "device 'quantum'"),
    "dtype": ([*GENERATE, "x", "--dtype", "int3"], "dtype is 'int3'"),
    "no drafter": ([*GENERATE, "x", "--drafter", "none"], "no drafter"),
    "batch size": ([*GENERATE, "x", "--json", "--batch-size", "0"], "batch size is 0"),
    "chat": (["chat", "--model", "{folder}", "--temperature", "-1"], "temperature is -1"),
    "chat draft length": (["chat", "--model", "{folder}", "--draft-length", "500"], "draft length is 500"),
    "no data": (["train", "--model", "{folder}", "--output", "{tmp}/o"], "no training data"),
    "bad weights": ([*GENERATE, "hi", "--weights", "int4"], "weights is 'int4', but must be one of int8, fp8"),
    "bad layer": ([*TRAIN, "--target", "nope"], "no linear layer is called nope"),
    "no free token": ([*TRAIN, "--objective", "paper"], "no free token"),
    "objective": ([*TRAIN, "--objective", "magic"], "objective is 'magic'"),
    "steps": ([*TRAIN, "--steps", "0"], "steps is 0"),
    "block size": ([*TRAIN, "--block-size", "1"], "block size is 1"),
    "long blocks": ([*TRAIN, "--block-size", "129"], "block size is 129"),
    "rank": ([*TRAIN, "--rank", "0"], "rank is 0"),
    "anchors": ([*TRAIN, "--anchors", "-1"], "anchors is -1"),
    "many anchors": ([*TRAIN, "--anchors", "65", "--sequence-length", "64"], "anchors is 65"),
    "log every": ([*TRAIN, "--log-every", "0"], "log-every is 0"),
    "seed": ([*TRAIN, "--seed", "-1"], "seed is -1"),
    "teacher temperature": ([*TRAIN, "--teacher-temperature", "0"], "teacher-temperature is 0"),
    "learning rate": ([*TRAIN, "--learning-rate", "0"], "learning-rate is 0"),
    "weights": ([*TRAIN, "--objective", "paper", "--ar-weight", "0", "--diffusion-weight", "0"], "both 0"),
    "no conversation": (
        [*TRAIN[:-1], "{tmp}/strings.jsonl", "--no-self-generate"],
        "line 1: field 'messages[0]' must be a message",
    ),
    "half a training prompt": ([*TRAIN[:-1], "{tmp}/half.jsonl"], "half.jsonl, line 2"),
    "half a training sample": ([*TRAIN[:-1], "{tmp}/half.jsonl", "--no-self-generate"], "line"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_exit_code_2(case, run, folder, tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    args, wanted = BAD[case]
    args = [a.replace("{folder}", folder).replace("{tmp}", str(tmp_path)) for a in args]
    code, out, err = run(*args, *([] if "--device" in args else ["--device", "cpu"]))
    assert code == 2, err
    assert out == ""
    assert err.startswith("tidar: ")
    assert err.count("\n") == 1
    assert wanted in err
    assert not (tmp_path / "o").exists()  # refused before anything was generated


@pytest.mark.parametrize(
    ("arch", "options", "wanted"),
    [
        ("mistral", {"sliding_window": 8}, "sliding"),
        ("gemma2", {}, "sliding"),
        ("t5", {"num_layers": 1, "d_model": 8, "d_ff": 8, "d_kv": 4, "num_heads": 2}, "encoder-decoder"),
    ],
)
def test_models_that_cannot_work_are_refused_in_one_sentence(arch, options, wanted, run, tmp_path):
    AutoConfig.for_model(arch, **options).save_pretrained(tmp_path)
    code, _, err = run("generate", "x", "--model", tmp_path)
    assert code == 2
    assert wanted in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arch", "options"),
    [
        ("falcon", {"num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}),
        ("gpt_neo", {"num_layers": 1, "num_heads": 2, "hidden_size": 16, "attention_types": [[["global"], 1]]}),
    ],
)
def test_models_whose_attention_cannot_be_replaced_are_refused_in_one_sentence(arch, options, run, tmp_path, capsys):
    config = AutoConfig.for_model(arch, vocab_size=99, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    capsys.readouterr()
    code, _, err = run("generate", "x", "--model", tmp_path)
    assert code == 2
    assert f"{arch} model, which has no pluggable attention" in err
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


def test_ctrl_c_at_the_prompt_starts_a_new_line_and_end_of_input_leaves(run, folder, monkeypatch):
    lines = iter([KeyboardInterrupt, "hello", EOFError])

    def read(prompt):
        line = next(lines)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", read)
    code, _, err = run("chat", "--model", folder, "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0
    assert err.count("tokens per forward") == 1
    assert next(lines, None) is None


def test_a_conversation_that_fills_the_context_says_how_to_go_on(run, folder, monkeypatch):
    lines = iter(["x" * 200, "hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    code, _, err = run("chat", "--model", folder, "--max-new-tokens", 4, "--device", "cpu")
    assert code == 0
    assert "context is 128: shorten it (/new starts a new conversation)" in err
    assert err.count("tokens per forward") == 1  # the next line is answered


def test_records_are_printed_in_order_as_soon_as_they_are_finished(run, folder, tmp_path, monkeypatch, capsys):
    """Rows end in the order 1, 0, 3 before Ctrl-C: the first two are out by then."""
    seen = []

    def generate(self, prompts, on_update, **options):
        for row in (1, 0, 3):
            on_update(Update(Answer(row, [5], str(row), 1, finish_reason="length"), [5], ""))
            seen.append(capsys.readouterr().out)
        raise KeyboardInterrupt

    monkeypatch.setattr(TidarModel, "generate", generate)
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n' * 4)
    code, *_ = run("generate", "--prompts", file, "--model", folder, "--json", "--device", "cpu")
    assert code == 130
    assert [[json.loads(line)["text"] for line in out.splitlines()] for out in seen] == [[], ["0", "1"], []]


def test_a_closed_pipe_is_not_an_error_message(folder, tmp_path):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n' * 3)
    args = ["generate", "--prompts", str(file), "--model", folder, "--json", "--max-new-tokens", "2", "--device", "cpu"]
    args += ["--plan", "fixed"]  # measuring costs says so on stderr
    process = subprocess.Popen(
        [sys.executable, "-m", "tidar.cli.main", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 1


def test_answers_at_the_end_of_a_conversation_are_not_answered(run, folder, tmp_path):
    question = {"role": "user", "content": "why?"}
    rows = [
        {"messages": [question, {"role": "assistant", "content": "because"}]},
        {"prompt": [question]},
        {"prompt": "why?"},
    ]
    file = tmp_path / "p.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    code, out, _ = run(
        "generate", "--prompts", file, "--model", folder, "--json", "--max-new-tokens", 9, "--device", "cpu"
    )
    assert code == 0
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["prompt"] for r in records] == [[question], [question], "why?"]
    assert records[0]["token_ids"] == records[1]["token_ids"] == records[2]["token_ids"]


def test_a_layer_that_sees_flattened_tokens_is_named_with_the_way_out(run, tmp_path):
    tiny_folder(tmp_path / "opt")
    OPTForCausalLM(
        OPTConfig(
            vocab_size=258,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=128,
        )
    ).save_pretrained(tmp_path / "opt")
    (tmp_path / "ok.jsonl").write_text('{"prompt": "a"}')
    code, _, err = run(
        "train",
        "--model",
        tmp_path / "opt",
        "--output",
        tmp_path / "o",
        "--data",
        tmp_path / "ok.jsonl",
        "--device",
        "cpu",
    )
    assert code == 2
    assert "model.decoder.layers.0.fc1 sees its tokens flattened" in err
    assert "--target" in err


MEMORY = {
    "CUDA out of memory. Tried to allocate 20.00 GiB.\nmore": torch.OutOfMemoryError,
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 40 bytes.": RuntimeError,
    "Unable to allocate 8 GiB": MemoryError,
}


@pytest.mark.parametrize(("says", "kind"), MEMORY.items())
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--prompts", "{file}", "--batch-size", "64"], "batch size 3: lower --batch-size or --max-new-tokens"),
        (["hello"], "one prompt: shorten it or lower --max-new-tokens"),
    ],
)
def test_where_memory_ends_one_line_says_what_needs_less(given, said, says, kind, run, folder, tmp_path, monkeypatch):
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": "x"}\n' * 3)

    def no_memory(*_, **__):
        try:
            raise kind(says)
        except kind:
            raise RuntimeError("capture failed") from None  # what capturing a graph makes of it

    monkeypatch.setattr("tidar.decode.engine.Engine.run", no_memory)
    given = [text.replace("{file}", str(file)) for text in given]
    code, _, err = run("generate", *given, "--model", folder, "--device", "cpu")
    assert code == 2
    assert err == f"tidar: out of memory with {said}\n"


def test_where_memory_ends_a_chat_goes_on(run, folder, monkeypatch):
    lines = iter(["hello", "/exit"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))

    def stream(self, messages, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")
        yield

    monkeypatch.setattr(TidarModel, "stream", stream)
    code, _, err = run("chat", "--model", folder, "--device", "cpu")
    assert code == 0
    assert "out of memory with this conversation: shorten it" in err


def test_any_command_says_in_one_line_that_memory_ended(run, folder, monkeypatch):
    def load(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TidarModel, "from_pretrained", load)
    code, _, err = run("generate", "x", "--model", folder)
    assert code == 2
    assert err.startswith("tidar: out of memory with the model's weights: ")
    monkeypatch.setattr("tidar.cli.generate.Placed", load)
    code, _, err = run("generate", "x", "--model", folder)
    assert code == 2
    assert err.startswith("tidar: out of memory with this command: ")


def test_other_failures_keep_their_traceback(run, folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr("tidar.decode.engine.Engine.run", fail)
    with pytest.raises(RuntimeError, match="of ours"):
        run("generate", "x", "--model", folder, "--device", "cpu")


def test_a_check_of_files_leaves_none_behind(run, folder, tmp_path):
    (tmp_path / "link.html").symlink_to(tmp_path / "target.html")
    for out in ("new/x.html", "link.html"):
        code, _, _ = run("trace", "x", "--model", folder, "--out", tmp_path / out, "--max-new-tokens", 0)
        assert code == 2
    assert [path.name for path in tmp_path.iterdir()] == ["link.html"]
