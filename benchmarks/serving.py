"""Times a service on loopback against `Classifier.predict` in a process, on the same rows.

    python -m benchmarks.serving runs/openclipart-0 --write benchmarks/results/serving.md

Each request has one row, as an encoded picture and a text, in a form. The clients run in a process of their own; each
has one connection, and sends its next request when it has the answer. At half load requests are sent at fixed times,
whether or not those before are answered, and their time counts from when they were due.
"""

from __future__ import annotations

import datetime
import http.client
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from benchmarks.page import as_table
from cmaclip_fast import env
from cmaclip_fast.classifier.artifact import load_config
from cmaclip_fast.classifier.classifier import Classifier
from cmaclip_fast.data.source import Source

HEADINGS = ["", "clients", "rows a second", "p50, ms", "p99, ms", "of `predict`"]
BOUNDARY = "cmaclip-rows"
BATCH = 32
Pair = tuple[bytes | None, str | None]


@dataclass
class Measured:
    """What the clients saw."""

    seconds: float = 0.0
    times: list[float] = field(default_factory=list)
    wrong: int = 0

    @property
    def rate(self) -> float:
        return len(self.times) / self.seconds

    def at(self, share: float) -> float:
        """A percentile of the times, in ms."""
        return 1000 * float(np.percentile(self.times, share))


@dataclass(frozen=True)
class Work:
    """What the clients send, and the labels of one task that they should get."""

    port: int
    bodies: list[bytes]
    task: str
    labels: list[str]


def main(
    folder: Annotated[Path, typer.Argument(help="The model.")],
    rows: Annotated[int, typer.Option(help="Different rows, of the training data's test split.")] = 256,
    clients: Annotated[list[int], typer.Option(help="At a time; repeatable. The last is the full load.")] = [1, 8, 32],  # noqa: B006
    seconds: Annotated[float, typer.Option(help="Of each row of the table.")] = 20.0,
    write: Annotated[Path | None, typer.Option(help="The tables, as Markdown.")] = None,
) -> None:
    """Time a service against `Classifier.predict`."""
    pairs = read_pairs(folder, rows)
    classifier = Classifier.load(folder)
    load = os.getloadavg()[0]
    alone, single = in_process(classifier, pairs, BATCH, seconds), in_process(classifier, pairs, 1, seconds)
    task = next(iter(classifier.tasks))
    wanted = [row[task].top[0][0] for row in classifier.predict(*map(list, zip(*pairs, strict=True)))]
    del classifier
    lines = [
        [f"`predict`, batches of {BATCH}", "", alone.rate, alone.at(50), alone.at(99), 1.0],
        ["`predict`, one row", "", single.rate, single.at(50), single.at(99), single.rate / alone.rate],
    ]
    bodies = [as_form(pair) for pair in pairs]
    wrong = 0
    with service(folder) as port, multiprocessing.get_context("spawn").Pool(1) as away:
        work = Work(port, bodies, task, wanted)
        for number in clients:
            found = away.apply(send_all, (work, number, seconds))
            lines.append(["service", number, found.rate, found.at(50), found.at(99), found.rate / alone.rate])
            wrong += found.wrong
            full = found
        half = away.apply(send_all, (work, 2 * clients[-1], seconds, full.rate / 2))
        lines.append(["service, half load", "", half.rate, half.at(50), half.at(99), half.rate / alone.rate])
        wrong += half.wrong
    said = as_table(HEADINGS, lines)
    print(said)
    if write is None:
        return
    text = f"""With {clients[-1]} clients the service labels {full.rate / alone.rate:.2f} times as many rows a second as
`Classifier.predict` in batches of {BATCH}. At half that load p99 is {half.at(99) / single.at(50):.1f} times the median
of one row alone. Of all answers, {wrong} differed from those of `predict`.

{said}

One row a request, as an encoded picture and a text; {len(pairs)} different rows. The time of a batch is that of all its
rows. Service and clients share the machine: {machine()}; load before the run {load:.2f}, after it
{os.getloadavg()[0]:.2f}.
"""
    write.parent.mkdir(parents=True, exist_ok=True)
    write.write_text(text, encoding="utf-8")


