"""Pictures to tensors, as open_clip makes them."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from pydantic import ValidationError

from cmaclip_fast.data import ImagePreprocessing

MODES = {"squash": "squash", "shortest-crop": "shortest", "longest-pad": "longest"}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [(50, 31), (31, 50), (32, 32), (20, 17), (100, 3)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_equals_open_clip(mode: str, size: tuple[int, int], interpolation: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    config = {
        "size": 32,
        "mode": "RGB",
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.3, 0.4),
        "interpolation": interpolation,
        "resize_mode": MODES[mode],
        "fill_color": 40,
    }
    ours = ImagePreprocessing.from_open_clip(config)
    theirs = image_transform(
        32,
        is_train=False,
        mean=config["mean"],
        std=config["std"],
        interpolation=interpolation,
        resize_mode=MODES[mode],
        fill_color=40,
    )
    assert ours.resize_mode == mode and ours(image).shape == (3, 32, 32) and ours(image).dtype == torch.float32
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-6)


def test_from_an_open_clip_model() -> None:
    config = open_clip.get_model_preprocess_cfg(open_clip.create_model("ViT-B-32", pretrained=None, device="meta"))
    assert ImagePreprocessing.from_open_clip(config) == ImagePreprocessing()


def test_padding_has_the_background_and_json_keeps_all() -> None:
    how = ImagePreprocessing(size=8, resize_mode="longest-pad", background="#ff0000", mean=(0, 0, 0), std=(1, 1, 1))
    image = how(Image.new("RGB", (16, 8), "white"))
    assert image[:, 0, 0].tolist() == [1, 0, 0] and image[:, 4, 4].tolist() == [1, 1, 1]
    assert ImagePreprocessing.model_validate_json(how.model_dump_json()) == how


def test_normalising_leaves_its_input_alone() -> None:
    unit = torch.full((1, 3, 2, 2), 0.5)
    ImagePreprocessing(size=2).normalise(unit)
    assert (unit == 0.5).all()


def test_wrong_settings() -> None:
    for wrong in ({"size": 0}, {"background": "no-colour"}, {"resize_mode": "stretch"}, {"colour": 1}):
        with pytest.raises(ValidationError):
            ImagePreprocessing(**wrong)
    config = {"size": (32, 64), "mean": (0,) * 3, "std": (1,) * 3, "interpolation": "bicubic", "resize_mode": "squash"}
    with pytest.raises(ValueError, match="32 x 64; only square"):
        ImagePreprocessing.from_open_clip(config)


@pytest.mark.tried("picture", ends="megabytes instead of gigabytes")
@pytest.mark.parametrize("size", [(1, 20_000), (20_000, 1), (3, 1_000_000)])
def test_a_picture_many_times_as_long_as_it_is_wide(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.linear_gradient("L").resize(size)
    sizes: list[tuple[int, int]] = []
    resize = Image.Image.resize

    def noted(image: Image.Image, size: tuple[int, int], **options: object) -> Image.Image:
        sizes.append(size)
        return resize(image, size, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    pixels = ImagePreprocessing(size=32, resize_mode="shortest-crop").pixels(image)
    assert pixels.shape == (3, 32, 32) and max(sizes[-1]) <= 257 * 32
