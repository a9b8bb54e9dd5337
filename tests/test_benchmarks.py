"""The benchmark of the operators runs, compares equal results, and keeps what it measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from benchmarks.accuracy import TARGETS, markdown
from benchmarks.towers import IMAGE_TOWER, renamed
from cmaclip_fast.ops import available_backends

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "operators.py"


@pytest.mark.skipif(available_backends()["cpp"] is not None, reason="the extension is not built")
def test_operators(tmp_path):
    command = [sys.executable, SCRIPT, "pack", "pool", "loss", "binary_loss", "--only", "32 rows", "--dtype", "float32"]
    done = subprocess.run([*command, "--write", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = tmp_path.glob("*.json")
    report = json.loads(path.read_text())
    table = (tmp_path / "operators-cpu.md").read_text()
    assert table.count("\n| ") == len(report["results"]) + 1 and f"| {report['results'][0]['ratio']:.2f} |" in table
    names = {"pack_tokens", "modality_pool", "multitask_cross_entropy", "multitask_binary_cross_entropy"}
    assert {row["operator"] for row in report["results"]} == names
    assert all(row["ours"][0] <= row["ours"][1] <= row["ours"][2] and row["ratio"] > 0 for row in report["results"])
    assert report["packages"]["torch"] and report["processor"]["threads"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_heads(tmp_path, dtype):
    page = tmp_path / "tables" / "heads.md"
    command = [sys.executable, "-m", "benchmarks.heads", "--tasks", "1", "--tasks", "40", "--width", "16"]
    command += ["--seconds", "0.05", "--dtype", dtype, "--write", page]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    text = page.read_text()
    assert "times as fast as the loop" in "".join(text.splitlines()[:10]) and text.count(" | 40 | ") == 6


def test_page_is_written_from_the_tables_and_again(tmp_path):
    results, page = tmp_path / "results", tmp_path / "docs" / "tables" / "performance.md"
    results.mkdir(), page.parent.parent.mkdir()
    command = [sys.executable, "-m", "benchmarks.page", results / "performance.md", page, "Speed", "make bench"]
    for number in ("1.5", "1.7"):
        (results / "performance.md").write_text(f"# Old\n\n![speed](performance.png)\n\n## Table\n\n| {number} |\n")
        subprocess.run(command, check=True, cwd=SCRIPT.parents[1])
        text = page.read_text()
        assert text.startswith("# Speed\n\nWritten by `make bench`.\n")
        assert "](../../results/performance.png)" in text and "\n## Table\n" in text and f"| {number} |" in text
    assert "| 1.5 |" not in text


def test_results_say_what_was_not_reached(tmp_path):
    """Two seeds' records become the table of `make results`; where one modality alone is as good, it is named."""

    def record(both: float, seconds: float) -> dict:
        views = {"both": both, "text alone": 0.1, "image alone": 0.6}
        test = {
            view: {task: {"accuracy": x, "macro_f1": x, "recall_at_precision": x} for task in TARGETS}
            for view, x in views.items()
        }
        weights = {task: {"text": 0.25, "image": 0.75} for task in TARGETS}
        return {"test": test, "modality_weights": weights, "seconds": seconds, "best_epoch": 3}

    text = markdown([record(0.5, 90), record(0.9, 700)], [0, 1])
    assert "| color | 0.700 ± 0.283 | 0.85 | 0.100 | 0.600 |" in text and "Not reached, both" not in text
    assert "| 1 | 0.900 | 0.900 | 0.900 | 3 | 11.7 |" in text and "10 minutes of training: seed 1" in text
    assert "- `color`: 0.5500 with both, 0.6000 with image alone" in markdown([record(0.55, 9)], [0])


def test_weights_under_other_names_are_taken_in_order_or_refused():
    expected = timm.create_model(IMAGE_TOWER).state_dict()
    parts = {name: f"layer{i}.{name.rpartition('.')[2]}" for i, name in enumerate(expected)}
    found = renamed({parts[name]: tensor + 1 for name, tensor in expected.items()})
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], tensor + 1) for name, tensor in expected.items())
    with pytest.raises(ValueError, match="stands where"):
        renamed({parts[name]: expected[name] for name in reversed(expected)})


@pytest.mark.slow
def test_reliability_counts_what_is_tried(tmp_path: Path) -> None:
    page = ROOT / "docs" / "reliability.md"
    copy = shutil.copy(page, tmp_path)
    subprocess.run([sys.executable, "-m", "benchmarks.reliability", copy], cwd=ROOT, check=True)
    assert Path(copy).read_text() == page.read_text(), "run make reliability"
