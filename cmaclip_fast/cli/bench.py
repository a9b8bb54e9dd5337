"""`cmaclip bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cmaclip_fast.cli.options import DeviceOption, device_name
from cmaclip_fast.cli.output import err, out
from cmaclip_fast.errors import one_line


def bench(
    output: Annotated[Path, typer.Option(help="Output folder.")] = Path("runs/bench"),
    quick: Annotated[bool, typer.Option("--quick", help="Takes three minutes instead of 45.")] = False,
    only: Annotated[
        str,
        typer.Option(
            help="Run only benchmarks whose name contains this; after a `/`, only systems whose name contains that."
        ),
    ] = "",
    device: DeviceOption = "cpu",
    dtype: Annotated[str | None, typer.Option(help="`float32`, `bfloat16` [on a GPU], `float16`.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads [default: PyTorch's choice].")] = None,
    floors: Annotated[
        Path | None, typer.Option(help="JSON file of minimum speed ratios; a lower ratio fails the run.")
    ] = None,
    record: Annotated[bool, typer.Option("--record", help="Write the minimum ratios from this run instead.")] = False,
) -> None:
    """Benchmark the model against a plain implementation, torch.compile, transformers, ONNX Runtime and OpenVINO.

    Example: `cmaclip bench --quick`

    Example: `cmaclip bench --only 'ViT-B-32, inference at batch 32/o' --threads 2`
    """
    from cmaclip_fast.bench.results import BenchmarkError
    from cmaclip_fast.bench.run import Options, benchmark

    options = Options(output, quick, only, device_name(device), dtype, threads, floors, record)
    try:
        benchmark(options, err)
    except BenchmarkError as error:
        err.print(f"error: {one_line(str(error))}", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from None
    out.print((output / "performance.md").read_text(encoding="utf-8"), soft_wrap=True, highlight=False)
