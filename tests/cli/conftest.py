"""A small made-up data set of coloured squares and circles, and an artefact trained on it once."""

from __future__ import annotations

import csv
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from cmaclip_fast.cli import app as cli

COLOURS = {"red": (220, 30, 30), "green": (30, 180, 30), "blue": (30, 30, 220)}
QUICK = ["--option", "image_size=32", "--option", "width=32", "--option", "heads=2", "--option", "depth=1"]
QUICK += ["--batch-size", "16", "--epochs", "2"]


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture
def cmaclip(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command in this process."""

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["cmaclip", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Done(code, captured.out, captured.err)

    monkeypatch.setenv("COLUMNS", "200")
    return run


def write_data(folder: Path, rows: int = 96, seed: int = 0, split: bool = True) -> Path:
    """`shapes.csv` with columns id, picture, title, colour, shape (some empty) and split, and its pictures."""
    chance = random.Random(seed)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    lines = []
    for row in range(rows):
        colour, shape = chance.choice(list(COLOURS)), chance.choice(["square", "circle"])
        picture = Image.new("RGB", (40, 40), "white")
        draw = ImageDraw.Draw(picture)
        box = (8, 8, 30 + chance.randrange(4), 30)
        (draw.rectangle if shape == "square" else draw.ellipse)(box, fill=COLOURS[colour])
        picture.save(folder / "pictures" / f"{row}.png")
        lines.append(
            {
                "id": f"item-{row}",
                "picture": "" if row % 12 == 5 else f"pictures/{row}.png",
                "title": "" if row % 12 == 7 else f"a nice {shape} number {row}",
                "colour": "" if row % 12 == 9 else colour,
                "shape": shape,
                "split": ("train", "train", "train", "validation", "test", "train")[row % 6],
            }
        )
    table = folder / "shapes.csv"
    with table.open("w", newline="") as file:
        names = [name for name in lines[0] if split or name != "split"]
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    return table


COLUMNS = ["--image", "picture", "--text", "title", "--task", "colour", "--task", "shape", "--key", "id"]


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="session")
def artifact(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that `cmaclip train` wrote from `shapes`."""
    output = tmp_path_factory.mktemp("runs") / "shapes"
    before = sys.argv
    sys.argv = ["cmaclip", "train", "--data", str(shapes), *COLUMNS, "--output", str(output), *QUICK]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code
    finally:
        sys.argv = before
    return output
