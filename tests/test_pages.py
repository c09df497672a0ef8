"""Pages that are made from results/ are what their scripts make of the results that are committed."""

import importlib
import math
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("page", "script"), [("speed", "make_speed"), ("ablations", "make_training"), ("baselines", "make_baselines")]
)
def test_a_page_is_what_its_script_makes(page, script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    render, makers = importlib.import_module("pages").render, importlib.import_module(script).MAKERS
    written = (ROOT / "docs" / f"{page}.md").read_text()
    assert written == render(page, makers), f"run python docs/{script}.py"
    pictures = [line.split("](")[1].removesuffix(")") for line in written.splitlines() if line.startswith("![")]
    assert pictures
    assert all((ROOT / "docs" / picture).is_file() for picture in pictures)


def test_errors_of_tokens_per_forward(monkeypatch):
    """By hand: lengths 1, 1, 3, 3 have variance 4/3; five forwards, one of them a prefill."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    script = importlib.import_module("make_training")
    row = {"acceptance_length_counts": [2, 0, 2], "forwards": 5, "tokens_per_forward": 1.8}
    assert script.error(row) == pytest.approx(math.sqrt(4 / 3 * 4) / 5)
    assert script.apart(row | {"tokens_per_forward": 2.8}, row) == pytest.approx(1 / (math.sqrt(2) * script.error(row)))
