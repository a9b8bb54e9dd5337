"""Low-rank adapters for training: the towers stay as they are, and a small change of each layer is learnt (LoRA).

Linear layers get peft's adapters. The weights of `nn.MultiheadAttention` are read by it and not multiplied by a module
that could be wrapped, so they are parametrized: peft's own wrapper (0.21) adds the change of the output projection
twice, and adds and subtracts the changes at each call, so that the frozen weights drift by rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from open_clip.hf_model import HFTextEncoder
from open_clip.timm_model import TimmModel
from open_clip.transformer import Transformer
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.low_rank import LowRank
from cmaclip_fast.systems.presets import preset

if TYPE_CHECKING:
    from cmaclip_fast.systems.base import System


def add_adapters(model: System, rank: int) -> list[Any]:
    """Freezes the towers and adds adapters to the layers of their transformers; `merge_adapters` takes the result.

    The towers of `tiny` start from random weights and are left as they are.

    Raises:
        InputError: peft is missing, or a tower has no layers to adapt.
    """
    try:
        from peft import LoraConfig, LoraModel
    except ImportError:
        raise InputError("lora_rank needs peft: pip install 'cmaclip_fast[lora]'") from None
    sides = [side for side in ("image_tower", "text_tower") if hasattr(model, side)]
    if preset(model.config.name).is_ours:
        sides = [side for side in sides if getattr(model.config, side) is not None]
    if not sides:
        raise InputError(
            f"lora_rank: '{model.config.name}' has no pretrained tower to adapt: "
            "leave lora_rank out, or name an open_clip model with --model"
        )
    adapted = []
    for side in sides:
        tower = getattr(model, side)
        layers = dict.fromkeys(_layers(tower))  # in their order, so that a seed always draws the same
        linear = [name for name, module in tower.named_modules() if module in layers and type(module) is nn.Linear]
        if not linear:
            raise InputError(
                f"lora_rank: the {side.replace('_', ' ')} of '{model.config.name}' has no linear layers to adapt: "
                "leave lora_rank out, or choose a model with transformer towers"
            )
        tower.requires_grad_(False)
        adapted.append(LoraModel(tower, LoraConfig(r=rank, lora_alpha=rank, target_modules=linear), "default"))
        for module in layers:
            for name in _read_weights(module):
                parametrize.register_parametrization(module, name, LowRank(getattr(module, name), rank))
    return adapted


def merge_adapters(adapted: list[Any]) -> None:
    """Adds what the adapters have learnt to the weights, and makes the towers ordinary modules again."""
    for tuner in adapted:
        tower = tuner.merge_and_unload()
        for module in list(tower.modules()):
            if parametrize.is_parametrized(module):
                for name in list(module.parametrizations):
                    parametrize.remove_parametrizations(module, name)
        tower.requires_grad_(True)


def _layers(tower: nn.Module) -> Iterator[nn.Module]:
    """The modules inside the transformers of a tower, without the projections into CLIP's common space."""
    for module in tower.modules():
        if isinstance(module, Transformer):
            yield from module.modules()
        elif isinstance(module, TimmModel):
            yield from module.trunk.modules()
        elif isinstance(module, HFTextEncoder):
            yield from module.transformer.modules()


def _read_weights(module: nn.Module) -> list[str]:
    """The weights of a module that attention reads."""
    if isinstance(module, NonDynamicallyQuantizableLinear):  # the output projection of nn.MultiheadAttention
        return ["weight"]
    return ["in_proj_weight"] if isinstance(getattr(module, "in_proj_weight", None), nn.Parameter) else []
