"""CMA-CLIP (arXiv 2112.03562): fast classification of image-text pairs."""

import importlib

from cmaclip_fast.errors import InputError
from cmaclip_fast.types import AttentionMaps, Batch, Output

__version__ = "0.1.0"

_WHERE = {
    "CMACLIP": "systems.cma_clip",
    "Classifier": "classifier.classifier",
    "System": "systems.base",
    "accelerate": "nn.dropin",
    "create_model": "systems.build",
    "create_system": "systems.build",
    "restore": "nn.dropin",
    "train": "training.api",
}

__all__ = ["AttentionMaps", "Batch", "InputError", "Output", *_WHERE]


def __getattr__(name: str) -> object:
    # open_clip takes seconds to import, which `cmaclip --help` and the operators do without
    if name not in _WHERE:
        raise AttributeError(f"module 'cmaclip_fast' has no attribute '{name}'")
    return getattr(importlib.import_module(f"cmaclip_fast.{_WHERE[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
