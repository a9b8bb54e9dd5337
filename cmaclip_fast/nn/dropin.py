"""The same speed for a model that a user already has: stock open_clip models and `nn.TransformerEncoder`.

`accelerate` gives the parts that it knows a subclass of their own class, on these objects alone: parameters, state
dicts and `isinstance` stay as they are. Outputs and gradients stay the same within rounding; what nobody reads is no
longer computed: texts end at their end-of-text token, and where only a global token is used afterwards, the last layer
computes only that. Modified modules are detected at each call and run unaccelerated (`plain.py`).
"""

from __future__ import annotations

from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import CustomResidualAttentionBlock, TextTransformer, Transformer, VisionTransformer
from torch import Tensor, nn

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.layers import Layer, Queries, Rows, has_fused_projection, layer_of, run_layers
from cmaclip_fast.nn.plain import can_be_packed, classes_are_plain, has_own_methods, is_norm, stock_class
from cmaclip_fast.nn.towers import embed_images, layers_of, pack_dense, run_dense_layers

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Makes a model faster in place, in training and inference; `restore` undoes it.

    Accelerated are, anywhere inside the model: open_clip's `CLIP`, `TextTransformer`, `VisionTransformer` and
    `Transformer`, of standard blocks, and `nn.TransformerEncoder` with `batch_first`. Other modules stay as they are.

    A text is read up to its end-of-text token if its tower is causal and pools there; towers that pool another
    position (SigLIP) or read their padding are run whole. Attention with dropout is stock in training. Where an
    `nn.TransformerEncoder` is given a padding mask, its output is 0 at the masked positions, as it is in PyTorch's own
    fast path.

    Hooks, replaced modules and methods, added before or after, do what they do in the stock model: a tower with one
    inside runs as stock. LoRA by peft on the linear modules and the attention of an open_clip tower stays fast.
    Copies, pickles and `torch.save` of an accelerated model are accelerated; traced and exported it is stock.

    Returns:
        The same object.

    Raises:
        InputError: nothing in the model can be accelerated; the message says what was found.
    """
    restore(model)
    found = [(module, cls) for module in model.modules() if (cls := _accelerated_class(module)) is not None]
    if not found:
        reasons = sorted({reason for module in model.modules() if (reason := _why_not(module))})
        known = "open_clip's CLIP models and nn.TransformerEncoder (batch_first, standard layers) can be"
        raise InputError(f"nothing in {type(model).__name__} can be accelerated: {'; '.join(reasons) or known}")
    for module, cls in found:
        module.__class__ = cls
    return model


def restore(model: Model) -> Model:
    """Gives a model its own methods back; the same object."""
    for module in model.modules():
        module.__class__ = stock_class(module)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether a part of the model runs by this module's methods."""
    return any(isinstance(module, _Accelerated) for module in model.modules())


def _accelerated_class(module: Any) -> type[nn.Module] | None:
    """The class that a module gets, or None where it cannot be accelerated."""
    transformer = getattr(module, "transformer", module)
    if type(module) is nn.TransformerEncoder:
        return None if _why_not(module) else AcceleratedTransformerEncoder
    if type(transformer) is not Transformer or _why_not(transformer):
        return None
    if type(module) is CLIP and _ends_known(module, module.text_pool_type):
        return AcceleratedCLIP
    if type(module) is TextTransformer and module.cls_emb is None and _ends_known(module, module.pool_type):
        return AcceleratedTextTransformer
    if type(module) is VisionTransformer and _pools_first(module):
        return AcceleratedVisionTransformer
    return AcceleratedTransformer if type(module) is Transformer and module.batch_first else None


def _why_not(module: nn.Module) -> str:
    """Why a module of a known class can never be accelerated, or ""; hooks and the like, which can go, do not count."""
    if isinstance(module, nn.TransformerEncoder):
        for block in module.layers:
            attention = getattr(block, "self_attn", None)
            if isinstance(attention, nn.MultiheadAttention) and not has_fused_projection(attention):
                return f"an nn.TransformerEncoder has a {type(block).__name__} with other than standard attention"
            if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
                return "an nn.TransformerEncoder is not batch_first: build it with batch_first=True"
    if isinstance(module, Transformer) and isinstance(module.resblocks[0], CustomResidualAttentionBlock):
        return "open_clip's CustomResidualAttentionBlock is not a standard block"
    return ""


def _ends_known(module: Any, pool_type: str) -> bool:
    return module.attn_mask is not None and pool_type in ("argmax", "eos")


def _pools_first(visual: VisionTransformer) -> bool:
    return visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens


class _Accelerated:
    """What the classes below have in common; each stands before the class that it replaces."""

    def __prepare_scriptable__(self) -> nn.Module:
        raise InputError("torch.jit.script cannot compile an accelerated model: call cmaclip_fast.restore first")


