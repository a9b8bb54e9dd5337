"""Requests that are wrong, hostile or too large: each gets an error as JSON, and the service goes on."""

from __future__ import annotations

import base64
import io
import json
import logging
import socket
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cmaclip_fast.serving.settings import Limits
from tests.serving.conftest import PICTURES, Running, Start, as_file

TOKEN = "correct-horse-battery-staple"


def b64(content: bytes | None) -> str:
    return base64.b64encode(content or b"").decode()


def png_of(width: int, height: int) -> bytes:
    """A few bytes that say they hold so many pixels."""

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes((width // 8 + 1) * 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


WHOLE = as_file(Image.new("RGB", (64, 64), "red"), "JPEG") or b""

UNUSABLE = {
    "no picture": (b"hello", "unreadable_image"),
    "a truncated picture": (WHOLE[: len(WHOLE) // 2], "unreadable_image"),
    "a bomb": (png_of(30_000, 30_000), "oversized_image"),
    "an SVG": (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "unreadable_image"),
    "a PostScript program": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unreadable_image"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("kind", ["json", "form"])
@pytest.mark.tried("request", ends="status 422 that names the row")
def test_a_picture_that_cannot_be_used_is_named(served: Running, name: str, kind: str) -> None:
    content, code = UNUSABLE[name]
    if kind == "json":
        response = served.client.post("/predict", json={"rows": [{"text": "fine"}, {"image": b64(content)}]})
    else:
        files = [("image", b""), ("text", (None, "fine")), ("image", content), ("text", (None, ""))]
        response = served.client.post("/predict", files=files)  # type: ignore[arg-type]
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["row"]) == (422, code, 1)
    assert error["message"].startswith("row 1: the picture ")


def test_a_picture_over_the_limit_of_pixels_is_refused(start: Start) -> None:
    running = start(limits=Limits(pixels=1000))
    response = running.client.post("/predict", files={"image": PICTURES[0]})
    assert response.status_code == 422 and "over the bound of 1,000" in response.json()["error"]["message"]


PATHS = ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/a.png", "../../a.png", "C:\\a.png"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.tried("request", ends="status 422, nothing opened")
def test_no_path_or_address_is_opened(served: Running, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(*arguments: object, **more: object) -> None:
        raise AssertionError("a path was opened")

    monkeypatch.setattr("cmaclip_fast.data.images.open_regular", opened)
    for response in (
        served.client.post("/predict", json={"rows": [{"image": path}]}),
        served.client.post("/predict", files=[("image", (None, path))]),
    ):
        assert response.status_code == 422 and response.json()["error"]["code"] in ("bad_image", "unreadable_image")
    table = f"file,title\n{path},red\n".encode()
    (row,) = served.client.post("/predict-table", files={"table": ("t.csv", table)}).json()["rows"]
    assert row["predictions"] is None and "was not uploaded" in row["error"]


NESTED = b'{"rows":' + b"[" * 100_000
WRONG: dict[str, tuple[dict[str, Any], int, str]] = {
    "no JSON": ({"content": b"{", "headers": {"content-type": "application/json"}}, 400, "bad_json"),
    "deep JSON": ({"content": NESTED, "headers": {"content-type": "application/json"}}, 400, "bad_json"),
    "invalid UTF-8": (
        {"content": b'{"rows":[{"text":"\xff"}]}', "headers": {"content-type": "application/json"}},
        400,
        "bad_json",
    ),
    "half a surrogate pair": (
        {"content": b'{"rows":[{"text":"\\ud800"}]}', "headers": {"content-type": "application/json"}},
        400,
        "bad_json",
    ),
    "a list": ({"json": []}, 400, "bad_json"),
    "no rows": ({"json": {"rows": []}}, 400, "bad_json"),
    "another field": ({"json": {"rows": [{"text": "a", "url": "http://a"}]}}, 400, "bad_json"),
    "a number for a text": ({"json": {"rows": [{"text": 3}]}}, 400, "bad_json"),
    "a list for an image": ({"json": {"rows": [{"image": [1]}]}}, 400, "bad_json"),
    "too many rows": ({"json": {"rows": [{"text": "a"}] * 65}}, 422, "too_many_rows"),
    "a million empty rows": (
        {"content": b'{"rows":[' + b"{}," * 1_000_000 + b"{}]}", "headers": {"content-type": "application/json"}},
        422,
        "too_many_rows",
    ),
    "an empty row": ({"json": {"rows": [{"text": "a"}, {}]}}, 422, "empty_row"),
    "blanks": ({"json": {"rows": [{"text": " \n"}]}}, 422, "empty_row"),
    "a long text": ({"json": {"rows": [{"text": "a" * 10_001}]}}, 422, "long_text"),
    "no base64": ({"json": {"rows": [{"image": "?"}]}}, 422, "bad_image"),
    "text": ({"content": b"hello", "headers": {"content-type": "text/plain"}}, 415, "content_type"),
    "a form in an address": ({"data": {"text": "a"}}, 415, "content_type"),
    "no type": ({"content": b"{}"}, 415, "content_type"),
    "an empty form": ({"files": [("text", (None, ""))]}, 422, "empty_row"),
    "an unknown field": ({"files": [("url", (None, "http://a"))]}, 400, "bad_form"),
    "a file for a text": ({"files": [("text", ("a.txt", b"a"))]}, 422, "bad_text"),
    "uneven sides": ({"files": [("text", (None, "a"))] * 2 + [("image", b"")]}, 422, "uneven_rows"),
    "too many files": ({"files": [("image", PICTURES[0])] * 65}, 422, "too_many_rows"),
    "a long text in a form": ({"files": [("text", (None, "a" * 50_000))]}, 422, "long_text"),
    "no boundary": ({"content": b"--x", "headers": {"content-type": "multipart/form-data"}}, 400, "bad_form"),
    "a broken form": (
        {"content": b"--x\r\nnonsense", "headers": {"content-type": "multipart/form-data; boundary=x"}},
        400,
        "bad_form",
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.tried("request", ends="one line of JSON, and the next request is answered")
def test_a_wrong_request_gets_one_line_of_json(served: Running, name: str) -> None:
    body, status, code = WRONG[name]
    response = served.client.post("/predict", **body)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code), error
    assert "\n" not in error["message"] and len(error["message"]) <= 500 and "Traceback" not in error["message"]
    assert served.client.post("/predict", json={"rows": [{"text": "a"}]}).status_code == 200


def test_explanations_have_a_limit_of_their_own(served: Running) -> None:
    assert served.client.post("/explain", json={"rows": [{"text": "a"}] * 9}).json()["error"]["code"] == "too_many_rows"


def parquet(columns: list[pa.Array], names: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns, names), buffer)
    return buffer.getvalue()


TABLES: dict[str, tuple[str, bytes, str]] = {
    "another format": ("a.xlsx", b"PK", "give a file named .csv"),
    "no rows": ("a.csv", b"file,title\n", "has no rows"),
    "empty": ("a.csv", b"", "is empty"),
    "other columns": ("a.csv", b"x,y\n1,2\n", "image_column"),
    "ragged": ("a.csv", b"file,title\n1,2,3\n", "row 1"),
    "UTF-16": ("a.csv", "file,title\na,b\n".encode("utf-16"), "UTF-8"),
    "text that is not UTF-8": ("a.parquet", parquet([pa.array([b"\xff"]).view(pa.string())], ["title"]), "UTF8"),
    "a column twice": ("a.parquet", parquet([pa.array(["a"])] * 2, ["title", "title"]), "is there twice"),
    "damaged": ("a.parquet", b"PAR1" + bytes(100) + b"PAR1", "cannot be read"),
    "too many rows": ("a.csv", b"title\n" + b"a\n" * 10_001, "over the limit of 10,000"),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.tried("request", ends="status 422, one line of JSON")
def test_a_table_that_cannot_be_used_is_refused(served: Running, name: str) -> None:
    file, content, said = TABLES[name]
    response = served.client.post("/predict-table", files={"table": (file, content)})
    assert response.status_code == 422 and said in response.json()["error"]["message"]
    assert "cmaclip-" not in response.text  # no path of this machine


@pytest.mark.tried("request", ends="status 413")
def test_values_of_a_table_that_repeat_do_not_fill_memory(start: Start) -> None:
    running = start(limits=Limits(body_bytes=2**20))
    buffer = io.BytesIO()
    column = pa.array(["x" * 500_000]).dictionary_encode()
    pq.write_table(pa.table({"title": pa.DictionaryArray.from_arrays([0] * 5000, column.dictionary)}), buffer)
    response = running.client.post("/predict-table", files={"table": ("a.parquet", buffer.getvalue())})
    assert response.status_code == 413 and response.json()["error"]["code"] == "large_body"


def test_a_table_needs_a_form(served: Running) -> None:
    assert served.client.post("/predict-table", content=b"title\na\n").status_code == 415
    assert served.client.post("/predict-table", files={"other": b"a"}).json()["error"]["code"] == "bad_table"
    found = served.client.post("/predict-table?format=exe", files={"table": ("a.csv", b"title\na\n")})
    assert (found.status_code, found.json()["error"]["code"]) == (422, "bad_parameter")


def talk(port: int, content: bytes, seconds: float = 10.0) -> bytes:
    """What the service says to these bytes until it closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as line:
        line.sendall(content)
        said = b""
        with suppress(ConnectionResetError):  # it was closed before it had read everything
            while part := line.recv(65536):
                said += part
        return said


def head(path: str = "/predict", **fields: object) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
    return "\r\n".join(
        [*lines, *(f"{name.replace('_', '-')}: {value}" for name, value in fields.items()), "", ""]
    ).encode()


def test_a_large_body_within_the_limit_is_taken(served: Running) -> None:
    content = as_file(Image.new("RGB", (2600, 2600), "red"), "BMP") or b""
    assert 20 * 2**20 > len(content) > 19 * 2**20
    assert served.client.post("/predict", files={"image": content}).status_code == 200
    assert served.client.post("/predict", json={"rows": [{"image": b64(content)}]}).status_code == 200


def test_a_body_over_the_limit_is_refused_before_it_is_sent(start: Start) -> None:
    running = start(limits=Limits(body_bytes=1000))
    for length in ("1001", "99999999999999999999"):
        said = talk(running.port, head(Content_Length=length))
        assert said.startswith(b"HTTP/1.1 413 ") and b'"large_body"' in said
    for length in ("-1", "9" * 3000, "0x10"):
        assert talk(running.port, head(Content_Length=length)).startswith(b"HTTP/1.1 400 ")


@pytest.mark.tried("request", ends="status 413")
def test_a_body_without_a_length_is_refused_when_it_passes_the_limit(start: Start) -> None:
    running = start(limits=Limits(body_bytes=1000))
    part = b"1f4\r\n" + b"x" * 500 + b"\r\n"
    assert talk(running.port, head(Transfer_Encoding="chunked") + 3 * part).startswith(b"HTTP/1.1 413 ")


@pytest.mark.tried("request", ends="status 429 with Retry-After")
def test_bodies_together_have_a_limit(start: Start) -> None:
    running = start(limits=Limits(body_bytes=1000, held_bytes=1500))
    with socket.create_connection(("127.0.0.1", running.port)) as slow:
        slow.sendall(head(Content_Length=1000) + b"x" * 999)
        time.sleep(0.3)
        said = talk(running.port, head(Content_Length=600) + b"x" * 600)
        assert said.startswith(b"HTTP/1.1 429 ") and b"retry-after: 1" in said
    time.sleep(0.3)  # what the one held is free again once it has gone
    assert running.client.post("/predict", json={"rows": [{"text": "a" * 500}]}).status_code == 200


@pytest.mark.parametrize("sent", [b"", b"POST /pre", head(Content_Length=100)[:-2]])
@pytest.mark.tried("request", ends="the connection closed, others answered")
def test_a_slow_head_is_given_up(start: Start, sent: bytes) -> None:
    running = start(limits=Limits(body_seconds=0.5))
    began = time.monotonic()
    assert talk(running.port, sent) == b""
    assert time.monotonic() - began < 5
    assert running.client.get("/health").status_code == 200


@pytest.mark.tried("request", ends="status 408")
def test_a_slow_body_is_given_up(start: Start) -> None:
    running = start(limits=Limits(body_seconds=0.5))
    said = talk(running.port, head(Content_Length=100) + b"{")
    assert said.startswith(b"HTTP/1.1 408 ") and b'"slow_body"' in said


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\nabc",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nA: a\0b\r\n\r\n",
    ],
)
@pytest.mark.tried("request", ends="status 400 or 403, others answered")
def test_what_is_no_http_is_refused(served: Running, sent: bytes) -> None:
    assert talk(served.port, sent).split(b"\r\n")[0].split(b" ")[1] in (b"400", b"403")
    assert served.client.get("/health").status_code == 200


@pytest.mark.tried("request", ends="the connection closed, others answered")
def test_a_large_head_is_refused(served: Running) -> None:
    said = talk(served.port, b"GET / HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 2_000_000 + b"\r\n\r\n")
    assert not said or said.startswith(b"HTTP/1.1 400 ")
    assert served.client.get("/health").status_code == 200


@pytest.mark.parametrize(
    "path", ["/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%5c..%5c", "/page/script.js", "/static/", "/docs"]
)
@pytest.mark.tried("request", ends="status 404")
def test_there_are_no_other_paths(served: Running, path: str) -> None:
    said = talk(served.port, f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
    assert said.startswith(b"HTTP/1.1 404 ") and b'"not_found"' in said


def test_another_method_is_refused(served: Running) -> None:
    response = served.client.get("/predict")
    assert response.status_code == 405 and response.headers["allow"] == "POST"
    assert response.json()["error"]["code"] == "method"


def test_a_token_is_asked_for_where_there_is_one(start: Start) -> None:
    running = start(token=TOKEN)
    rows = {"rows": [{"text": "a"}]}
    for header in (None, "", TOKEN, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer \xff"):
        headers = {} if header is None else {"Authorization": header.encode("latin-1")}
        for path in ("/predict", "/explain", "/embed", "/predict-table"):
            response = running.client.post(path, json=rows, headers=headers)
            assert (response.status_code, response.json()["error"]["code"]) == (401, "token")
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/model", "/examples", "/metrics"):
            assert running.client.get(path, headers=headers).status_code == 401
    right = {"Authorization": f"Bearer {TOKEN}"}
    assert running.client.post("/predict", json=rows, headers=right).status_code == 200
    assert running.client.get("/metrics", headers=right).status_code == 200
    for path in ("/", "/health", "/ready", "/openapi.json"):
        assert running.client.get(path).status_code == 200
    assert running.client.get("/openapi.json").json()["security"] == [{"token": []}]


def test_a_body_is_not_read_from_who_has_no_token(start: Start) -> None:
    running = start(token=TOKEN)
    # no byte of the body is sent, and none is waited for
    assert talk(running.port, head(Content_Length=1000)).startswith(b"HTTP/1.1 401 ")


def test_no_secret_and_no_content_is_logged(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    running = start(token=TOKEN)
    with caplog.at_level(logging.DEBUG):
        for token in (TOKEN, "not-the-right-token"):
            headers = {"Authorization": f"Bearer {token}"}
            rows = {"rows": [{"text": "a very private title"}]}
            running.client.post("/predict?key=hidden-in-the-query", json=rows, headers=headers)
    ours = [record for record in caplog.records if record.name.startswith(("cmaclip_fast", "uvicorn"))]
    said = " ".join(record.getMessage() + json.dumps(getattr(record, "fields", {})) for record in ours)
    assert '"route": "/predict"' in said and '"status": 401' in said
    for secret in (TOKEN, "not-the-right-token", "private", "hidden-in-the-query"):
        assert secret not in said
    assert TOKEN not in repr(running.service.settings)


def test_another_name_of_the_service_is_refused_on_loopback(served: Running, start: Start) -> None:
    evil = {"Host": "evil.example"}
    assert served.client.get("/model", headers=evil).json()["error"]["code"] == "host"
    for name in ("localhost", "127.0.0.1:80", "[::1]:8000", "LOCALHOST"):
        assert served.client.get("/health", headers={"Host": name}).status_code == 200
    assert start(hosts=("evil.example",)).client.get("/model", headers=evil).status_code == 200


def test_a_page_of_another_site_is_refused(served: Running, start: Start) -> None:
    rows = {"rows": [{"text": "a"}]}
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{served.port + 1}"):
        response = served.client.post("/predict", json=rows, headers={"Origin": origin})
        assert (response.status_code, response.json()["error"]["code"]) == (403, "origin")
    own = {"Origin": f"http://127.0.0.1:{served.port}"}
    assert served.client.post("/predict", json=rows, headers=own).status_code == 200
    behind = start(hosts=("labels.example",))
    public = {"Origin": "https://labels.example"}
    assert behind.client.post("/predict", json=rows, headers=public).status_code == 200


@pytest.mark.tried("request", ends="status 500 without details")
def test_a_failure_inside_says_nothing_of_the_inside(
    served: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(*arguments: object) -> None:
        raise RuntimeError("secret detail at /home/somebody")

    monkeypatch.setattr(served.service, "answer", fails)
    response = served.client.post("/predict", json={"rows": [{"text": "a"}]})
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal"
    assert "secret" not in response.text and response.headers["x-request-id"] in response.text
    assert "secret detail" in caplog.text


def test_a_name_of_a_file_is_not_used(served: Running, tmp_path: Path) -> None:
    files = [("table", ("../../../x.csv", b"file,title\na.png,red\n")), ("picture", ("../../a.png", PICTURES[0]))]
    (row,) = served.client.post("/predict-table", files=files).json()["rows"]  # type: ignore[arg-type]
    assert row["error"] is None and not list(tmp_path.parent.rglob("x.csv"))
