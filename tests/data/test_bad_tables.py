"""Tables as they are met in practice: read as what they say, or refused in one line that names file and row."""

from __future__ import annotations

import datetime as dt
import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cmaclip_fast.data import Columns, describe, files, read_table
from cmaclip_fast.errors import InputError

PLAIN = b"sku,title,kind\n1,red hat,a\n2,NA,b\n3,,a\n"
COLUMNS = Columns(None, "title", ("kind",), ("sku",))


def read(path: Path, content: bytes, columns: Columns = COLUMNS) -> Any:
    path.write_bytes(content)
    return read_table(path, columns)


def same_as_plain(table: Any) -> None:
    assert table.texts() == ["red hat", "NA", None]
    assert table.labels("kind") == ["a", "b", "a"]
    assert table.key_columns().to_pydict() == {"sku": ["1", "2", "3"]}


SAME = {
    "trailing commas": b"sku,title,kind\n1,red hat,a,\n2,NA,b,\n3,,a,\n",
    "several trailing commas": b"sku,title,kind,,\n1,red hat,a,,,\n2,NA,b,,,\n3,,a,,,\n",
    "trailing commas in the header alone": b"sku,title,kind,\n1,red hat,a\n2,NA,b\n3,,a\n",
    "trailing comma in one row": b"sku,title,kind\n1,red hat,a\n2,NA,b, \n3,,a\n",
    "byte order mark": b"\xef\xbb\xbf" + PLAIN,
    "lines that end in CR": PLAIN.replace(b"\n", b"\r"),
    "lines that end in CR LF": PLAIN.replace(b"\n", b"\r\n"),
    "lines that end in all ways": b"sku,title,kind\r1,red hat,a\r\n2,NA,b\n3,,a",
    "blank lines": b"\n\nsku,title,kind\n\n1,red hat,a\n  \n2,NA,b\n\n3,,a\n\n",
    "quotes": b'"sku","title","kind"\n"1","red hat","a"\n"2","NA","b"\n"3","","a"\n',
    "columns without a name": b",sku,title,kind,,x\n0,1,red hat,a,,\n1,2,NA,b,,y\n2,3,,a,,\n",
    "an index": b"Unnamed: 0,sku,title,kind\n0,1,red hat,a\n1,2,NA,b\n2,3,,a\n",
}


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in SAME.items()])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
@pytest.mark.tried("table", ends="the same rows as the plain table")
def test_csv_that_reads_as_the_plain_one(content: bytes, suffix: str, tmp_path: Path) -> None:
    same_as_plain(read(tmp_path / f"t{suffix}", content.replace(b",", b"\t") if suffix == ".tsv" else content))


@pytest.mark.tried("table", ends="the same rows as the plain table")
def test_cells_are_the_text_they_are(tmp_path: Path) -> None:
    cells = [
        "2020-01-01",
        "1.0",
        "007",
        "1e5",
        "true",
        "null",
        "None",
        "NaN",
        'two\nlines, and a "quote"',
        " a ",
        "x" * 10**6,
    ]
    rows = "".join('"' + cell.replace('"', '""') + f'",{number}\n' for number, cell in enumerate(cells))
    table = read(tmp_path / "t.csv", ("title,sku\n" + rows).encode(), Columns(None, "title", (), ("title", "sku")))
    assert table.texts() == cells
    assert table.key_columns().to_pydict() == {"title": cells, "sku": [str(n) for n in range(len(cells))]}


