"""MkDocs hook: files outside docs/ that pages link to become part of the site.

Pages link to each other and to results/, recipes/ and src/ by relative paths, which a plain git host follows as they
are. In the site a linked file lies below `files/`: Markdown as a page, code as a page that shows it, a folder as the
list of its files, anything else as it is.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)[^)#\s]+")
LANGUAGES = {".py": "python", ".yaml": "yaml"}

paths: dict[str, str] = {}
"""Path in the repository of each page of the site."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to, and what those pages link to."""
    waiting = [f"docs/{file.src_uri}" for file in files.documentation_pages()]
    paths.clear()
    seen = set(waiting)
    while waiting:
        path = waiting.pop()
        paths[site_path(path)] = path
        if is_outside(path):
            files.append(added(path, config))
        new = {link for link in targets(path) if is_outside(link)} - seen
        waiting += sorted(new)
        seen |= new
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are in the site."""
    path = paths[page.file.src_uri]
    return markdown if is_code(path) else with_links(path, markdown, lambda target: relative(path, target))


def added(path: str, config: MkDocsConfig) -> File:
    uri = site_path(path)
    if uri.endswith(".md"):
        return File.generated(config, uri, content=source(path), inclusion=InclusionLevel.NOT_IN_NAV)
    return File.generated(config, uri, abs_src_path=str(ROOT / path), inclusion=InclusionLevel.NOT_IN_NAV)


def source(path: str) -> str:
    """A page as Markdown."""
    file = ROOT / path
    if file.is_dir():
        names = sorted(inside.name for inside in file.iterdir() if inside.is_file())
        return f"# {path}/\n\n" + "".join(f"- [{name}]({file.name}/{name})\n" for name in names)
    text = file.read_text(encoding="utf-8")
    shown = f"---\nhide: [toc]\n---\n\n# {path}\n\n````{LANGUAGES.get(file.suffix)}\n{text}````\n"
    return shown if is_code(path) else text


def targets(path: str) -> set[str]:
    """Files and folders of the repository that a page links to."""
    found = set[str]()
    if site_path(path).endswith(".md") and not is_code(path):
        with_links(path, source(path), lambda target: found.add(target) or target)
    return found


def with_links(path: str, text: str, change: Callable[[str], str]) -> str:
    """The text of a page, each link into the repository replaced by what `change` makes of the path that it names."""

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), match[0]))
        return change(target) if (ROOT / target).exists() else match[0]

    return LINK.sub(link, text)


def relative(path: str, target: str) -> str:
    """The link from one page of the site to another."""
    return posixpath.relpath(site_path(target), posixpath.dirname(site_path(path)))


def site_path(path: str) -> str:
    """Where a file of the repository lies in the site's sources."""
    if not is_outside(path):
        return path.removeprefix("docs/")
    if (ROOT / path).is_dir():
        return f"files/{path}/index.md"
    return f"files/{path}.md" if is_code(path) else f"files/{path}"


def is_outside(path: str) -> bool:
    """Whether MkDocs does not have it by itself."""
    return not path.startswith("docs/") or is_code(path)


def is_code(path: str) -> bool:
    return Path(path).suffix in LANGUAGES
