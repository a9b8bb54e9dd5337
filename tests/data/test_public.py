"""Readers of public data sets, on small files of the same form."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cmaclip_fast.data import check_rows, describe, read_table, split_table
from cmaclip_fast.errors import InputError


def _picture(path: Path, colour: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), colour).save(path)


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.fixture
def food(tmp_path: Path) -> Path:
    """`images/SPLIT/CLASS/CLASS_N.jpg` and two CSV files without a row of column names."""
    for split, numbers in (("train", (0, 1, 2)), ("test", (3,))):
        for dish in ("apple_pie", "sushi"):
            for number in numbers:
                _picture(tmp_path / "images" / split / dish / f"{dish}_{number}.jpg")
    titles = [["apple_pie_0.jpg", 'Apple Pie, "the best"', "apple_pie"], ["apple_pie_1.jpg", "Pie | Blog", "apple_pie"]]
    titles += [["sushi_0.jpg", "Sushi: how to", "sushi"], ["sushi_9.jpg", "no such picture", "sushi"]]
    _write_csv(tmp_path / "texts" / "train_titles.csv", titles)
    # the same file name may be in both splits
    _write_csv(
        tmp_path / "texts" / "test_titles.csv", [["sushi_3.jpg", "Sushi", "sushi"], ["sushi_0.jpg", "x", "sushi"]]
    )
    return tmp_path


def test_upmc_food101(food: Path) -> None:
    table = read_table(f"upmc-food101:{food}")
    assert table.columns.tasks == ("label",) and table.columns.split == "split"
    assert {split: len(part) for split, part in split_table(table).items()} == {
        "train": 5,
        "validation": 1,
        "test": 2,
    }
    texts = dict(zip([table.keys(i)["image"] for i in range(len(table))], table.texts(), strict=True))
    assert texts["images/train/apple_pie/apple_pie_0.jpg"] == 'Apple Pie, "the best"'
    assert texts["images/train/sushi/sushi_1.jpg"] is None, "a picture without a title"
    assert texts["images/test/sushi/sushi_3.jpg"] == "Sushi" and len(texts) == 8
    assert table.labels("label").count("sushi") == 4 and table.image(0).size == (20, 16)  # type: ignore[union-attr]
    assert len(check_rows(table)[0]) == 8


def test_upmc_food101_that_is_not_whole(food: Path) -> None:
    with pytest.raises(InputError, match="row 1: 2 values instead of file name, title and class"):
        (food / "texts" / "train_titles.csv").write_text("apple_pie_0.jpg,apple_pie\n")
        read_table(f"upmc-food101:{food}")
    (food / "texts" / "test_titles.csv").unlink()
    (food / "texts" / "train_titles.csv").write_text("")
    with pytest.raises(InputError, match=r"test_titles.csv: is missing; name the folder"):
        read_table(f"upmc-food101:{food}")


@pytest.fixture
def glami(tmp_path: Path) -> Path:
    """The archive's folder, with both CSV files and the pictures of all rows in one folder."""
    root = tmp_path / "GLAMI-1M-dataset"
    names = ["item_id", "image_id", "geo", "name", "description", "category", "category_name", "label_source"]
    train = [
        ["11", "501", "cz", "Pánská obuv", "modrá, kožená", "7", "mens-boots", "custom-tag"],
        ["12", "502", "sk", "Dámsky opasok", "", "9", "womens-belts", "admin"],
        ["13", "503", "gr", "Γυναικείο φόρεμα", "κόκκινο", "8", "womens-dresses", "heuristic"],
    ]
    _write_csv(root / "GLAMI-1M-train.csv", [names, *train])
    _write_csv(root / "GLAMI-1M-test.csv", [names, ["14", "504", "cz", "Boty", "", "7", "mens-boots", "NA"]])
    for image in ("501", "502", "503", "504"):
        _picture(root / "images" / f"{image}.jpg")
    return tmp_path


def test_glami_1m(glami: Path) -> None:
    for folder in (glami, glami / "GLAMI-1M-dataset"):
        table = read_table(f"glami-1m:{folder}")
        assert table.columns.tasks == ("category_name",) and table.splits() == ["train"] * 3 + ["test"]
        assert table.texts() == ["Pánská obuv modrá, kožená", "Dámsky opasok", "Γυναικείο φόρεμα κόκκινο", "Boty"]
        assert table.keys(3) == {"item_id": "14", "geo": "cz"} and table.labels("geo")[2] == "gr"
        assert all(table.image(row) is not None for row in range(4))
        assert table.where(3).endswith("GLAMI-1M-test.csv, row 1")
    (glami / "GLAMI-1M-dataset" / "GLAMI-1M-test.csv").write_text("item_id,geo\n1,cz\n")
    with pytest.raises(InputError, match=r"GLAMI-1M-test.csv: no column 'category_name'; columns: item_id, geo"):
        read_table(f"glami-1m:{glami}")


