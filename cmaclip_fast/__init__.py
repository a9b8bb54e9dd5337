"""CMA-CLIP (arXiv 2112.03562): fast classification of image-text pairs."""

from cmaclip_fast.errors import InputError
from cmaclip_fast.types import AttentionMaps, Batch, Output

__version__ = "0.1.0"

__all__ = [
    "CMACLIP",
    "AttentionMaps",
    "Batch",
    "Classifier",
    "InputError",
    "Output",
    "System",
    "create_model",
    "create_system",
]


def __getattr__(name: str) -> object:
    # open_clip takes seconds to import, which `cmaclip --help` and the operators do without
    if name in ("CMACLIP", "create_model"):
        from cmaclip_fast import model

        return getattr(model, name)
    if name == "Classifier":
        from cmaclip_fast.classifier.classifier import Classifier

        return Classifier
    if name in ("System", "create_system"):
        from cmaclip_fast import systems
        from cmaclip_fast.systems.base import System

        return System if name == "System" else systems.create_system
    raise AttributeError(f"module 'cmaclip_fast' has no attribute '{name}'")
