"""Pictures from a stranger: what is decoded, how much, and from where."""

from __future__ import annotations

import contextlib
import io
import os
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image, ImageFile, PngImagePlugin

from cmaclip_fast import InputError
from cmaclip_fast.data import Columns, read_table
from cmaclip_fast.data.images import FORMATS, ImageProblem, read_image, verify_image

from .conftest import at_most

SIDE = 13_000


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, rows: int | None = None) -> bytes:
    """A picture of one grey value whose file is small and whose pixels are many."""
    body = zlib.compress(b"\0" * ((width + 1) * (height if rows is None else rows)), 9)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


def saved(kind: str, size: tuple[int, int] = (32, 32), mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def icon(body: bytes) -> bytes:
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 0, 0, 0, 0, 1, 32, len(body), 22) + body


def icns(body: bytes) -> bytes:
    part = b"ic10" + struct.pack(">I", len(body) + 8) + body
    return b"icns" + struct.pack(">I", len(part) + 8) + part


def jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    content = bytearray(saved("JPEG"))
    place = content.index(b"\xff\xc0") + 5
    content[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(content)


def bmp(width: int, height: int) -> bytes:
    content = bytearray(saved("BMP"))
    content[18:26] = struct.pack("<Ii", width, height)
    return bytes(content)


def gif(canvas: int, frame: int) -> bytes:
    content = bytearray(saved("GIF", mode="L"))
    content[6:10] = struct.pack("<HH", canvas, canvas)
    place = content.index(b",\0\0\0\0")
    content[place + 5 : place + 9] = struct.pack("<HH", frame, frame)
    return bytes(content)


def tiff(width: int, height: int, tile: int | None = None) -> bytes:
    """A TIFF of deflated grey: one strip, or one tile."""
    body = zlib.compress(b"\0" * 1000)
    entries = [(256, width), (257, height), (258, 8), (259, 8), (262, 1), (277, 1)]
    place = 8
    entries += (
        [(273, place), (278, height), (279, len(body))]
        if tile is None
        else [(322, tile), (323, tile), (324, place), (325, len(body))]
    )
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", t, 4, 1, v) for t, v in entries)
    return b"II*\0" + struct.pack("<I", place + len(body)) + body + directory + struct.pack("<I", 0)


def avif(size: tuple[int, int]) -> bytes:
    content = bytearray(saved("AVIF"))
    place = content.index(b"ispe") + 8
    content[place : place + 8] = struct.pack(">II", *size)
    return bytes(content)


def webp(side: int) -> bytes:
    """An animated WebP whose canvas is larger than its frames."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    buffer = io.BytesIO()
    frames[0].save(buffer, "WEBP", save_all=True, append_images=frames[1:])
    content = bytearray(buffer.getvalue())
    place = content.index(b"VP8X") + 12
    content[place : place + 6] = struct.pack("<I", side - 1)[:3] * 2
    return bytes(content)


BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG": lambda: png(SIDE, SIDE),
    "PNG in an icon": lambda: icon(png(SIDE, SIDE)),
    "PNG in an Apple icon": lambda: icns(png(SIDE, SIDE)),
    "icon in an icon": lambda: icon(icon(png(SIDE, SIDE))),
    "PNG of 2**31 - 1 squared": lambda: png(2**31 - 1, 2**31 - 1, rows=0),
    "JPEG of 65,500 squared": lambda: jpeg(65_500, 65_500),
    "BMP": lambda: bmp(60_000, 60_000),
    "BMP from the top": lambda: bmp(60_000, -60_000),
    "GIF's canvas": lambda: gif(60_000, 32),
    "GIF's frame": lambda: gif(32, 60_000),
    "TIFF": lambda: tiff(60_000, 60_000),
    "TIFF's tile": lambda: tiff(16, 16, tile=60_000),
    "TIFF's tile, 2**31 wide": lambda: tiff(16, 16, tile=2**31),
    "animated WebP": lambda: webp(16_000),
}
Image.init()
if "AVIF" in Image.SAVE:
    BOMBS["AVIF"] = lambda: avif((60_000, 60_000))


def problem_of(source: bytes | Path, seconds: float = 2.0) -> ImageProblem:
    """The picture is refused, soon, without much memory; by both ways of reading."""
    with at_most(100, seconds):
        with pytest.raises(ImageProblem):
            verify_image(source)
        with pytest.raises(ImageProblem) as caught:
            read_image(source)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.tried("picture", ends="refused before it is decoded")
@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("way", ["bytes", "file"])
def test_a_picture_of_too_many_pixels(bomb: str, way: str, tmp_path: Path) -> None:
    content = BOMBS[bomb]()
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    problem_of(content if way == "bytes" else path)


@pytest.mark.tried("picture", ends="refused before it is decoded")
@pytest.mark.parametrize("part", ["text", "profile"])
def test_a_small_png_with_a_large_part(part: str) -> None:
    body = zlib.compress(b"a" * 200_000_000, 9)
    more = chunk(b"zTXt", b"key\0\0" + body) if part == "text" else chunk(b"iCCP", b"name\0\0" + body)
    with at_most(150, 2.0), contextlib.suppress(ImageProblem):
        read_image(png(32, 32, more))
    assert PngImagePlugin.MAX_TEXT_MEMORY < 200_000_000 and not ImageFile.LOAD_TRUNCATED_IMAGES


OTHERS: dict[str, bytes] = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n0 0 32 32 rectfill\nshowpage\n%%EOF\n",
    "EPS with a preview": struct.pack("<I7I", 0xC6D3D0C5, 32, 60, 0, 0, 0, 0, 0)
    + b"%!PS-Adobe-3.0 EPSF-3.0\n"
    + b" " * 60,
    "PDF": b"%PDF-1.4\n",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='9' height='9'/>",
    "WMF": b"\xd7\xcd\xc6\x9a\x00\x00" + b"\0" * 60,
    "icon": saved("ICO"),
    "Apple icon": saved("ICNS", (128, 128)),
    "PCX": saved("PCX"),
    "PPM": saved("PPM"),
    "TGA": saved("TGA"),
    "JPEG 2000": b"\xff\x4f\xff\x51" + b"\0" * 60,
    "FITS": b"SIMPLE  =                    T" + b" " * 50,
    "XBM": b"#define a_width 9\n#define a_height 9\nstatic char a_bits[] = {\n0 };",
    "nothing": b"",
    "text": b"a picture",
}


@pytest.mark.tried("picture", ends="refused, no program is started")
@pytest.mark.parametrize("kind", OTHERS)
def test_formats_that_are_not_decoded(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*_: object, **__: object) -> None:
        raise AssertionError("a program is started")

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(os, "system", start)
    path = tmp_path / "picture.png"
    path.write_bytes(OTHERS[kind])
    assert "not a picture of PNG" in str(problem_of(path))
    assert problem_of(OTHERS[kind]).kind == "unreadable_image"


@pytest.mark.parametrize("kind", FORMATS)
def test_formats_that_are_decoded_whatever_the_name(kind: str, tmp_path: Path) -> None:
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip("this Pillow is built without it")
    path = tmp_path / "picture.eps"
    path.write_bytes(saved(kind))
    verify_image(path)
    assert read_image(path).size == (32, 32)


@pytest.mark.tried("picture", ends="refused at once")
@pytest.mark.parametrize("what", ["pipe", "socket", "device", "link to a device", "folder", "loop of links", "huge"])
def test_a_file_that_is_no_regular_one(what: str, tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    listener = socket.socket(socket.AF_UNIX)
    if what == "pipe":
        os.mkfifo(path)
    elif what == "socket":
        listener.bind(str(path))
    elif what == "device":
        path = Path("/dev/zero")
    elif what == "link to a device":
        path.symlink_to("/dev/random")
    elif what == "folder":
        path.mkdir()
    elif what == "loop of links":
        path.symlink_to(path)
    else:
        with path.open("wb") as file:
            file.truncate(2**30)
    problem_of(path)
    listener.close()


def test_large_pictures_are_decoded_one_at_a_time() -> None:
    from cmaclip_fast.data import images

    content = saved("PNG", (5000, 4000), "L")
    running, most = [], []

    def decode() -> None:
        with images._opened(content, 10**9):
            running.append(1)
            most.append(len(running))
            time.sleep(0.02)
            running.pop()

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    (tmp_path / "secret.png").write_bytes(saved("PNG"))
    (tmp_path / "shop" / "pictures").mkdir(parents=True)
    (tmp_path / "shop" / "pictures" / "1.png").write_bytes(saved("PNG"))
    return tmp_path / "shop"


@pytest.mark.tried("table", ends="one line, exit 2")
@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize(
    "path", ["../secret.png", "pictures/../../secret.png", "./../secret.png", "~nobody/../../x.png"]
)
def test_a_path_that_leads_out_of_the_folder(path: str, named: bool, shop: Path) -> None:
    (shop / "table.csv").write_text(f"image,text\n{path},a\n")
    table = read_table(shop / "table.csv", Columns("image", "text"), image_dir=shop if named else None)
    assert table.has_image(0) and table.image_problem(0) is not None
    with pytest.raises(InputError, match=r"row 1, column 'image'"):
        table.image(0)


def test_absolute_paths_need_no_folder(shop: Path) -> None:
    (shop / "table.csv").write_text(f"image,text\n{shop.parent / 'secret.png'},a\n{shop / 'pictures' / '1.png'},b\n")
    table = read_table(shop / "table.csv", Columns("image", "text"))
    assert table.image_problem(0) is None and table.image_problem(1) is None
    table = read_table(shop / "table.csv", Columns("image", "text"), image_dir=shop)
    problem = table.image_problem(0)
    assert problem is not None and "leads out of" in str(problem)
    assert table.image_problem(1) is None
    (shop / "table.csv").write_text("image,text\npictures/../pictures/1.png,a\n")
    assert read_table(shop / "table.csv", Columns("image", "text")).image_problem(0) is None


def test_a_folder_of_pictures_takes_known_formats_alone(shop: Path) -> None:
    (shop / "pictures" / "2.eps").write_bytes(OTHERS["EPS"])
    (shop / "pictures" / "3.ico").write_bytes(OTHERS["icon"])
    (shop / "pictures" / "loop").symlink_to(shop)
    assert [Path(str(read_table(shop).keys(i)["image"])).name for i in range(len(read_table(shop)))] == ["1.png"]
