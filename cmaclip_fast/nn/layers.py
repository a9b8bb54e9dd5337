"""Transformer layers over packed tokens, with the weights that they find in the modules of other libraries.

A layer is read from its module at each call, so that a state dict, an optimizer or a distributed wrapper sees nothing
else than the module; and only where reading is the same as calling (`plain.py`). Gradients keep less than autograd
would: the activation and the normalised tokens, which the next product needs for its weights' gradient, are computed
again from what went into them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from open_clip.transformer import LayerScale, ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from cmaclip_fast.nn.laid_out import linear
from cmaclip_fast.nn.plain import (
    acts_on_tokens,
    is_activation,
    is_attention,
    is_attention_of_peft,
    is_linear,
    is_low_rank_attention,
    is_norm,
    is_ordinary,
    is_plain,
)
from cmaclip_fast.ops import derivatives, dispatch, epilogue, packed_attention

_VALUES_AT_ONCE = 1_250_000
"""Values of packed tokens that go through all layers together on a CPU without gradients, 32 images of ViT-B-32: with
more, what lies between the layers falls out of the caches and takes new memory at each step."""


@dataclass
class Rows:
    """Where the rows of packed tokens `[T, D]` begin and end.

    Attributes:
        cu_seqlens: `[B + 1]` int32, from 0; row b is `tokens[cu_seqlens[b]:cu_seqlens[b + 1]]`.
        longest: at least the longest row's number of tokens.
    """

    cu_seqlens: Tensor
    longest: int

    @classmethod
    def of(cls, counts: Tensor, longest: int) -> Rows:
        """Rows of `counts [B]` tokens."""
        return cls(F.pad(counts.cumsum(0, dtype=torch.int32), (1, 0)), longest)

    @classmethod
    def equal(cls, number: int, length: int, device: torch.device) -> Rows:
        """`number` rows of `length` tokens each."""
        return cls(torch.arange(number + 1, dtype=torch.int32, device=device) * length, length)

    @property
    def starts(self) -> Tensor:
        """`[B]`, the first token of each row."""
        return self.cu_seqlens[:-1]

    def part(self, begin: int, end: int) -> tuple[Rows, slice]:
        """Rows `begin:end` alone, and where their tokens are."""
        first, last = int(self.cu_seqlens[begin]), int(self.cu_seqlens[end])
        return Rows(self.cu_seqlens[begin : end + 1] - first, self.longest), slice(first, last)


@dataclass
class Queries:
    """The tokens that a layer is computed for, where not all go on.

    Attributes:
        index: `[Q]` int64, their places among the packed tokens, row by row.
        rows: which of them are of which row; attention lets each see its whole row.
    """

    index: Tensor
    rows: Rows

    @classmethod
    def one_per_row(cls, index: Tensor) -> Queries:
        """One token of each row: `index [B]`."""
        return cls(index, Rows.equal(len(index), 1, index.device))


class Weights(NamedTuple):
    """Of a linear product: `weight [N, D]`, `bias [N]` or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass
