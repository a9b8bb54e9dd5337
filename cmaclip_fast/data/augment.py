"""Random changes of pictures and texts in training, a whole batch at a time.

Every random number comes in from outside, so that what happens to a row depends on that row's numbers alone.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

IMAGE_DRAWS = 13
"""Random numbers that `augment_images` takes for each picture."""


class Augmentation(BaseModel):
    """What may happen to a training row. Hue and saturation never change, because colour can be a label.

    Attributes:
        scale: the part of the picture's area that a crop keeps; above 1 the picture shrinks into its background.
        ratio: the aspect of a crop, width by height.
        horizontal_flip: the probability of a mirror image.
        rotation: the largest rotation either way, in degrees.
        brightness, contrast: pixels are scaled by a factor of 1 minus to 1 plus this, the second about their mean.
        erasing: the probability that a rectangle is painted over with the background.
        erasing_area: the part of the picture's area that the rectangle covers.
        word_dropout: the probability that a token of the text is left out; one is always kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: tuple[float, float] = (0.6, 1.0)
    ratio: tuple[float, float] = (0.8, 1.25)
    horizontal_flip: float = Field(0.5, ge=0, le=1)
    rotation: float = Field(10.0, ge=0, le=180)
    brightness: float = Field(0.1, ge=0, lt=1)
    contrast: float = Field(0.1, ge=0, lt=1)
    erasing: float = Field(0.0, ge=0, le=1)
    erasing_area: tuple[float, float] = (0.02, 0.2)
    word_dropout: float = Field(0.0, ge=0, lt=1)


def augment_images(
    pixels: Tensor, draws: Tensor, how: Augmentation, background: tuple[int, int, int], side: int | None = None
) -> Tensor:
    """Crops, flips and rotates in one resampling, then changes brightness and contrast, then erases.

    Args:
        pixels: `[B, 3, S, S]` uint8.
        draws: `[B, IMAGE_DRAWS]` float in 0 to 1.
        background: fills what a crop or rotation brings in from outside, and erased rectangles.
        side: pixels a side of the result; None is S.

    Returns:
        `[B, 3, side, side]` float32 in 0 to 1.
    """
    fill = torch.tensor(background, dtype=torch.float32).div_(255).view(1, 3, 1, 1)
    images = pixels.float().div_(255).sub_(fill)  # what is outside is sampled as 0, which is now the background
    places = _places(_crop_flip_rotate(draws[:, :6], how), side or images.shape[-1])
    images = F.grid_sample(images, places, mode="bilinear", padding_mode="zeros", align_corners=False).add_(fill)
    if how.brightness or how.contrast:
        images = _brighten(images, draws[:, 6:8], how)
    if how.erasing:
        images = torch.where(_rectangles(draws[:, 8:13], how, images.shape[-1]), fill, images)
    return images


def _crop_flip_rotate(draws: Tensor, how: Augmentation) -> Tensor:
    """`[B, 2, 3]`: for each picture, where a pixel of the result is read from."""
    area = _between(draws[:, 0], *how.scale)
    aspect = torch.exp(_between(draws[:, 1], *(float(np.log(side)) for side in how.ratio)))
    longest = max(1.0, how.scale[1]) ** 0.5
    width = (area * aspect).sqrt().clamp(max=longest)
    height = (area / aspect).sqrt().clamp(max=longest)
    centre_x = _between(draws[:, 2], -1, 1) * (1 - width).abs()
    centre_y = _between(draws[:, 3], -1, 1) * (1 - height).abs()
    mirror = 1 - 2 * (draws[:, 4] < how.horizontal_flip).float()
    angle = torch.deg2rad(_between(draws[:, 5], -how.rotation, how.rotation))
    cosine, sine = angle.cos(), angle.sin()
    across = torch.stack([width * cosine * mirror, -height * sine, centre_x], dim=1)
    down = torch.stack([width * sine * mirror, height * cosine, centre_y], dim=1)
    return torch.stack([across, down], dim=1)


def _places(theta: Tensor, size: int) -> Tensor:
    """`F.affine_grid`, many times faster: `[B, S, S, 2]`, x and y each kept together, as `grid_sample` likes them."""
    centres = (torch.arange(size) * 2 + 1) / size - 1
    across = theta[:, :, 0, None] * centres
    down = theta[:, :, 1, None] * centres + theta[:, :, 2, None]
    return (across[:, :, None, :] + down[:, :, :, None]).permute(0, 2, 3, 1)


def _brighten(images: Tensor, draws: Tensor, how: Augmentation) -> Tensor:
    bright = _between(draws[:, 0], 1 - how.brightness, 1 + how.brightness).view(-1, 1, 1, 1)
    contrast = _between(draws[:, 1], 1 - how.contrast, 1 + how.contrast).view(-1, 1, 1, 1)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return images.mul_(bright * contrast).add_(bright * (1 - contrast) * mean).clamp_(0, 1)


def _rectangles(draws: Tensor, how: Augmentation, size: int) -> Tensor:
    """`[B, 1, S, S]` bool, the pixels to erase."""
    area = _between(draws[:, 1], *how.erasing_area)
    aspect = torch.exp(_between(draws[:, 2], *(float(np.log(side)) for side in how.ratio)))
    width, height = (area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1)
    left, top = draws[:, 3] * (1 - width), draws[:, 4] * (1 - height)
    place = (torch.arange(size) + 0.5) / size
    columns = (place >= left[:, None]) & (place < (left + width)[:, None])
    rows = (place >= top[:, None]) & (place < (top + height)[:, None])
    chosen = (draws[:, 0] < how.erasing).view(-1, 1, 1)
    return (chosen & rows[:, :, None] & columns[:, None, :]).unsqueeze(1)


def drop_tokens(
    tokens: np.ndarray, lengths: np.ndarray, draws: np.ndarray, probability: float, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Leaves tokens out of texts, never the first (start), the last (end), or all that lie between.

    Args:
        tokens: `[B, L]`, padded on the right with `pad`.
        lengths: `[B]`.
        draws: `[B, L]` in 0 to 1.

    Returns:
        The shorter texts, `[B, L]` and `[B]`.
    """
    place = np.arange(tokens.shape[1])
    inside = (place > 0) & (place < lengths[:, None] - 1)
    dropped = inside & (draws < probability)
    emptied = (dropped == inside).all(axis=1)
    kept = (place < lengths[:, None]) & ~(dropped & ~emptied[:, None])
    order = np.argsort(~kept, axis=1, kind="stable")
    counts = kept.sum(axis=1)
    shorter = np.where(place < counts[:, None], np.take_along_axis(tokens, order, axis=1), pad)
    return shorter, counts.astype(lengths.dtype)


def _between(draw: Tensor, low: float, high: float) -> Tensor:
    return low + (high - low) * draw
