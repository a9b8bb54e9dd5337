"""The data set `pairs`: composed pictures and a name, with labels that neither side tells alone."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cmaclip_fast.data.files import read_files
from cmaclip_fast.data.named import NAMED
from cmaclip_fast.errors import InputError
from cmaclip_fast.files import check_output_file, replacing, write_text

SEED = 20_261_127
SPLITS = {"train": 8_000, "validation": 1_000, "test": 2_000}
OBJECTS = 24
SIDE, CELL = 96, 48
COLOURS = {"red": (214, 39, 40), "green": (44, 160, 44), "blue": (31, 119, 220), "yellow": (240, 200, 20)}
PLACES = ("top left", "top right", "bottom left", "bottom right")
FITS = ("no", "yes")
COVERED = (0.2, 0.8)
"""Share of its box that an object's drawing covers."""


def build_pairs(
    output: Path | None = None,
    overwrite: bool = False,
    splits: dict[str, int] | None = None,
    seed: int = SEED,
    report: Callable[[str], None] = lambda line: None,
) -> Path:
    """Composes `pairs.parquet` and its card from the embedded drawings; the same seed gives the same rows.

    Args:
        output: the folder; by default the one that `--data pairs` reads.
        overwrite: replace existing files.
        splits: rows of each split, `SPLITS` by default; each a multiple of 4 keeps the labels balanced.
        report: called with a line on the progress.

    Returns:
        The Parquet file.

    Raises:
        InputError: the file exists already, or the folder is a file.
    """
    folder = output or NAMED["pairs"].folder
    path, card = folder / "pairs.parquet", folder / "README.md"
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is not a folder: name another --output")
    if folder.is_dir():
        check_output_file(path, overwrite)
        check_output_file(card, overwrite=True)
        if card.exists() and not card.read_bytes().startswith(b"# pairs\n"):
            raise InputError(f"{card}: is not the card of this data set: name another --output")
    splits = splits or SPLITS
    objects = _objects(np.random.default_rng(seed))
    rows: list[dict[str, Any]] = []
    for number, (split, size) in enumerate(splits.items()):
        generator = np.random.default_rng([seed, number])
        for row in _compose(objects, size, generator):
            report(f"composing {len(rows):,} of {sum(splits.values()):,}")
            rows.append({"id": f"{split}/{len(rows):05d}", **row, "split": split})
    folder.mkdir(parents=True, exist_ok=True)
    write_text(card, _CARD.format(objects=len(objects), names=", ".join(sorted(objects)), **splits))
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary, compression="zstd")
    return path


def _objects(generator: np.random.Generator) -> dict[str, Image.Image]:
    """Grey drawings whose title is one word that no other has; no flags, which look alike without their colours."""
    rows = read_files([NAMED["openclipart"].path]).table.select(["title", "subcategory", "image"]).to_pylist()
    titles = [row["title"].strip().lower() for row in rows]
    found: dict[str, Image.Image] = {}
    for index in generator.permutation(len(rows)):
        title = titles[index]
        if not (title.isascii() and title.isalpha() and len(title) > 2 and titles.count(title) == 1):
            continue
        if "flag" in (rows[index]["subcategory"] or ""):
            continue
        grey = Image.open(io.BytesIO(rows[index]["image"]["bytes"])).convert("L")
        covered = float((np.asarray(grey) < 245).mean())
        if COVERED[0] <= covered <= COVERED[1]:
            found[title] = grey
        if len(found) == OBJECTS:
            return found
    raise AssertionError("the embedded drawings have fewer objects than are wanted")


def _compose(objects: dict[str, Image.Image], rows: int, generator: np.random.Generator) -> Iterator[dict[str, Any]]:
    names, colours = list(objects), list(COLOURS)
    # the answers are drawn before the pictures, each as often as the others
    answers = generator.permutation(rows)
    for answer in answers:
        place, colour, fits = answer % 4, (answer // 4) % 4, bool((answer // 16) % 2)
        chosen = generator.permutation(len(names))[:5]
        others = [c for c in generator.permutation(4) if c != colour]
        tints = [colour if cell == place else others.pop() for cell in range(4)]
        canvas = np.full((SIDE, SIDE, 3), 255, np.uint8)
        for cell in range(4):
            tile = _tile(objects[names[chosen[cell]]], COLOURS[colours[tints[cell]]], generator)
            top, left = cell // 2 * CELL, cell % 2 * CELL
            canvas[top : top + CELL, left : left + CELL] = tile
        buffer = io.BytesIO()
        Image.fromarray(canvas).save(buffer, "WEBP", quality=80, method=0)
        yield {
            "image": {"bytes": buffer.getvalue(), "path": None},
            "name": names[chosen[place if fits else 4]],
            "fits": FITS[fits],
            "place": PLACES[place] if fits else None,
            "colour": colours[colour] if fits else None,
        }


def _tile(grey: Image.Image, colour: tuple[int, int, int], generator: np.random.Generator) -> np.ndarray:
    """`[CELL, CELL, 3]` uint8: the drawing in one colour, turned, scaled and moved at random, on white."""
    turned = grey.rotate(float(generator.uniform(-20, 20)), Image.Resampling.BILINEAR, fillcolor=255)
    side = int(generator.integers(36, CELL + 1))
    small = np.asarray(turned.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
    top, left = generator.integers(0, CELL - side + 1, 2)
    shade = np.ones((CELL, CELL), np.float32)
    shade[top : top + side, left : left + side] = small
    ink = np.clip((1 - shade) / 0.15, 0, 1)[..., None]
    paint = np.asarray(colour, np.float32) / 255 * (0.4 + 0.6 * shade[..., None])
    return np.round(255 * (ink * paint + 1 - ink)).astype(np.uint8)


_CARD = """# pairs

Pictures of four objects, each in another colour and another corner, and the name of one object. Three labels that need
both sides: text and patches must meet. Composed by `cmaclip data build pairs` from the drawings of `openclipart`, with
a fixed seed; read with `--data pairs`.

## Columns

| column | meaning |
|---|---|
| `id` | split and number |
| `image` | WebP, 96 x 96, in a struct `{{bytes, path}}`: four of {objects} objects, one a corner |
| `name` | the title of one object |
| `fits` | `yes` where the named object is in the picture, `no` where it is another of the {objects} |
| `place` | the corner of the named object; null where `fits` is `no` |
| `colour` | its colour, one of four; null where `fits` is `no` |
| `split` | train {train:,}, validation {validation:,}, test {test:,} rows |

## What one side tells

Nothing. Every picture has all four colours and all four corners filled, and the named corner is drawn independently of
both the name and the picture, each answer as often as the others. So the best guess is right in half of the rows for
`fits`, and in a quarter for `place` and `colour`, from the text alone and from the picture alone.

## Objects

{names}.

## Limits

The objects are the same drawings in every split, in other combinations, turns, sizes and places: the set measures
whether a system brings the two sides together, not whether it knows new objects.
"""
