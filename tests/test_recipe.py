"""Config files: fields as flags, flags first, and what is wrong said before a model is loaded."""

import os
from pathlib import Path

import pytest
import yaml

from tidar import TidarError, TidarModel
from tidar.cli import main
from tidar.train.config import TrainConfig
from tidar.train.recipe import load_config, read_fields
from tidar.train.trainer import launcher_shards

RECIPES = Path(__file__).parent.parent / "recipes"


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n')
    return path


def write(path, **fields):
    path.write_text(yaml.safe_dump({name: str(v) if isinstance(v, Path) else v for name, v in fields.items()}))
    return path


def test_fields_may_be_spelt_either_way_and_flags_override_them(tmp_path, data):
    file = tmp_path / "c.yaml"
    file.write_text(
        f"model: m\noutput: {tmp_path}/o\ndata: {data}\nbatch-size: 3\nlog_every: 7\nlearning-rate: 1e-5\n"
        "alpha: 8\nanchors: 4\ncompiled: false\nmeasure_draft_lengths: 4\ntarget-modules: [q_proj]\nanswers: null\n"
    )
    config = load_config(file, {"batch_size": 5, "steps": 9})
    assert config == TrainConfig(
        "m",
        tmp_path / "o",
        [data],
        batch_size=5,
        steps=9,
        log_every=7,
        learning_rate=1e-5,
        alpha=8.0,
        anchors=4,
        compiled=False,
        measure_draft_lengths=[4],
        target_modules=["q_proj"],
    )
    assert type(config.alpha) is float


