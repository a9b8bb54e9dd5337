"""Turns the results of a run on a GPU into docs/gpu.md and its picture: `python -m benchmarks.gpu_report OUT`.

With `--prefer` it also writes the table of measurements by which `auto` chooses backends on that architecture.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from matplotlib.figure import Figure

from benchmarks.gpu_kit import result as results
from benchmarks.gpu_kit.run import STEPS
from benchmarks.page import insert
from cmaclip_fast.files import write_json
from cmaclip_fast.ops import preferences

PAGE = Path(__file__).parents[1] / "docs" / "gpu.md"
COMMAND = "make gpu"
Record = dict[str, Any]


def main(
    output: Annotated[Path, typer.Argument(help="Folder of the result files.")],
    prefer: Annotated[bool, typer.Option(help="Write the table by which `auto` chooses backends.")] = False,
    page: Annotated[Path, typer.Option(help="The page with the marks; its picture lies beside it.")] = PAGE,
    table: Annotated[Path, typer.Option(help="The table that `--prefer` writes.")] = preferences.TABLE,
) -> None:
    records = read(output)
    text, picture = markdown(records), draw(records)
    if picture is not None:
        file = page.with_suffix(".png")
        picture.savefig(file, dpi=110)
        text += f"\n\n![packed_attention's forward: time by batch]({file.name})"
    insert(page, COMMAND, text)
    typer.echo(f"wrote {page}")
    if prefer:
        architecture, found = preferred(records)
        write_json(table, {**json.loads(table.read_text(encoding="utf-8")), architecture: found})
        typer.echo(f"wrote {table}: {len(found['rows'])} rows for {architecture}")


def read(folder: Path) -> dict[str, Record]:
    """The result files in the order of the steps.

    Raises:
        SystemExit: there are none, one cannot be read, or they are of a dry run.
    """
    paths = [path for step in STEPS if (path := folder / f"{step.name}.json").is_file()]
    if not paths:
        raise SystemExit(f"{folder}: holds no result files; `bash run.sh {folder}` writes them")
    try:
        records = [results.read(path) for path in paths]
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from None
    if any(record["dry_run"] for record in records):
        raise SystemExit(f"{folder}: is of a dry run, whose times mean nothing: nothing was written")
    return {record["step"]: record for record in records}


def markdown(records: dict[str, Record]) -> str:
    machine: Record = next((record["machine"] for record in records.values() if "gpu" in record["machine"]), {})
    first = next(iter(records.values()))
    about = (
        f"{machine.get('gpu', 'unknown GPU')} ({machine.get('architecture', '?')}), PyTorch {machine.get('torch')}, "
    )
    lines = [about + f"Python {machine.get('python')}, {first['started'][:10]}.", "", *steps(records)]
    for name, section in SECTIONS.items():
        if name in records:
            lines += ["", *section(records[name]["data"])]
    return "\n".join(lines)


def steps(records: dict[str, Record]) -> list[str]:
    rows = []
    for step in STEPS:
        record = records.get(step.name)
        if record is None:
            rows.append([step.name, step.what, "not run", "", ""])
            continue
        status = "cut off" if record["status"] == results.RUNNING else record["status"]
        reasons = "; ".join(_line(failure)[:160] for failure in record["failures"][:3])
        rows.append([step.name, step.what, status, f"{record['seconds']:.0f}", reasons])
    return table_of(["step", "what it does", "ended", "seconds", "failures"], rows)


def load(data: Record) -> list[str]:
    abi = data.get("abi")
    if not abi:
        return []
    return [f"The extension, built against PyTorch {abi['built']}, loads under PyTorch {abi['loaded']}."]


def operators(data: Record) -> list[str]:
    kinds = ("passed", "failed", "skipped")
    rows = [
        [backend, *(counts.get(kind, 0) for kind in kinds)] for backend, counts in sorted(data["by_backend"].items())
    ]
    lines = ["### Operators against float64", "", *table_of(["backend", *kinds], rows)]
    if data["skipped"]:
        lines += ["", *(f"- skipped {count}: {reason}" for reason, count in sorted(data["skipped"].items()))]
    return lines + [f"- failed: `{one['name']}`: {_line(one['reason'])[:200]}" for one in data["failed"][:20]]


def model(data: Record) -> list[str]:
    rows = [[name, f"{error:.1e}"] for name, error in data.get("errors", {}).items()]
    rows += [
        [f"same class of `{task}` in bfloat16", f"{s:.1%}"] for task, s in data.get("argmax_agreement", {}).items()
    ]
    rows += [[f"loss on the {w}, first to last step", f"{v[0]:.3f} to {v[-1]:.3f}"] for w, v in data["losses"].items()]
    return ["### The whole model", "", "Differences are of the largest logit.", "", *table_of(["what", "found"], rows)]


def operator_timing(data: Record) -> list[str]:
    roofs = data["roofs"]
    measured = [row for row in data["attention"] if "us" in row]
    lines = [
        "### packed_attention",
        "",
        "bfloat16, 8 heads, rows of 5 to 127 tokens. Microseconds, medians of CUDA events; all but FlexAttention as "
        f"CUDA graphs. In brackets the share of what a large copy ({roofs['bytes'] / 1e12:.2f} TB/s) and a large "
        f"matrix product ({roofs['operations'] / 1e12:.0f} TFLOP/s) reach in the same run.",
    ]
    for size, mean, queries in dict.fromkeys((row["size"], row["mean"], row["queries"]) for row in measured):
        rows = [row for row in measured if (row["size"], row["mean"], row["queries"]) == (size, mean, queries)]
        columns = sorted({(row["what"] != "forward", row["batch"]) for row in rows})
        cells = []
        for competitor in dict.fromkeys(row["competitor"] for row in rows):
            mine = {(row["what"] != "forward", row["batch"]): row for row in rows if row["competitor"] == competitor}
            note = next((row["note"] for row in mine.values() if row["note"]), "")
            times = [_time(mine[column]) if column in mine else "" for column in columns]
            cells.append([competitor + (f" ({note})" if note else ""), *times])
        which = "all queries" if queries is None else f"{queries} queries a row"
        headings = [f"{'with backward' if backward else 'forward'}, {batch} rows" for backward, batch in columns]
        lines += ["", f"Head size {size}, mean {mean}, {which}:", "", *table_of(["", *headings], cells)]
    lines += ["", *(f"- {_refused(row)}" for row in unique(data["attention"], _refused) if "error" in row)]
    if data["others"]:
        headings = ["operator", "shape", "", "backend", "ours, µs", "in a graph", "PyTorch", "PyTorch, µs"]
        rows = [
            [
                *(row["operator"], row["name"], row["what"], row["backend"], f"{row['us']:.1f}"),
                *(f"{row['graph_us']:.1f}" if row["graph_us"] else "", row["theirs"], f"{row['their_us']:.1f}"),
            ]
            for row in data["others"]
        ]
        lines += ["", "### The other operators", "", "Launches are in all times but those of a graph.", ""]
        lines += table_of(headings, rows)
    return lines


def model_timing(data: Record) -> list[str]:
    lines = ["### Speed of the whole model", ""]
    lines += [f"Product titles, bfloat16; useful operations as a share of {data['matrix_rate'] / 1e12:.0f} TFLOP/s."]
    headings = ["tower", "batch", "system", "pairs/s", "ms (p20-p80)", "useful TFLOP/s", "share", "peak MiB"]
    for title, rows in (("Inference", data["inference"]), ("Training step", data["training"])):
        cells = [
            [
                *(row["tower"], row["batch"], row["system"], f"{row['pairs_per_second']:.0f}"),
                f"{row['milliseconds']:.2f} ({row['p20']:.2f}-{row['p80']:.2f})",
                *(f"{row['useful_rate'] / 1e12:.1f}", f"{row['useful_share']:.1%}", f"{row['peak_mib'] or 0:.0f}"),
            ]
            for row in sorted(rows, key=lambda row: (row["tower"] != "ViT-B-32", row["batch"]))
        ]
        lines += ["", f"{title}:", "", *table_of(headings, cells)]
    return lines


def sanitizer(data: Record) -> list[str]:
    rows = [[tool, "not ended" if found["errors"] is None else found["errors"]] for tool, found in data.items()]
    return ["### compute-sanitizer", "", *table_of(["tool", "errors"], rows)]


def counters(data: Record) -> list[str]:
    names = {
        "l1_sectors": "L1 sectors",
        "bank_conflicts": "bank conflicts",
        "tensor_core": "tensor-core instructions",
    }
    rows = [
        [row["call"], f"`{row['kernel']}`", _count(row["dram_bytes"]), _count(row["l2_sectors"])]
        + [f"{_count(row[name])} / {_count(row['emulator'].get(name))}" for name in names]
        for row in data.get("launches", [])
    ]
    headings = ["call", "kernel", "DRAM bytes", "L2 sectors", *(f"{title}: GPU / emulator" for title in names.values())]
    return ["### Hardware counters beside the emulator's", "", *table_of(headings, rows)]


def triton(data: Record) -> list[str]:
    rows = [[f"`{row['kernel']}`", row["key"], row["configuration"]] for row in data.get("chosen", [])]
    headings = ["kernel", "head size, causal, longest queries and keys, dtype", "configuration"]
    return ["### What Triton's autotuner chose", "", *table_of(headings, rows)]


SECTIONS: dict[str, Callable[[Record], list[str]]] = {
    "load": load,
    "operators": operators,
    "model": model,
    "operator-timing": operator_timing,
    "model-timing": model_timing,
    "sanitizer": sanitizer,
    "counters": counters,
    "triton": triton,
}


def draw(records: dict[str, Record]) -> Figure | None:
    """The forward of packed_attention at head size 64: time by batch, a panel for each mean and number of queries."""
    data = records.get("operator-timing", {}).get("data", {})
    rows = [r for r in data.get("attention", []) if "us" in r and r["what"] == "forward" and r["size"] == 64]
    panels = sorted({(row["mean"], row["queries"] or 0) for row in rows})
    if not panels:
        return None
    figure = Figure(figsize=(4.2 * len(panels), 4.2), layout="constrained")
    names = list(dict.fromkeys(row["competitor"] for row in rows))
    for axes, (mean, queries) in zip(
        figure.subplots(1, len(panels), sharey=True, squeeze=False)[0], panels, strict=True
    ):
        for index, name in enumerate(names):
            points = sorted(
                (row["batch"], row["us"])
                for row in rows
                if (row["mean"], row["queries"] or 0, row["competitor"]) == (mean, queries, name)
            )
            style = {"linewidth": 2.2} if name in preferences.UNMEASURED else {"linestyle": "--"}
            axes.plot(
                *zip(*points, strict=True), marker="o", color=f"C{index}", label=name, **style
            ) if points else None
        axes.set(xscale="log", yscale="log", xlabel="rows", title=f"mean {mean} tokens, {queries or 'all'} queries")
    figure.axes[0].set_ylabel("forward, µs")
    figure.axes[0].legend(fontsize="small")
    return figure


def preferred(records: dict[str, Record]) -> tuple[str, Record]:
    """The architecture, and what `measured.json` says of it: backends by their median times, fastest first.

    Raises:
        SystemExit: times or tests are missing.
    """
    missing = [name for name in ("operators", "operator-timing") if name not in records]
    if missing:
        raise SystemExit(f"--prefer needs the results of {' and '.join(missing)}")
    by_backend = records["operators"]["data"]["by_backend"]
    sound = [
        name
        for name in preferences.UNMEASURED
        if by_backend.get(name, {}).get("passed") and not by_backend[name].get("failed")
    ]
    timing = records["operator-timing"]
    machine = timing["machine"]
    times: dict[tuple[Any, ...], dict[str, dict[str, float]]] = {}
    for key, backend, case, microseconds in (*_attention(timing["data"]), *_others(timing["data"])):
        if backend in sound:
            times.setdefault(key, {}).setdefault(backend, {})[case] = microseconds
    rows = [
        dict(zip(("operator", "direction", "dtype", "shape"), key, strict=True)) | {"backends": fastest_first(found)}
        for key, found in times.items()
    ]
    return machine["architecture"], {
        "measured": f"{machine['gpu']}, PyTorch {machine['torch']}, {timing['started'][:10]}",
        "rows": rows,
    }


def fastest_first(found: dict[str, dict[str, float]]) -> list[str]:
    """Backends by the geometric mean of their times over the cases; those that lack a case are left out."""
    most = max(len(times) for times in found.values())
    whole = {backend: times for backend, times in found.items() if len(times) == most}
    return sorted(whole, key=lambda backend: statistics.mean(map(math.log, whole[backend].values())))


def _attention(data: Record) -> Iterator[tuple[tuple[Any, ...], str, str, float]]:
    """Class, backend, case and microseconds; the backward is what the forward with it takes beyond the forward."""
    forwards = {
        (row["competitor"], row["shape"]): row["us"]
        for row in data["attention"]
        if "us" in row and row["what"] == "forward"
    }
    for row in data["attention"]:
        if "us" not in row:
            continue
        forward = forwards[row["competitor"], row["shape"]]
        backward = row["what"] != "forward"
        shape = preferences.shape_class(row["size"], row["queries"] or row["longest"], row["longest"])
        key = ("packed_attention", "backward" if backward else "forward", row["dtype"], shape)
        yield key, row["competitor"], row["shape"], max(row["us"] - forward, 1e-3) if backward else forward


def _others(data: Record) -> Iterator[tuple[tuple[Any, ...], str, str, float]]:
    rows = [row for row in data["others"] if row["theirs"] == "eager"]
    forwards = {(r["operator"], r["backend"], r["name"]): _ours(r) for r in rows if r["what"] == "forward"}
    for row in rows:
        forward = forwards[row["operator"], row["backend"], row["name"]]
        backward = row["what"] != "forward"
        key = (row["operator"], "backward" if backward else "forward", row["dtype"], ())
        yield key, row["backend"], row["name"], max(_ours(row) - forward, 1e-3) if backward else forward


def _ours(row: Record) -> float:
    return float(row["graph_us"] or row["us"])


def table_of(headings: Sequence[object], rows: Iterable[Sequence[object]]) -> list[str]:
    lines = ["| " + " | ".join(str(cell).replace("|", "/") for cell in cells) + " |" for cells in (headings, *rows)]
    return [lines[0], "|" + "---|" * len(headings), *lines[1:]]


def unique(rows: Iterable[Record], key: Callable[[Record], str]) -> list[Record]:
    return list({key(row): row for row in rows}.values())


def _refused(row: Record) -> str:
    return f"{row['competitor']}: {_line(row['error'])[:200]}" if "error" in row else ""


def _time(row: Record) -> str:
    return f"{row['us']:.1f} ({row['bytes_share']:.0%}, {row['operations_share']:.0%})"


def _count(value: float | None) -> str:
    return "?" if value is None else f"{value:,.0f}"


def _line(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    typer.run(main)
