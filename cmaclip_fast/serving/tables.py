"""Uploaded tables: CSV, TSV, JSONL and Parquet of bounded size, with their predictions as a table again."""

from __future__ import annotations

import asyncio
import io
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq
from fastapi import Request
from starlette.datastructures import UploadFile

from cmaclip_fast.classifier.prediction import flatten, output_schema
from cmaclip_fast.data.files import FORMATS, near, read_files
from cmaclip_fast.data.values import column_texts, is_bytes, storage
from cmaclip_fast.errors import InputError, clipped, listed
from cmaclip_fast.serving.answers import predictions_of
from cmaclip_fast.serving.errors import Refused
from cmaclip_fast.serving.inputs import FORM, content_type, read_form, too_many, unknown_type
from cmaclip_fast.serving.schemas import TableRow, TableRows
from cmaclip_fast.serving.service import Given, Loaded, Service
from cmaclip_fast.serving.settings import Limits

_BATCH = (
    16  # rows of a Parquet file that are decoded at a time, so that a value repeated many times does not fill memory
)
_EXPANDED = 8  # times a body's limit that the values of a table may take


@dataclass
class Upload:
    """The rows of an uploaded table.

    Attributes:
        texts: None where absent.
        names: what the picture column says, where that is text.
        pictures: the bytes of each row's picture; a `Refused` where they are missing.
    """

    texts: list[str | None]
    names: list[str | None]
    pictures: list[bytes | Refused | None]


@dataclass(frozen=True)
class Labelled:
    """A row with its predictions, or with why it has none."""

    text: str | None
    picture: str | None
    said: Mapping[str, Any] | Refused


async def read_upload(request: Request, model: Loaded, limits: Limits) -> Upload:
    """
    Raises:
        Refused: no form, no table, a table that cannot be read, too many rows, or an unknown column.
    """
    kind = content_type(request)
    if kind != FORM:
        raise unknown_type(kind, (FORM,))
    form = await read_form(request, limits.table_rows + 1, 8, 4096)
    try:
        table, given = form.get("table"), form.getlist("picture")
        if not isinstance(table, UploadFile) or not table.filename:
            raise Refused(422, "bad_table", "the form has no file `table`: send it as `curl -F table=@rows.csv` does")
        files = {}
        for file in given:
            if not isinstance(file, UploadFile):
                raise Refused(422, "bad_image", "`picture` is no file: send the pictures that the table names")
            files[_base(file.filename or "")] = await file.read()
        columns = {}
        for side, own in (("image", "image"), ("text", "text")):
            value = form.get(f"{side}_column")
            known = getattr(model.classifier.columns, own, None)
            columns[side] = (value, True) if isinstance(value, str) and value else (known, False)
        content, name = await table.read(), table.filename
    finally:
        await form.close()
    return await asyncio.to_thread(_read, content, name, columns, files, limits)