BAD = {
    "unknown field": ("stesp: 3", "c.yaml: there is no field stesp; did you mean steps?"),
    "unlike any": ("qqq: 3", "c.yaml: there is no field qqq"),
    "a text for a number": ("steps: many", "c.yaml: steps is 'many', but must be a whole number"),
    "a number for a text": ("objective: 3", "c.yaml: objective is 3, but must be a text"),
    "a fraction": ("batch-size: 1.5", "c.yaml: batch-size is 1.5, but must be a whole number"),
    "a truth for a number": ("learning_rate: true", "c.yaml: learning_rate is True, but must be a number"),
    "a number for a truth": ("fsdp: 1", "c.yaml: fsdp is 1, but must be true or false"),
    "a wrong list": ("measure-draft-lengths: [4, x]", "must be a whole number, or a list of such"),
    "nothing": ("steps:", "c.yaml: steps is None, but must be a whole number"),
    "twice": ("log-every: 3\nlog_every: 4", "c.yaml: log_every is given twice"),
    "broken": ("steps: [3", "c.yaml, line 2: not valid YAML"),
    "a list": ("- steps", "c.yaml must hold fields and their values"),
    "impossible count": ("steps: 0", "c.yaml: steps is 0, but must be at least 1"),
    "impossible length": ("sequence-length: 8", "c.yaml: sequence-length 8 is too short for blocks of 8"),
    "impossible block": ("block_size: 1", "c.yaml: block size is 1"),
    "rising rate": ("learning-rate: 1e-4\nmin-learning-rate: 1e-3", "c.yaml: min-learning-rate is 0.001"),
    "warm-up": ("warmup-ratio: 1", "c.yaml: warmup-ratio is 1.0"),
    "no data": ("data: []", "no training data"),
    "missing data": ("data: none.jsonl", "c.yaml: data is none.jsonl, which does not exist"),
    "no match": ("data: 'none*.jsonl'", "c.yaml: data is none*.jsonl, but no file matches"),
    "an empty address": ("data: 'hf:'", "c.yaml: data is hf:, but hf: is no data set"),
    "no prompts to measure": ("measure-prompts: none.jsonl", "measure-prompts is none.jsonl, which does not exist"),
    "measuring nothing": ("measure-every: 5", "c.yaml: measure-every is 5, but must be 0 without measure-prompts"),
    "measuring no drafts": ("objective: ar\nmeasure-prompts: rows.jsonl", "objective 'ar' trains no drafts"),
    "reporter": ("report-to: wandb", "c.yaml: report-to is wandb, but must be one of none, tensorboard, trackio"),
    "no checkpoint": ("resume: nowhere", "c.yaml: resume is nowhere, which is no checkpoint"),
    "objective": ("objective: magic", "c.yaml: objective is 'magic'"),
    "one process": ("fsdp: true", "fsdp needs several processes"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_config_is_one_line_before_a_model_is_loaded(case, tmp_path, data, monkeypatch, capsys):
    def load(*args, **kwargs):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(TidarModel, "from_pretrained", load)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.chdir(tmp_path)
    text, wanted = BAD[case]
    Path("c.yaml").write_text(text + "\n")
    flags = ["--model", "m", "--output", "o", *(["--data", str(data)] if "data:" not in text else [])]
    monkeypatch.setattr("sys.argv", ["tidar", "train", "c.yaml", *flags, "--device", "cpu"])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    assert exit_.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("tidar: ")
    assert err.count("\n") == 1
    assert wanted in err
    assert not Path("o").exists()


def test_the_file_is_not_blamed_for_a_flag(tmp_path, data):
    file = write(tmp_path / "c.yaml", model="m", output=tmp_path / "o", data=[str(data)], steps=4)
    with pytest.raises(TidarError, match=r"^steps is 0"):
        load_config(file, {"steps": 0})


@pytest.mark.parametrize("field", ["model", "output"])
def test_a_missing_field_is_named(field, data):
    given = {"model": "m", "output": Path("o"), "data": [data]}
    del given[field]
    with pytest.raises(TidarError, match=f"{field} is missing"):
        load_config(None, given)


def test_a_missing_or_unreadable_file_is_named(tmp_path):
    with pytest.raises(TidarError, match=r"cannot read .*none\.yaml"):
        load_config(tmp_path / "none.yaml", {})
    (tmp_path / "latin.yaml").write_bytes(b"model: \xe9")
    with pytest.raises(TidarError, match=r"latin\.yaml is not UTF-8"):
        load_config(tmp_path / "latin.yaml", {})


def test_a_reporter_that_is_not_installed_is_named(tmp_path, data, monkeypatch):
    monkeypatch.setattr("tidar.train.config.find_spec", lambda name: None)
    with pytest.raises(TidarError, match="report-to is 'trackio', which is not installed"):
        TrainConfig("m", tmp_path / "o", [data], report_to="trackio").check()


def test_data_may_be_a_folder_a_pattern_or_on_the_hub(tmp_path, data):
    sources = [data, data.parent, data.parent / "*.jsonl", Path("hf:openai/gsm8k:main:train[:100]")]
    TrainConfig("m", tmp_path / "o", sources, measure_prompts=sources[-1]).check()


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_are_valid(recipe, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    load_config(recipe, {"data": [data]}).check()


def test_the_papers_settings():
    fields = read_fields(RECIPES / "paper.yaml")
    config = TrainConfig(**fields)
    assert 8 * config.batch_size * config.accumulate * config.sequence_length == 2**21
    assert (config.peak_rate, config.min_learning_rate, config.sequence_length) == (1e-5, 3e-6, 4096)
    assert config.warmup_steps == 239
    assert config.steps * 2**21 == pytest.approx(50e9, rel=1e-3)


def test_a_launcher_that_was_told_to_shard_is_heard_and_kept_from_it(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launcher_shards()
    assert "ACCELERATE_USE_FSDP" not in os.environ
    assert not launcher_shards()


def test_the_command_takes_a_file(tmp_path, data, monkeypatch):
    seen = []
    monkeypatch.setattr("tidar.cli.train.convert", seen.append)
    file = write(tmp_path / "c.yaml", model="m", output=tmp_path / "o", data=str(data), with_base=True)
    monkeypatch.setattr("sys.argv", ["tidar", "train", str(file), "--steps", "4", "--fsdp"])
    with pytest.raises(SystemExit) as exit_:
        main.main()
    assert exit_.value.code == 0
    (config,) = seen
    assert (config.steps, config.fsdp, config.with_base) == (4, True, True)
