"""The `cmaclip` command: reads arguments, calls the package, prints."""

from __future__ import annotations

import errno
import sys

import typer

from cmaclip_fast import signals
from cmaclip_fast.cli.audit import audit
from cmaclip_fast.cli.bench import bench
from cmaclip_fast.cli.compare import compare
from cmaclip_fast.cli.data import data_app
from cmaclip_fast.cli.environment import env
from cmaclip_fast.cli.evaluate import evaluate
from cmaclip_fast.cli.explain import explain
from cmaclip_fast.cli.output import err
from cmaclip_fast.cli.predict import predict
from cmaclip_fast.cli.serve import serve
from cmaclip_fast.cli.train import train
from cmaclip_fast.errors import InputError, one_line

app = typer.Typer(
    help="Classify image-text pairs with CMA-CLIP: train, compare, evaluate, predict, explain, audit, serve.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

for command in (train, evaluate, predict, explain, audit, serve, compare, env, bench):
    app.command()(command)
app.add_typer(data_app, name="data")


def main() -> None:
    """The entry point: a user's errors end with one line and exit code 2, signals with 128 + N."""
    try:
        with signals.handled():
            app()
    except InputError as error:
        _fail(str(error))
    except OSError as error:
        reason = error.strerror or " ".join(str(error).split()) or type(error).__name__
        if error.errno == errno.ENOSPC:
            _fail(f"{error.filename or 'output'}: no space left on the device: free some, then resume with --resume")
        _fail(f"{error.filename or 'a file'}: {reason}: choose another path, or change its permissions")


def _fail(message: str) -> None:
    err.print(f"error: {one_line(message)}", soft_wrap=True, highlight=False, markup=False)
    sys.exit(2)


if __name__ == "__main__":
    main()