@pytest.fixture
def fashion(tmp_path: Path) -> Path:
    """HDF5 files of arrays `[N, 1]` of bytes, and pictures `[N, 256, 256, 3]`."""
    h5py = pytest.importorskip("h5py", reason="h5py is not installed (extra 'readers')")
    texts = {
        "input_description": ["Crêpe de chine gown in black.", "Leather boots.", "Şal"],
        "input_name": ["Black Gown", "Boots", "Scarf"],
        "input_category": ["DRESSES", "BOOTS", "SCARVES"],
        "input_subcategory": ["GOWNS", "ANKLE BOOTS", "SILKS & CASHMERES"],
        "input_gender": ["Women", "Men", "Women"],
    }
    for name, rows in (("train", [0, 1, 2]), ("validation", [1])):
        with h5py.File(tmp_path / f"fashiongen_256_256_{name}.h5", "w") as file:
            for key, values in texts.items():
                encoded = np.array([[values[row].encode("iso-8859-9")] for row in rows], dtype="S400")
                file.create_dataset(key, data=encoded)
            file.create_dataset("input_productID", data=np.array([[100 + row] for row in rows]))
            file.create_dataset("index", data=np.array([[row] for row in rows]))
            pixels = np.stack([np.full((256, 256, 3), 40 * row + 10, dtype=np.uint8) for row in rows])
            file.create_dataset("input_image", data=pixels)
    return tmp_path


def test_fashion_gen(fashion: Path) -> None:
    table = read_table(f"fashion-gen:{fashion}")
    assert table.columns.tasks == ("category",) and table.splits() == ["train"] * 3 + ["test"]
    assert table.texts() == ["Crêpe de chine gown in black.", "Leather boots.", "Şal", "Leather boots."]
    assert table.labels("category") == ["DRESSES", "BOOTS", "SCARVES", "BOOTS"]
    assert table.labels("subcategory")[2] == "SILKS & CASHMERES" and table.labels("gender")[1] == "Men"
    assert table.keys(3) == {"image": "fashiongen_256_256_validation.h5#0", "product": "101"}
    shades = [table.image(row).getpixel((128, 128))[0] for row in range(4)]  # type: ignore[union-attr, index]
    assert shades == [10, 50, 90, 50]
    assert len(check_rows(table)[0]) == 4 and describe(table).absent["image"] == 0
    assert table.mask_images([1]).image(1) is None and not table.mask_images([1]).has_image(1)
    assert table.select([3]).image(0).size == (256, 256)  # type: ignore[union-attr]


def test_fashion_gen_pictures_in_loader_processes(fashion: Path) -> None:
    from cmaclip_fast.data import Examples, ImagePreprocessing, TrainedTokenizer, make_loader

    table = read_table(f"fashion-gen:{fashion}")
    assert table.image(0) is not None, "the files are open here already"
    tokenizer = TrainedTokenizer.train(table.texts(), min_frequency=1)
    examples = Examples(table, {}, ImagePreprocessing(size=16), tokenizer, cache_images=False)
    batches = list(make_loader(examples, 1, shuffle=False, workers=2))
    alone = list(make_loader(examples, 1, shuffle=False))
    assert all((a.images == b.images).all() for a, b in zip(batches, alone, strict=True)) and len(batches) == 4


def test_fashion_gen_that_is_something_else(fashion: Path) -> None:
    path = fashion / "fashiongen_256_256_validation.h5"
    path.write_bytes(b"no HDF5")
    with pytest.raises(InputError, match=r"validation.h5: is not Fashion-Gen's HDF5 .*; download it again"):
        read_table(f"fashion-gen:{fashion}")
    path.unlink()
    with pytest.raises(InputError, match=r"validation.h5: is missing; name the folder"):
        read_table(f"fashion-gen:{fashion}")


@pytest.mark.parametrize("name", ["upmc-food101", "fashion-gen", "glami-1m"])
def test_where_it_is(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"{name}: say where it is, as '{name}:FOLDER'"):
        read_table(name)
    with pytest.raises(InputError, match="no such folder; name the one that the data set was unpacked in"):
        read_table(f"{name}:{tmp_path / 'nothing'}")
    with pytest.raises(InputError, match="is missing"):
        if name == "fashion-gen":
            pytest.importorskip("h5py", reason="h5py is not installed (extra 'readers')")
        read_table(f"{name}:{tmp_path}")


def test_h5py_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "h5py", None)
    with pytest.raises(InputError, match=r"h5py is needed; install cmaclip_fast\[readers\]"):
        read_table(f"fashion-gen:{tmp_path}")
