"""`cmaclip serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmaclip_fast.cli.options import DeviceOption, MinPrecisionOption, ModelArgument
from cmaclip_fast.cli.output import err, out
from cmaclip_fast.errors import InputError

MODULES = ("fastapi", "h11", "multipart", "prometheus_client", "python_multipart", "starlette", "uvicorn")
"""What the extra `serve` installs."""

MIB = 2**20


def serve(
    directory: ModelArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine's. The default is loopback.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for any free one.")] = 8000,
    token_file: Annotated[
        Path | None, typer.Option(help="File with the token that clients must send as `Authorization: Bearer TOKEN`.")
    ] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Name that clients may call the service by; `*` for any. Repeatable.")
    ] = None,
    device: DeviceOption = "auto",
    precision: Annotated[
        str, typer.Option(help="Of the weights: `auto`, `float32`, `bfloat16` or `float16`.")
    ] = "auto",
    min_precision: MinPrecisionOption = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows that the model runs at a time, at most.")] = 32,
    queue: Annotated[int, typer.Option(min=1, help="Rows that may wait; more get status 429.")] = 512,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds to an answer, after which it is status 504.")] = 30.0,
    max_rows: Annotated[int, typer.Option(min=1, help="Rows of one request.")] = 64,
    max_body: Annotated[int, typer.Option(min=1, help="Size of one request, in MiB.")] = 32,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Pixels of one picture.")] = 25_000_000,
    examples: Annotated[int, typer.Option(min=0, help="Rows of the training data that the page offers.")] = 6,
) -> None:
    """Serve a model over HTTP: labels, explanations and embeddings, with a page at `/`.

    SIGTERM and Ctrl-C answer what was accepted, then end; SIGHUP loads the model folder anew. See docs/serving.md.

    Example: `cmaclip serve runs/clipart --port 8000 --token-file token.txt`
    """
    try:
        from cmaclip_fast.serving.server import serve as run
        from cmaclip_fast.serving.settings import Limits, Settings, is_private, read_token
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in MODULES:
            raise
        raise InputError(f"serve needs {package}: pip install 'cmaclip_fast[serve]'") from None

    limits = Limits(
        rows=max_rows,
        body_bytes=max_body * MIB,
        held_bytes=max(Limits.held_bytes, 2 * max_body * MIB),
        pixels=max_image_pixels,
        queue_rows=queue,
        seconds=timeout,
    )
    settings = Settings(
        host=host,
        port=port,
        token=None if token_file is None else read_token(token_file),
        hosts=tuple(allow_host or ()),
        batch_rows=batch_size,
        examples=examples,
        min_precision=min_precision,
        limits=limits,
    )
    warnings = []
    if token_file is not None and not is_private(token_file):
        warnings.append(f"{token_file}: other users can read it: chmod 600 {token_file}")
    if not settings.is_loopback and token_file is None:
        warnings.append(f"{host} can be reached from other machines, and no token is asked for: pass --token-file")

    def opened(address: str) -> None:
        for warning in warnings:
            err.print(f"warning: {warning}", soft_wrap=True, highlight=False, markup=False)
        out.print(address, soft_wrap=True, highlight=False, markup=False)

    run(directory, settings, device, precision, opened)
