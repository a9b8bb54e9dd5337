"""Which rate each parameter is trained at, and when: groups, warm-up, cosine, heads first, slower lower layers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

from torch import nn

from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.pretrained import TimmImage
from cmaclip_fast.training.config import TrainingConfig

LOWEST = 0.01
"""Share of the peak rate that the cosine ends at."""

_LAYER = re.compile(r"\.(?:resblocks|layers?|blocks|h|stages)\.(\d+)\.")
_FIRST = re.compile(r"embed|conv1|stem|cls_token|class_token|pos_")


def parameter_groups(model: System, config: TrainingConfig) -> list[dict[str, Any]]:
    """AdamW's groups, with and without weight decay.

    Each has its `kind`: `heads`, `fusion`, `tower`, `read` (a tower with weights of its own), or `new` for all others;
    and `peak`, its rate after warm-up.
    """
    rates = {
        "heads": config.learning_rate,
        "fusion": config.learning_rate if config.fusion_learning_rate is None else config.fusion_learning_rate,
        "new": config.learning_rate,
        "tower": config.tower_learning_rate,
        "read": config.pretrained_learning_rate,
    }
    text, image = model.config.text_tower, model.config.image_tower
    read: tuple[str, ...] = () if text is None else ("text_tower.text.transformer.",)
    if isinstance(image, TimmImage) and image.read:
        read += ("image_tower.visual.trunk.",)
    factors = tower_factors(model, config.tower_decay)
    groups: dict[tuple[str, bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = parameter.ndim > 1 and not name.endswith(
                ("positional_embedding", "class_embedding", "type_embedding", "cls_emb")
            )
            kind = "new"
            if ".lora_" not in name:
                if name in factors:
                    kind = "read" if name.startswith(read) else "tower"
                elif name.startswith(("heads.", "auxiliary_heads.")) or name in model.per_task:
                    kind = "heads"
                elif name.startswith(model.fusion):
                    kind = "fusion"
            factor = factors[name] if kind in ("tower", "read") else 1.0
            groups.setdefault((kind, decays, factor), []).append(parameter)
    return [
        {
            "params": parameters,
            "kind": kind,
            "peak": rates[kind] * factor,
            "lr": 0.0,
            "weight_decay": config.weight_decay if decays else 0.0,
        }
        for (kind, decays, factor), parameters in groups.items()
    ]


def tower_factors(model: System, decay: float) -> dict[str, float]:
    """For each parameter of the towers the factor of its rate: `decay` for each layer above it.

    What comes before the first layer counts as the layer below it, what comes after the last as one with it.
    """
    towers: dict[str, dict[str, int | None]] = {}
    for name, _ in model.tower_parameters():
        found = _LAYER.search(name)
        place = int(found[1]) + 1 if found else 0 if _FIRST.search(name) else None
        towers.setdefault(name.partition(".")[0], {})[name] = place
    factors: dict[str, float] = {}
    for places in towers.values():
        last = max((place for place in places.values() if place is not None), default=0)
        factors |= {name: decay ** (last - (last if place is None else place)) for name, place in places.items()}
    return factors


def schedule(config: TrainingConfig, steps: int) -> Callable[[int, str], float]:
    """Share of the peak rate at a step, for a kind of group.

    A linear warm-up, then a cosine, again for the tasks after a contrastive start. In the epochs of `heads_first` the
    rate of all but the heads is 0, after which it warms up again. A function of the step alone, unlike PyTorch's
    `SequentialLR`, so that a checkpoint holds no state of a scheduler.

    Args:
        steps: of an epoch.
    """
    first = config.contrastive_epochs * steps
    start = first + config.heads_first * steps

    def share(step: int, kind: str = "new") -> float:
        length, position = (first, step) if step < first else (config.epochs * steps, step - first)
        warm = max(1, int(config.warmup * length))
        if position < warm:
            found = (position + 1) / warm
        else:
            found = LOWEST + (1 - LOWEST) * 0.5 * (1 + math.cos(math.pi * (position - warm) / max(1, length - warm)))
        if step < first or kind == "heads":
            return found
        if step < start:
            return 0.0
        slow = config.fusion_warmup if kind == "fusion" and config.fusion_warmup is not None else config.warmup
        if start > first or slow != config.warmup:
            found *= min(1.0, (step - start + 1) / max(1, int(slow * (first + length - start))))
        return found

    return share