def machine() -> str:
    about = "CPU, {instruction_set}, {threads} threads".format(**env.processor())
    if torch.cuda.is_available():
        about = torch.cuda.get_device_name()
    return f"{about}, {os.cpu_count()} processors, torch {torch.__version__}, {datetime.date.today()}"


def read_pairs(folder: Path, most: int) -> list[Pair]:
    """Rows of the test split, each picture as the file of one."""
    source = Source(split="test", on_bad_rows="skip")
    table, _ = source.checked(load_config(folder).trained_on(), print)
    pairs: list[Pair] = []
    for row in range(min(most, len(table))):
        picture, content = table.image(row), None
        if picture is not None:
            buffer = io.BytesIO()
            picture.save(buffer, "PNG")
            content = buffer.getvalue()
        pairs.append((content, table.text(row)))
    return pairs


def in_process(classifier: Classifier, pairs: list[Pair], batch: int, seconds: float) -> Measured:
    found = Measured()
    chunks = itertools.cycle([pairs[start : start + batch] for start in range(0, len(pairs), batch)])
    for _ in range(3):  # weights are laid out when they are first needed
        classifier.predict(*map(list, zip(*next(chunks), strict=True)), batch_size=batch)
    began = time.perf_counter()
    while (now := time.perf_counter()) - began < seconds:
        chunk = next(chunks)
        images, texts = map(list, zip(*chunk, strict=True))
        if batch == 1:
            classifier.predict(images[0], texts[0])
        else:
            classifier.predict(images, texts, batch_size=batch)
        found.times += [time.perf_counter() - now] * len(chunk)
    found.seconds = time.perf_counter() - began
    return found


@contextmanager
def service(folder: Path) -> Iterator[int]:
    """The port of a service of the model, which is ended with the block."""
    command = [sys.executable, "-m", "cmaclip_fast.cli.app", "serve", str(folder), "--port", "0", "--examples", "0"]
    run = subprocess.Popen(
        [*command, "--batch-size", str(BATCH)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert run.stdout is not None
        found = re.search(r":(\d+)/", run.stdout.readline())
        if found is None:
            raise SystemExit(f"{folder}: the service did not start: run `cmaclip serve {folder}`")
        yield int(found[1])
    finally:
        run.send_signal(signal.SIGTERM)
        run.wait(60)


def as_form(pair: Pair) -> bytes:
    image, text = pair
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'.encode() + (image or b""),
        f'\r\n--{BOUNDARY}\r\nContent-Disposition: form-data; name="text"\r\n\r\n{text or ""}\r\n'.encode(),
        f"--{BOUNDARY}--\r\n".encode(),
    ]
    return b"".join(parts)


def send_all(work: Work, number: int, seconds: float, rate: float = 0.0) -> Measured:
    """What so many clients see; with a rate requests are sent at fixed times."""
    send_for(Measured(), threading.Lock(), itertools.count(), work, time.perf_counter() + 1.0, 0.0)
    found, lock, turns = Measured(), threading.Lock(), itertools.count()
    began = time.perf_counter()
    threads = [
        threading.Thread(target=send_for, args=(found, lock, turns, work, began + seconds, rate)) for _ in range(number)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found.seconds = time.perf_counter() - began
    return found


def send_for(found: Measured, lock: threading.Lock, turns: Iterator[int], work: Work, end: float, rate: float) -> None:
    """One client, on one connection, until the time is over."""
    began = time.perf_counter()
    line = http.client.HTTPConnection("127.0.0.1", work.port, timeout=60)
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    while True:
        turn = next(turns)
        due = began + turn / rate if rate else time.perf_counter()
        if due > end:
            break
        time.sleep(max(0.0, due - time.perf_counter()))
        line.request("POST", "/predict", work.bodies[turn % len(work.bodies)], headers)
        answer = line.getresponse()
        content = answer.read()
        taken = time.perf_counter() - due
        label = None
        if answer.status == 200:
            label = json.loads(content)["predictions"][0][work.task]["top"][0]["label"]
        with lock:
            found.times.append(taken)
            found.wrong += label != work.labels[turn % len(work.bodies)]
    line.close()


if __name__ == "__main__":
    typer.run(main)