class Layer:
    """One transformer layer, as what it is made of.

    Attributes:
        heads: attention heads.
        norm_first: whether a norm stands before attention and MLP (pre-norm) or after their sums (post-norm).
        norm_attention, norm_mlp: the two norms.
        qkv: the fused projection, `[3 * D, D]`.
        out: projection of the attended tokens.
        expand, activation, contract: the MLP; a product is given by its weights, or as a module to be called.
        after_attention, after_mlp: what happens to each branch before it is added: dropout, layer scale.
        inside_mlp: dropout between activation and second product, or None.
    """

    heads: int
    norm_first: bool
    norm_attention: nn.Module
    norm_mlp: nn.Module
    qkv: Weights
    out: Weights
    expand: Weights | nn.Module
    activation: Callable[[Tensor], Tensor]
    contract: Weights | nn.Module
    after_attention: Callable[[Tensor], Tensor] | None = None
    after_mlp: Callable[[Tensor], Tensor] | None = None
    inside_mlp: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, rows: Rows, causal: bool = False, queries: Queries | None = None) -> Tensor:
        """`x [T, D]` -> `[T, D]`, or `[Q, D]`, the same for the queries alone.

        A causal layer takes one query a row, the row's last token.
        """
        if self.norm_first:
            return self._process(self._attend(x, rows, causal, queries, self.norm_attention), self.norm_mlp)
        x = self.norm_attention(self._attend(x, rows, causal, queries, None))
        return self.norm_mlp(self._process(x, None))

    def _attend(self, x: Tensor, rows: Rows, causal: bool, queries: Queries | None, norm: nn.Module | None) -> Tensor:
        """`x` plus what attention makes of it."""
        weight, bias = self.qkv
        width = x.shape[1]
        heads = self.heads, width // self.heads
        if queries is None:
            of_queries = rows
            q, k, v = recomputing_linear(norm, x, weight, bias).view(len(x), 3, *heads).unbind(1)
        else:
            of_queries = queries.rows
            biases = (None, None) if bias is None else (bias[:width], bias[width:])
            tokens = x if norm is None else norm(x)
            k, v = linear(tokens, weight[width:], biases[1]).view(len(x), 2, *heads).unbind(1)
            q = linear(tokens[queries.index], weight[:width], biases[0]).unflatten(1, heads)
            x = x[queries.index]
        attended, _ = packed_attention(
            *(q, k, v, of_queries.cu_seqlens, rows.cu_seqlens, of_queries.longest, rows.longest), causal=causal
        )
        tokens, out = attended.flatten(1), self.out
        return _add(x, lambda bias: linear(tokens, out.weight, bias), out.bias, self.after_attention)

    def _process(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        """`x` plus what the MLP makes of it."""
        if isinstance(self.contract, Weights):
            return _add(x, lambda bias: self._mlp(x, norm, bias), self.contract.bias, self.after_mlp)
        branch = self._mlp(x, norm, None)
        return x + (branch if self.after_mlp is None else self.after_mlp(branch))

    def _mlp(self, x: Tensor, norm: nn.Module | None, bias: Tensor | None) -> Tensor:
        expand, contract = self.expand, self.contract
        if isinstance(expand, Weights) and isinstance(contract, Weights) and self.inside_mlp is None:
            quick, weight = epilogue.is_quick(self.activation), contract.weight
            if quick is not None and expand.bias is not None and epilogue.takes(x, expand.bias, weight):
                hidden = recomputing_linear(norm, x, expand.weight, None)
                if torch.is_grad_enabled():
                    return epilogue.bias_gelu_linear(hidden, expand.bias, weight, bias, quick)
                return linear(epilogue.bias_gelu_(hidden, expand.bias, quick), weight, bias)
        if isinstance(contract, Weights):
            contract = contract._replace(bias=bias)
        hidden = _product(norm, x, expand)
        if self.inside_mlp is not None:
            return _product(None, self.inside_mlp(self.activation(hidden)), contract)
        return _product(self.activation, hidden, contract)


def _product(function: Callable[[Tensor], Tensor] | None, x: Tensor, product: Weights | nn.Module) -> Tensor:
    """The product of `function(x)`."""
    if isinstance(product, Weights):
        return recomputing_linear(function, x, product.weight, product.bias)
    return cast(Tensor, product(x if function is None else function(x)))


def _add(
    x: Tensor,
    product: Callable[[Tensor | None], Tensor],
    bias: Tensor | None,
    after: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """`x` plus a branch that ends with a product; `product` adds the bias that it is given."""
    if bias is not None and after is None and epilogue.takes(x, bias):
        return epilogue.add_branch(x, product(None), bias)
    branch = product(bias)
    if after is not None:
        branch = after(branch)
    # in place where nothing else needs the branch
    return x + branch if torch.is_grad_enabled() or branch.dtype != x.dtype else branch.add_(x)


def layer_of(block: nn.Module) -> Layer | None:
    """The layer that a module of open_clip or PyTorch is, or None where running it here would not be the same.

    That is a module of another kind, attention with more than one fused projection or with dropout in training, and a
    block to which something was added: hooks, other modules, methods of its own.
    """
    if is_plain(block, ResidualAttentionBlock):
        return _of_open_clip(block)
    return _of_torch(block) if is_plain(block, nn.TransformerEncoderLayer) else None


def has_fused_projection(attention: Any) -> bool:
    """Whether an `nn.MultiheadAttention` is softmax attention over one fused projection."""
    return attention._qkv_same_embed_dim and attention.bias_k is None and not attention.add_zero_attn


def _of_open_clip(block: nn.Module) -> Layer | None:
    parts: dict[str, Any] = block._modules
    mlp, scales = parts["mlp"], (parts["ls_1"], parts["ls_2"])
    if "ln_1_kv" in parts or not is_plain(mlp, nn.Sequential) or tuple(mlp._modules) != ("c_fc", "gelu", "c_proj"):
        return None
    expand, activation, contract = mlp._modules.values()
    norms = parts["ln_1"], parts["ln_2"]
    if not all(is_plain(scale, nn.Identity, LayerScale) for scale in scales):
        return None
    after_attention, after_mlp = (None if type(scale) is nn.Identity else scale for scale in scales)
    return _layer(
        parts["attn"], True, norms, expand, activation, contract, after_attention=after_attention, after_mlp=after_mlp
    )


def _of_torch(block: Any) -> Layer | None:
    drops = (block.dropout, block.dropout1, block.dropout2)
    # PyTorch reads the weights of these two in evaluation, whatever they are
    if not is_linear(block.linear1) or not is_linear(block.linear2):
        return None
    if not all(is_plain(drop, nn.Dropout) for drop in drops) or is_attention_of_peft(block.self_attn):
        return None
    inside, after_attention, after_mlp = (drop if drop.training and drop.p else None for drop in drops)
    return _layer(
        *(
            block.self_attn,
            block.norm_first,
            (block.norm1, block.norm2),
            block.linear1,
            block.activation,
            block.linear2,
        ),
        after_attention=after_attention,
        after_mlp=after_mlp,
        inside_mlp=inside,
    )


def _layer(
    attention: Any,
    norm_first: bool,
    norms: tuple[nn.Module, nn.Module],
    expand: nn.Module,
    activation: Callable[[Tensor], Tensor],
    contract: nn.Module,
    **after: Callable[[Tensor], Tensor] | None,
) -> Layer | None:
    """The layer of these parts, or None where one of them is not what it has to be."""
    of_peft = is_attention_of_peft(attention)
    if not of_peft and not is_attention(attention):
        return None
    if not has_fused_projection(attention) or (attention.training and attention.dropout):
        return None
    if not (is_norm(norms[0]) and is_norm(norms[1]) and is_activation(activation)):
        return None
    products = [weights_of(module) for module in (expand, contract)]
    if not all(isinstance(product, Weights) or acts_on_tokens(product) for product in products):
        return None
    read = _merged(attention) if of_peft else _read(attention)
    if read is None:
        return None
    weights = [*read, *(product for product in products if isinstance(product, Weights))]
    if not all(is_ordinary(*part) for part in weights):
        return None
    qkv, out = read
    expand_by, contract_by = products
    return Layer(
        attention.num_heads, norm_first, norms[0], norms[1], qkv, out, expand_by, activation, contract_by, **after
    )


def weights_of(module: nn.Module) -> Weights | nn.Module:
    """What a linear module multiplies by, or the module itself where it has to be called."""
    if is_plain(module, nn.Linear):
        return Weights(module.weight, module.bias)  # type: ignore[arg-type]
    return module


def run_linear(module: nn.Module, x: Tensor) -> Tensor:
    """`module(x)`, by a layout of its weight where it is linear and has one."""
    return _product(None, x, weights_of(module))


def _read(attention: Any) -> tuple[Weights, Weights]:
    """The projections of an `nn.MultiheadAttention`, which reads its `out_proj` and does not call it."""
    qkv = Weights(attention.in_proj_weight, attention.in_proj_bias)
    return qkv, Weights(attention.out_proj.weight, attention.out_proj.bias)


_MERGING = threading.Lock()
"""Held while peft's attention is merged, which changes the module: no other thread may find it so."""


def _merged(attention: Any) -> tuple[Weights, Weights] | None:
    """The projections with the adapters of peft's `lora.MultiheadAttention`, merged for a moment as it does itself."""
    with _MERGING:
        if not is_low_rank_attention(attention):
            return None
        base = attention.base_layer
        out = base.out_proj.base_layer
        before = (base, "in_proj_weight", base.in_proj_weight), (out, "weight", out.weight)
        try:
            attention.merge(adapter_names=[name for name in attention.active_adapters if name in attention.lora_A])
            return _read(base)
        finally:
            # `unmerge` would subtract the adapters from copies of the weights, which so drift by rounding
            for layer in (attention, base.out_proj):
                layer.merged_adapters.clear()
            for module, name, weight in before:
                delattr(module, name)
                module.register_parameter(name, weight)


Runs = Callable[[Tensor, Rows, bool, Queries | None], Tensor]
"""A `Layer`, or a module that is called as one."""


def run_layers(
    layers: Iterable[Runs],
    x: Tensor,
    rows: Rows,
    causal: bool = False,
    queries: Queries | None = None,
    checkpointing: bool = False,
) -> Tensor:
    """`x [T, D]` through all layers -> `[T, D]`, or `[Q, D]`: the last layer is computed for the queries alone.

    Args:
        checkpointing: keep only what goes into each layer for the backward pass.
    """
    layers = list(layers)
    parts = _parts(x, rows)
    if len(parts) == 1:
        return _run_layers(layers, x, rows, causal, queries, checkpointing)
    done = []
    for begin, end in parts:
        part, tokens = rows.part(begin, end)
        wanted = None
        if queries is not None:
            of_part, places = queries.rows.part(begin, end)
            # what stands for an absent token is some token, maybe of another row
            index = (queries.index[places] - tokens.start).clamp(0, tokens.stop - tokens.start - 1)
            wanted = Queries(index, of_part)
        done.append(_run_layers(layers, x[tokens], part, causal, wanted, checkpointing))
    return torch.cat(done)


def _parts(x: Tensor, rows: Rows) -> list[tuple[int, int]]:
    """The rows that go through all layers together, begin and end: parts of about equally many tokens."""
    number = len(rows.cu_seqlens) - 1
    count = -(-x.numel() // _VALUES_AT_ONCE)
    if count <= 1 or number <= 1 or x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return [(0, number)]
    ends = rows.cu_seqlens[1:].long()
    if int(ends[-1]) < len(x):  # tokens behind the last row, which keep their places
        return [(0, number)]
    wanted = torch.arange(1, count) * len(x) // count
    inner = torch.unique(torch.searchsorted(ends, wanted) + 1).tolist()
    return list(pairwise([0, *(bound for bound in inner if bound < number), number]))


def _run_layers(
    layers: list[Runs], x: Tensor, rows: Rows, causal: bool, queries: Queries | None, checkpointing: bool
) -> Tensor:
    for index, layer in enumerate(layers):
        wanted = queries if index == len(layers) - 1 else None
        if checkpointing and torch.is_grad_enabled():
            # what is computed again runs where it ran: the backward pass may be on another thread, or after the block
            contexts = noop_context_fn if torch.compiler.is_compiling() else _same_backend()
            x = checkpoint(layer, x, rows, causal, wanted, use_reentrant=False, context_fn=contexts)
        else:
            x = layer(x, rows, causal, wanted)
    return x


def _same_backend() -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    backend = dispatch.decided(dispatch.requested(None))
    return lambda: (nullcontext(), dispatch.use_backend(backend))


def recomputing_linear(
    function: Callable[[Tensor], Tensor] | None, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """`linear(function(x), weight, bias)`, whose backward pass computes `function(x)` again instead of keeping it."""
    if function is None:
        return linear(x, weight, bias)
    if not torch.is_grad_enabled() or torch.compiler.is_compiling() or derivatives.looked_into(x, weight):
        return linear(function(x), weight, bias)
    if dispatch.decided(dispatch.requested(None)) == "reference":
        return linear(function(x), weight, bias)
    parameters = tuple(function.parameters()) if isinstance(function, nn.Module) else ()
    return cast(Tensor, _RecomputingLinear.apply(function, x, weight, bias, *parameters))


class _RecomputingLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[[Tensor], Tensor],
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        device = x.device.type
        ctx.function, ctx.biased = function, bias is not None
        ctx.autocast = (device, torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None
        ctx.save_for_backward(x, weight, *parameters)
        return F.linear(function(x), weight, bias)

    @staticmethod
    @derivatives.once("recomputing_linear")
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *parameters = ctx.saved_tensors
        _, need_x, need_weight, need_bias, *need_parameters = ctx.needs_input_grad
        leaf = x.detach().requires_grad_(need_x)
        again = torch.autocast(*ctx.autocast) if ctx.autocast else nullcontext()
        with torch.enable_grad(), again:
            inner = ctx.function(leaf)
        grad_weight = grad_bias = None
        if need_weight:
            grad_weight = (grad.t() @ inner.detach().to(grad.dtype)).to(weight.dtype)
        if ctx.biased and need_bias:
            grad_bias = grad.sum(0)
        wanted = [leaf] * need_x + [p for p, need in zip(parameters, need_parameters, strict=True) if need]
        found: list[Tensor | None] = []
        if wanted:
            grad_inner = (grad @ weight.to(grad.dtype)).to(inner.dtype)
            found = list(torch.autograd.grad(inner, wanted, grad_inner))
        grad_x = found.pop(0) if need_x else None
        of_parameters = [found.pop(0) if need else None for need in need_parameters]
        return None, grad_x, grad_weight, grad_bias, *of_parameters
