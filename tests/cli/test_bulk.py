"""Predictions of a table, part by part: whether interrupted and gone on with, or made by Ray, the same file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from cmaclip_fast import InputError
from cmaclip_fast.classifier import bulk
from cmaclip_fast.classifier.artifact import load_config
from cmaclip_fast.classifier.labeller import ahead
from cmaclip_fast.data import table as tables

from .conftest import Done, write_data

Run = Callable[..., Done]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk, "PART_ROWS", 16)
    monkeypatch.setattr(bulk, "GROUP_ROWS", 40)


@pytest.fixture
def arguments(artifact: Path, tmp_path: Path) -> list[object]:
    data = write_data(tmp_path / "data", rows=50)
    return ["predict", artifact, "--data", data, "--key", "id", "--output", tmp_path / "labels.parquet"]


@pytest.fixture
def whole(cmaclip: Run, arguments: list[object], tmp_path: Path) -> Path:
    """What a run without interruption writes."""
    path = tmp_path / "whole.parquet"
    done = cmaclip(*arguments[:-1], path)
    assert done.code == 0 and done.out.startswith("50 rows"), done.err
    return path


def interrupt(monkeypatch: pytest.MonkeyPatch, after: int | None) -> list[int]:
    """Ends the next run after so many parts, as Ctrl-C does; lists the parts that were begun."""
    begun: list[int] = []
    records = bulk.Labeller._records

    def stopping(self: bulk.Labeller, step: Any) -> list[dict[str, Any]]:
        if step.start not in begun:
            if len(begun) == after:
                raise KeyboardInterrupt
            begun.append(step.start)
        return records(self, step)

    monkeypatch.setattr(bulk.Labeller, "_records", stopping)
    return begun


def test_an_interrupted_run_goes_on_to_the_same_file(
    cmaclip: Run, arguments: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, partial = tmp_path / "labels.parquet", tmp_path / "labels.parquet.partial"
    with monkeypatch.context() as patch:
        assert interrupt(patch, after=2) == []
        done = cmaclip(*arguments)
    assert done.code == 130 and "--resume" in done.err and not output.exists()
    assert sorted(path.name for path in partial.iterdir()) == [
        "part-000000000000.parquet",
        "part-000000000016.parquet",
        "run.json",
    ]
    for more, said in (([], "--resume"), (["--resume", "--on-bad-rows", "skip"], "other settings (on_bad_rows)")):
        refused = cmaclip(*arguments, *more)
        assert refused.code == 2 and said in refused.err and partial.exists()
    with monkeypatch.context() as patch:
        begun = interrupt(patch, after=None)
        assert cmaclip(*arguments, "--resume").code == 0
    assert begun == [32, 48]
    assert pq.read_table(output).equals(pq.read_table(whole)) and not partial.exists()
    assert pq.ParquetFile(output).metadata.num_row_groups == 2


def test_an_unfinished_run_is_dropped_when_asked(
    cmaclip: Run, arguments: list[object], whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        interrupt(patch, after=1)
        assert cmaclip(*arguments).code == 130
    assert cmaclip(*arguments, "--overwrite").code == 0
    assert pq.read_table(tmp_path / "labels.parquet").equals(pq.read_table(whole))
    refused = cmaclip(*arguments[:-1], tmp_path / "other.parquet", "--resume")
    assert refused.code == 2 and "no unfinished run" in refused.err


def test_a_file_that_is_there_is_kept_from_python_too(artifact: Path, whole: Path, tmp_path: Path) -> None:
    before = whole.read_bytes()
    table = tables.read_table(tmp_path / "data" / "shapes.csv", tables.Columns("picture", "title"))
    with pytest.raises(InputError, match="exists already"):
        bulk.predict_table(bulk.BulkRun(model=artifact, table=table, output=whole), load_config(artifact).tasks)
    assert whole.read_bytes() == before


def test_what_was_labelled_before_a_bad_row_is_kept(
    cmaclip: Run, arguments: list[object], whole: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "data" / "pictures" / "20.png"
    good = picture.read_bytes()
    picture.write_bytes(b"not a picture")
    stopped = cmaclip(*arguments)
    assert stopped.code == 2 and "row 21" in stopped.err and "--resume" in stopped.err
    picture.write_bytes(good)
    assert cmaclip(*arguments, "--resume").code == 0
    assert pq.read_table(tmp_path / "labels.parquet").equals(pq.read_table(whole))


def test_bad_rows_are_counted_over_all_parts(cmaclip: Run, arguments: list[object], tmp_path: Path) -> None:
    for row in (*range(16, 32), 40):
        (tmp_path / "data" / "pictures" / f"{row}.png").write_bytes(b"not a picture")
    done = cmaclip(*arguments, "--on-bad-rows", "skip")
    assert done.code == 0 and "unreadable_image: 15" in done.err, done.err
    # rows 17 and 29 name no picture
    names = pq.read_table(tmp_path / "labels.parquet")["id"].to_pylist()
    bad = {*range(16, 32), 40} - {17, 29}
    assert names == [f"item-{row}" for row in range(50) if row not in bad]


def test_no_usable_row_leaves_nothing(cmaclip: Run, arguments: list[object], tmp_path: Path) -> None:
    for path in (tmp_path / "data" / "pictures").iterdir():
        path.write_bytes(b"not a picture")
    data = tmp_path / "data" / "shapes.csv"
    columns, *lines = [line.split(",") for line in data.read_text().splitlines()]
    untitled = [columns, *([*line[:2], "", *line[3:]] for line in lines)]
    data.write_text("\n".join(map(",".join, untitled)))
    done = cmaclip(*arguments, "--on-bad-rows", "mask")
    assert done.code == 2 and "no usable row is left" in done.err and "--resume" not in done.err
    assert list(tmp_path.glob("labels*")) == []


def test_each_picture_is_read_once(
    cmaclip: Run, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, times = tables.read_image, []

    def counting(*arguments: object) -> object:
        times.append(arguments[0])
        return read(*arguments)

    monkeypatch.setattr(tables, "read_image", counting)
    monkeypatch.setattr(tables, "verify_image", None)
    assert cmaclip(*arguments).code == 0
    assert len(times) == len(set(times)) == 46  # of 50 rows 4 name none


# parts of two rows, each kept after a while: a process to itself, since signals and Ray can end whatever runs them
RAY = """
import time
from cmaclip_fast.classifier import bulk
from cmaclip_fast.cli import app as cli
bulk.PART_ROWS = 2
write = bulk._Parts.write
def slowly(*arguments):
    write(*arguments)
    time.sleep(0.1)