class AcceleratedCLIP(_Accelerated, CLIP):
    """open_clip's `CLIP` with packed texts."""

    _cmaclip_stock = CLIP

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        known = _ends_known(self, self.text_pool_type) and not has_own_methods(self)
        layers = layers_of(self.transformer, text, self.ln_final, self.token_embedding) if known else None
        if layers is None:
            return super().encode_text(text, normalize)
        features = _pooled_text(self, layers, text, self.text_pool_type, getattr(self, "text_eos_id", None))
        return F.normalize(features, dim=-1) if normalize else features


class AcceleratedTextTransformer(_Accelerated, TextTransformer):
    """open_clip's `TextTransformer` on packed texts."""

    _cmaclip_stock = TextTransformer

    def forward(self, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        known = _ends_known(self, self.pool_type) and self.cls_emb is None and not self.output_tokens
        fits = known and not has_own_methods(self)
        layers = layers_of(self.transformer, text, self.ln_final, self.token_embedding) if fits else None
        if layers is None:
            return super().forward(text)
        return _pooled_text(self, layers, text, self.pool_type, getattr(self, "eos_id", None))


class AcceleratedVisionTransformer(_Accelerated, VisionTransformer):
    """open_clip's `VisionTransformer` where only the class token is read."""

    _cmaclip_stock = VisionTransformer

    def _embeds(self, x: Tensor) -> Tensor:
        return embed_images(super()._embeds, x)

    def forward(self, x: Tensor) -> Tensor:
        fits = _pools_first(self) and not has_own_methods(self)
        layers = layers_of(self.transformer, x, self.ln_post) if fits else None
        if layers is None:
            return super().forward(x)
        x = self._embeds(x)
        rows = Rows.equal(len(x), x.shape[1], x.device)
        first = Queries.one_per_row(rows.starts.long())
        x = run_layers(layers, x.flatten(0, 1), rows, False, first, self.transformer.grad_checkpointing)
        x = self.ln_post(x)
        return x if self.proj is None else x @ self.proj


class AcceleratedTransformer(_Accelerated, Transformer):
    """open_clip's `Transformer`, without a mask by the fused operators."""

    _cmaclip_stock = Transformer

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        layers = layers_of(self, x) if attn_mask is None and x.ndim == 3 else None
        if layers is None:
            return super().forward(x, attn_mask=attn_mask)
        return run_dense_layers(self, layers, x)


class AcceleratedTransformerEncoder(_Accelerated, nn.TransformerEncoder):
    """`nn.TransformerEncoder` on packed tokens."""

    _cmaclip_stock = nn.TransformerEncoder

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """`src [B, N, D]` -> `[B, N, D]`."""
        # a mask of no tokens says nothing, and PyTorch cannot tell its shape
        padding = src_key_padding_mask if src.numel() else None
        layers = None if mask is not None or is_causal else self._layers(src, padding)
        if layers is None:
            return super().forward(src, mask, padding, is_causal)
        batch, length, width = src.shape
        if padding is None:
            x = run_layers(layers, src.flatten(0, 1), Rows.equal(batch, length, src.device)).view_as(src)
            return x if self.norm is None else self.norm(x)
        kept = ~padding
        index = _places(kept)
        rows = Rows.of(kept.sum(1), length)
        x = run_layers(layers, src.reshape(-1, width).index_select(0, index), rows)
        if self.norm is not None:
            x = self.norm(x)
        return x.new_zeros(batch * length, width).index_copy(0, index, x).view(batch, length, width)

    def _layers(self, src: Tensor, padding: Tensor | None) -> list[Layer] | None:
        """The layers, or None where packed tokens would not give the same."""
        if not (can_be_packed(src) and src.ndim == 3 and classes_are_plain()):
            return None
        if padding is not None and (padding.dtype != torch.bool or padding.shape != src.shape[:2]):
            return None
        if self.norm is not None and not is_norm(self.norm):
            return None
        layers = [layer_of(block) for block in self.layers]
        return None if None in layers else cast(list[Layer], layers)


def _pooled_text(tower: Any, layers: list[Layer], text: Tensor, pool_type: str, end: Any) -> Tensor:
    """The projected end-of-text token of `text [B, L]`: `[B, E]`."""
    # the position that open_clip pools: the highest token, or the first end token
    position = (text if pool_type == "argmax" else text.eq(end).int()).argmax(-1)
    counts = (position + 1).int()
    longest = text.shape[1] if torch.compiler.is_compiling() else int(counts.max())
    dtype = tower.transformer.get_cast_dtype()
    embedded = tower.token_embedding(text[:, :longest]).to(dtype) + tower.positional_embedding[:longest].to(dtype)
    packed, rows = pack_dense(embedded, counts)
    ends = Queries.one_per_row((rows.starts + position).long())
    x = tower.ln_final(run_layers(layers, packed, rows, True, ends, tower.transformer.grad_checkpointing))
    projection = tower.text_projection
    if projection is None:
        return x
    return projection(x) if isinstance(projection, nn.Linear) else x @ projection


@torch.compiler.disable
def _places(kept: Tensor) -> Tensor:
    """Where a mask is true, as places in it flattened; outside of compiled graphs, since its size depends on values."""
    return kept.flatten().nonzero()[:, 0]
