"""The examples of docs/serving.md run as they stand."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.classifier.conftest import TASKS
from tests.serving.conftest import Running

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
EXAMPLES = dict(re.findall(r"<!-- example: (.*?) -->\n```\n(.*?)```", PAGE, re.DOTALL))

needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are calls of curl")


def answer(served: Running, name: str) -> str:
    """What the command of an example prints, with the pictures of examples/clipart."""
    command = EXAMPLES[name].replace("http://127.0.0.1:8000", str(served.client.base_url).rstrip("/"))
    assert str(served.port) in command
    done = subprocess.run(
        ["bash", "-c", command], cwd=ROOT / "examples" / "clipart", capture_output=True, text=True, check=True
    )
    return done.stdout


@needs_curl
@pytest.mark.parametrize(("name", "rows"), [("a row", 1), ("rows", 2), ("json", 2)])
def test_requests(served: Running, name: str, rows: int) -> None:
    found: list[dict[str, Any]] = json.loads(answer(served, name))["predictions"]
    assert len(found) == rows and all(row.keys() == TASKS.keys() for row in found)
    said = found[0]["colour"]
    assert said["text_weight"] > 0 and said["image_weight"] > 0
    assert rows == 1 or found[1]["colour"]["image_weight"] == 0
    shown = json.loads(re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[0])["predictions"][0]["color"]
    assert shown.keys() == said.keys() and shown["top"][0].keys() == said["top"][0].keys()


@needs_curl
def test_table(served: Running) -> None:
    rows = list(csv.DictReader(io.StringIO(answer(served, "table"))))
    assert len(rows) == 3 and not any(row["error"] for row in rows)
    for row in rows:
        assert row["colour_status"] in ("accepted", "unsure")
        assert (row["colour"] in TASKS["colour"]) == (row["colour_status"] == "accepted")


def test_every_endpoint_and_metric_is_on_the_page(served: Running) -> None:
    paths = served.client.get("/openapi.json").json()["paths"]
    assert all(f" {path}" in PAGE for path in paths)
    ours = set(re.findall(r"# TYPE (cmaclip_\w+) (?:counter|gauge|histogram)", served.client.get("/metrics").text))
    assert all(f"`{name}`" in PAGE for name in ours if not name.endswith("_created"))
