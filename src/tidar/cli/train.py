"""`tidar train`: convert a causal LM. Its options are the fields of `TrainConfig`."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import typer
from transformers.utils import logging as hf_logging

from tidar.train.config import TrainConfig
from tidar.train.convert import convert
from tidar.train.recipe import load_config


def train(config: Path | None = None, **options: Any) -> None:
    """Convert a causal LM: by default a small drafter is trained and the base model stays as it is.

    CONFIG is a YAML file of the options below, names as fields; flags override it.
    """
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    convert(load_config(config, {name: value for name, value in options.items() if value is not None}))


def _parameter(option: Field, hint: Any) -> Parameter:
    """The field as an option that is None unless given: the config file and the dataclass know better defaults."""
    kind, text, *flags = get_args(hint)
    if option.default not in (MISSING, None) and "[default" not in text:
        text = f"{text} [default: {option.default}]"
    annotation: Any = Annotated[kind | None, typer.Option(*flags, help=text)]
    return Parameter(option.name, Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


_hints = get_type_hints(TrainConfig, include_extras=True)
_file: Any = Annotated[Path | None, typer.Argument(help="YAML file of options.", show_default=False)]
train.__signature__ = Signature(  # type: ignore[attr-defined]
    [
        Parameter("config", Parameter.POSITIONAL_OR_KEYWORD, default=None, annotation=_file),
        *(_parameter(f, _hints[f.name]) for f in fields(TrainConfig)),
    ]
)
