"""What goes with a model's name: the defaults of its configuration and of its training."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

TINY = "tiny"


@dataclass(frozen=True)
class Preset:
    """Defaults of a model.

    Attributes:
        model: fields of a system's `Config`; a system without such a field ignores it.
        training: fields of `TrainingConfig`.
        quick: fields of a system's `Config` for `cmaclip compare --quick`.
        is_ours: the towers are built by this package, for pictures of any size, and train from scratch, with a
            tokenizer that is trained on the texts; otherwise open_clip builds and names all of it.
    """

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    quick: dict[str, Any] = field(default_factory=dict)
    is_ours: bool = False


PRESETS = {
    TINY: Preset(
        model={
            "image_size": 96,
            "context_length": 32,
            "width": 128,
            "depth": 1,
            "heads": 4,
            "dropout": 0.1,
            "head_dropout": 0.3,
            "auxiliary_heads": True,
        },
        training={
            "epochs": 25,
            "batch_size": 64,
            "learning_rate": 2e-3,
            "tower_learning_rate": 2e-3,
            "clip_norm": 2.0,
            "label_smoothing": 0.1,
            "augmentation": {
                "scale": (0.6, 1.6),
                "ratio": (0.75, 1.33),
                "rotation": 15,
                "brightness": 0,
                "contrast": 0,
                "erasing": 0.25,
                "word_dropout": 0.3,
            },
            "mismatch": 0.25,
            "small_epochs": 0.8,
            "ema_decay": 0.99,
        },
        quick={"image_size": 48},
        is_ours=True,
    )
}
"""`tiny` is a small CLIP for training from scratch on a CPU."""


def preset(name: str) -> Preset:
    """The preset of a model name; without defaults of its own for the names of open_clip."""
    return PRESETS.get(name, Preset())
