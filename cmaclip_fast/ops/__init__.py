"""The fused operators: one contract each, with backends `reference`, `cpp`, `triton`, `cuda` and `torch`."""

from cmaclip_fast.ops.dispatch import available_backends, use_backend
from cmaclip_fast.ops.modality_pool import modality_pool
from cmaclip_fast.ops.multitask_binary_cross_entropy import multitask_binary_cross_entropy
from cmaclip_fast.ops.multitask_cross_entropy import multitask_cross_entropy
from cmaclip_fast.ops.pack_tokens import pack_padded, pack_tokens, unpad
from cmaclip_fast.ops.packed_attention import packed_attention

__all__ = [
    "available_backends",
    "modality_pool",
    "multitask_binary_cross_entropy",
    "multitask_cross_entropy",
    "pack_padded",
    "pack_tokens",
    "packed_attention",
    "unpad",
    "use_backend",
]
