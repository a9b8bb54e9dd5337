"""Pictures to the tensors that an image tower reads."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import numpy as np
import torch
from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from PIL import Image, ImageColor
from pydantic import BaseModel, ConfigDict, Field, field_validator
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

_RESIZE_MODES = {"squash": "squash", "shortest": "shortest-crop", "longest": "longest-pad"}
"""open_clip's names for the ways to make a picture square, and ours."""

_LONGEST = 256
"""How many times as long as it is wide a picture is resized whole, before its middle is cut out."""

MAX_IMAGE_SIZE = 4096
"""Pixels a side, at most, of what a tower reads."""

Channel = Annotated[float, Field(ge=-1e3, le=1e3)]
Triple = tuple[Channel, Channel, Channel]


class ImagePreprocessing(BaseModel):
    """How a picture becomes `[3, size, size]`.

    Attributes:
        size: pixels a side.
        mean, std: of the channels of pixels in 0 to 1; what the tower was trained with.
        interpolation: of the resize.
        resize_mode: `squash` ignores the aspect; `shortest-crop` cuts the longer side; `longest-pad` fills the shorter.
        background: a colour name or `#rrggbb`, under transparent parts and around padded pictures.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    size: int = Field(224, ge=1, le=MAX_IMAGE_SIZE)
    mean: Triple = OPENAI_DATASET_MEAN
    std: Triple = OPENAI_DATASET_STD
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["squash", "shortest-crop", "longest-pad"] = "shortest-crop"
    background: str = "white"

    @field_validator("background")
    @classmethod
    def _is_colour(cls, value: str) -> str:
        if max(ImageColor.getrgb(value)) > 255:
            raise ValueError(f"{value} is no colour: channels go to 255")
        return value

    @field_validator("std")
    @classmethod
    def _divides(cls, value: Triple) -> Triple:
        if min(value) < 1e-6:
            raise ValueError("must be over 0")
        return value

    @classmethod
    def from_open_clip(cls, config: dict[str, Any]) -> ImagePreprocessing:
        """From `model.visual.preprocess_cfg`, so that a tower sees what it was trained on.

        Raises:
            ValueError: a picture that is not square.
        """
        size = config["size"]
        height, width = (size, size) if isinstance(size, int) else size
        if height != width:
            raise ValueError(f"the tower reads pictures of {height} x {width}; only square ones are supported")
        fill = config.get("fill_color", 0)
        padded = config["resize_mode"] == "longest"
        return cls(
            size=height,
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
            resize_mode=_RESIZE_MODES[config["resize_mode"]],  # type: ignore[arg-type]
            background=f"#{fill:02x}{fill:02x}{fill:02x}" if padded else "white",
        )

    @property
    def background_rgb(self) -> tuple[int, int, int]:
        return ImageColor.getrgb(self.background)[:3]

    def pixels(self, image: Image.Image) -> Tensor:
        """The picture made square: `[3, size, size]` uint8."""
        if image.mode != "RGB":
            image = image.convert("RGB")
        if image.size != (self.size, self.size):
            image = self._square(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()

    def normalise(self, pixels: Tensor) -> Tensor:
        """uint8 in 0 to 255, or float in 0 to 1, `[..., 3, H, W]`, to the float tensor that the tower reads."""
        mean, std = (torch.tensor(v, device=pixels.device).view(3, 1, 1) for v in (self.mean, self.std))
        unit = pixels.float().div_(255).sub_(mean) if pixels.dtype == torch.uint8 else pixels - mean
        return unit.div_(std)

    def __call__(self, image: Image.Image) -> Tensor:
        """The transform of evaluation: `[3, size, size]` float."""
        return self.normalise(self.pixels(image))

    def _square(self, image: Image.Image) -> Image.Image:
        mode = InterpolationMode(self.interpolation)
        if self.resize_mode == "squash":
            return F.resize(image, [self.size, self.size], mode)
        if self.resize_mode == "shortest-crop":
            return F.center_crop(F.resize(_middle(image), [self.size], mode), [self.size, self.size])
        ratio = max(image.size) / self.size
        width, height = (max(1, round(side / ratio)) for side in image.size)
        left, top = (self.size - width) // 2, (self.size - height) // 2
        padding = [left, top, self.size - width - left, self.size - height - top]
        return F.pad(F.resize(image, [height, width], mode), padding, fill=list(self.background_rgb))


def _middle(image: Image.Image) -> Image.Image:
    """A picture without the ends that the crop would cut off, if they would take many times its memory to resize."""
    width, height = image.size
    cut = [max(0, side - _LONGEST * min(width, height)) // 2 for side in (width, height)]
    return image.crop((cut[0], cut[1], width - cut[0], height - cut[1])) if any(cut) else image
