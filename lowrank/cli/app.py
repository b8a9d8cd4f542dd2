"""The verbs, one line each."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from lowrank.cli import (
    chat,
    check,
    compose,
    evaluate,
    export,
    extract,
    info,
    init,
    merge,
    predict,
    preview,
    report,
    sweep,
    train,
)

app = typer.Typer(
    name="lowrank",
    help="Fine-tune Hugging Face models with low-rank adapters.",
    epilog="Every verb takes --debug: show where an error comes from.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=True,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(version("lowrank"))
        raise typer.Exit


@app.callback()
def _lowrank(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


app.command("init", epilog=init.EXAMPLE)(init.init)
app.command("check", epilog=check.EXAMPLE)(check.check)
app.command("preview", epilog=preview.EXAMPLE)(preview.preview)
app.command("train", epilog=train.EXAMPLE)(train.train)
app.command("sweep", epilog=sweep.EXAMPLE)(sweep.sweep)
app.command("eval", epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command("chat", epilog=chat.EXAMPLE)(chat.chat)
app.command("predict", epilog=predict.EXAMPLE)(predict.predict)
app.command("merge", epilog=merge.EXAMPLE)(merge.merge)
app.command("compose", epilog=compose.EXAMPLE)(compose.compose)
app.command("resize", epilog=compose.RESIZE_EXAMPLE)(compose.resize)
app.command("extract", epilog=extract.EXAMPLE)(extract.extract)
app.command("export", epilog=export.EXAMPLE)(export.export)
app.command("info", epilog=info.EXAMPLE)(info.info)
app.command("report", epilog=report.EXAMPLE)(report.report)
