"""Rows whose pictures are decoded once, made square, and kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from cmaclip_fast.data.images import ImageProblem
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.table import Table
from cmaclip_fast.errors import InputError


class KeptPictures(Table):
    """The same rows, their pictures made square and kept, so that each is decoded once, whoever asks for it."""

    def __init__(
        self, table: Table, preprocessing: ImagePreprocessing, kept: dict[int, Image.Image | None] | None = None
    ) -> None:
        super().__init__(table._source, table._rows, table._masked)
        self._preprocessing = preprocessing
        self._kept: dict[int, Image.Image | None] = {} if kept is None else kept

    def select(self, indices: Sequence[int] | np.ndarray) -> KeptPictures:
        return KeptPictures(super().select(indices), self._preprocessing, self._kept)

    def mask_images(self, indices: Sequence[int]) -> KeptPictures:
        return KeptPictures(super().mask_images(indices), self._preprocessing, self._kept)

    def image(self, index: int, background: str = "white") -> Image.Image | None:
        row = int(self._rows[index])
        if row in self._masked:
            return None
        if row not in self._kept:
            picture = super().image(index, background)
            square = None if picture is None else self._preprocessing.pixels(picture)
            self._kept[row] = None if square is None else Image.fromarray(square.permute(1, 2, 0).numpy())
        return self._kept[row]

    def image_problem(self, index: int) -> ImageProblem | None:
        try:
            self.image(index, self._preprocessing.background)
        except InputError as error:
            if isinstance(error.__cause__, ImageProblem):
                return error.__cause__
            raise
        return None
