"""The `tidar` command: parse, call, print. Errors meant for people become one line and exit code 2."""

from __future__ import annotations

import sys

import typer
from rich.console import Console

from tidar.cli import (
    bench,
    chat,
    compare,
    demo,
    evaluate,
    generate,
    generate_data,
    serve,
    speculation,
    trace,
    train,
)
from tidar.errors import TidarError, memory_for

app = typer.Typer(
    help="Language models that think in diffusion and talk in autoregression.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("trace")(trace.trace)
app.command("demo")(demo.demo)
app.command("generate-data")(generate_data.generate_data)
app.command("serve")(serve.serve)
app.command("train")(train.train)
app.command("compare")(compare.compare)
app.add_typer(bench.app, name="bench")
evaluate.app.command("speculation")(speculation.speculation)
app.add_typer(evaluate.app, name="evaluate")


def main() -> None:
    """Entry point. Typer itself ends quietly on Ctrl-C (130) and on a closed pipe (1)."""
    try:
        with memory_for("this command", "ask for fewer rows or tokens at a time, or take a smaller model"):
            app()
    except TidarError as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(f"tidar: {error}", markup=False)
        sys.exit(2)


if __name__ == "__main__":
    main()
