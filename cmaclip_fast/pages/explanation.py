"""The page that explains single rows, and the cards of rows in a report's gallery."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from cmaclip_fast.errors import clipped
from cmaclip_fast.pages.page import NAME_LENGTH, TEXT_LENGTH, finite, is_special, render_template, word, write_html
from cmaclip_fast.pages.views import ExampleView

_GALLERY_SIDE, _STAGE_SIDE, _MAP_SIDE = 256, 640, 128


def render_explanation(
    examples: list[ExampleView], path: str | os.PathLike[str], title: str, summary: dict[str, str]
) -> None:
    """Writes the predictions and attention maps of single rows as one self-contained HTML file, atomically.

    Raises:
        ValueError: arrays whose shapes do not fit each other.
        InputError: `path` cannot be written.
    """
    rows = [_explained(example) for example in examples]
    layers = max((len(row["layers"]) for row in rows), default=0)
    write_html(render_template("explain.html", title=title, summary=summary, rows=rows, layers=layers), Path(path))


def relevant_token(example: ExampleView) -> int | None:
    """The text token with the largest total attention to patches, special tokens left out (paper, figure 2)."""
    if example.token_to_patch is None:
        return None
    totals = _token_maps(example).sum(axis=(1, 2))
    plain = [i for i, token in enumerate(example.tokens) if not is_special(token)]
    return max(plain, key=lambda i: float(totals[i]), default=None)


def _token_maps(example: ExampleView) -> np.ndarray:
    maps = np.asarray(example.token_to_patch, dtype=float)
    if maps.ndim != 3 or len(maps) != len(example.tokens):
        raise ValueError(
            f"row {example.row}: token_to_patch is {list(maps.shape)}, expected [{len(example.tokens)}, gh, gw]"
        )
    return np.nan_to_num(maps, nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)


def gallery_card(example: ExampleView) -> dict[str, Any]:
    card = _example(example, _GALLERY_SIDE)
    chosen = relevant_token(example)
    if chosen is not None and example.image is not None:
        card["map"] = _layer(_token_maps(example)[chosen], example.image)
        card["token"] = word(example.tokens[chosen])
    return card


def _example(example: ExampleView, side: int) -> dict[str, Any]:
    return {
        "row": example.row,
        "key": clipped(example.key, NAME_LENGTH),
        "text": None if example.text is None else clipped(example.text, TEXT_LENGTH),
        "picture": None if example.image is None else picture_uri(example.image, side),
        "aspect": 1.0 if example.image is None else example.image.width / example.image.height,
        "map": None,
        "token": None,
        "predictions": [
            {
                "task": clipped(task, NAME_LENGTH),
                "label": None if said.label is None else clipped(said.label, NAME_LENGTH),
                "predicted": clipped(said.predicted, NAME_LENGTH),
                "probability": said.probability,
                "right": None if said.label is None else said.label == said.predicted,
                "top": [(clipped(name, NAME_LENGTH), probability) for name, probability in said.top[:5]],
                "weights": said.weights,
            }
            for task, said in example.predictions.items()
        ],
    }


def _explained(example: ExampleView) -> dict[str, Any]:
    """An example with a layer for each map to lay over the picture: the image's global token, then the text tokens."""
    row = _example(example, _STAGE_SIDE)
    reading = None
    if example.text_global_to_token is not None:
        reading = np.asarray(example.text_global_to_token, dtype=float)
        if reading.shape != (len(example.tokens),):
            raise ValueError(
                f"row {example.row}: text_global_to_token is {list(reading.shape)}, expected [{len(example.tokens)}]"
            )
    maps = None if example.token_to_patch is None else _token_maps(example)
    layers: list[str] = []

    def add(weights: np.ndarray | None) -> int | None:
        if weights is None or example.image is None:
            return None
        layers.append(_layer(weights, example.image))
        return len(layers) - 1

    row["image_token"] = add(
        None if example.image_global_to_patch is None else np.asarray(example.image_global_to_patch)
    )
    chosen, top = relevant_token(example), 0.0 if reading is None else finite(reading.max(initial=0)) or 0.0
    row["tokens"] = [
        {
            "word": word(token),
            "special": is_special(token),
            "layer": add(None if maps is None else maps[i]),
            "relevant": i == chosen,
            "to_patches": None if maps is None else float(maps[i].sum()),
            "read": None if reading is None else float(reading[i]),
            "bar": 0.0 if reading is None or not top else float(reading[i]) / top,
        }
        for i, token in enumerate(example.tokens)
    ]
    row["layers"] = layers
    row["reading"] = reading is not None
    return row


def _flat(image: Image.Image) -> Image.Image:
    """The picture as RGB; what is transparent becomes white, the paper it will be seen on."""
    picture = image.convert("RGBA")
    paper = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(paper, picture).convert("RGB")


def _fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def picture_uri(image: Image.Image, side: int) -> str:
    """The picture as a `data:` address, no side longer than `side`."""
    if max(image.size) > side:
        image = _flat(image).resize(_fit(image.size, side), Image.Resampling.LANCZOS)
    return _data_uri(_flat(image), quality=85)


def _layer(weights: np.ndarray, image: Image.Image) -> str:
    """A map `[gh, gw]` as a veil to lay over the picture: from 0 to the map's own maximum, bilinear between patches.

    The veil thins where attention is high, so that the attended part of the picture is seen best.
    """
    if weights.ndim != 2:
        raise ValueError(f"an attention map is {list(weights.shape)}, expected [gh, gw]")
    weights = np.nan_to_num(weights.astype(float), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    scaled = (weights / (weights.max(initial=0) or 1.0)).astype(np.float32)
    smooth = Image.fromarray(scaled).resize(_fit(image.size, _MAP_SIDE), Image.Resampling.BILINEAR)
    values = np.asarray(smooth).clip(0, 1)
    veil = colormaps["viridis"](values)
    veil[..., 3] = 0.74 - 0.3 * values
    return _data_uri(Image.fromarray((255 * veil).round().astype(np.uint8)), quality=80)


def _data_uri(image: Image.Image, quality: int) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