bulk._Parts.write = slowly
cli.main()
"""


@contextmanager
def running_ray(arguments: list[object], partial: Path) -> Iterator[tuple[subprocess.Popen[str], list[psutil.Process]]]:
    """The command under Ray once its first parts are kept, and its processes."""
    pytest.importorskip("ray", reason="--engine ray needs Ray (cmaclip_fast[ray])")
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-c", RAY, *map(str, arguments), "--engine", "ray"]
    with subprocess.Popen(command, env=environment, text=True, stderr=subprocess.PIPE) as run:
        processes: list[psutil.Process] = []
        try:
            while len(list(partial.glob("part-*"))) < 2:
                assert run.poll() is None, run.stderr and run.stderr.read()
                time.sleep(0.02)
            processes = psutil.Process(run.pid).children(recursive=True)
            yield run, processes
        finally:
            run.kill()
            for process in processes:
                with suppress(psutil.Error):
                    process.kill()


@pytest.mark.tried("cluster", ends="the worker is replaced; the same file as without; loopback alone is listened on")
def test_ray_gives_the_same_file_when_a_worker_is_killed(arguments: list[object], whole: Path, tmp_path: Path) -> None:
    # of four workers only as many are started as there are CPUs: others would wait for ever
    with running_ray([*arguments, "--workers", 4], tmp_path / "labels.parquet.partial") as (run, processes):
        workers = [one for one in processes if one.name().startswith("ray::_Actor")]
        workers[0].kill()
        listening = set()
        for process in (psutil.Process(run.pid), *processes):
            with suppress(psutil.Error):
                found = process.net_connections("inet")
                listening |= {one.laddr.ip for one in found if one.status == psutil.CONN_LISTEN}
        _, errors = run.communicate(timeout=120)
    assert run.returncode == 0, errors
    assert {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}
    # on another number of threads sums are added up in another order
    found, expected = (pq.read_table(path) for path in (tmp_path / "labels.parquet", whole))
    assert found.schema.equals(expected.schema)
    assert found.select(["id", "colour", "shape"]).equals(expected.select(["id", "colour", "shape"]))
    for name in ("colour_probability", "shape_probability", "shape_text_weight"):
        assert found[name].to_pylist() == pytest.approx(expected[name].to_pylist(), abs=1e-5)


@pytest.mark.tried("cluster", ends="exit 143, no process is left, resumes without Ray to the same rows")
def test_a_signal_ends_ray_too(
    cmaclip: Run, arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "PART_ROWS", 2)
    with running_ray([*arguments, "--workers", 1], tmp_path / "labels.parquet.partial") as (run, processes):
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=120)
        gone, alive = psutil.wait_procs(processes, timeout=10)
    assert run.returncode == 143 and "Traceback" not in errors, errors
    assert gone and not alive
    assert cmaclip(*arguments, "--resume").code == 0
    assert pq.read_table(tmp_path / "labels.parquet")["id"].to_pylist() == [f"item-{row}" for row in range(50)]


def test_how_busy_the_model_was_is_printed(cmaclip: Run, arguments: list[object], whole: Path, tmp_path: Path) -> None:
    done = cmaclip(*arguments, "--profile")
    assert done.code == 0 and re.search(r"model busy \d+\.\d%: computing .* waiting for rows", done.err), done.err
    assert pq.read_table(arguments[-1]).equals(pq.read_table(whole))


def test_items_are_made_ahead_and_no_further() -> None:
    made: list[int] = []

    def items() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    with closing(ahead(items(), 3)) as found:
        assert next(found) == 0
        deadline = time.monotonic() + 10
        while len(made) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(made) == 5  # three wait, and the fifth has no room yet
        assert [next(found) for _ in range(4)] == [1, 2, 3, 4]
    assert len(made) < 15, "closing ends the thread"
    assert not [thread for thread in threading.enumerate() if thread.name == "cmaclip-ahead"]


def test_an_error_comes_after_the_items_before_it() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise InputError("row 2: bad")

    found = ahead(items(), 3)
    assert next(found) == 1
    with pytest.raises(InputError, match="row 2"):
        next(found)


def test_the_model_does_not_wait_for_rows_or_answers() -> None:
    """Reading, computing and writing overlap: the whole takes little more than the slowest."""

    def slowly(items: Iterable[int]) -> Iterator[int]:
        for item in items:
            time.sleep(0.02)
            yield item

    started = time.perf_counter()
    with closing(ahead(slowly(ahead(slowly(range(20)), 4)), 4)) as found:
        assert list(slowly(found)) == list(range(20))
    assert time.perf_counter() - started < 2 * 20 * 0.02