REFUSED_CSV = {
    "a row with more cells": (b"sku,title,kind\n1,a,b\n2,a,b,c\n", "row 2: has 4 cells, but there are 3 columns"),
    "all rows with more cells": (b"title,kind\n1,a,b\n2,a,b\n", "row 1: has 3 cells, but there are 2 columns"),
    "a row with fewer cells": (b"sku,title,kind\n1,a,b\n\n2,a\n", "row 2: has 2 cells, but there are 3 columns"),
    "a quote that is not closed": (b'sku,title,kind\n1,a,b\n2,"a,b\n3,c,d\n', "row 2: cannot be read as CSV"),
    "a quote inside quotes": (b'sku,title,kind\n1,a,b\n2,"a"c,b\n', "row 2: cannot be read as CSV"),
    "a quote in the header": (b'"sku,title,kind\n1,a,b\n', "the row of column names cannot be read"),
    "semicolons": (b"sku;title;kind\n1;a;b\n", "'sku;title;kind', whose name holds ';': save it with commas"),
    "semicolons, decimal commas": (b"sku;title;kind\n1,5;a;b\n", "save it with commas between the cells"),
    "tabs": (b"sku\ttitle\tkind\n1\ta\tb\n", "holds tabs: save it with commas between the cells, or name it .tsv"),
    "NUL": (b"sku,title,kind\n1,a\0,b\n", "line 2: holds NUL characters"),
    "UTF-16": (PLAIN.decode().encode("utf-16"), "line 1: holds NUL characters, as UTF-16 does; save it as UTF-8"),
    "Latin-1": (PLAIN + b"4,h\xe4t,a\n", "row 4, column 'title': is not UTF-8 .*; save it as UTF-8"),
    "Latin-1 in the header": (b"sku,title,kind,gr\xf6sse\n1,a,b,c\n", "the name of a column is not UTF-8"),
    "a column twice": (b"sku,title,kind,title\n1,a,b,c\n", "column 'title' is there 2 times"),
    "no rows": (b"sku,title,kind\n\n", "the table has no rows"),
    "blank lines alone": (b"\n\n\n", "has no column names"),
    "commas alone": (b",,,\n,,,\n", "has no column names"),
}


@pytest.mark.parametrize(("content", "message"), [pytest.param(*case, id=name) for name, case in REFUSED_CSV.items()])
@pytest.mark.tried("table", ends="one line with file and row")
def test_csv_that_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"t.csv(, |: ).*{message}") as refused:
        read(tmp_path / "t.csv", content)
    assert "\n" not in str(refused.value)


SAME_JSON = {
    "one object a line": '{"sku": "1", "title": "red hat", "kind": "a"}\n\n{"sku": "2", "title": "NA", "kind": "b"}\n'
    '{"sku": "3", "kind": "a", "more": [[]]}',
    "an array": json.dumps(
        [
            {"sku": "1", "title": "red hat", "kind": "a"},
            {"kind": "b", "title": "NA", "sku": "2"},
            {"sku": "3", "title": None, "kind": "a"},
        ],
        indent=2,
    ),
    "a byte order mark, CR LF, NaN": '\ufeff{"sku": "1", "title": "red hat", "kind": "a", "x": 1}\r\n'
    '{"sku": "2", "title": "NA", "kind": "b", "x": NaN}\r\n{"sku": "3", "title": NaN, "kind": "a", "x": -Infinity}\r\n',
    "escapes": '{"sku": "1", "title": "\\u0072ed hat", "kind": "a"}\n{"sku": "2", "title": "NA", "kind": "b"}\n'
    '{"sku": "3", "title": "", "kind": "\\u0061"}',
    "other columns of several shapes": '{"sku": "1", "title": "red hat", "kind": "a", "x": {"y": 1}, "z": []}\n'
    '{"sku": "2", "title": "NA", "kind": "b", "x": {"y": "s"}, "z": 1}\n{"sku": "3", "kind": "a", "x": 4, "w": {}}',
}


@pytest.mark.parametrize("content", [pytest.param(content, id=name) for name, content in SAME_JSON.items()])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.tried("table", ends="the same rows as the plain table")
def test_json_that_reads_as_the_plain_one(content: str, suffix: str, tmp_path: Path) -> None:
    same_as_plain(read(tmp_path / f"t{suffix}", content.encode()))


JSON_VALUES = {
    "dates": ["2020-01-01", "2021-05-05T10:00:00Z", None],
    "numbers as text": ["007", "1.0", "1e5"],
    "whole numbers": [1, None, 2**53 + 1],
    "negative whole numbers": [-1, 0, None],
    "numbers over 63 bits": [2**64 - 1, 0, None],
    "numbers": [1.5, None, 2.0],
    "true or false": [True, False, None],
    "nothing": [None, None, None],
}


