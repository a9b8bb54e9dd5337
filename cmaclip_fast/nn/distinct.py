"""The distinct texts and images of a batch, so that each is encoded once."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_SAMPLED = 64
"""Values of an image that are compared before all of them are."""


@dataclass
class Distinct:
    """Which rows of a batch to encode.

    Attributes:
        rows: `[U]` int64, one row of each distinct item.
        of_row: `[B]` int64, which of the U each row has; 0 where it has none.
    """

    rows: Tensor
    of_row: Tensor


def distinct_texts(tokens: Tensor, lengths: Tensor, present: Tensor) -> Distinct | None:
    """Of `tokens [B, L]`, `lengths [B]`, `present [B]`; None where every row has a text of its own."""
    keys = torch.cat([lengths[:, None].to(tokens.dtype), tokens], dim=1)
    return _distinct(keys, present)


def distinct_images(images: Tensor, present: Tensor) -> Distinct | None:
    """Of `images [B, 3, H, W]`, `present [B]`; None where every row has an image of its own.

    Images count as the same if all their values are equal.
    """
    values = images.flatten(1)
    if values.shape[1] == 0:
        return None
    sample = values[:, :: max(1, values.shape[1] // _SAMPLED)]
    found = _distinct(sample.float(), present)
    if found is None or len(found.rows) == int(present.sum()):
        return found
    # alike in the sample: the row that stands for each is compared with it in full
    stands_for = found.rows[found.of_row]
    same = torch.tensor(
        [row == other or torch.equal(values[row], values[other]) for row, other in enumerate(stands_for.tolist())],
        device=images.device,
    )
    if bool((same | ~present).all()):
        return found
    own = torch.arange(len(values), device=images.device)
    return _distinct(torch.where(same, stands_for, own)[:, None], present)


def _distinct(keys: Tensor, present: Tensor) -> Distinct | None:
    rows = present.nonzero()[:, 0]
    if len(keys) == 1 and len(rows) == 1:
        return None
    unique, of_present = torch.unique(keys[rows], dim=0, return_inverse=True)
    if len(unique) == len(keys):
        return None
    first = torch.full((len(unique),), len(keys), device=keys.device)
    first = first.scatter_reduce(0, of_present, rows, "amin")
    of_row = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
    of_row[rows] = of_present
    return Distinct(first, of_row)
