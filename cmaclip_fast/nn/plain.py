"""Which modules are exactly the known ones, so that reading their weights is the same as calling them.

Users change models: they register hooks, replace a linear module by an adapter, override a `forward`. PyTorch calls a
module for all of that to happen; code that reads a module's weights must look first. These checks run at each call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.model import CLIP
from open_clip.transformer import (
    LayerNorm,
    LayerNormFp32,
    LayerScale,
    QuickGELU,
    ResidualAttentionBlock,
    TextTransformer,
    Transformer,
    VisionTransformer,
)
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules import module as _torch_module
from torch.nn.utils import parametrize

from cmaclip_fast.nn.low_rank import LowRank

NORMS = (nn.LayerNorm, LayerNorm, LayerNormFp32, nn.RMSNorm)
"""Norms of each token by itself, if over one dimension."""
_ACTIVATIONS = (nn.GELU, QuickGELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU, nn.LeakyReLU, nn.Mish)
_ACTIVATION_FUNCTIONS = (F.relu, F.gelu, F.silu, torch.relu, torch.tanh, torch.sigmoid)

_METHODS: dict[type[nn.Module], tuple[str, ...]] = {
    CLIP: ("encode_text", "encode_image"),
    TextTransformer: ("forward", "_embeds"),
    VisionTransformer: ("forward", "_embeds", "_pool", "_global_pool"),
    Transformer: ("forward", "get_cast_dtype"),
    ResidualAttentionBlock: ("forward", "attention", "get_weight_dtype"),
    nn.TransformerEncoder: ("forward",),
    nn.TransformerEncoderLayer: ("forward", "_sa_block", "_ff_block"),
    nn.MultiheadAttention: ("forward",),
    **dict.fromkeys(
        (LowRank, nn.Linear, nn.Embedding, nn.Sequential, nn.Dropout, nn.Identity, LayerScale, *NORMS, *_ACTIVATIONS),
        ("forward",),
    ),
}
"""The methods that make a known class what it is."""
_ORIGINALS = [(cls, name, getattr(cls, name)) for cls, names in _METHODS.items() for name in names]
_OVERRIDDEN = frozenset(name for names in _METHODS.values() for name in names)


def classes_are_plain() -> bool:
    """Whether no hook on all modules is registered and nobody has replaced a method of a known class."""
    if torch.compiler.is_compiling():
        return True
    return not _torch_module._has_any_global_hook() and all(
        getattr(cls, name) is method for cls, name, method in _ORIGINALS
    )


def has_own_methods(module: nn.Module) -> bool:
    """Whether one of the methods in question was set on this object, as in `module.forward = function`."""
    return not _OVERRIDDEN.isdisjoint(module.__dict__)


def is_bare(module: nn.Module) -> bool:
    """Whether a call of the module runs the `forward` of its class and nothing else."""
    state = module.__dict__
    return not (
        state["_forward_hooks"]
        or state["_forward_pre_hooks"]
        or state["_backward_hooks"]
        or state["_backward_pre_hooks"]
        or state.get("_compiled_call_impl")
        or has_own_methods(module)
    )


def is_plain(module: object, *classes: type[nn.Module]) -> bool:
    """Whether a module is of exactly one of these classes and bare."""
    return type(module) in classes and is_bare(module)  # type: ignore[arg-type]


def stock_class(module: nn.Module) -> type[nn.Module]:
    """A module's class, or for one that `accelerate` has changed the class that it had."""
    cls = type(module)
    return cls.__dict__.get("_cmaclip_stock", cls)


def is_linear(module: object) -> bool:
    """Whether a call of the module is `F.linear` with its weight and bias.

    That goes for the classes too that PyTorch's parametrizations make.
    """
    cls = type(module)
    if cls is not nn.Linear and not (
        issubclass(cls, nn.Linear) and cls.forward is nn.Linear.forward and cls.__call__ is nn.Module.__call__
    ):
        return False
    return is_bare(module)  # type: ignore[arg-type]


def is_attention(module: Any) -> bool:
    """Whether a module is attention of PyTorch, its weights parametrized by nothing but our low-rank changes."""
    if not parametrize.is_parametrized(module):
        return is_plain(module, nn.MultiheadAttention)
    changes = [change for changes in module.parametrizations.values() for change in changes]
    known = type(module).__base__ is nn.MultiheadAttention and all(is_plain(change, LowRank) for change in changes)
    return known and is_bare(module)


def is_norm(module: object) -> bool:
    """Whether a module is a known norm of each token by itself."""
    return is_plain(module, *NORMS) and len(module.normalized_shape) == 1  # type: ignore[attr-defined]


def is_activation(function: object) -> bool:
    """Whether a function or module is a known one of each value by itself that does not change what it is given."""
    if isinstance(function, nn.Module):
        return is_plain(function, *_ACTIVATIONS) and not getattr(function, "inplace", False)
    return function in _ACTIVATION_FUNCTIONS


def is_ordinary(*tensors: Tensor | None) -> bool:
    """Whether these are tensors of PyTorch's own class: no quantized or distributed ones, none of a tracer."""
    return all(x is None or type(x) in (Tensor, nn.Parameter) for x in tensors)


def can_be_packed(x: Tensor) -> bool:
    """Whether rows of an input may be packed, which looks at values and runs operators of our own.

    Not so for empty batches, on the meta device, and under tracing, export and transforms such as `torch.func.vmap`.
    """
    if torch.compiler.is_compiling():
        return not torch.compiler.is_exporting()
    return (
        is_ordinary(x)
        and not x.is_nested
        and x.device.type != "meta"
        and x.numel() > 0
        and not torch.jit.is_tracing()
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is None
        and forward_ad._current_level < 0
    )


def acts_on_tokens(module: nn.Module) -> bool:
    """Whether a call of the module does the same to packed tokens, being linear, with low-rank adapters or not."""
    return is_linear(module) or _is_low_rank_linear(module)


def _is_low_rank_linear(module: Any) -> bool:
    """Whether a module is peft's `lora.Linear` over a linear module, with nothing else added."""
    if not _is_of_peft(module, "Linear") or not is_bare(module) or module.lora_variant:
        return False
    inner = (*module.lora_A.values(), *module.lora_B.values())
    return (
        is_linear(module.base_layer)
        and all(is_plain(part, nn.Linear) for part in inner)
        and all(is_plain(part, nn.Identity, nn.Dropout) for part in module.lora_dropout.values())
    )


def is_attention_of_peft(module: object) -> bool:
    """Whether a module is peft's `lora.MultiheadAttention`, in whatever state."""
    return _is_of_peft(module, "MultiheadAttention")


def is_low_rank_attention(module: Any) -> bool:
    """Whether a module is peft's `lora.MultiheadAttention` over a plain one, with adapters that are in use."""
    return (
        is_attention_of_peft(module)
        and is_bare(module)
        and is_plain(module.base_layer, nn.MultiheadAttention)
        and _is_low_rank_linear(module.base_layer.out_proj)
        and module.base_layer.out_proj.active_adapters == module.active_adapters
        and not (module.merged or module.disable_adapters)
    )


def _is_of_peft(module: object, name: str) -> bool:
    cls: Callable[..., Any] = type(module)
    return cls.__module__ == "peft.tuners.lora.layer" and cls.__name__ == name
