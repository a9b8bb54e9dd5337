"""Rows of the training data to try a model on."""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from cmaclip_fast.classifier.artifact import load_config
from cmaclip_fast.data.images import ImageProblem
from cmaclip_fast.data.source import Source
from cmaclip_fast.errors import InputError
from cmaclip_fast.serving.answers import as_png
from cmaclip_fast.serving.schemas import Example

_SIDE = 320

log = logging.getLogger(__name__)


def read_examples(directory: Path, most: int) -> list[Example]:
    """Rows of the test split, spread over it; none where the training data are gone or cannot be read."""
    if most < 1:
        return []
    config = load_config(directory)
    source = Source(split="test", on_bad_rows="skip")
    found: list[Example] = []
    try:
        table = source.unchecked(config.trained_on(), lambda message: None)
        step = max(1, len(table) // most)
        for row in range(0, min(len(table), step * most), step):
            try:
                picture = table.image(row, config.preprocessing.background)
            except ImageProblem:
                picture = None
            text = table.text(row)
            if picture is not None or text is not None:
                found.append(Example(image=None if picture is None else _small(picture), text=text))
    except (InputError, OSError) as error:
        log.info("no examples", extra={"fields": {"reason": str(error)}})
    return found


def _small(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((_SIDE, _SIDE))
    return as_png(picture)
