"""The two encoders: open_clip's CLIP models, made to give token sequences instead of one embedding each.

Whatever the family, an image becomes `[B, 1 + P, W]` with its global token first, and the texts become packed tokens
`[T, W]`, row after row without padding, the global token of each row last (CLIP's end-of-text token) or first (BERT's).
A causal tower computes nothing after a text's end; one that reads its padding as text gives all its positions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer
from torch import Tensor, nn

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.layers import Layer, Queries, Rows, layer_of, run_layers
from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.nn.plain import (
    can_be_packed,
    classes_are_plain,
    has_own_methods,
    is_bare,
    is_norm,
    is_plain,
    stock_class,
)
from cmaclip_fast.nn.tiny import SubwordEmbedding
from cmaclip_fast.ops import unpad


class ImageTower(Protocol):
    """Gives the tokens of images.

    Attributes:
        width: W, the width of a token.
        grid: rows and columns of patches behind the tokens after the first, or None where they are no grid.
    """

    width: int
    grid: tuple[int, int] | None

    def __call__(self, images: Tensor) -> Tensor:
        """`images [B, 3, H, W]` -> `[B, 1 + P, W]`, the global token first."""
        ...

    def global_tokens(self, images: Tensor) -> Tensor:
        """The global tokens alone, `[B, W]`, at less cost where the family allows it."""
        ...

    def project(self, global_token: Tensor) -> Tensor:
        """`[B, W] -> [B, E]`, into the space where CLIP compares images with texts."""
        ...


class TextTower(Protocol):
    """Gives the tokens of texts.

    Attributes:
        width: W, the width of a token.
        global_first: whether a row's global token is its first, else it is its last.
    """

    width: int
    global_first: bool

    def __call__(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """`tokens [B, L]`, `lengths [B]` -> `[B, L', W]` and how many of the L' belong to each row, `[B]` int32."""
        ...

    def packed(self, tokens: Tensor, lengths: Tensor, capacity: int | None = None) -> tuple[Tensor, Rows]:
        """`tokens [B, L]`, `lengths [B]` (0: no tokens) -> `[T, W]` and where its rows begin.

        With a `capacity`, T is that, at least the number of tokens, and the host does not wait for the device.
        """
        ...

    def global_tokens(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The global tokens alone, `[B, W]`, at less cost where the family allows it."""
        ...

    def project(self, global_token: Tensor) -> Tensor:
        """`[B, W] -> [B, E]`, into the space where CLIP compares images with texts."""
        ...


class ViTImageTower(nn.Module):
    """An open_clip `VisionTransformer`; its own pooling gives the global token."""

    def __init__(self, visual: VisionTransformer) -> None:
        super().__init__()
        self.visual = visual
        self.width = visual.ln_post.normalized_shape[0]
        self.grid = visual.grid_size if visual.attn_pool is None else None

    def forward(self, images: Tensor) -> Tensor:
        x = run_dense(self.visual.transformer, embed_images(self.visual._embeds, images))
        pooled, tokens = self.visual._pool(x)
        if self.visual.final_ln_after_pool and self.visual.attn_pool is None:
            tokens = self.visual.ln_post(tokens)
        return torch.cat([pooled[:, None], tokens], dim=1)

    def global_tokens(self, images: Tensor) -> Tensor:
        visual = self.visual
        if not is_bare(self) or has_own_methods(visual) or visual.attn_pool is not None or visual.pool_type != "tok":
            return self(images)[:, 0]
        layers = layers_of(visual.transformer, images, visual.ln_post)
        if layers is None:
            return self(images)[:, 0]
        x = embed_images(visual._embeds, images)
        rows = Rows.equal(len(x), x.shape[1], x.device)
        first = Queries.one_per_row(rows.starts.long())
        checkpointing = visual.transformer.grad_checkpointing
        return visual.ln_post(run_layers(layers, x.flatten(0, 1), rows, queries=first, checkpointing=checkpointing))

    def project(self, global_token: Tensor) -> Tensor:
        return global_token if self.visual.proj is None else global_token @ self.visual.proj


def embed_images(embed: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """`embed(images)` with open_clip's `_embeds`, which cannot tell the shape of what no image becomes."""
    if images.shape[0] == 0:
        return embed(images.new_zeros(1, *images.shape[1:]))[:0]
    return embed(images)


def layers_of(
    transformer: Transformer, x: Tensor, norm: nn.Module | None = None, embedding: nn.Module | None = None
) -> list[Layer] | None:
    """The layers of an open_clip transformer, or None where packed tokens would not give the same.

    Args:
        x: what the tower is given.
        norm, embedding: the modules before and after it that see packed tokens too.
    """
    if not can_be_packed(x) or (norm is not None and not is_norm(norm)):
        return None
    if embedding is not None and not is_plain(embedding, nn.Embedding, SubwordEmbedding):
        return None
    if not classes_are_plain() or stock_class(transformer) is not Transformer or not is_bare(transformer):
        return None
    layers: list[Layer] = []
    for block in transformer.resblocks:
        layer = layer_of(block)
        if layer is None:
            return None
        layers.append(layer)
    return layers


def run_dense(transformer: Transformer, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """An open_clip transformer over `x [B, N, W]` without padding, by the fused operators where it can be."""
    layers = layers_of(transformer, x) if mask is None and transformer.batch_first and x.ndim == 3 else None
    if layers is None:
        return transformer(x, attn_mask=mask)
    return run_dense_layers(transformer, layers, x)


def run_dense_layers(transformer: Transformer, layers: list[Layer], x: Tensor) -> Tensor:
    """The layers of `transformer` over `x [B, N, W]`, all of it tokens."""
    rows = Rows.equal(len(x), x.shape[1], x.device)
    return run_layers(layers, x.flatten(0, 1), rows, checkpointing=transformer.grad_checkpointing).view_as(x)


class ResNetImageTower(nn.Module):
    """OpenAI's `ModifiedResNet`. Its attention pool is run for every position, not only for the mean token."""

    def __init__(self, visual: ModifiedResNet) -> None:
        super().__init__()
        self.visual = visual
        self.width = visual.output_dim
        side = visual.image_size // 32
        self.grid = (side, side)

    def forward(self, images: Tensor) -> Tensor:
        visual = self.visual
        x = visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            x = layer(x)
        return _attend_everywhere(visual.attnpool, x.flatten(2).transpose(1, 2))

    def global_tokens(self, images: Tensor) -> Tensor:
        return self.visual(images)

    def project(self, global_token: Tensor) -> Tensor:
        return global_token


def _attend_everywhere(pool: AttentionPool2d, patches: Tensor) -> Tensor:
    """`AttentionPool2d` with every token as a query: `[B, P, W] -> [B, 1 + P, W_out]`."""
    x = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
    x = x + pool.positional_embedding.to(x.dtype)
    q, k, v = (
        projection(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    return pool.c_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class TimmImageTower(nn.Module):
    """Any timm image model inside open_clip (SigLIP, EVA, ConvNeXt, ...).

    The global token is the trunk's own pooling. Where open_clip pools outside the trunk (`abs_attn`, `rot_attn`), it
    is the mean of the patches.
    """

    def __init__(self, visual: TimmModel) -> None:
        super().__init__()
        self.visual = visual
        self.grid: tuple[int, int] | None = None
        with torch.no_grad():
            # shapes alone are computed, whatever the size of the pictures
            picture = torch.zeros(1, 3, *visual.image_size, device="meta")
            self.width = self._tokens(evaluation_copy(visual, device="meta"), picture).shape[-1]

    def forward(self, images: Tensor) -> Tensor:
        return self._tokens(self.visual, images)

    def _tokens(self, visual: TimmModel, images: Tensor) -> Tensor:
        trunk = visual.trunk
        # convolutions on the CPU are faster with the channels last
        features = trunk.forward_features(images.contiguous(memory_format=torch.channels_last))
        if features.ndim == 4:
            tokens = features if features.shape[-1] == trunk.num_features else features.permute(0, 2, 3, 1)
            self.grid = (tokens.shape[1], tokens.shape[2])
            tokens = tokens.flatten(1, 2)
        else:
            tokens = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
            self.grid = getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
        pooled = (
            tokens.mean(1)
            if "pool" in dict(visual.head.named_children())
            else trunk.forward_head(features, pre_logits=True)
        )
        return torch.cat([pooled[:, None], tokens], dim=1)

    def global_tokens(self, images: Tensor) -> Tensor:
        return self(images)[:, 0]

    def project(self, global_token: Tensor) -> Tensor:
        return self.visual.head(global_token)


class ClipTextTower(nn.Module):
    """An open_clip `TextTransformer`.

    A causal tower is run on packed tokens. One that pools its last position (SigLIP, CLIPA) reads its padding as text,
    so all its positions are tokens; CoCa's class token is put behind the text.
    """

    def __init__(self, text: TextTransformer) -> None:
        super().__init__()
        self.text = text
        self.width = text.width
        self.global_first = text.pool_type == "first" and text.cls_emb is None
        self.stops_at_end = text.attn_mask is not None and text.cls_emb is None and text.pool_type != "last"

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        lengths = lengths.clamp(min=1)
        if not self.stops_at_end:
            return self._dense(tokens, lengths)
        longest = _longest(tokens, lengths)
        packed, _ = self.packed(tokens[:, :longest], lengths)
        kept = torch.arange(longest, device=tokens.device) < lengths[:, None]
        dense = packed.new_zeros(len(tokens), longest, self.width).masked_scatter(kept[..., None], packed)
        return dense, lengths

    def packed(self, tokens: Tensor, lengths: Tensor, capacity: int | None = None) -> tuple[Tensor, Rows]:
        if not is_bare(self):  # hooks are called with all tokens
            dense, counts = self(tokens, lengths)
            return pack_dense(dense, counts.where(lengths > 0, 0), capacity)
        if not self.stops_at_end:
            dense, counts = self._dense(tokens, lengths)
            return pack_dense(dense, counts.where(lengths > 0, 0), capacity)
        return self._causal(tokens, lengths, capacity, only_global=False)

    def global_tokens(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        lengths = lengths.clamp(min=1)
        if not self.stops_at_end or self.global_first or not is_bare(self):
            dense, counts = self(tokens, lengths)
            return dense[torch.arange(len(dense), device=dense.device), counts.long() - 1]
        return self._causal(tokens, lengths, None, only_global=True)[0]

    def project(self, global_token: Tensor) -> Tensor:
        projection = self.text.text_projection
        if projection is None:
            return global_token
        return projection(global_token) if isinstance(projection, nn.Linear) else global_token @ projection

    def _causal(self, tokens: Tensor, lengths: Tensor, capacity: int | None, only_global: bool) -> tuple[Tensor, Rows]:
        text = self.text
        layers = layers_of(text.transformer, tokens, text.ln_final, text.token_embedding)
        if has_own_methods(text):
            layers = None
        if capacity is None:
            tokens = tokens[:, : _longest(tokens, lengths)]
        x, mask = text._embeds(tokens)
        if layers is None:
            size = tokens.shape[1]
            dense = text.ln_final(text.transformer(x, attn_mask=mask[:size, :size]))
            packed, rows = pack_dense(dense, lengths, capacity)
            last = (rows.starts + lengths - 1).long()
            return (packed.index_select(0, last), rows) if only_global else (packed, rows)
        packed, rows = pack_dense(x, lengths, capacity)
        ends = Queries.one_per_row((rows.starts + lengths - 1).long()) if only_global else None
        checkpointing = text.transformer.grad_checkpointing
        return text.ln_final(run_layers(layers, packed, rows, True, ends, checkpointing)), rows

    def _dense(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """All positions, `[B, L', W]`, for a tower that reads its padding."""
        if tokens.shape[0] == 0:  # attention of PyTorch cannot tell the shape of a mask for no rows
            dense, counts = self._dense(tokens.new_zeros(1, tokens.shape[1]), lengths.new_ones(1))
            return dense[:0], counts[:0]
        x, mask = self.text._embeds(tokens)
        x = self.text.ln_final(run_dense(self.text.transformer, x, mask))
        if self.text.cls_emb is not None:
            text, class_token = x[:, :-1], x[:, -1:]
            x = torch.cat([text, torch.zeros_like(class_token)], dim=1)
            index = lengths.long()[:, None, None].expand(-1, 1, x.shape[-1])
            return x.scatter(1, index, class_token), lengths + 1
        return x, torch.full_like(lengths, tokens.shape[1]) if self.text.pool_type == "last" else lengths


def pack_dense(dense: Tensor, counts: Tensor, capacity: int | None = None) -> tuple[Tensor, Rows]:
    """The first `counts [B]` tokens of each row of `dense [B, L, W]`, packed: `[T, W]`."""
    pack = unpad if capacity is not None else _unpad_uncompiled
    packed, cu_seqlens = pack(dense, counts, capacity=capacity)
    return packed, Rows(cu_seqlens, dense.shape[1])


# how many tokens come out depends on values, so this stands between compiled graphs
_unpad_uncompiled = torch.compiler.disable(unpad)


def _longest(tokens: Tensor, lengths: Tensor) -> int:
    """How many tokens the longest text has, at least 1; a compiled graph, which cannot look, takes all there are."""
    return tokens.shape[1] if torch.compiler.is_compiling() or not len(tokens) else max(1, int(lengths.max()))


class HuggingFaceTextTower(nn.Module):
    """A Hugging Face encoder inside open_clip; its pooler gives the global token, put before the tokens."""

    global_first = True

    def __init__(self, text: HFTextEncoder) -> None:
        super().__init__()
        self.text = text
        self.width = text.config.hidden_size

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self._encode(tokens[:, : _longest(tokens, lengths)], lengths)

    def _encode(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        mask = (torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]).long()
        out = self.text.transformer(input_ids=tokens, attention_mask=mask)
        pooled = self.text.pooler(out, mask)
        return torch.cat([pooled[:, None], out.last_hidden_state], dim=1), lengths + 1

    def packed(self, tokens: Tensor, lengths: Tensor, capacity: int | None = None) -> tuple[Tensor, Rows]:
        encode = self if capacity is None else self._encode  # with a capacity nothing may be looked at
        dense, counts = encode(tokens, lengths)
        return pack_dense(dense, counts.where(lengths > 0, 0), capacity)

    def global_tokens(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        return self(tokens, lengths)[0][:, 0]

    def project(self, global_token: Tensor) -> Tensor:
        return self.text.proj(global_token)


def image_tower(visual: nn.Module) -> ViTImageTower | ResNetImageTower | TimmImageTower:
    """The image tower of an open_clip model, from its `visual`.

    Raises:
        InputError: the family is unknown.
    """
    if isinstance(visual, VisionTransformer):
        return ViTImageTower(visual)
    if isinstance(visual, ModifiedResNet):
        return ResNetImageTower(visual)
    if isinstance(visual, TimmModel):
        return TimmImageTower(visual)
    raise InputError(f"image tower {type(visual).__name__} is not supported: use a ViT, a ResNet or a timm model")


def text_tower(text: nn.Module) -> ClipTextTower | HuggingFaceTextTower:
    """The text tower of an open_clip model, from its `text` (made with `force_custom_text`).

    Raises:
        InputError: the family is unknown.
    """
    if isinstance(text, HFTextEncoder):
        return HuggingFaceTextTower(text)
    if isinstance(text, TextTransformer):
        return ClipTextTower(text)
    raise InputError(f"text tower {type(text).__name__} is not supported: use a CLIP or Hugging Face text encoder")
