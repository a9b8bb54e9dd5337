"""A tiny artefact, and services of it that listen on loopback, as clients find them."""

from __future__ import annotations

import asyncio
import csv
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("fastapi", reason="serve needs FastAPI (cmaclip_fast[serve])")

import httpx
from PIL import Image

from cmaclip_fast import Classifier
from cmaclip_fast.classifier.artifact import save_model
from cmaclip_fast.serving.examples import read_examples
from cmaclip_fast.serving.server import listen, make_server
from cmaclip_fast.serving.service import Service, load
from cmaclip_fast.serving.settings import Settings
from tests.classifier.conftest import COLUMNS, TASKS, TEXTS, make_model, make_pictures
from tests.decided import save_decided


def as_file(picture: Image.Image | None, kind: str = "PNG") -> bytes | None:
    if picture is None:
        return None
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


PICTURES = [as_file(picture) for picture in make_pictures()]
"""The files of the pictures that belong to `TEXTS`."""


@dataclass
class Running:
    """A service that listens.

    Attributes:
        client: calls it; raises nothing by itself.
    """

    service: Service
    client: httpx.Client
    port: int

    def metric(self, line: str) -> float:
        """The value of a metric, by its name and labels; 0 where there is none yet."""
        found = [row for row in self.client.get("/metrics").text.splitlines() if row.startswith(f"{line} ")]
        return float(found[0].rpartition(" ")[2]) if found else 0.0


Start = Callable[..., Running]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artefact, with the table that it says it was trained on."""
    home = tmp_path_factory.mktemp("served")
    with (home / "rows.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "title", *TASKS, "split"])
        for number, (content, text) in enumerate(zip(PICTURES, TEXTS, strict=True)):
            if content is not None:
                (home / f"{number}.png").write_bytes(content)
            writer.writerow([f"{number}.png" if content else "", text or "", "red", "long", "test"])
    made = home / "tiny"
    made.mkdir()
    columns = COLUMNS.model_copy(update={"split": "split"})
    save_model(made, make_model(), columns, str(home / "rows.csv"), {"seed": 0})
    save_decided(made, make_model())
    return made


@pytest.fixture(scope="session")
def classifier(folder: Path) -> Classifier:
    return Classifier.load(folder, "cpu")


@contextmanager
def running(folder: Path, settings: Settings) -> Iterator[Running]:
    with listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        service = Service(load(folder, "cpu", "auto"), settings, lambda: load(folder, "cpu", "auto"))
        opened = threading.Event()
        server = make_server(service, read_examples(folder, settings.examples), opened.set)
        thread = threading.Thread(target=lambda: asyncio.run(server.serve([listening])))
        thread.start()
        assert opened.wait(30)
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:
                yield Running(service, client, port)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@pytest.fixture
def start(folder: Path) -> Iterator[Start]:
    """Starts a service with settings of a test's own."""
    ends = []

    def begin(**settings: object) -> Running:
        manager = running(folder, Settings(**settings))  # type: ignore[arg-type]
        ends.append(manager)
        return manager.__enter__()

    yield begin
    for manager in ends:
        manager.__exit__(None, None, None)


@pytest.fixture(scope="session")
def served(folder: Path) -> Iterator[Running]:
    """One service for all tests that change nothing of it."""
    with running(folder, Settings()) as found:
        yield found
