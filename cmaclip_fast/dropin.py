"""The same speed for a model that a user already has: stock open_clip models and `nn.TransformerEncoder`.

`accelerate` replaces the `forward` of the parts that it knows, on these objects alone: classes, parameters and state
dicts stay as they are. Outputs and gradients stay the same within rounding; what nobody reads is no longer computed:
texts end at their end-of-text token, and where only a global token goes on, the last layer computes only that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer
from torch import Tensor, nn

from cmaclip_fast.errors import InputError
from cmaclip_fast.layers import Layer, Queries, Rows, is_standard, layer_of, run_layers
from cmaclip_fast.towers import layers_of, pack_dense, run_dense

Model = TypeVar("Model", bound=nn.Module)

_STOCK = "_cmaclip_stock"
"""Where an accelerated module says which of its methods are replaced."""


def accelerate(model: Model) -> Model:
    """Makes a model faster in place, in training and inference; `restore` undoes it.

    Accelerated are, anywhere inside the model: open_clip's `CLIP`, `TextTransformer`, `VisionTransformer` and
    `Transformer`, of standard blocks, and `nn.TransformerEncoder` with `batch_first`. Other modules stay as they are.

    A text is read up to its end-of-text token if its tower is causal and pools there; towers that pool another
    position (SigLIP) or read their padding are run whole. Attention with dropout is stock in training. Where an
    `nn.TransformerEncoder` is given a padding mask, its output is 0 at the masked positions, as it is in PyTorch's own
    fast path.

    Returns:
        The same object.

    Raises:
        InputError: nothing in the model can be accelerated; the message says what was found.
    """
    restore(model)
    found = [module for module in model.modules() if _replace(module)]
    if not found:
        reasons = sorted({reason for module in model.modules() if (reason := _why_not(module))})
        known = "open_clip's CLIP models and nn.TransformerEncoder (batch_first, standard layers) can be"
        raise InputError(f"nothing in {type(model).__name__} can be accelerated: {'; '.join(reasons) or known}")
    return model


def restore(model: Model) -> Model:
    """Gives a model its own methods back; the same object."""
    for module in model.modules():
        for name in module.__dict__.pop(_STOCK, ()):
            module.__dict__.pop(name, None)
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether a part of the model runs by this module's methods."""
    return any(_STOCK in module.__dict__ for module in model.modules())


def _replace(module: Any) -> bool:
    methods = dict(_methods(module))
    for name, function in methods.items():
        module.__dict__[name] = MethodType(function, module)
    if methods:
        module.__dict__[_STOCK] = tuple(methods)
    return bool(methods)


def _methods(module: Any) -> Iterator[tuple[str, Callable[..., Any]]]:
    """The methods that take the place of a module's own."""
    if type(module) is CLIP and _ends_known(module, module.text_pool_type) and layers_of(module.transformer):
        yield "encode_text", _encode_text
    elif type(module) is TextTransformer and _can_stop(module):
        yield "forward", _text_forward
    elif type(module) is VisionTransformer and _pools_first(module) and layers_of(module.transformer):
        yield "forward", _visual_forward
    elif type(module) is Transformer and module.batch_first and layers_of(module):
        yield "forward", _transformer_forward
    elif type(module) is nn.TransformerEncoder and not _why_not(module):
        yield "forward", _encoder_forward


def _why_not(module: nn.Module) -> str:
    """Why a module of a known class cannot be accelerated, or ""."""
    if isinstance(module, nn.TransformerEncoder):
        for block in module.layers:
            if not is_standard(block):
                return f"an nn.TransformerEncoder has a {type(block).__name__} with other than standard attention"
            if not cast(Any, block).self_attn.batch_first:
                return "an nn.TransformerEncoder is not batch_first: build it with batch_first=True"
    if isinstance(module, Transformer) and layers_of(module) is None:
        return f"open_clip's {type(module.resblocks[0]).__name__} is not a standard block"
    return ""


def _ends_known(module: Any, pool_type: str) -> bool:
    return module.attn_mask is not None and pool_type in ("argmax", "eos")


def _can_stop(text: TextTransformer) -> bool:
    return text.cls_emb is None and _ends_known(text, text.pool_type) and layers_of(text.transformer) is not None


def _pools_first(visual: VisionTransformer) -> bool:
    return visual.attn_pool is None and visual.pool_type == "tok" and not visual.output_tokens


def _encode_text(self: CLIP, text: Tensor, normalize: bool = False) -> Tensor:
    """In place of `CLIP.encode_text`."""
    layers = layers_of(self.transformer)
    if layers is None:
        return CLIP.encode_text(self, text, normalize)
    features = _pooled_text(self, layers, text, self.text_pool_type, getattr(self, "text_eos_id", None))
    return F.normalize(features, dim=-1) if normalize else features


def _text_forward(self: TextTransformer, text: Tensor) -> Tensor | tuple[Tensor, Tensor]:
    """In place of `TextTransformer.forward`."""
    layers = layers_of(self.transformer)
    if layers is None or self.output_tokens:
        return TextTransformer.forward(self, text)
    return _pooled_text(self, layers, text, self.pool_type, getattr(self, "eos_id", None))


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


def _visual_forward(self: VisionTransformer, x: Tensor) -> Tensor:
    """In place of `VisionTransformer.forward`, where only the class token is read."""
    layers = layers_of(self.transformer)
    if layers is None:
        return VisionTransformer.forward(self, x)
    x = self._embeds(x)
    rows = Rows.equal(len(x), x.shape[1], x.device)
    first = Queries.one_per_row(rows.starts.long())
    x = run_layers(layers, x.flatten(0, 1), rows, False, first, self.transformer.grad_checkpointing)
    x = self.ln_post(x)
    return x if self.proj is None else x @ self.proj


def _transformer_forward(self: Transformer, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
    """In place of `Transformer.forward`: without a mask by the fused operators."""
    if attn_mask is not None or layers_of(self) is None:
        return Transformer.forward(self, x, attn_mask=attn_mask)
    return run_dense(self, x)


def _encoder_forward(
    self: nn.TransformerEncoder,
    src: Tensor,
    mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool | None = None,
) -> Tensor:
    """In place of `nn.TransformerEncoder.forward`: `src [B, N, D]` -> `[B, N, D]`."""
    padding = src_key_padding_mask
    layers = [layer_of(block) for block in self.layers]
    fits = src.ndim == 3 and mask is None and (padding is None or padding.dtype == torch.bool)
    if not fits or None in layers:
        return nn.TransformerEncoder.forward(self, src, mask, padding, is_causal)
    known: list[Layer] = [layer for layer in layers if layer is not None]
    batch, length, width = src.shape
    if padding is None:
        x = run_layers(known, src.flatten(0, 1), Rows.equal(batch, length, src.device)).view_as(src)
        return x if self.norm is None else self.norm(x)
    kept = ~padding
    index = _places(kept)
    rows = Rows.of(kept.sum(1), length)
    x = run_layers(known, src.reshape(-1, width).index_select(0, index), rows)
    if self.norm is not None:
        x = self.norm(x)
    return x.new_zeros(batch * length, width).index_copy(0, index, x).view(batch, length, width)


@torch.compiler.disable
def _places(kept: Tensor) -> Tensor:
    """Where a mask is true, as places in it flattened; outside of compiled graphs, since its size depends on values."""
    return kept.flatten().nonzero()[:, 0]
