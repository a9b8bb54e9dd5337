"""`tiny`: a small CLIP of ours whose first layers suit a few thousand pairs and a CPU.

The towers are open_clip's, so they are read, saved and accelerated as any other. Three things differ at their entrance:
a residual convolutional stem stands for the patch embedding (arXiv 2106.14881), the class token starts from the mean of
the patches, and the embedding of a token is made of those of its character n-grams (arXiv 1607.04606), with the sum of
the words put on the end-of-text token.
"""

from __future__ import annotations

import math
import zlib

import torch
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

STRIDE = 16
"""Pixels a side of what a patch token stands for."""

_WIDTH, _HEADS = 128, 4
_STEM, _BLOCKS = (16, 32, 96, 192), (1, 1, 2)
_BUCKETS = 4096
_NGRAMS = (3, 4, 5)
_MOST_NGRAMS = 36


class TinyCLIP(nn.Module):
    """The two towers of `tiny` with random weights, under the names that open_clip's models give them."""

    def __init__(self, image_size: int, context_length: int, pieces: list[str], end_token: int) -> None:
        """
        Args:
            image_size: pixels a side, a multiple of 16.
            context_length: most tokens of a text.
            pieces: what each token stands for; empty for special tokens.
            end_token: the end-of-text token.

        Raises:
            ValueError: an image size that is not a multiple of 16.
        """
        super().__init__()
        if image_size % STRIDE:
            raise ValueError(f"image_size {image_size} is not a multiple of {STRIDE}")
        shape = {"width": _WIDTH, "layers": 1, "heads": _HEADS, "output_dim": _WIDTH}
        self.visual = PooledVisionTransformer(image_size, STRIDE, mlp_ratio=4.0, no_ln_pre=True, **shape)
        self.visual.conv1 = ConvStem(_WIDTH)
        nn.init.normal_(self.visual.class_embedding, std=0.02)
        nn.init.normal_(self.visual.positional_embedding, std=0.02)
        self.text = TextTransformer(context_length, len(pieces), **shape)
        self.text.token_embedding = SubwordEmbedding(pieces, _WIDTH, end_token)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))


class PooledVisionTransformer(VisionTransformer):
    """A `VisionTransformer` whose class token starts from the mean of the patches, for pictures of any size."""

    def _embeds(self, x: Tensor) -> Tensor:
        grid = self.conv1(x)
        patches = grid.flatten(2).transpose(1, 2)
        first = self.class_embedding + patches.mean(1, keepdim=True)
        return self.ln_pre(torch.cat([first, patches], dim=1) + self._positions(grid.shape[2], grid.shape[3]))

    def _positions(self, rows: int, columns: int) -> Tensor:
        """`[1 + rows * columns, width]`, interpolated where the grid is not the one that was learnt."""
        if (rows, columns) == self.grid_size:
            return self.positional_embedding
        learnt = self.positional_embedding[1:].T.view(1, -1, *self.grid_size)
        resized = F.interpolate(learnt, (rows, columns), mode="bilinear", align_corners=False)
        return torch.cat([self.positional_embedding[:1], resized[0].flatten(1).T])


class ConvStem(nn.Module):
    """`[B, 3, H, W] -> [B, width, H / 16, W / 16]`: one strided convolution, then residual stages of stride 2."""

    def __init__(self, width: int) -> None:
        super().__init__()
        first, *rest = _STEM
        layers: list[nn.Module] = [
            nn.Conv2d(3, first, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
        ]
        for before, after, blocks in zip(_STEM[:-1], rest, _BLOCKS, strict=True):
            layers += [ResidualBlock(before, after, 2)]
            layers += [ResidualBlock(after, after, 1) for _ in range(blocks - 1)]
        self.stages = nn.Sequential(*layers)
        self.projection = nn.Conv2d(rest[-1], width, 1)

    def forward(self, images: Tensor) -> Tensor:
        # channels last is the order that convolutions on a CPU compute in
        return self.projection(self.stages(images.contiguous(memory_format=torch.channels_last)))


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        nn.init.constant_(self.norm2.weight, 0.5)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride), nn.Conv2d(before, after, 1, bias=False), nn.BatchNorm2d(after)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class SubwordEmbedding(nn.Module):
    """Token embeddings that share what their spellings share: `[B, L] int64 -> [B, L, width]`.

    A token is the sum of a vector of its own and those of its n-grams of 3 to 5 characters, hashed into a table, over
    the root of their number. The end-of-text token gets the same sum over the words before it, so that a text of a few
    words is understood before attention has learnt anything.
    """

    token_ngrams: Tensor

    def __init__(self, pieces: list[str], width: int, end_token: int, dropout: float = 0.4) -> None:
        """
        Args:
            dropout: how often each vector of a token's sum is left out in training.
        """
        super().__init__()
        self.end_token = end_token
        self.dropout = dropout
        self.num_embeddings, self.embedding_dim = len(pieces), width
        # row 0 of the table is 'nothing', then a row for each token, then the hashed n-grams
        first = 1 + len(pieces)
        rows = [[1 + token, *(first + n for n in hashed_ngrams(piece))] for token, piece in enumerate(pieces)]
        longest = max(map(len, rows))
        table = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        self.register_buffer("token_ngrams", table, persistent=False)
        self.weight = nn.Parameter(torch.randn(first + _BUCKETS, width) * 0.2)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = self.token_ngrams[tokens]
        if self.training and self.dropout:
            special = rows[..., 1:].amax(-1, keepdim=True) == 0
            rows = rows * ((torch.rand(rows.shape, device=rows.device) >= self.dropout) | special)
        count = (rows > 0).sum(-1, keepdim=True).clamp(min=1)
        summed = F.embedding_bag(rows.flatten(0, 1), self.weight, mode="sum", padding_idx=0).view(*tokens.shape, -1)
        x = summed * count.to(summed.dtype).rsqrt()
        is_end = (tokens == self.end_token).unsqueeze(-1)
        inside = ~is_end & (is_end.cumsum(1) == 0)
        inside[:, 0] = False
        words = inside.sum(1, keepdim=True).clamp(min=1)
        return x + is_end * (x * inside).sum(1, keepdim=True) * words.to(x.dtype).rsqrt()


def hashed_ngrams(piece: str) -> list[int]:
    """The hash table's rows of the n-grams of 3 to 5 characters of a token, its ends marked; none of a special one."""
    if not piece:
        return []
    marked = f"<{piece}>"
    ngrams = [marked[i : i + n] for n in _NGRAMS for i in range(len(marked) - n + 1) if n < len(marked)]
    return [zlib.crc32(ngram.encode()) % _BUCKETS for ngram in ngrams[:_MOST_NGRAMS]]
