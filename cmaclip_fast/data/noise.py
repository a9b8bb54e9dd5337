"""Damage to test rows, to measure how well a model bears it (paper, robustness against noise in image and text)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

from cmaclip_fast.data.files import near
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError

Kind = Literal["text-replace", "text-drop", "text-shuffle", "image-replace", "image-drop", "image-blur", "image-noise"]


@dataclass(frozen=True)
class Noise:
    """One kind of damage.

    Attributes:
        kind: `-replace` puts another row's text or picture in, `-drop` takes it for absent, `text-shuffle` mixes the
            order of its words, `image-blur` and `image-noise` blur a picture and add Gaussian noise.
        level: the share of rows, 0 to 1, that it happens to; of `image-blur`, which happens to all, the radius as a
            share of the picture's shorter side, and of `image-noise` the deviation as a share of full brightness.
    """

    kind: Kind
    level: float


def parse_noise(spec: str) -> Noise:
    """From `KIND:LEVEL`, such as `text-replace:0.5`.

    Raises:
        InputError: an unknown kind, or a level that is not a number from 0 to 1.
    """
    kind, _, level = spec.partition(":")
    if kind not in get_args(Kind):
        raise InputError(
            f"--noise {spec}: no kind '{kind}'{near(kind, get_args(Kind))}; kinds: {', '.join(get_args(Kind))}"
        )
    try:
        value = float(level)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InputError(f"--noise {spec}: give KIND:LEVEL with a level from 0 to 1, such as {kind}:0.5")
    return Noise(kind, value)  # type: ignore[arg-type]


class NoisyTable(Table):
    """A table whose texts or pictures are damaged; which rows and how follows from the seed alone.

    Attributes:
        hit: `[N]` bool, the rows that are damaged.
    """

    def __init__(self, table: Table, noise: Noise, seed: int = 0) -> None:
        super().__init__(table._source, table._rows, table._masked)
        self._table = table
        self._noise = noise
        self._seed = seed
        generator = np.random.default_rng([seed, get_args(Kind).index(noise.kind)])
        order = generator.permutation(len(table))
        self.hit = np.zeros(len(table), dtype=bool)
        self.hit[order[: round(noise.level * len(table))]] = True
        # a cyclic shift of a permutation gives every row another row, never its own
        self._other = np.empty(len(table), dtype=np.int64)
        self._other[order] = np.roll(order, 1)

    def text(self, index: int) -> str | None:
        kind = self._noise.kind
        if not self.hit[index] or not kind.startswith("text"):
            return self._table.text(index)
        if kind == "text-drop":
            return None
        if kind == "text-replace":
            return self._table.text(int(self._other[index]))
        words = (self._table.text(index) or "").split()
        # of numbers: an array of words would give each the room of the longest
        return " ".join(words[i] for i in self._generator(index).permutation(len(words))) or None

    def image(self, index: int, background: str = "white") -> Image.Image | None:
        kind = self._noise.kind
        if kind == "image-drop" and self.hit[index]:
            return None
        if kind == "image-replace" and self.hit[index]:
            return self._table.image(int(self._other[index]), background)
        picture = self._table.image(index, background)
        if picture is None or kind not in ("image-blur", "image-noise"):
            return picture
        if kind == "image-blur":
            return picture.filter(ImageFilter.GaussianBlur(self._noise.level * min(picture.size)))
        pixels = np.asarray(picture, dtype=np.float32)
        noisy = pixels + self._generator(index).normal(0, 255 * self._noise.level, pixels.shape)
        return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))

    def _generator(self, index: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, int(self._rows[index])])


def add_noise(table: Table, noise: Noise, seed: int = 0) -> Table:
    """The same rows with `noise`; noises add up when applied one after another."""
    return NoisyTable(table, noise, seed)
