"""Each augmentation alone, checked against what it must do to known pictures and tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmaclip_fast.data import Augmentation
from cmaclip_fast.data.augment import IMAGE_DRAWS, _places, augment_images, drop_tokens

NOTHING = {
    "scale": (1.0, 1.0),
    "ratio": (1.0, 1.0),
    "horizontal_flip": 0.0,
    "rotation": 0.0,
    "brightness": 0.0,
    "contrast": 0.0,
    "erasing": 0.0,
}
WHITE = (255, 255, 255)


def _pixels(rows: int = 2, size: int = 16) -> Tensor:
    return torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def _augment(
    pixels: Tensor, draws: Tensor | None = None, background: tuple[int, int, int] = WHITE, **how: object
) -> Tensor:
    if draws is None:
        draws = torch.full((len(pixels), IMAGE_DRAWS), 0.5)
    return augment_images(pixels, draws, Augmentation(**{**NOTHING, **how}), background)


def test_nothing_changes_nothing() -> None:
    pixels = _pixels()
    torch.testing.assert_close(_augment(pixels), pixels.float() / 255, rtol=0, atol=1e-5)


def test_flip() -> None:
    pixels = _pixels()
    torch.testing.assert_close(_augment(pixels, horizontal_flip=1.0), pixels.flip(-1) / 255.0, rtol=0, atol=1e-5)


def test_crop_is_the_part_of_the_picture() -> None:
    pixels = _pixels(1, 16)
    draws = torch.full((1, IMAGE_DRAWS), 0.5)
    draws[:, 2:4] = torch.tensor([0.0, 1.0])  # far left, far down
    expected = F.interpolate(pixels[:, :, 8:, :8].float() / 255, scale_factor=2, mode="bilinear", align_corners=False)
    inner = slice(1, -1)  # at the edge of the crop the picture goes on, the cut-out piece does not
    got = _augment(pixels, draws, scale=(0.25, 0.25))
    torch.testing.assert_close(got[..., inner, inner], expected[..., inner, inner], rtol=0, atol=1e-5)


def test_shrinking_and_turning_fill_with_the_background() -> None:
    black = torch.zeros(1, 3, 16, 16, dtype=torch.uint8)
    small = _augment(black, background=(255, 0, 0), scale=(4.0, 4.0))
    assert small[0, :, 0, 0].tolist() == [1, 0, 0] and small[0, :, 8, 8].tolist() == [0, 0, 0]
    assert small[0, 0].mean().item() == pytest.approx(0.75, abs=0.02)
    draws = torch.ones(1, IMAGE_DRAWS) / 2
    draws[:, 5] = 1.0
    turned = _augment(black, draws, rotation=45.0)
    assert turned[0, :, 0, 0].tolist() == [1, 1, 1] and turned[0, :, 8, 8].tolist() == [0, 0, 0]


def test_quarter_turn() -> None:
    pixels = _pixels(1)
    draws = torch.ones(1, IMAGE_DRAWS) / 2
    draws[:, 5] = 1.0
    torch.testing.assert_close(
        _augment(pixels, draws, rotation=90.0), pixels.rot90(1, (2, 3)) / 255.0, rtol=0, atol=1e-3
    )


def test_brightness_and_contrast() -> None:
    pixels = torch.full((1, 3, 4, 4), 100, dtype=torch.uint8)
    pixels[..., :2] = 50
    draws = torch.ones(1, IMAGE_DRAWS) / 2
    draws[:, 6] = 1.0
    torch.testing.assert_close(_augment(pixels, draws, brightness=0.2), pixels * 1.2 / 255, rtol=0, atol=1e-5)
    draws[:, 6], draws[:, 7] = 0.5, 1.0
    expected = ((pixels - 75.0) * 1.5 + 75) / 255
    torch.testing.assert_close(_augment(pixels, draws, contrast=0.5), expected, rtol=0, atol=1e-5)


def test_hue_and_saturation_stay() -> None:
    pixels = torch.tensor([200, 40, 40], dtype=torch.uint8).view(1, 3, 1, 1).expand(64, 3, 8, 8)
    draws = torch.rand(64, IMAGE_DRAWS, generator=torch.Generator().manual_seed(0))
    images = augment_images(pixels, draws, Augmentation(erasing=0.5), WHITE)
    assert (images[:, 0] >= images[:, 1] - 1e-6).all()
    torch.testing.assert_close(images[:, 1], images[:, 2], rtol=0, atol=1e-6)


def test_erasing_paints_a_rectangle() -> None:
    pixels = torch.zeros(200, 3, 32, 32, dtype=torch.uint8)
    draws = torch.rand(200, IMAGE_DRAWS, generator=torch.Generator().manual_seed(0))
    images = _augment(pixels, draws, erasing=0.5, erasing_area=(0.1, 0.2))
    areas = (images[:, 0] == 1).float().mean(dim=(1, 2))
    assert 0.35 < (areas > 0).float().mean() < 0.65
    assert ((areas == 0) | ((areas > 0.07) & (areas < 0.25))).all()


def test_places_are_those_of_affine_grid() -> None:
    theta = torch.randn(3, 2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(_places(theta, 7), F.affine_grid(theta, [3, 1, 7, 7], align_corners=False))


def test_a_picture_does_not_depend_on_its_neighbours() -> None:
    pixels, draws = _pixels(5), torch.rand(5, IMAGE_DRAWS, generator=torch.Generator().manual_seed(0))
    how = Augmentation(erasing=0.5)
    together = augment_images(pixels, draws, how, WHITE)
    assert torch.equal(together[3:4], augment_images(pixels[3:4], draws[3:4], how, WHITE))


def test_dropped_tokens_close_up() -> None:
    tokens = np.array([[1, 5, 6, 7, 2, 0], [1, 8, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]])
    lengths = np.array([5, 3, 2], dtype=np.int32)
    draws = np.array([[0, 0.9, 0.1, 0.9, 0, 0], [0, 0.1, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]])
    shorter, counts = drop_tokens(tokens, lengths, draws, 0.5, pad=0)
    assert shorter.tolist() == [[1, 5, 7, 2, 0, 0], [1, 8, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]]
    assert counts.tolist() == [4, 3, 2] and counts.dtype == np.int32
