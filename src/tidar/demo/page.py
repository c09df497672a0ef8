"""The files of the demo page, and the same page as one file with a trace inside."""

from __future__ import annotations

import json
from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files
from typing import Any

TYPES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    "viewer.js": "text/javascript; charset=utf-8",
    "live.js": "text/javascript; charset=utf-8",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
"""Nothing from elsewhere, nothing inline, and no text of a model can become HTML: the browser refuses such code."""


@cache
def page_file(name: str) -> str:
    """One of TYPES."""
    return (files(__package__) / "page" / name).read_text(encoding="utf-8")


def trace_page(document: dict[str, Any]) -> str:
    """The page with a trace (see `cli.trace`) in it: one file that loads nothing, and runs only its own script."""
    style, script = page_file("style.css"), page_file("viewer.js")
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; "
        "form-action 'none'; require-trusted-types-for 'script'"
    )
    replaced = {
        "<!-- policy -->": f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<link rel="stylesheet" href="style.css">': f"<style>{style}</style>",
        '<script src="viewer.js" defer></script>': "",
        '<script src="live.js" defer></script>': "",
        "<!-- trace -->": f'<script type="application/json" id="trace">{_embedded(document)}</script>'
        f"<script>{script}</script>",
    }
    page = page_file("index.html")
    for mark, text in replaced.items():
        before, found, after = page.partition(mark)
        assert found, mark
        page = before + text + after
    return page


def _embedded(document: dict[str, Any]) -> str:
    """JSON in which no text can end the element that it stands in."""
    return json.dumps(document, ensure_ascii=False).replace("<", "\\u003c")


def _hash(text: str) -> str:
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"
