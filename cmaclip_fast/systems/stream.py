"""One transformer over a class token, the text and the image of each pair, for the systems that fuse early."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmaclip_fast.nn.blocks import SequenceAttention
from cmaclip_fast.nn.layers import Rows
from cmaclip_fast.ops import pack_padded
from cmaclip_fast.types import TEXT, AttentionMaps


@dataclass
class Fused:
    """The tokens of a batch after fusion, as one packed sequence.

    Attributes:
        tokens: `[T, D]`: of each row its class token, its text tokens, its image tokens.
        starts: `[B]`, where each row begins.
        text_tokens: `[B]`, text tokens of each row, 0 where the text is absent.
        weights: for each row `[n, n]`, the last layer's attention, the class token included; None if not asked for.
    """

    tokens: Tensor
    starts: Tensor
    text_tokens: Tensor
    weights: list[Tensor] | None

    def class_tokens(self) -> Tensor:
        """`[B, D]`."""
        return self.tokens[self.starts]

    def text(self, rows: Tensor, positions: Tensor) -> Tensor:
        """The text tokens at the given positions of the given rows, both `[N]`: `[N, D]`."""
        return self.tokens[self.starts[rows] + 1 + positions]

    def image(self, rows: Tensor, positions: Tensor) -> Tensor:
        """As `text`, of the image tokens."""
        return self.tokens[self.starts[rows] + 1 + self.text_tokens[rows] + positions]

    def maps(self) -> AttentionMaps | None:
        """The attention maps over text and image, without the class token."""
        if self.weights is None:
            return None
        return AttentionMaps([weights[1:, 1:] for weights in self.weights], self.text_tokens.long())


class OneStream(nn.Module):
    """A class token, text and image through one transformer encoder, in the manner of BERT."""

    def __init__(self, width: int, depth: int, heads: int, mlp_ratio: float, dropout: float) -> None:
        super().__init__()
        self.class_token = nn.Parameter(torch.empty(width))
        self.type_embedding = nn.Parameter(torch.empty(2, width))
        for parameter in (self.class_token, self.type_embedding):
            nn.init.normal_(parameter, std=0.02)
        self.attention = SequenceAttention(width, depth, heads, mlp_ratio, dropout)
        self.norm = nn.LayerNorm(width)

    def forward(
        self, text: Tensor, lengths: Tensor, image: Tensor, present: Tensor, with_weights: bool = False
    ) -> Fused:
        """`text [B, L, D]`, `lengths [B]`, `image [B, P, D]`, `present [B, 2]`; a missing side has no tokens."""
        first = self.class_token.to(text.dtype).expand(len(text), 1, -1)
        # the class token travels as the first token of a text that is always there
        counts = token_counts(lengths, image.shape[1], present)
        after = counts + counts.new_tensor([1, 0])
        packed, cu_seqlens = pack_padded(torch.cat([first, text], 1), image, after, self.type_embedding)
        rows = Rows(cu_seqlens, 1 + text.shape[1] + image.shape[1])
        weights = None
        if with_weights:
            tokens, weights = self.attention.forward_with_weights(packed, rows)
        else:
            tokens = self.attention(packed, rows)
        return Fused(self.norm(tokens), cu_seqlens[:-1].long(), counts[:, TEXT], weights)


def token_counts(lengths: Tensor, patches: int, present: Tensor) -> Tensor:
    """`[B, 2]` int64: how many text tokens (of `lengths [B]`) and image tokens each row has; 0 where absent."""
    return torch.stack([lengths.long(), torch.full_like(lengths, patches, dtype=torch.int64)], dim=1) * present


def pool_patches(patches: Tensor, grid: tuple[int, int] | None, side: int) -> Tensor:
    """Patch tokens averaged into a coarser grid: `[B, P, W] -> [B, side * side, W]`.

    A picture of another size than the tower's has a square grid; patches that are no grid are averaged as a sequence.
    """
    count = patches.shape[1]
    root = round(count**0.5)
    if grid is None or grid[0] * grid[1] != count:
        grid = (root, root) if root * root == count else None
    features = patches.transpose(1, 2)
    if grid is None:
        return F.adaptive_avg_pool1d(features, side * side).transpose(1, 2)
    return F.adaptive_avg_pool2d(features.unflatten(2, grid), side).flatten(2).transpose(1, 2)


def mask_words(
    tokens: Tensor, lengths: Tensor, share: float | Tensor, mask: int, vocabulary: int
) -> tuple[Tensor, Tensor]:
    """BERT's corruption of words (arXiv 1810.04805, section 3.1): of the chosen ones 80 % become the mask token, 10 %
    another token, 10 % stay.

    Args:
        tokens: `[B, L]`, with a start and an end token, which are never chosen.
        lengths: `[B]`, 0 for a text to leave alone.
        share: how often a word is chosen; a number, or `[B, L]`.

    Returns:
        The corrupted tokens and where words were chosen, both `[B, L]`.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device)
    inner = (position > 0) & (position < lengths[:, None] - 1)
    chosen = inner & (torch.rand(tokens.shape, device=tokens.device) < share)
    draw = torch.rand(tokens.shape, device=tokens.device)
    other = torch.randint_like(tokens, vocabulary)
    corrupted = torch.where(draw < 0.8, mask, torch.where(draw < 0.9, other, tokens))
    return torch.where(chosen, corrupted, tokens), chosen


def mask_token(tokenizer: object) -> int:
    """The token that stands for a hidden word: the tokenizer's own, else its unknown token, else its padding."""
    for name in ("mask", "unknown", "pad"):
        token = getattr(tokenizer, name, None)
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither a mask nor a padding token")
