"""Generated pages and pictures are what their scripts make; the site is built strictly and loads nothing from afar."""

import importlib
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


@pytest.mark.parametrize(
    ("page", "script"),
    [
        ("speed", "make_speed"),
        ("ablations", "make_training"),
        ("convert", "make_training"),
        ("baselines", "make_baselines"),
        ("serve-vllm", "make_serving"),
    ],
)
def test_a_page_is_what_its_script_makes(page, script, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    render, makers = importlib.import_module("pages").render, importlib.import_module(script).MAKERS
    assert (DOCS / f"{page}.md").read_text() == render(page, makers), f"run python docs/{script}.py"


@pytest.mark.parametrize("page", ["commands", "api"])
def test_the_reference_is_what_commands_and_docstrings_say(page, monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    made = importlib.import_module("make_reference").PAGES[page]()
    assert (DOCS / f"{page}.md").read_text() == made, "run python docs/make_reference.py"


def test_pictures_show_the_layouts(monkeypatch):
    monkeypatch.syspath_prepend(DOCS)
    assert (DOCS / "step.svg").read_text() == importlib.import_module("draw_step").picture()
    for name, draw in importlib.import_module("draw_layouts").PICTURES.items():
        assert (DOCS / f"{name}.svg").read_text() == draw(), "run python docs/draw_layouts.py"


def test_relative_links_lead_to_files():
    """On a plain git host; within the site the strict build looks after them, anchors included."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")]:
        links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
        missing = [link for link in links if not (page.parent / link).exists()]
        assert not missing, f"{page.name}: {missing}"


class Loaded(HTMLParser):
    """Collects the addresses that a browser loads without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses = list[str]()

    def handle_starttag(self, tag, attrs):
        wanted = {"link": "href", "script": "src", "img": "src", "iframe": "src", "source": "src"}.get(tag)
        values = dict(attrs)
        if wanted in values and values.get("rel") != "canonical":
            self.addresses.append(values[wanted])
        assert "mermaid" not in (values.get("class") or ""), "the theme fetches mermaid from elsewhere"


def test_the_site_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path, monkeypatch):
    pytest.importorskip("material")  # tidar[docs]
    config, build = importlib.import_module("mkdocs.config"), importlib.import_module("mkdocs.commands.build")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    build.build(config.load_config(str(ROOT / "mkdocs.yml"), strict=True, site_dir=str(tmp_path)))
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list(DOCS.glob("*.md"))) - 4  # *.in.md are no pages
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text())
        assert loaded.addresses
        assert not [address for address in loaded.addresses if re.match(r"(\w+:)?//", address)], page
    style = "".join(file.read_text() for file in tmp_path.rglob("*.css"))
    assert not re.search(r"url\([\"']?(https?:)?//|@import", style)


def test_errors_of_tokens_per_forward(monkeypatch):
    """By hand: lengths 1, 1, 3, 3 have variance 4/3; five forwards, one of them a prefill."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    script = importlib.import_module("make_training")
    row = {"acceptance_length_counts": [2, 0, 2], "forwards": 5, "tokens_per_forward": 1.8}
    assert script.error(row) == pytest.approx(math.sqrt(4 / 3 * 4) / 5)
    assert script.apart(row | {"tokens_per_forward": 2.8}, row) == pytest.approx(1 / (math.sqrt(2) * script.error(row)))
