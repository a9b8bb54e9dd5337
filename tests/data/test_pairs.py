"""The composed data set `pairs`: labels that neither side tells alone."""

from __future__ import annotations

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cmaclip_fast.data import read_table
from cmaclip_fast.data.pairs import COLOURS, PLACES, build_pairs
from cmaclip_fast.errors import InputError

ROWS = {"train": 640, "validation": 64, "test": 320}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "pairs"
    build_pairs(folder, splits=ROWS)
    return folder


def test_read_by_name_after_building(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMACLIP_DATA", str(folder.parent))
    table = read_table("pairs")
    assert len(table) == sum(ROWS.values()) and table.columns.tasks == ("fits", "place", "colour")
    assert table.image(0).size == (96, 96)


@pytest.mark.tried("table", ends="one line that names the command")
def test_not_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMACLIP_DATA", str(tmp_path))
    with pytest.raises(InputError, match="cmaclip data build pairs"):
        read_table("pairs")
    with pytest.raises(InputError, match="has no parts"):
        read_table("pairs:de")


def test_the_text_alone_says_nothing(folder: Path) -> None:
    """The best guess from the name, counted on the training rows, is right on the test rows as often as chance."""
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    for task, chance in (("fits", 1 / 2), ("place", 1 / 4), ("colour", 1 / 4)):
        counts: dict[str, Counter] = {}
        for row in rows:
            if row["split"] == "train" and row[task]:
                counts.setdefault(row["name"], Counter())[row[task]] += 1
        test = [row for row in rows if row["split"] == "test" and row[task]]
        right = [counts[row["name"]].most_common(1)[0][0] == row[task] for row in test]
        deviation = (chance * (1 - chance) / len(test)) ** 0.5
        assert abs(np.mean(right) - chance) < 3 * deviation


def test_the_picture_alone_says_nothing(folder: Path) -> None:
    """Every picture has all four colours, and the named corner is each of the four equally often."""
    rows = pq.read_table(folder / "pairs.parquet").to_pylist()
    for split, size in ROWS.items():
        part = [row for row in rows if row["split"] == split]
        assert Counter(row["fits"] for row in part) == {"yes": size // 2, "no": size // 2}
        assert Counter(row["place"] for row in part if row["place"]) == dict.fromkeys(PLACES, size // 8)
        assert Counter(row["colour"] for row in part if row["colour"]) == dict.fromkeys(COLOURS, size // 8)
    for row in rows[:50]:
        assert {_corner_colour(row, place) for place in PLACES} == set(COLOURS)


def test_the_label_is_what_is_in_the_corner(folder: Path) -> None:
    rows = [row for row in pq.read_table(folder / "pairs.parquet").to_pylist() if row["place"]]
    assert all(_corner_colour(row, row["place"]) == row["colour"] for row in rows)


def test_same_seed_same_rows(folder: Path, tmp_path: Path) -> None:
    again = build_pairs(tmp_path, splits=ROWS)
    assert pq.read_table(again).equals(pq.read_table(folder / "pairs.parquet"))
    other = build_pairs(tmp_path, overwrite=True, splits=ROWS, seed=1)
    assert not pq.read_table(other).equals(pq.read_table(folder / "pairs.parquet"))


@pytest.mark.tried("output folder", ends="one line; what is there is left")
@pytest.mark.parametrize("there", ["pairs.parquet", "README.md", "a file"])
def test_nothing_is_replaced(tmp_path: Path, there: str) -> None:
    target = tmp_path / "pairs"
    if there == "a file":
        target.write_text("mine")
        kept = target
    else:
        target.mkdir()
        kept = target / there
        kept.write_text("mine")
    with pytest.raises(InputError):
        build_pairs(target, splits=ROWS)
    assert kept.read_text() == "mine"


def _corner_colour(row: dict, place: str) -> str:
    """The colour nearest to the mean of the coloured pixels of a corner."""
    pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"), np.float64)
    index = PLACES.index(place)
    corner = pixels[index // 2 * 48 : index // 2 * 48 + 48, index % 2 * 48 : index % 2 * 48 + 48].reshape(-1, 3)
    inked = corner[np.ptp(corner, axis=1) > 60].mean(0)
    directions = {name: np.asarray(rgb, np.float64) for name, rgb in COLOURS.items()}
    return max(directions, key=lambda name: float(inked @ directions[name] / np.linalg.norm(directions[name])))
