"""The systems that are compared, all made from our model's weights."""

from cmaclip_fast.bench.peers.hugging_face import HuggingFace
from cmaclip_fast.bench.peers.onnx_runtimes import OnnxRuntime, OpenVINO
from cmaclip_fast.bench.peers.ours import Ours
from cmaclip_fast.bench.peers.plain import Accelerated, Plain, PlainCompiled, PlainLongest
from cmaclip_fast.bench.peers.steps import PackedFusion, PackedText, ShortLast
from cmaclip_fast.bench.peers.system import Setting, System

SYSTEMS: dict[str, type[System]] = {
    "ours": Ours,
    "plain": Plain,
    "longest": PlainLongest,
    "compiled": PlainCompiled,
    "accelerated": Accelerated,
    "transformers": HuggingFace,
    "onnxruntime": OnnxRuntime,
    "openvino": OpenVINO,
}
"""By the names that the command takes."""

BETWEEN: dict[str, type[System]] = {
    "packed-text": PackedText,
    "packed-fusion": PackedFusion,
    "short-last": ShortLast,
}
"""What lies between the plain implementation and ours, for the table of steps."""

__all__ = ["BETWEEN", "SYSTEMS", "Setting", "System"]
