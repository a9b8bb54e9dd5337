"""Every format in, the same rows out; every fault told in one line that names its place and its remedy."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from PIL import Image

from cmaclip_fast.data import Columns, read_table
from cmaclip_fast.errors import InputError

COLUMNS = Columns("image", "title", ("label",), ("id",))
ROWS = [
    {"id": "1", "image": "a.png", "title": "Red, car", "label": "car"},
    {"id": "2", "image": "b.png", "title": "NA", "label": ""},
    {"id": "3", "image": "", "title": "  ", "label": "01"},
]


def _fails(*parts: str) -> Any:
    return pytest.raises(InputError, match=".*".join(parts))


def _as_csv(path: Path, separator: str = ",") -> None:
    pd.DataFrame(ROWS).to_csv(path, index=False, sep=separator)


def _as_json_lines(path: Path) -> None:
    path.write_text("\n".join(json.dumps({k: v or None for k, v in row.items()}) for row in ROWS))


def _as_parquet(path: Path) -> None:
    pd.DataFrame(ROWS).to_parquet(path, index=False)


WRITERS: dict[str, Callable[[Path], None]] = {
    "rows.csv": _as_csv,
    "rows.tsv": lambda path: _as_csv(path, "\t"),
    "rows.jsonl": _as_json_lines,
    "rows.parquet": _as_parquet,
    "folder [1]/.hidden/rows*.csv": _as_csv,
}


@pytest.mark.parametrize("name", WRITERS)
def test_formats_read_alike(name: str, tmp_path: Path, picture: Callable[..., Path]) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[name](path)
    picture("pictures/a.png", "red")
    picture("pictures/b.png", "blue")
    before = set(path.parent.iterdir())

    table = read_table(path, COLUMNS, image_dir=tmp_path / "pictures")

    assert len(table) == 3 and table.name == str(path)
    assert [table.text(i) for i in range(3)] == table.texts() == ["Red, car", "NA", None]
    assert table.labels("label") == ["car", None, "01"]
    assert [table.keys(i) for i in range(3)] == [{"id": "1"}, {"id": "2"}, {"id": "3"}]
    assert table.image(0).getpixel((0, 0)) == (255, 0, 0) and table.image(1).getpixel((0, 0)) == (0, 0, 255)
    assert table.image(2) is None and [table.has_image(i) for i in range(3)] == [True, True, False]
    assert table.where(2) == f"{path}, row 3" and table.row_number(2) == 3
    assert set(path.parent.iterdir()) == before, "reading wrote beside the data"


def test_paths_start_from_the_table_or_are_absolute(
    write_csv: Callable[..., Path], picture: Callable[..., Path]
) -> None:
    picture("sub/a.png", "red")
    blue = picture("elsewhere/b.png", "blue")
    table = read_table(write_csv([["image"], ["a.png"], [str(blue)]], "sub/t.csv"), Columns("image"))
    assert [table.image(i).getpixel((0, 0)) for i in range(2)] == [(255, 0, 0), (0, 0, 255)]


def test_select_keeps_places_and_masks(write_csv: Callable[..., Path], picture: Callable[..., Path]) -> None:
    picture("a.png")
    path = write_csv([["image", "title"], ["a.png", "x"], ["a.png", "y"], ["a.png", "z"]])
    table = read_table(path, Columns("image", "title")).mask_images([1]).select([2, 1]).select([1, 0])
    assert table.texts() == ["y", "z"] and table.row_number(0) == 2 and table.row_number(1) == 3
    assert table.image(0) is None and table.image(1) is not None


@pytest.mark.parametrize("kind", ["struct", "bytes", "feature"])
def test_pictures_inside_parquet(kind: str, tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), "lime").save(stream, "PNG")
    data = stream.getvalue()
    path = tmp_path / "t.parquet"
    if kind == "bytes":
        pd.DataFrame({"image": [data, None]}).to_parquet(path)
    else:
        rows = datasets.Dataset.from_dict({"image": [{"bytes": data, "path": "x.png"}, None]})
        if kind == "feature":
            rows = rows.cast_column("image", datasets.Image())
        rows.to_parquet(str(path))
    table = read_table(path, Columns("image"))
    assert table.image(0).getpixel((0, 0)) == (0, 255, 0) and table.image(1) is None


def test_numbers_missing_values_and_class_features_become_names(tmp_path: Path) -> None:
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "number": datasets.Value("float64"),
            "whole": datasets.Value("int64"),
            "kind": datasets.ClassLabel(names=["cat", "dog"]),
        }
    )
    rows = {"text": ["a", "b", "c"], "number": [1.0, float("nan"), 2.5], "whole": [3, None, 4], "kind": [1, 0, -1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "t.parquet"))
    table = read_table(tmp_path / "t.parquet", Columns(None, "text", ("number", "whole", "kind")))
    assert table.labels("number") == ["1", None, "2.5"]
    assert table.labels("whole") == ["3", None, "4"]
    assert table.labels("kind") == ["dog", "cat", None]


def test_glob_counts_rows_in_each_file(write_csv: Callable[..., Path], tmp_path: Path) -> None:
    write_csv([["text"], ["a"], ["b"]], "shard-1.csv")
    write_csv([["text", "more"], ["c", "x"]], "shard-0.csv")
    table = read_table(tmp_path / "shard-*.csv", Columns(None, "text"))
    assert table.texts() == ["c", "a", "b"]
    assert [table.where(i) for i in (0, 2)] == [f"{tmp_path}/shard-0.csv, row 1", f"{tmp_path}/shard-1.csv, row 2"]


def test_folder_of_classes_with_metadata_and_splits(picture: Callable[..., Path], tmp_path: Path) -> None:
    for name in ("f/train/cat/a.png", "f/train/dog/b.jpg", "f/test/cat/c.png"):
        picture(name)
    (tmp_path / "f/train/metadata.csv").write_text("file_name,text,label\ncat/a.png,a cat,tabby\n")
    table = read_table(tmp_path / "f")
    assert table.columns == Columns("image", "text", ("label",), ("image",), "split")
    assert table.labels("label") == ["cat", "tabby", "dog"]
    assert table.texts() == [None, "a cat", None] and table.splits() == ["test", "train", "train"]
    assert table.image(0).size == (12, 8) and table.keys(0) == {"image": "test/cat/c.png"}
    assert len(read_table(tmp_path / "f", split="test")) == 1


def test_embedded_data_set_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("reading touched the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    table = read_table("openclipart")
    assert len(table) == 3545
    assert table.columns == Columns("image", "title", ("category", "subcategory", "color"), ("id",), "split")
    assert table.image(0).size == (96, 96)
    assert [len(read_table("openclipart", split=name)) for name in ("train", "val", "test")] == [2586, 333, 626]
    text_alone = read_table("openclipart", Columns(text="title", tasks=("color",)))
    assert text_alone.columns.image is None and text_alone.columns.tasks == ("color",)


def test_changed_file_is_read_anew(write_csv: Callable[..., Path]) -> None:
    path = write_csv([["text"], ["old"]])
    assert read_table(path, Columns(None, "text")).texts() == ["old"]
    write_csv([["text"], ["new"]])
    assert read_table(path, Columns(None, "text")).texts() == ["new"]


def test_missing_column(write_csv: Callable[..., Path]) -> None:
    path = write_csv([["image", "title", "label"], ["a", "b", "c"]])
    for columns, role in (
        (Columns("image", "titel"), "text"),
        (Columns("Titel"), "image"),
        (Columns("image", tasks=("titel",)), "task"),
        (Columns("image", keys=("titel",)), "key"),
        (Columns("image", split="titel"), "split"),
    ):
        with _fails(
            "pairs.csv: no column '[Tt]itel' for " + role, "did you mean 'title'", "columns: image, title, label"
        ):
            read_table(path, columns)
    with _fails("pairs.csv: no column 'labl' for task", "did you mean 'label'"):
        read_table(path, Columns("image")).labels("labl")


def test_column_choices_that_make_no_sense(write_csv: Callable[..., Path], tmp_path: Path) -> None:
    path = write_csv([["image", "title"], ["a", "b"]])
    with _fails("name the column of pictures, of text, or both; columns: image, title"):
        read_table(path, Columns(tasks=("title",)))
    with _fails("task 'title' is named twice"):
        read_table(path, Columns("image", tasks=("title", "title")))
    (tmp_path / "t.jsonl").write_text('{"n": 1, "l": ["a"]}')
    with _fails("column 'n' holds int64, not paths or bytes"):
        read_table(tmp_path / "t.jsonl", Columns("n"))
    with _fails("column 'l' holds list", "not text or classes"):
        read_table(tmp_path / "t.jsonl", Columns(None, "n", ("l",)))
    pd.DataFrame({"t": [b"x"]}).to_parquet(tmp_path / "t.parquet")
    with _fails("column 't' holds binary"):
        read_table(tmp_path / "t.parquet", Columns(None, "t"))


@pytest.mark.parametrize("name", ["e.csv", "e.jsonl", "header.csv", "e.parquet"])
def test_empty_table(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    if name == "e.parquet":
        pd.DataFrame({"text": []}).to_parquet(path)
    else:
        path.write_text("text\n" if name == "header.csv" else "")
    with _fails(name + ": the (file is empty|table has no rows); give"):
        read_table(path, Columns(None, "text"))


def test_source_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\na\n")
    (tmp_path / "t.xlsx").write_text("x")
    (tmp_path / "none").mkdir()
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables/a.csv").write_text("text\na\n")
    for source, parts in {
        tmp_path / "trian.csv": ["no such file, folder or data set \\(did you mean 'train.csv'"],
        "openclipar": ["no such file", "did you mean 'openclipart'"],
        tmp_path / "x-*.csv": ["no file matches this pattern"],
        tmp_path / "t.xlsx": ["format '.xlsx' is not read; convert it"],
        "https://example.org/a.csv": ["download the file"],
        tmp_path / "none": ["holds no pictures; name a folder of pictures"],
        tmp_path / "tables": ["holds no pictures; to read its tables name", "tables/\\*.csv"],
    }.items():
        with _fails(*parts):
            read_table(source, Columns(None, "text"))
    with _fails("gone: image_dir is not a folder; name the folder"):
        read_table(tmp_path / "train.csv", Columns("text"), image_dir=tmp_path / "gone")


def test_malformed_files(tmp_path: Path, picture: Callable[..., Path]) -> None:
    contents = {
        "wide.csv": (b"a,b\n1,2\n1,2,3\n", "row 2: has 3 cells, but there are 2 columns"),
        "twice.csv": (b"a,a\n1,2\n", "column 'a' is there 2 times"),
        "latin.csv": ("a\n\xe9\n".encode("latin-1"), "is not UTF-8 .*save it as UTF-8"),
        "cut.jsonl": (b'{"a": "x"}\n{"a":\n', "cannot be read as JSON"),
        "cut.parquet": (b"PAR1nonsense", "cannot be read as PARQUET"),
    }
    for name, (data, message) in contents.items():
        (tmp_path / name).write_bytes(data)
        with _fails(f"{name}.*{message}"):
            read_table(tmp_path / name, Columns(None, "a"))
    (tmp_path / "0.jsonl").write_text('{"a": [1]}')
    (tmp_path / "1.jsonl").write_text('{"a": "x"}')
    with _fails("the files do not fit together", "give them the same columns"):
        read_table(tmp_path / "[01].jsonl", Columns(None, "a"))
    picture("f/cat/a.png")
    (tmp_path / "f/metadata.csv").write_text("file_name,text\ncat/a.png,x\ncat/b.png,y\n")
    with _fails("metadata.csv, row 2, column 'file_name': picture 'cat/b.png' does not exist"):
        read_table(tmp_path / "f")
    (tmp_path / "f/metadata.csv").write_text("file,text\ncat/a.png,x\n")
    with _fails("metadata.csv: has no column 'file_name'"):
        read_table(tmp_path / "f")


def test_split_that_is_not_there(write_csv: Callable[..., Path]) -> None:
    path = write_csv([["text", "split"], ["a", "train"], ["b", "dev"]])
    assert read_table(path, Columns(None, "text"), split="validation").texts() == ["b"]
    with _fails("column 'split': no row of split 'trein' .did you mean 'train'", "splits: dev, train"):
        read_table(path, Columns(None, "text"), split="trein")
    with _fails("no column 'split' for split_column"):
        read_table(write_csv([["text"], ["a"]], "u.csv"), Columns(None, "text"), split="test")