@pytest.mark.parametrize("values", [pytest.param(values, id=name) for name, values in JSON_VALUES.items()])
@pytest.mark.tried("table", ends="keys as they went in, type included")
def test_keys_of_json_keep_value_and_type(values: list[Any], tmp_path: Path) -> None:
    lines = [json.dumps({"sku": value, "title": "a"}) for value in values]
    table = read(tmp_path / "t.jsonl", "\n".join(lines).encode(), Columns(None, "title", (), ("sku",)))
    kept = table.key_columns()["sku"].to_pylist()
    assert kept == values == [table.keys(i)["sku"] for i in range(3)]
    assert [type(value) for value in kept] == [type(value) for value in values]


MIXED = {
    "number and text": (['"1"', "1", "null"], ["1", "1", None], "text and whole numbers"),
    "truth and number": (["true", "1", "1.5"], ["True", "1", "1.5"], "numbers and true or false and whole numbers"),
    "numbers past 64 bits": (["1", str(2**70), "null"], ["1", str(2**70), None], "beyond 64 bits"),
    "large number and fraction": ([str(2**60 + 1), "1.5", "2"], [str(2**60 + 1), "1.5", "2"], "whole numbers"),
}


@pytest.mark.parametrize(("written", "texts", "held"), [pytest.param(*case, id=name) for name, case in MIXED.items()])
@pytest.mark.tried("table", ends="text and labels are read; as a key refused in one line")
def test_json_column_of_several_types(written: list[str], texts: list[str], held: str, tmp_path: Path) -> None:
    content = "\n".join(f'{{"x": {value}}}' for value in written).encode()
    table = read(tmp_path / "t.jsonl", content, Columns(None, "x", ("x",)))
    assert table.texts() == table.labels("x") == texts
    with pytest.raises(InputError, match=f"t.jsonl: key column 'x' holds .*{held}.*; write all of it as text"):
        read_table(tmp_path / "t.jsonl", Columns(None, "x", (), ("x",)))


