"""A low-rank change of a weight that attention reads, as a parametrization (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import math

from torch import Tensor, nn


class LowRank(nn.Module):
    """A parametrization: `weight [N, D]` -> `weight + B A`, with `A [R, D]` and `B [N, R]`, which starts at 0."""

    def __init__(self, weight: Tensor, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.lora_B = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A
