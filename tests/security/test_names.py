"""Names from a stranger: no character of a table reaches a terminal or a page that would obey it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cmaclip_fast.cli import app as cli
from cmaclip_fast.errors import one_line, visible
from cmaclip_fast.progress import Console, rate_bar

EVIL = "\x1b]0;title\x07\x1b[31m\x9b2J\u202egnp<script>alert(1)</script>&\"'$x^{_$ :smile: [bold]|\\"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
CLASSES = [f"{EVIL} {number}" for number in range(2)]
TASK, TEXT, KEY = f"task {EVIL}", f"text {EVIL}", f"key {EVIL}"
QUICK = ["--option", "image_size=32", "--option", "width=32", "--option", "heads=2", "--option", "depth=1"]
QUICK += ["--batch-size", "16", "--epochs", "1"]
Run = Callable[..., tuple[int, str]]


def plain(said: str) -> None:
    assert not OBEYED.search(said), OBEYED.findall(said)[:3]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    Image.new("RGB", (40, 40), "red").save(folder / "1.png")
    rows = range(40)
    splits = ["train"] * 20 + ["validation"] * 10 + ["test"] * 10
    columns = {
        KEY: [f"{EVIL}{i}" for i in rows],
        "image": ["1.png" for _ in rows],
        TEXT: [f"{EVIL} {'red' if i % 2 else 'blue'}" for i in rows],
        TASK: [CLASSES[i % 2] for i in rows],
        "group": [f"{EVIL}{i % 3}" for i in rows],
        "split": splits,
    }
    path = folder / "a\x1b[31m<i>\u202e.parquet"
    pq.write_table(pa.table(columns), path)
    return path


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def cmaclip(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["cmaclip", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        plain(captured.out + captured.err)
        return code, captured.out + captured.err

    return cmaclip


@pytest.mark.tried("table", ends="shown as escapes, the run succeeds")
def test_hostile_names_through_every_command(run: Run, data: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    columns = ["--image", "image", "--text", TEXT, "--task", TASK]
    assert run("train", "--data", data, *columns, "--output", model, *QUICK)[0] == 0
    assert run("evaluate", model, "--by", "group", "--json", tmp_path / "numbers.json")[0] == 0
    assert run("predict", model, "--data", data, "--key", KEY, "--output", tmp_path / "labels.parquet")[0] == 0
    assert run("explain", model, "--row", 1, "--key", KEY, "--output", tmp_path / "row.html")[0] == 0
    assert run("data", "show", data, "--text", TEXT, "--task", TASK)[0] == 0
    assert run("audit", model, "--key", KEY, "--output", tmp_path / "found.parquet")[0] == 0
    for page in (model / "report.html", tmp_path / "row.html", tmp_path / "found.html"):
        content = page.read_text(encoding="utf-8")
        plain(content)
        assert "<script>alert" not in content and "&lt;script&gt;alert" in content
    plain((model / "train.log").read_text(encoding="utf-8"))
    assert set(pq.read_table(tmp_path / "labels.parquet")[TASK].to_pylist()) <= {*CLASSES, None}
    compared = tmp_path / "compared"
    systems = ["--systems", "cma-clip,clip", "--seeds", "0", "--quick", "--epochs", 1, "--by", "group"]
    small = ["--option", "image_size=32", "--option", "width=32", "--option", "batch_size=16"]
    code, said = run("compare", "--data", data, *columns, *systems, *small, "--output", compared)
    assert code == 0, said
    page = (compared / "comparison.md").read_text(encoding="utf-8")
    plain(page)
    assert "<script>" not in page and "&lt;script>" in page


@pytest.mark.tried("table", ends="one line, exit 2")
@pytest.mark.parametrize("option", ["--data", "--text", "--task", "--split-column", "--key", "--option", "--model"])
def test_a_hostile_value_in_an_error(option: str, run: Run, data: Path, tmp_path: Path) -> None:
    given = {"--data": data, "--text": TEXT, "--task": TASK, "--output": tmp_path / "out"}
    given[option] = f"no{EVIL}\nerror: another line"
    code, said = run("train", *(part for pair in given.items() for part in pair))
    assert code == 2 and said.count("\n") == 1 and said.startswith("error: ")


def test_what_is_shown() -> None:
    assert visible("a\x1b[1m\tb\n") == "a\\x1b[1m\tb\n"
    assert one_line("a\nb\r\u2028\ud800é日👩‍🚀") == "a\\nb\\r\\u2028\\ud800é日👩‍🚀"


def test_a_console_obeys_its_own_bar_alone() -> None:
    stream = StringIO()
    console = Console(file=stream, force_terminal=True, width=200)
    with rate_bar(console, "rows") as bar:
        bar.add_task(f"[bold]{EVIL}", total=2)
    console.print(EVIL, highlight=False)
    written = stream.getvalue()
    assert "\x1b]0;" not in written and "\x9b" not in written and "\x07" not in written
    assert "\x1b[?25l" in written and ":smile: [bold]" in written.replace("\n", "")
