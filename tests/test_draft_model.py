"""The recipe of a small draft model: it learns from the base's answers, and drafts for it."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from tidar import TidarModel
from tidar.cli.main import main
from tidar.evaluate.methods import Models, Settings, parse_method, prepare

RECIPE = Path(__file__).parent.parent / "recipes" / "draft-model" / "distil.py"


def distil(*arguments):
    """The script, in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(RECIPE), "--device", "cpu", *map(str, arguments)])
        try:
            runpy.run_path(str(RECIPE), run_name="__main__")
        except SystemExit as stop:
            return stop.code
    return 0


@pytest.fixture(scope="module")
def answers(folder, data, tmp_path_factory):
    """The base model's answers, as `tidar generate-data` writes them."""
    path = tmp_path_factory.mktemp("answers") / "answers.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        command = ["tidar", "generate-data", "--model", folder, "--data", data, "--output", path]
        patch.setattr(
            sys, "argv", [*map(str, command), "--max-new-tokens", "24", "--temperature", "0", "--device", "cpu"]
        )
        with pytest.raises(SystemExit, match="0"):
            main()
    return path


def test_a_draft_model_learns_and_drafts(folder, answers, tmp_path):
    out = tmp_path / "draft"
    # The first of two layers alone.
    sizes = ["--layers", 1, "--steps", 150, "--batch-size", 8, "--length", 64, "--warmup", 5]
    assert distil("--model", folder, "--answers", answers, "--out", out, *sizes, "--learning-rate", 5e-3) == 0
    record = json.loads((out / "training.json").read_text())
    assert record["layers"] == [0]
    first, *_, last = record["curve"]
    assert last["loss"] < 0.95 * first["loss"]
    assert last["match"] > first["match"]
    base = TidarModel.from_pretrained(folder, device="cpu", dtype="float32").hf_model
    draft = TidarModel.from_pretrained(str(out), device="cpu", dtype="float32").hf_model
    assert draft.config.num_hidden_layers == 1
    assert draft.get_input_embeddings().weight.equal(base.get_input_embeddings().weight)
    assert not draft.model.layers[0].mlp.up_proj.weight.equal(base.model.layers[0].mlp.up_proj.weight)
    models = Models(Settings(folder, max_new_tokens=24, device="cpu", dtype="float32"))
    plain = prepare(parse_method("ar"), models)("say 3", 0)
    drafted = prepare(parse_method(f"assisted:{out}"), models)("say 3", 0)
    assert drafted.token_ids == plain.token_ids
    assert drafted.forwards < plain.forwards


def test_what_cannot_be_meant_is_one_line(folder, answers, tmp_path, capsys):
    for file, more, message in (
        (answers, ["--layers", 2], "layers is 2, but must be between 1 and 1"),
        (answers, ["--layers", 1, "--length", 1], "no sample has an answer within 1 tokens"),
        (tmp_path / "none", ["--layers", 1], "does not hold samples"),
    ):
        assert distil("--model", folder, "--answers", file, "--out", tmp_path / "out", *more) == 2
        assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
