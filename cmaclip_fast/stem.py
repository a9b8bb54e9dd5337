"""A convolutional stem in place of a ViT's patch embedding, for small data (arXiv 2106.14881)."""

from __future__ import annotations

from torch import Tensor, nn


class ConvStem(nn.Module):
    """`[B, 3, H, W] -> [B, width, H / 16, W / 16]`."""

    stride = 16

    def __init__(self, width: int) -> None:
        super().__init__()
        sizes = [3, 32, 64, 128, width]
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(nn.Conv2d(a, b, 3, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
                for a, b in zip(sizes, sizes[1:], strict=False)
            )
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.blocks(images)
