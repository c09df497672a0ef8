import os
import sys
from collections.abc import Callable

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports transformers

from pathlib import Path

import pytest
import torch
from hypothesis import settings

from tidar.cli.main import main
from tiny import tiny_folder
from train_options import conversations

torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_costs(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured costs belong to the test run, not to the user's cache folder."""
    folder = tmp_path_factory.getbasetemp()
    monkeypatch.setattr("tidar.decode.costs.cache_folder", lambda: folder)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model folder to train, whose tokenizer has a mask token."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"), mask_token=True)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations to train on."""
    return conversations(tmp_path_factory.mktemp("data") / "rows.jsonl", 40)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """`tidar ...` in this process: exit code, stdout, stderr."""

    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["tidar", *map(str, args)])
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
