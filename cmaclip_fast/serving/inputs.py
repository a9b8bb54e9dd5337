"""The rows of a request, from JSON or a form. Nothing that a client names is opened: pictures come as bytes."""

from __future__ import annotations

import asyncio
import base64
import re

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from cmaclip_fast.errors import clipped
from cmaclip_fast.serving.errors import Refused
from cmaclip_fast.serving.schemas import Rows
from cmaclip_fast.serving.service import Given
from cmaclip_fast.serving.settings import Limits
from cmaclip_fast.untrusted import first_problem

JSON, FORM = "application/json", "multipart/form-data"

_DATA_URL = re.compile(r"data:image/[a-z0-9.+-]{1,40};base64,", re.ASCII)


async def read_rows(request: Request, limits: Limits, rows: int) -> list[Given]:
    """
    Args:
        rows: that the request may have.

    Raises:
        Refused: another content type, a malformed body, too many rows, or a picture that is no file.
    """
    kind = content_type(request)
    if kind == JSON:
        # in a thread, as large bodies take long
        return await asyncio.to_thread(_from_json, await request.body(), limits, rows)
    if kind == FORM:
        return await _from_form(request, limits, rows)
    raise unknown_type(kind, (JSON, FORM))


def content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def unknown_type(kind: str, known: tuple[str, ...]) -> Refused:
    said = f"content type '{clipped(kind)}'" if kind else "no content type"
    return Refused(415, "content_type", f"{said}: send {' or '.join(known)}")


async def read_form(request: Request, files: int, fields: int, field_bytes: int) -> FormData:
    """
    Raises:
        Refused: the form is malformed, or has more files or fields.
    """
    # the parser drops a part that was cut off, and its row would go unanswered
    boundary = parse_options_header(request.headers.get("content-type"))[1].get(b"boundary", b"")
    if not boundary or b"--" + boundary + b"--" not in await request.body():
        raise Refused(400, "bad_form", "the form is cut off, or has no boundary: send a form as `curl -F` does")
    try:
        return await request.form(max_files=files, max_fields=fields, max_part_size=field_bytes)
    except HTTPException as error:
        if error.detail.startswith("Too many"):
            raise Refused(422, "too_many_rows", f"{error.detail} Send the rest in another request") from None
        if "exceeded maximum size" in error.detail:
            raise Refused(422, "long_text", f"{error.detail} Shorten the text") from None
        raise Refused(400, "bad_form", f"{error.detail}: send a form as `curl -F` does") from None


def too_many(found: int, most: int) -> Refused:
    return Refused(422, "too_many_rows", f"{found:,} rows, over the limit of {most:,}: send them in several requests")


def _from_json(body: bytes, limits: Limits, rows: int) -> list[Given]:
    # every value but the first of a list or object follows a comma, and takes many times its bytes once it is parsed
    if body.count(b",") > rows * (limits.text_characters + 2):
        raise Refused(422, "too_many_rows", f"more than {rows:,} rows: send them in several requests")
    try:
        found = Rows.model_validate_json(body).rows
    except ValidationError as error:
        raise Refused(400, "bad_json", f'{first_problem(error)}: send {{"rows": [{{"text": "..."}}]}}') from None
    if len(found) > rows:
        raise too_many(len(found), rows)
    return [(_decoded(number, row.image), row.text) for number, row in enumerate(found)]


def _decoded(number: int, image: str | None) -> bytes | None:
    if not image:
        return None
    if found := _DATA_URL.match(image):
        image = image[found.end() :]
    try:
        return base64.b64decode(image, validate=True)
    except ValueError:
        said = f"row {number}: the image is no base64: send the picture's file; paths and addresses are not opened"
        raise Refused(422, "bad_image", said, number) from None


async def _from_form(request: Request, limits: Limits, rows: int) -> list[Given]:
    # a form may send absent images as empty texts, so there may be two fields a row
    form = await read_form(request, rows, 2 * rows, 4 * limits.text_characters + 4)
    try:
        unknown = sorted({name for name, _ in form.multi_items()} - {"image", "text"})
        if unknown:
            raise Refused(400, "bad_form", f"field '{clipped(unknown[0])}' is unknown: send `image` and `text`")
        images = [await _file(number, value) for number, value in enumerate(form.getlist("image"))]
        texts = [_text(number, value) for number, value in enumerate(form.getlist("text"))]
    finally:
        await form.close()
    images = images or [None] * len(texts)
    texts = texts or [None] * len(images)
    if len(images) != len(texts):
        said = f"{len(images)} images but {len(texts)} texts: send one of each for every row, an empty one if absent"
        raise Refused(422, "uneven_rows", said)
    if not images:
        raise Refused(422, "empty_row", "neither image nor text: give at least one")
    if len(images) > rows:
        raise too_many(len(images), rows)
    return list(zip(images, texts, strict=True))


async def _file(number: int, value: UploadFile | str) -> bytes | None:
    if isinstance(value, UploadFile):
        return await value.read() or None
    if not value.strip():
        return None
    said = f"row {number}: the image is no file: send the file itself; paths and addresses are not opened"
    raise Refused(422, "bad_image", said, number)


def _text(number: int, value: UploadFile | str) -> str | None:
    if isinstance(value, UploadFile):
        raise Refused(422, "bad_text", f"row {number}: the text is a file: send it as a field", number)
    return value
