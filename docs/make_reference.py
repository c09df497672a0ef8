"""Write docs/commands.md from the command line's own help, and docs/api.md from docstrings.

python docs/make_reference.py
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

import tidar
from tidar import layout, sampling
from tidar.cli.main import app
from tidar.decode import step
from tidar.model import hub

HERE = Path(__file__).parent
CLASSES = (tidar.TidarModel, tidar.Answer, tidar.Update, tidar.TidarConfig, step.Plan, sampling.SamplingParams)
LAYOUTS = (
    *(layout.chain_layout, layout.tree_layout, layout.prefill_layout, layout.step_layout),
    *(layout.block_causal_layout, layout.tiled_anchors, layout.random_anchors),
)
FLAGS = {"True": "yes", "False": ""}
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")


def commands() -> str:
    """Every command with its options."""
    parts = [
        "# Commands\n\nWritten by `python docs/make_reference.py` from the commands; `--help` says the same.\n"
        "Bad input is one line on stderr and exit code 2. Ctrl-C keeps what long work has done.\n"
    ]
    for path, function in named_commands("tidar", app):
        parts.append(f"## {path}\n\n{_text(function.__doc__)}\n")
        rows = list(filter(None, map(_option, inspect.signature(function, eval_str=True).parameters.values())))
        parts.append("| option | | default |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n")
    return "\n".join(parts)


def named_commands(path: str, inside: typer.Typer) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions behind `tidar ...`, with what a user types."""
    if inside.registered_callback is not None and inside.registered_callback.callback is not None:
        yield path, inside.registered_callback.callback
    for command in inside.registered_commands:
        assert command.callback is not None
        yield f"{path} {command.name or command.callback.__name__.replace('_', '-')}", command.callback
    for group in inside.registered_groups:
        assert group.typer_instance is not None
        yield from named_commands(f"{path} {group.name}", group.typer_instance)


def _option(parameter: inspect.Parameter) -> str:
    """A row of the table; nothing for what is no option."""
    kind, info = get_args(parameter.annotation) if get_origin(parameter.annotation) is Annotated else (None, None)
    if info is None:
        return ""
    kinds = [part for part in get_args(kind) or (kind,) if part not in (NoneType, list)]
    kind = (get_args(kinds[0]) or kinds)[0]
    text, flag = info.help or "", parameter.name.replace("_", "-")
    spelt = [given for given in (info.default, *(info.param_decls or ())) if isinstance(given, str)]
    if isinstance(info, typer.models.ArgumentInfo):
        name = f"`{parameter.name.upper()}`"
    elif kind is bool:
        name = " ".join(f"`{given}`" for given in spelt or (f"--{flag}", f"--no-{flag}"))
    else:
        name = f"`{(spelt or [f'--{flag}'])[0]} {kind.__name__.upper().replace('STR', 'TEXT')}`"
    stated = re.search(r" \[(default: |without it: )?([^\]]*)\]\.?$", text)
    text = text[: stated.start()].removesuffix(".") + "." if stated else text
    default = FLAGS.get(stated[2], stated[2]) if stated else _default(parameter.default)
    return f"| {name} | {_cell(text)} | {_cell(default)} |"


def _default(value: object) -> str:
    if value is inspect.Parameter.empty:
        return "must be given"
    if value is None or value is False:
        return ""
    return "yes" if value is True else f"`{value}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def api() -> str:
    """What a user of the package calls."""
    parts = [
        "# Python\n\nWritten by `python docs/make_reference.py` from docstrings. Everything else is internal: it may\n"
        "change, and [Architecture](architecture.md) explains it.\n"
    ]
    for thing in CLASSES:
        parts += _class(thing)
    parts.append(_function(hub.load, "##", _name(hub.load)))
    parts.append(f"## tidar.TidarError\n\n{_docstring(tidar.TidarError)}\n")
    parts += _class(tidar.Layout)
    parts += [_function(make, "###", _name(make)) for make in LAYOUTS]
    return "\n".join(parts)


def _name(thing: Any) -> str:
    public = thing.__name__ in tidar.__all__
    return f"tidar.{thing.__name__}" if public else f"{thing.__module__}.{thing.__qualname__}"


def _class(thing: type) -> list[str]:
    parts = [f"## {_name(thing)}\n\n{_docstring(thing)}\n"]
    own = {field.name for field in dataclasses.fields(thing)} if dataclasses.is_dataclass(thing) else set()
    for name, member in vars(thing).items():
        if name.startswith("_") or name in own:
            continue
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if not inspect.isfunction(function) or not function.__doc__:
            continue
        if isinstance(member, property):
            parts.append(f"**`.{name}`** {_docstring(function)}\n")
        else:
            parts.append(_function(getattr(thing, name), "###", f"{thing.__name__}.{name}"))
    return parts


def _function(function: Any, heading: str, title: str) -> str:
    code = f"def {function.__name__}{_signature(inspect.signature(function))}: ..."
    return f"{heading} {title}\n\n```python\n{code}\n```\n\n{_docstring(function)}\n"


def _signature(signature: inspect.Signature) -> str:
    """On one line if that is short, else a parameter a line; annotations as they are written."""
    parameters = list[str]()
    for p in signature.parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in parameters:
            parameters.append("*")
        if p.name != "self":
            parameters.append(_parameter(p))
    result = "" if signature.return_annotation is signature.empty else f" -> {signature.return_annotation}"
    line = f"({', '.join(parameters)}){result}"
    return line if len(line) < 90 else "(\n" + "".join(f"    {p},\n" for p in parameters) + f"){result}"


def _parameter(p: inspect.Parameter) -> str:
    name = {p.VAR_KEYWORD: "**", p.VAR_POSITIONAL: "*"}.get(p.kind, "") + p.name
    if p.annotation is p.empty:
        return name if p.default is p.empty else f"{name}={p.default!r}"
    default = "" if p.default is p.empty else f" = {p.default!r}"
    return f"{name}: {p.annotation}{default}".replace("'", '"')


def _docstring(thing: Any) -> str:
    """A docstring as Markdown: sections become lists."""
    lines, parts, section = inspect.cleandoc(thing.__doc__ or "").splitlines(), list[str](), False
    for line in lines:
        if line.rstrip(":") in SECTIONS and line.endswith(":"):
            section = True
            parts += [f"**{line.rstrip(':')}**", ""]
        elif section and line.strip():
            entry = re.match(r"    ([\w*]+(?:, [\w*]+)*): (.*)", line)
            parts.append(f"- `{entry[1]}`: {entry[2]}" if entry else "  " * line.startswith(" " * 8) + line.strip())
        else:
            parts.append(line)
    return _text("\n".join(parts))


def _text(text: str | None) -> str:
    """Prose in which angle brackets stay what they are."""
    return re.sub(r"<(?=\w)", r"\\<", inspect.cleandoc(text or "")).strip()


PAGES = {"commands": commands, "api": api}

if __name__ == "__main__":
    for name, make in PAGES.items():
        (HERE / f"{name}.md").write_text(make(), encoding="utf-8")
