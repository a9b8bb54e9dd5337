"""`cmaclip env`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from cmaclip_fast.cli.output import out


def env(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, compiler, CUDA toolkit, GPUs, and which backends can run on this machine, or why not.

    Example: `cmaclip env`
    """
    from cmaclip_fast import env as environment

    out.print(
        json.dumps(environment.as_dict(), indent=2) if as_json else environment.as_text(),
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
