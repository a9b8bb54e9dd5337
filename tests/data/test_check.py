"""Bad pictures and empty rows: raised with their place, or left out, or masked, and counted."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmaclip_fast.data import Columns, Table, check_rows, read_table
from cmaclip_fast.errors import InputError

COLUMNS = Columns("image", "title")


def _noise(path: Path, kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, kind)
    return path.read_bytes()


def _header_only_png(path: Path, side: int) -> None:
    """A PNG of one bit a pixel that has a header and no pixels: who decodes it fails."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


@pytest.fixture
def bad_table(tmp_path: Path, picture: Callable[..., Path], write_csv: Callable[..., Path]) -> Table:
    picture("good.png")
    (tmp_path / "cut.jpg").write_bytes(_noise(tmp_path / "whole.jpg", "JPEG")[:-2000])
    (tmp_path / "text.png").write_text("not a picture")
    _header_only_png(tmp_path / "huge.png", 10_000)
    rows = [["good.png", "a"], ["cut.jpg", "b"], ["text.png", ""], ["huge.png", "d"], ["", ""], ["", "f"]]
    return read_table(write_csv([["image", "title"], *rows]), COLUMNS)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            1,
            r"pairs.csv, row 2, column 'image': picture 'cut.jpg' cannot be read \(.*truncated.*\); replace it",
        ),
        (2, r"pairs.csv, row 3, column 'image': picture 'text.png' cannot be read \(not a picture"),
        (
            3,
            r"row 4, column 'image': picture 'huge.png' has 10000 x 10000 = 100,000,000 pixels.*raise max_image_pixels",
        ),
        (4, r"pairs.csv, row 5, column 'title' and 'image': neither text nor picture; fill one in, or leave"),
    ],
)
def test_error_names_row_column_and_remedy(bad_table: Table, row: int, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        check_rows(bad_table.select([0, row]))
    assert "\n" not in str(caught.value)


def test_reading_one_bad_picture_says_the_same(bad_table: Table) -> None:
    with pytest.raises(InputError, match=r"row 2, column 'image': picture 'cut.jpg' cannot be read"):
        bad_table.image(1)


def test_skip_drops_and_counts(bad_table: Table) -> None:
    table, counts = check_rows(bad_table, "skip")
    assert table.texts() == ["a", "f"]
    assert counts == {"unreadable_image": 2, "oversized_image": 1, "empty_row": 1}


def test_mask_keeps_the_text(bad_table: Table) -> None:
    table, counts = check_rows(bad_table, "mask")
    assert table.texts() == ["a", "b", "d", "f"]
    assert [table.image(i) is None for i in range(4)] == [False, True, True, True]
    assert counts == {"unreadable_image": 2, "oversized_image": 1, "empty_row": 1}
    assert check_rows(table)[1] == {}, "what is left must be clean"


def test_nothing_left(bad_table: Table) -> None:
    with pytest.raises(InputError, match=r"no usable row is left .*empty_row: 1, unreadable_image: 1"):
        check_rows(bad_table.select([2, 4]), "skip")


def test_unknown_policy(bad_table: Table) -> None:
    with pytest.raises(ValueError, match="use one of error, skip, mask"):
        check_rows(bad_table, "ignore")  # type: ignore[arg-type]


def test_progress_and_missing_file(write_csv: Callable[..., Path], picture: Callable[..., Path]) -> None:
    picture("a.png")
    seen: list[tuple[int, int]] = []
    path = write_csv([["image"], *[["a.png"]] * 300])
    check_rows(read_table(path, Columns("image")), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(256, 300), (300, 300)]
    with pytest.raises(
        InputError, match=r"row 1, column 'image': picture 'gone.png' does not exist; fix the path or name"
    ):
        check_rows(read_table(write_csv([["image"], ["gone.png"]], "b.csv"), Columns("image")))


def test_bound_can_be_raised_past_pillows_own(tmp_path: Path, write_csv: Callable[..., Path]) -> None:
    Image.new("1", (15_000, 13_000)).save(tmp_path / "big.png")  # 195 megapixels: Pillow alone refuses over 179
    path = write_csv([["image"], ["big.png"]])
    bound = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InputError, match="195,000,000 pixels, over the bound of 50,000,000"):
            check_rows(read_table(path, Columns("image")))
        assert check_rows(read_table(path, Columns("image"), max_image_pixels=200_000_000))[1] == {}
    assert bound == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize(
    ("mode", "colour", "expected"),
    [
        ("RGBA", (255, 0, 0, 0), (0, 0, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("LA", (9, 0), (0, 0, 255)),
        ("L", 7, (7, 7, 7)),
        ("I;16", 256 * 100, (100, 100, 100)),
        ("1", 1, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_rgb_on_the_background(
    mode: str, colour: object, expected: tuple[int, ...], picture: Callable[..., Path], write_csv: Callable[..., Path]
) -> None:
    picture("a.png", colour, mode=mode)
    image = read_table(write_csv([["image"], ["a.png"]]), Columns("image")).image(0, background="blue")
    assert image.mode == "RGB" and image.getpixel((0, 0)) == expected


def test_transparent_palette_and_camera_rotation(tmp_path: Path, write_csv: Callable[..., Path]) -> None:
    palette = Image.new("P", (3, 3), 0)
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    turned = Image.new("RGB", (6, 4))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "t.jpg", exif=exif)
    table = read_table(write_csv([["image"], ["p.png"], ["t.jpg"]]), Columns("image"))
    assert table.image(0).getpixel((1, 1)) == (255, 255, 255)
    assert table.image(1).size == (4, 6)