def _read(
    content: bytes, name: str, columns: dict[str, tuple[str | None, bool]], files: dict[str, bytes], limits: Limits
) -> Upload:
    suffix = Path(name).suffix.lower()
    if suffix not in FORMATS:
        raise Refused(422, "bad_table", f"table '{clipped(name)}': give a file named .csv, .tsv, .jsonl or .parquet")
    try:
        table = _parquet(content, columns, limits) if FORMATS[suffix] == "parquet" else _text(content, suffix, columns)
    except (pa.ArrowException, OSError, MemoryError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise Refused(422, "bad_table", f"the table cannot be read ({reason}): save it anew") from None
    if len(table) > limits.table_rows:
        raise too_many(len(table), limits.table_rows)
    if len(table) == 0:
        raise Refused(422, "bad_table", "the table has no rows: give at least one")
    nothing: list[Any] = [None] * len(table)
    image, text = (column if column in table.column_names else None for column, _ in columns.values())
    texts = nothing if text is None else column_texts(table[text])
    names, pictures = (nothing, nothing) if image is None else _pictures(table[image], files)
    return Upload(texts, names, pictures)


def _wanted(there: list[str], columns: dict[str, tuple[str | None, bool]]) -> list[str]:
    """Those of the two columns that the table has.

    Raises:
        Refused: one that was asked for is not there, or neither is.
    """
    for side, (column, asked) in columns.items():
        if asked and column not in there:
            hint = f"{near(column or '', there)}; columns: {listed(there)}: name another as `{side}_column`"
            raise Refused(422, "bad_table", f"the table has no column '{clipped(column or '')}'{hint}")
    found = [column for column, _ in columns.values() if column is not None and column in there]
    if twice := [column for column in found if there.count(column) > 1]:
        raise Refused(422, "bad_table", f"column '{clipped(twice[0])}' is there twice: rename one")
    if not found:
        raise Refused(
            422,
            "bad_table",
            f"columns {listed(there)}: name those of picture and text as `image_column`, `text_column`",
        )
    return found


def _text(content: bytes, suffix: str, columns: dict[str, tuple[str | None, bool]]) -> pa.Table:
    with tempfile.TemporaryDirectory(prefix="cmaclip-") as folder:
        path = Path(folder) / f"table{suffix}"
        path.write_bytes(content)
        try:
            table = read_files([path]).table
        except InputError as error:
            raise Refused(422, "bad_table", str(error).replace(str(path), "the table")) from None
    return table.select(_wanted(table.column_names, columns))


def _parquet(content: bytes, columns: dict[str, tuple[str | None, bool]], limits: Limits) -> pa.Table:
    most = _EXPANDED * limits.body_bytes
    with pq.ParquetFile(pa.BufferReader(content), thrift_string_size_limit=2**24) as parquet:
        metadata = parquet.metadata
        if metadata.num_rows > limits.table_rows:
            raise too_many(metadata.num_rows, limits.table_rows)
        groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
        held = sum(group.total_byte_size for group in groups)
        wanted = _wanted(parquet.schema_arrow.names, columns)
        batches, read = [], 0
        for batch in parquet.iter_batches(_BATCH, columns=wanted) if held <= most else ():
            batch.validate(full=True)  # a Parquet file may hold any bytes as text
            read += batch.nbytes
            if read > most:
                break
            batches.append(batch)
        if max(held, read) > most:
            raise Refused(413, "large_body", f"the table's values take over {most:,} bytes: send fewer rows at a time")
        table = pa.Table.from_batches(batches, batches[0].schema if batches else None) if batches else None
    return pa.table({name: [] for name in wanted}) if table is None else table


def _pictures(
    column: pa.ChunkedArray, files: dict[str, bytes]
) -> tuple[list[str | None], list[bytes | Refused | None]]:
    """The names and contents of the pictures; a name stands for an uploaded file of that name, in no folder."""
    kind = storage(column.type)
    if is_bytes(kind):
        return [None] * len(column), [bytes(value) if value else None for value in column.to_pylist()]
    if pa.types.is_struct(kind):  # as Hugging Face keeps pictures
        cells = [value or {} for value in column.to_pylist()]
        names = [value.get("path") if isinstance(value.get("path"), str) else None for value in cells]
        held = [value.get("bytes") for value in cells]
        return names, [content if isinstance(content, bytes) and content else None for content in held]
    names = column_texts(column)
    found: list[bytes | Refused | None] = []
    for name in names:
        if name is None or not name.strip():
            found.append(None)
        elif _base(name) in files:
            found.append(files[_base(name)])
        else:
            said = f"picture '{clipped(name)}' was not uploaded: send it as a file `picture`"
            found.append(Refused(422, "missing_picture", said))
    return names, found


def _base(name: str) -> str:
    """The name of a file without folders, of either kind of path."""
    return PureWindowsPath(PurePosixPath(name).name).name


async def label(service: Service, model: Loaded, upload: Upload, left: Callable[[], Awaitable[bool]]) -> list[Labelled]:
    """The predictions of an uploaded table, a few batches in the queue at a time, so that others are served too.

    Args:
        left: whether the client has gone.

    Raises:
        Refused: no answer in time.
    """
    step = service.settings.batch_rows
    found: list[Labelled] = []
    for start in range(0, len(upload.texts), step):
        if await left():
            break
        chosen = slice(start, start + step)
        texts, pictures = upload.texts[chosen], upload.pictures[chosen]
        usable: list[Given] = [
            (picture, text) for text, picture in zip(texts, pictures, strict=True) if not isinstance(picture, Refused)
        ]
        answers = iter(await service.answer_each(model, "predict", usable))
        found += [
            Labelled(text, name, picture if isinstance(picture, Refused) else next(answers))
            for text, name, picture in zip(texts, upload.names[chosen], pictures, strict=True)
        ]
    return found


def as_json(labelled: list[Labelled]) -> str:
    """`TableRows`, as JSON."""
    rows = [
        TableRow(
            row=number,
            text=row.text,
            picture=row.picture,
            predictions=None if isinstance(row.said, Refused) else predictions_of(row.said),
            error=_reason(row.said) if isinstance(row.said, Refused) else None,
        )
        for number, row in enumerate(labelled, 1)
    ]
    return TableRows(rows=rows).model_dump_json()


def as_file(labelled: list[Labelled], model: Loaded, kind: str) -> bytes:
    """A CSV or Parquet file: the row, text and picture, the columns of `cmaclip predict`, and the error of a row.

    CSV, which has no lists, goes without the classes that come after the best.
    """
    keys = pa.schema([("row", pa.int64()), ("text", pa.string()), ("picture", pa.string())])
    taxonomies, multi_label = model.classifier.system.taxonomies, model.classifier.system.multi_label
    schema = output_schema(keys, model.classifier.tasks, taxonomies, multi_label).append(pa.field("error", pa.string()))
    rows = []
    for number, row in enumerate(labelled, 1):
        record: dict[str, Any] = {"row": number, "text": row.text, "picture": row.picture}
        record |= {"error": _reason(row.said)} if isinstance(row.said, Refused) else flatten(dict(row.said), taxonomies)
        rows.append(record)
    table = pa.Table.from_pylist(rows, schema)
    buffer = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, buffer)
    else:
        for task in multi_label:
            place = table.schema.get_field_index(task)
            table = table.set_column(place, task, pc.binary_join(table[task], ", "))
        flat = [field.name for field in table.schema if not pa.types.is_nested(field.type)]
        pyarrow.csv.write_csv(table.select(flat), buffer)
    return buffer.getvalue()


def _reason(refused: Refused) -> str:
    """Without the number of the row, which is one of the batch, not of the table."""
    head, _, rest = refused.message.partition(": ")
    return rest if refused.row is not None and head == f"row {refused.row}" else refused.message
