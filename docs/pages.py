"""What scripts that write pages from results/ share: a line `{name arguments}` of PAGE.in.md is what `name` makes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE.parent / "results"


def render(page: str, makers: Mapping[str, Callable[..., str]]) -> str:
    """The text of a page."""

    def make(line: re.Match[str]) -> str:
        name, *arguments = line[1].split()
        return makers[name](*arguments).rstrip()

    return re.sub(r"^\{(\w.*)\}$", make, (HERE / f"{page}.in.md").read_text(), flags=re.MULTILINE)


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / name).read_text())


def conditions(result: dict[str, Any]) -> str:
    c = result["conditions"]
    commit = f", commit {c['commit']}" if c.get("commit") else ""
    command = f": `{c['command']}`" if "command" in c else ""
    return f"{c['device']}, {c['dtype']}, torch {c['torch']}{commit}, {c['date']}{command}"


def table(header: list[str], rows: list[list[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"
