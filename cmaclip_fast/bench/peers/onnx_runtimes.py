"""ONNX Runtime and OpenVINO on one export of the plain model."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cmaclip_fast.bench.peers.plain import PlainCMACLIP, to_longest
from cmaclip_fast.bench.peers.system import Setting, System
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

OPSET = 18


def export(model: CMACLIP, path: Path) -> None:
    """Writes the plain model as ONNX, for any number of pairs and texts up to the context length."""
    plain = PlainCMACLIP(model).eval()
    size, context = model.preprocessing.size, model.tokenizer.context_length
    lengths = torch.tensor([context // 2, context // 3], dtype=torch.int32)
    tokens = torch.ones(2, context // 2, dtype=torch.int64)
    rows, length = torch.export.Dim("rows", max=4096), torch.export.Dim("length", min=2, max=context)
    # nn.MultiheadAttention's own kernel for inference has no counterpart in ONNX
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                plain,
                (torch.zeros(2, 3, size, size), tokens, lengths),
                str(path),
                input_names=["images", "tokens", "lengths"],
                output_names=[f"logits_{number}" for number in range(len(model.tasks))],
                dynamic_shapes=({0: rows}, {0: rows, 1: length}, {0: rows}),
                opset_version=OPSET,
                dynamo=True,
                external_data=True,
                verbose=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    return {
        "images": batch.images.numpy(),
        "tokens": np.ascontiguousarray(to_longest(batch).numpy()),
        "lengths": batch.text_lengths.numpy(),
    }


class Exported(System):
    """What runs the exported file; padded to the longest text of the batch."""

    trains = False
    devices = ("cpu",)

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        self.path = setting.folder / f"{setting.model.config.name}.onnx"
        if not self.path.exists():
            start = time.perf_counter()
            export(setting.model, self.path)
            self.prepared["export"] = time.perf_counter() - start


class OnnxRuntime(Exported):
    """All graph optimisations, the same threads as the others."""

    title = "ONNX Runtime"
    packages = ("onnx", "onnxruntime", "onnxscript")

    def __init__(self, setting: Setting) -> None:
        import onnxruntime

        super().__init__(setting)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = setting.threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        # its idle threads would else spin into the next system's turn
        options.add_session_config_entry("session.force_spinning_stop", "1")
        start = time.perf_counter()
        self._session: Any = onnxruntime.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        self.prepared["loading"] = time.perf_counter() - start

    def logits(self, batch: Batch) -> list[Tensor]:
        return [torch.from_numpy(one) for one in self._session.run(None, arrays(batch))]

    def close(self) -> None:
        self._session = None


class OpenVINO(Exported):
    """The hint `LATENCY`; over one pair also `THROUGHPUT`, the batch cut between its streams, if that is faster."""

    title = "OpenVINO"
    packages = ("onnx", "onnxscript", "openvino")

    def __init__(self, setting: Setting) -> None:
        super().__init__(setting)
        start = time.perf_counter()
        self._compiled = self._compile("LATENCY")
        self._queue: Any = None
        self.prepared["loading"] = time.perf_counter() - start

    def _compile(self, hint: str) -> Any:
        import openvino

        core = openvino.Core()
        return core.compile_model(
            str(self.path),
            "CPU",
            {
                "PERFORMANCE_HINT": hint,
                "INFERENCE_NUM_THREADS": self.setting.threads,
                "INFERENCE_PRECISION_HINT": "f32",
            },
        )

    def warm(self, batch: Batch) -> None:
        if len(batch) == 1 or "choice of hint" in self.prepared:
            return
        import openvino

        start = time.perf_counter()
        alone = self._seconds(batch)
        latency = self._compiled
        self._compiled = self._compile("THROUGHPUT")
        streams = self._compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._queue = openvino.AsyncInferQueue(self._compiled, min(streams, len(batch)))
        if self._seconds(batch) > alone:
            self._compiled, self._queue = latency, None
        self.prepared["choice of hint"] = time.perf_counter() - start

    def _seconds(self, batch: Batch) -> float:
        self.logits(batch)
        start = time.perf_counter()
        self.logits(batch)
        return time.perf_counter() - start

    def logits(self, batch: Batch) -> list[Tensor]:
        inputs = arrays(batch)
        if self._queue is None:
            found = self._compiled(inputs)
            return [torch.from_numpy(found[port]) for port in self._compiled.outputs]
        parts: list[list[np.ndarray]] = [[] for _ in range(len(self._queue))]

        def keep(request: Any, part: int) -> None:
            parts[part] = [np.array(request.get_tensor(port).data) for port in self._compiled.outputs]

        self._queue.set_callback(keep)
        cut = {name: np.array_split(array, len(parts)) for name, array in inputs.items()}
        for part in range(len(parts)):
            self._queue.start_async({name: pieces[part] for name, pieces in cut.items()}, part)
        self._queue.wait_all()
        return [torch.from_numpy(np.concatenate(columns)) for columns in zip(*parts, strict=True)]

    def close(self) -> None:
        self._compiled = self._queue = None
