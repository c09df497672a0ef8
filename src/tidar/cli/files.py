"""Files that commands are given and write."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from tidar.errors import TidarError


def named(out: Path, ending: str) -> Path:
    """OUT with an ending; a name may hold dots that are no suffix. Raises TidarError where OUT has no name."""
    if not out.name:
        raise TidarError(f"--out {str(out)!r} names no file: give a name, to which {ending} is added")
    return out.with_name(out.name + ending)


def check_writable(*paths: Path | None) -> None:
    """Raise TidarError for a file that cannot be written: before the work whose result it is to hold.

    Leaves nothing behind that was not there.
    """
    for path in paths:
        if path is None:
            continue
        made = list[Path]()
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
            place = Path(os.path.realpath(path))  # a link that leads nowhere yet stays
            made += (folder for folder in (place, *place.parents) if not folder.exists())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise _cannot_write(path, error) from error
        finally:
            for one in made:
                _remove(one)


def _remove(place: Path) -> None:
    """Take an empty file or folder away, unless someone else has used it meanwhile."""
    with suppress(OSError):
        if place.is_dir():
            place.rmdir()
        elif not place.stat().st_size:
            place.unlink()


def _cannot_write(path: Path, error: OSError) -> TidarError:
    return TidarError(f"cannot write {path}: {error.strerror}")


def write_json(path: Path, result: dict[str, Any], indent: int | None = 1) -> None:
    """Write a result, to a file all of it or nothing."""
    write_text(path, json.dumps(result, indent=indent, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text, to a file all of it or nothing; its folder is made. Raises TidarError."""
    whole = not path.exists() or path.is_file()  # not so for /dev/stdout
    partial = path.with_name(f"{path.stem}.partial") if whole else path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        if whole:
            partial.replace(path)
    except OSError as error:
        raise _cannot_write(path, error) from error


def kept(results: Iterator[dict[str, Any]], path: Path, indent: int | None = 1) -> dict[str, Any]:
    """The last of growing results, each written as it comes: what was measured survives a Ctrl-C."""
    result = dict[str, Any]()
    for result in results:
        write_json(path, result, indent)
    return result


def prompt_set(text: str) -> tuple[str, Path, int | None]:
    """NAME=FILE[:FIRST_N], as --prompts has it where there can be several sets."""
    name, _, rest = text.partition("=")
    file, _, limit = rest.rpartition(":") if rest.rpartition(":")[2].isdecimal() else (rest, "", "")
    if not name or not file or (limit and not int(limit)):
        raise TidarError(f"--prompts {text!r} is not NAME=FILE.jsonl[:FIRST_N]")
    return name, Path(file), int(limit) if limit else None


def model_name(model: str) -> str:
    """A model as results name it: a folder without the folders that it is in, which are of this machine."""
    return Path(model).resolve().name if Path(model).exists() else model