REFUSED_JSON = {
    "Latin-1": (b'{"title": "a"}\n{"title": "h\xe4t"}\n', "row 2, column 'title': is not UTF-8"),
    "a name in Latin-1": (b'{"title": "a", "gr\xf6sse": 1}\n', "the name of a column is not UTF-8"),
    "UTF-16": ('{"title": "a"}\n'.encode("utf-16"), "line 1: holds NUL characters, as UTF-16 does"),
    "a lone surrogate": (b'{"title": "a"}\n\n{"title": "\\ud83d"}\n', "row 2, column 'title': is not UTF-8"),
    "50,000 lists in each other": (b'{"title": "a", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "row 1: is nested"),
    "50,000 objects in each other": (
        b'{"title": "a"}\n' + b'{"x": ' * 50_000 + b"1" + b"}" * 50_000,
        "row 2: is nested too deeply",
    ),
    "an array of 50,000 arrays": (b"[" * 50_000 + b"]" * 50_000, "row 1: is nested too deeply"),
    "a list": (b'{"title": "a"}\n[1]\n', "row 2: is list, not an object"),
    "a text": (b'{"title": "a"}\n"b"\n', "row 2: is str, not an object"),
    "an array of numbers": (b'[{"title": "a"}, 2]', "row 2: is int, not an object"),
    "a name twice": (b'{"title": "a", "title": "b"}\n', "row 1: cannot be read as JSON .'title' is there twice"),
    "cut off": (b'{"title": "a"}\n{"title":', "row 2: cannot be read as JSON"),
    "one object on several lines": (b'{\n"title": "a"\n}\n', "row 1: .*; write one object a line"),
    "two objects on a line": (b'{"title": "a"} {"title": "b"}\n', "row 1: cannot be read as JSON"),
    "a number of 5,000 digits": (b'{"title": "a", "x": ' + b"9" * 5_000 + b"}\n", "row 1: cannot be read as JSON"),
    "blank lines": (b"\n \n", "the table has no rows"),
    "an empty array": (b"[]", "the table has no rows"),
    "lists as text": (b'{"title": ["a"]}\n{"title": "b"}\n', "column 'title' holds list"),
    "objects as text": (b'{"title": {"a": 1}}\n', "column 'title' holds struct"),
}


@pytest.mark.parametrize(("content", "message"), [pytest.param(*case, id=name) for name, case in REFUSED_JSON.items()])
@pytest.mark.tried("table", ends="one line with file and row")
def test_json_that_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"t.jsonl(, |: ).*{message}") as refused:
        read(tmp_path / "t.jsonl", content, Columns(None, "title"))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"file_name": "a.png", "text": "h\xe4t"}', "row 1, column 'text': is not UTF-8"),
        (b'{"file_name": "a.png", "x": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "row 1: is nested too deeply"),
        (b'{"file_name": null}', "row 1, column 'file_name': picture 'None' does not exist"),
    ],
    ids=["Latin-1", "deep", "null"],
)
@pytest.mark.tried("table", ends="one line with file and row")
def test_metadata_that_is_refused(content: bytes, message: str, picture: Callable[..., Path], tmp_path: Path) -> None:
    picture("f/cat/a.png")
    (tmp_path / "f/cat/metadata.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=f"metadata.jsonl, {message}"):
        read_table(tmp_path / "f")


MOMENT = dt.datetime(2020, 1, 31, 10, 30)
PARQUET_KEYS: dict[str, tuple[pa.Array, list[str | None]]] = {
    **{
        str(kind): (pa.array([None, 2, 3], kind), [None, "2", "3"])
        for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())
    },
    "largest uint64": (pa.array([2**64 - 1, 2, 3], pa.uint64()), ["18446744073709551615", "2", "3"]),
    "float16": (pa.array([1.5, None, 2.0], pa.float16()), ["1.5", None, "2"]),
    "float32": (pa.array([0.1, None, 2.0], pa.float32()), ["0.1", None, "2"]),
    "float64": (pa.array([0.1, float("inf"), None]), ["0.1", "inf", None]),
    "bool": (pa.array([True, False, None]), ["True", "False", None]),
    "string": (pa.array(["2020-01-01", None, "1.0"]), ["2020-01-01", None, "1.0"]),
    "large string": (pa.array(["a", None, "b"], pa.large_string()), ["a", None, "b"]),
    "dictionary": (
        pa.array(["a", None, "b"]).dictionary_encode().cast(pa.dictionary(pa.int8(), pa.string())),
        ["a", None, "b"],
    ),
    "decimal": (pa.array([Decimal("1.20"), None, Decimal("3.00")]), ["1.20", None, "3.00"]),
    "date": (pa.array([dt.date(2020, 1, 31), None, None]), ["2020-01-31", None, None]),
    "time": (pa.array([dt.time(10, 30), None, None]), ["10:30:00", None, None]),
    "timestamp": (pa.array([MOMENT, None, None], pa.timestamp("us")), ["2020-01-31 10:30:00", None, None]),
    "timestamp in a zone": (
        pa.array([MOMENT, None, None], pa.timestamp("ms", "UTC")),
        ["2020-01-31 10:30:00+00:00", None, None],
    ),
    "timestamp of the year 20,000": (
        pa.array([568_971_820_800_000, None, None], pa.timestamp("ms")),
        ["20000-01-01 00:00:00.000", None, None],
    ),
    "nulls": (pa.nulls(3), [None, None, None]),
}


