"""EmbraceNet (arXiv 1904.09078): each feature of the fused vector is drawn from one of the modalities."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from cmaclip_fast.systems.base import SystemConfig, TwoTowers
from cmaclip_fast.systems.registry import register
from cmaclip_fast.types import Batch, Output


class EmbraceNetConfig(SystemConfig):
    """
    Attributes:
        modality_dropout: how often, in training, one side of a complete pair is left out (section 3.3).
        at_test: the mean over all draws, which repeats, or a draw as in the authors' code.
    """

    modality_dropout: float = Field(0.25, ge=0, lt=1)
    at_test: Literal["mean", "draw"] = "mean"


@register("embracenet")
class EmbraceNet(TwoTowers):
    """Docking layers, then embracement.

    Section 3.1, docking: `d_k = f(W_k x_k + b_k)`, all of one width c, with f the ReLU. Section 3.2, embracement: for
    each of the c features a modality is drawn, `r_i ~ Multinomial(1, p)`, and the fused feature is
    `e_i = sum_k r_i,k d_i,k`. Section 3.3: p is uniform over the modalities that are there, 0 for the others.
    """

    title = "EmbraceNet"
    fusion = ("docking.",)
    Config = EmbraceNetConfig

    def __init__(self, config: Any, *parts: Any) -> None:
        super().__init__(config, *parts)
        self.docking = nn.ModuleList(nn.Sequential(nn.Linear(config.width, config.width), nn.ReLU()) for _ in range(2))
        self.heads = self.make_heads(config.width)

    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        towers = self.encode(batch).globals
        present = self.drop_modalities(batch.present) if self.training else batch.present
        docked = torch.stack([dock(towers[:, k]) for k, dock in enumerate(self.docking)], dim=1)
        docked = torch.where(present[..., None], docked, 0)
        probability = self.probabilities(present)
        if self.training or self.config.at_test == "draw":
            fused = (self.draw(probability, docked.shape[-1]).to(docked.dtype) * docked).sum(1)
        else:
            fused = (probability[..., None].to(docked.dtype) * docked).sum(1)
        return self.output(self.heads(fused), embedding=docked, towers=towers)

    @staticmethod
    def probabilities(present: Tensor) -> Tensor:
        """`present [B, 2]` -> `[B, 2]`, uniform over what is there (section 3.3); zeros where nothing is."""
        return present / present.sum(1, keepdim=True).clamp(min=1)

    @staticmethod
    def draw(probability: Tensor, width: int) -> Tensor:
        """For each row and feature one modality: `[B, 2] -> [B, 2, width]` of 0 and 1 (section 3.2)."""
        is_text = torch.rand(len(probability), width, device=probability.device) < probability[:, :1]
        there = (probability > 0).any(1)[:, None]
        return torch.stack([is_text & there, ~is_text & there], dim=1).to(probability.dtype)

    def drop_modalities(self, present: Tensor) -> Tensor:
        """Leaves out the text or the image, each as often, of some complete pairs."""
        draw = torch.rand(len(present), device=present.device)
        both, half = present.all(1), self.config.modality_dropout / 2
        hidden = torch.stack([draw < half, draw > 1 - half], dim=1) & both[:, None]
        return present & ~hidden
