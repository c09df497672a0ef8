"""From a config file (YAML) and flags to a checked `TrainConfig`; what is wrong is said before any model is loaded."""

from __future__ import annotations

from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from tidar.errors import TidarError, first_line
from tidar.train.config import TrainConfig

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", Path: "a path"}


def load_config(file: Path | None, flags: dict[str, Any]) -> TrainConfig:
    """The config of a run: fields of `file` (written with - or _), overridden by `flags`.

    Raises:
        TidarError: for a file that cannot be read, an unknown or missing field, a wrong type or an impossible value;
            it names the field, and the file where the value came from there.
    """
    written = read_fields(file) if file is not None else {}
    values = {**written, **flags}
    for required in (f.name for f in fields(TrainConfig) if f.default is MISSING and f.default_factory is MISSING):
        if required not in values:
            raise TidarError(f"{required} is missing: give it in a config file or by --{required}")
    config = TrainConfig(**values)
    try:
        config.check()
    except TidarError as error:
        said = str(error).replace("-", " ")
        if any(said.startswith(name.replace("_", " ") + " ") for name in written.keys() - flags.keys()):
            raise TidarError(f"{file}: {error}") from error
        raise
    return config


def read_fields(file: Path) -> dict[str, Any]:
    """The fields that a config file sets, in the types of `TrainConfig`."""
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise TidarError(f"cannot read {file}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise TidarError(f"{file} is not UTF-8 text (byte {error.start})") from error
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark is not None else "?"
        raise TidarError(f"{file}, line {line}: not valid YAML ({error.problem})") from error
    except yaml.YAMLError as error:
        raise TidarError(f"{file}: not valid YAML ({first_line(error)})") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise TidarError(f"{file} must hold fields and their values ('steps: 1000'), not a {type(content).__name__}")
    hints = get_type_hints(TrainConfig)
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in hints:
            near = get_close_matches(name, hints, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TidarError(f"{file}: there is no field {key}{hint}")
        if name in values:
            raise TidarError(f"{file}: {key} is given twice")
        try:
            values[name] = coerce(value, hints[name])
        except TypeError as error:
            raise TidarError(f"{file}: {key} is {value!r}, but must be {error}") from error
    return values


def coerce(value: object, kind: Any) -> Any:
    """A YAML value as what the annotation `kind` says. Raises TypeError with what it must be."""
    kinds = get_args(kind) if get_origin(kind) is not list and get_args(kind) else (kind,)
    if value is None and NoneType in kinds:
        return None
    wanted = next(k for k in kinds if k is not NoneType)
    if get_origin(wanted) is list:
        (item,) = get_args(wanted)
        try:
            return [coerce(v, item) for v in (value if isinstance(value, list) else [value])]
        except TypeError as error:
            raise TypeError(f"{error}, or a list of such") from None
    if wanted is float and not isinstance(value, bool):
        try:
            return float(value)  # type: ignore[arg-type]  # YAML reads 1e-5 as a text
        except (TypeError, ValueError):
            raise TypeError(KINDS[float]) from None
    if wanted is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not wanted:
        raise TypeError(KINDS[wanted])
    return value