@pytest.mark.parametrize(("column", "texts"), [pytest.param(*case, id=name) for name, case in PARQUET_KEYS.items()])
@pytest.mark.tried("table", ends="keys as they went in, type included")
def test_keys_of_parquet_keep_value_and_type(column: pa.Array, texts: list[str | None], tmp_path: Path) -> None:
    pq.write_table(pa.table({"sku": column, "title": ["a", "b", "c"]}), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", Columns(None, "title", ("sku",), ("sku", "sku")))
    kept = table.select([2, 0, 1]).key_columns()
    assert kept["sku"].type == column.type and kept["sku"].combine_chunks().equals(column.take(pa.array([2, 0, 1])))
    assert all(len(table.keys(row)) == 1 for row in range(3))
    assert table.labels("sku") == read_table(tmp_path / "t.parquet", Columns(None, "sku")).texts() == texts


@pytest.mark.parametrize("kind", [pa.binary(), pa.binary(1), pa.binary_view(), pa.string_view()], ids=str)
@pytest.mark.tried("table", ends="keys as they went in")
def test_bytes_and_views_are_keys(kind: pa.DataType, tmp_path: Path) -> None:
    column = pa.array(["x", None], kind) if kind == pa.string_view() else pa.array([b"\xff", None], kind)
    pq.write_table(pa.table({"sku": column, "title": ["a", "b"]}), tmp_path / "t.parquet")
    table = read_table(tmp_path / "t.parquet", Columns(None, "title", (), ("sku",)))
    assert table.select([1, 0]).key_columns()["sku"].to_pylist() == column.to_pylist()[::-1]


def _bad_text() -> pa.Array:
    offsets = pa.array([0, 1, 2], pa.int32()).buffers()[1]
    return pa.Array.from_buffers(pa.string(), 2, [None, offsets, pa.py_buffer(b"a\xe4")])


REFUSED_PARQUET = {
    "keys in lists": (pa.table({"title": ["a", "b"], "sku": [[1], [2]]}), "key column 'sku' holds list"),
    "keys in objects": (pa.table({"title": ["a", "b"], "sku": [{"x": 1}, None]}), "key column 'sku' holds struct"),
    "bytes for text": (pa.table({"title": [b"a", b"b"], "sku": [1, 2]}), "column 'title' holds binary, not text"),
    "text that is not UTF-8": (
        pa.table({"title": _bad_text(), "sku": [1, 2]}),
        "row 2, column 'title': is not UTF-8",
    ),
    "a column twice": (pa.table([["a"], [1], [2]], names=["title", "sku", "sku"]), "column 'sku' is there 2 times"),
    "no rows": (pa.table({"title": pa.array([], pa.string()), "sku": pa.array([], pa.int8())}), "has no rows"),
}


@pytest.mark.parametrize(("table", "message"), [pytest.param(*case, id=name) for name, case in REFUSED_PARQUET.items()])
@pytest.mark.tried("table", ends="one line with file and column")
def test_parquet_that_is_refused(table: pa.Table, message: str, tmp_path: Path) -> None:
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match=f"t.parquet(, |: ).*{message}"):
        read_table(tmp_path / "t.parquet", Columns(None, "title", (), ("sku",)))


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.tried("table", ends="the content that is there now")
def test_table_rewritten_within_the_same_time(suffix: str, tmp_path: Path) -> None:
    path, texts = tmp_path / f"t{suffix}", []
    for word in ("old", "new"):
        if suffix == ".parquet":
            pq.write_table(pa.table({"title": [word]}), path)
        else:
            path.write_text(json.dumps({"title": word}) if suffix == ".jsonl" else f"title\n{word}\n")
        os.utime(path, ns=(10**18, 10**18))
        texts += read_table(path, Columns(None, "title")).texts()
    assert texts == ["old", "new"]


def test_large_parquet_is_mapped_from_a_temporary_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(files, "IN_MEMORY", 0)
    monkeypatch.setattr(files.tempfile, "tempdir", str(folder))
    for name in ("0.parquet", "1.parquet"):
        pq.write_table(
            pa.table({"title": [f"a {name}", "b"] * 50, "sku": range(100)}), tmp_path / name, row_group_size=7
        )
    before = pa.total_allocated_bytes()
    table = read_table(tmp_path / "*.parquet", Columns(None, "title", (), ("sku",)))
    assert pa.total_allocated_bytes() - before < 1000 and list(folder.iterdir()) == []
    assert len(table) == 200 and table.text(102) == "a 1.parquet" and table.keys(199) == {"sku": 99}


@pytest.mark.tried("table", ends="one line that names the folder")
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "IN_MEMORY", 0)
    monkeypatch.setattr(pa.ipc, "new_stream", full)
    pq.write_table(pa.table({"title": ["a"]}), tmp_path / "t.parquet")
    with pytest.raises(InputError, match=r"t.parquet: the disk is full at .*; free space or set TMPDIR"):
        read_table(tmp_path / "t.parquet", Columns(None, "title"))


@pytest.mark.tried("table", ends="counted as any table")
def test_labels_that_differ_in_blanks_case_or_form(tmp_path: Path) -> None:
    names = [" a", "a ", "A", "é", "e\u0301", "", "  ", "\u200b", "🎩", "x" * 10**6]
    content = "\n".join(json.dumps({"title": "a", "kind": name}) for name in names).encode()
    table = read(tmp_path / "t.jsonl", content, Columns(None, "title", ("kind",)))
    expected = ["a", "a", "A", "é", "e\u0301", None, None, "\u200b", "🎩", "x" * 10**6]
    assert table.labels("kind") == expected
    assert describe(table).classes["kind"] == {name: expected.count(name) for name in expected if name is not None}
