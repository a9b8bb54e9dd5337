"""Products with weights that were laid out for them once: for predictions on a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from cmaclip_fast.ops import epilogue

_FEW_ROWS = 80
"""Products of at most so many rows wait for the weights from memory rather than for arithmetic."""
_MKL_ROWS = 384
"""MKL chooses a layout by a number of rows. That for a few hundred serves more rows as well; one for more rows than
come costs up to half of the speed."""


@dataclass
class _Layouts:
    """What was laid out of one weight, each when first needed.

    Attributes:
        version, address: of the weight that it was made from; another one is used as it is.
        panels: for few rows, by our own product.
        packed: for more, by MKL.
    """

    version: int
    address: int
    panels: Tensor | None = None
    packed: Tensor | None = None


_LAID_OUT: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def lay_out(weights: Iterable[Tensor]) -> None:
    """Lets products without gradients lay these weights out once, as suits the number of rows.

    Each of the two layouts, for few rows and for more, takes the size of the weight in memory, from the first product
    that needs it. A weight that is changed afterwards is used as it is.

    Args:
        weights: `[N, D]` float32 on the CPU; others are passed over.
    """
    for weight in weights:
        on_cpu = weight.device.type == "cpu" and not weight.is_inference()
        if on_cpu and weight.ndim == 2 and weight.dtype == torch.float32:
            _LAID_OUT[weight] = _Layouts(weight._version, weight.data_ptr())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, by a layout of the weight where it may have one."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.dtype != torch.float32:
        return F.linear(x, weight, bias)
    layouts = _LAID_OUT.get(weight)
    if layouts is None or (layouts.version, layouts.address) != (weight._version, weight.data_ptr()):
        return F.linear(x, weight, bias)
    rows = x.numel() // max(1, x.shape[-1])
    if 0 < rows <= _FEW_ROWS and epilogue.takes(x, weight):
        if layouts.panels is None:
            with torch.inference_mode(False), torch.no_grad():
                layouts.panels = torch.ops.cmaclip._lay_panels_cpp(weight.detach().contiguous())
        product = torch.ops.cmaclip._panel_linear_cpp(
            x.reshape(rows, -1).contiguous(), layouts.panels, bias, weight.shape[0]
        )
        return product.view(*x.shape[:-1], -1)
    if rows > _FEW_ROWS and torch.backends.mkl.is_available() and not torch.is_autocast_enabled("cpu"):
        if layouts.packed is None:
            with torch.inference_mode(False), torch.no_grad():
                layouts.packed = torch.ops.mkl._mkl_reorder_linear_weight(weight.detach(), _MKL_ROWS)
        # MKL takes a layout for any number of rows; PyTorch uses it only if it is told this very number
        return torch.ops.mkl._mkl_linear(x, layouts.packed, weight, bias, rows)
    return F.linear(x, weight, bias)
