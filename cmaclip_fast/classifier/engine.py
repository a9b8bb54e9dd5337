"""Runs a trained system for predictions: weights laid out once, and on a GPU lower precision and CUDA graphs."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.laid_out import lay_out
from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.systems.base import System
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch, Output

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What `precision` may be, beside `auto`."""

_BUCKETS_PER_DOUBLING = 4
_GRAPHS = 32
"""CUDA graphs kept, those used last; each holds the memory of one batch's activations."""


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """The device of a name; `auto` is the first GPU if there is one, else the CPU.

    Raises:
        InputError: an unknown name, or a GPU that PyTorch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise InputError(f"device {name!r} is unknown: pass auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        seen = torch.cuda.device_count()
        raise InputError(f"device {name}: PyTorch sees {seen} GPUs: run `cmaclip env`, or use the device cpu")
    return device


def choose_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a precision; `auto` is bfloat16 on a GPU that computes in it, else float32.

    Raises:
        InputError: an unknown precision.
    """
    if precision == "auto":
        low = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if low else torch.float32
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r} is not available: use auto, {', '.join(PRECISIONS)}")
    return PRECISIONS[precision]


class Engine:
    """Computes what `system` does in evaluation mode, faster. Any number of threads may call it.

    The system is not changed: the engine runs a copy in evaluation mode (`module`) that shares its weights where they
    have the wanted device and dtype. On a CPU weights are laid out when first needed, once for products of few rows and
    once for those of many; each layout takes the size of the weights in memory. Weights that are changed later are used
    as they are. On a GPU a CMA-CLIP runs batches of a size that recurs as CUDA graphs, for a few numbers of text
    tokens, and batches are copied from pinned memory on a stream of their own. The GPU path has not been run on a GPU
    yet.

    Attributes:
        tasks, taxonomies, multi_label, applies, preprocessing, tokenizer: as in `System`.
        device, dtype: of its weights.
    """

    def __init__(
        self,
        system: System,
        device: str | torch.device | None = None,
        precision: str = "auto",
        graphs: bool = True,
    ) -> None:
        """
        Args:
            device: `auto`, `cpu`, `cuda` or `cuda:N`; None is the system's own.
            precision: `auto`, `float32`, `bfloat16` or `float16`.
            graphs: record CUDA graphs on a GPU.

        Raises:
            InputError: an unknown device or precision.
        """
        self.tasks, self.taxonomies = system.tasks, system.taxonomies
        self.multi_label, self.applies = system.multi_label, system.applies
        self.preprocessing, self.tokenizer = system.preprocessing, system.tokenizer
        self._system = system
        self._wanted, self._precision, self._with_graphs = device, precision, graphs
        self._lock = threading.RLock()
        self._prepare()

    @property
    def module(self) -> System:
        """The system in evaluation mode, as it is run."""
        if self._made_from != _placed(self._system):  # it was moved or converted meanwhile
            with self._lock:
                if self._made_from != _placed(self._system):
                    self._prepare()
        return self._module

    @property
    def is_asynchronous(self) -> bool:
        """Whether a call returns before its output is computed."""
        return self.device.type == "cuda"

    def __call__(self, batch: Batch, with_attention: bool = False) -> Output:
        """As `System.forward`.

        Args:
            batch: on any device; its images normalised, or uint8 as `ImagePreprocessing.pixels` gives them.
        """
        module = self.module
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            if self.device.type != "cuda":
                return _run(module, self._ready(batch.to(self.device)), with_attention)
            # read before the batch is copied, so that the host does not wait for the device
            capacity = bucket(int(batch.text_lengths.sum()), batch.tokens.numel())
            with self._lock, torch.cuda.device(self.device), _tensor_cores():
                batch = self._ready(self._upload(batch))
                if self._graphs is None or with_attention:
                    return _run(module, batch, with_attention)
                return self._graphs(batch, capacity)

    def _prepare(self) -> None:
        placed = _placed(self._system)
        self.device = placed[0] if self._wanted is None else choose_device(self._wanted)
        self.dtype = choose_dtype(self._precision, self.device)
        self._module = evaluation_copy(self._system, self.device, self.dtype)
        lay_out(self._module.parameters())
        self._graphs: _Graphs | None = None
        if self.device.type == "cuda":
            self._copies = torch.cuda.Stream(self.device)
            if self._with_graphs and isinstance(self._module, CMACLIP):
                self._graphs = _Graphs(self._module)
        self._made_from = placed

    def _ready(self, batch: Batch) -> Batch:
        images = batch.images
        if images.dtype == torch.uint8:
            images = self.preprocessing.normalise(images)
        return replace(batch, images=images.to(self.dtype))

    def _upload(self, batch: Batch) -> Batch:
        """The batch on the GPU, copied while the GPU may still be computing earlier batches."""
        if batch.tokens.is_cuda:
            return batch.to(self.device)
        pinned = _batch_of(tensor.pin_memory() for tensor in _tensors(batch))
        with torch.cuda.stream(self._copies):
            moved = pinned.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream()
        current.wait_stream(self._copies)
        for tensor in _tensors(moved):
            tensor.record_stream(current)
        return moved


def _placed(system: System) -> tuple[torch.device, torch.dtype]:
    first = next(system.parameters())
    return first.device, first.dtype


def _run(module: System, batch: Batch, with_attention: bool) -> Output:
    # a system without attention maps need not know the argument
    return module(batch, with_attention) if with_attention else module(batch)  # type: ignore[no-any-return]


@contextmanager
def _tensor_cores() -> Iterator[None]:
    """Float32 products in TF32, and then again as before."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def bucket(tokens: int, most: int) -> int:
    """The room for text tokens that a batch gets: the least of a few sizes that holds `tokens`, at most `most`.

    There are four sizes in each doubling, so at most a quarter is left empty.
    """
    step = max(1, (1 << max(0, tokens.bit_length() - 1)) // _BUCKETS_PER_DOUBLING)
    return min(most, -(-tokens // step) * step)


class _Graphs:
    """CUDA graphs of a model, one for each size of batch and bucket of text tokens that has come twice."""

    def __init__(self, model: CMACLIP) -> None:
        self._model = model
        self._kept: OrderedDict[tuple[int, ...], _Graph | None] = OrderedDict()

    def __call__(self, batch: Batch, capacity: int) -> Output:
        key = (*batch.images.shape, batch.tokens.shape[1], capacity)
        if key not in self._kept:
            self._kept[key] = None
            while len(self._kept) > _GRAPHS:
                self._kept.popitem(last=False)
            return self._model(batch, capacity=capacity)  # type: ignore[no-any-return]
        self._kept.move_to_end(key)
        graph = self._kept[key]
        if graph is None:
            graph = self._kept[key] = _Graph(lambda batch: self._model(batch, capacity=capacity), batch)
        return graph(batch)


class _Graph:
    """A run of the model that was recorded for batches of one size."""

    def __init__(self, run: Callable[[Batch], Output], batch: Batch) -> None:
        self.batch = _batch_of(tensor.clone() for tensor in _tensors(batch))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # autotuning and lazy initialisation must not be recorded
                run(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # other threads may allocate memory meanwhile
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.output = run(self.batch)

    def __call__(self, batch: Batch) -> Output:
        for ours, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            ours.copy_(given)
        self.graph.replay()
        output = self.output
        weights = output.modality_weights
        if weights is not None:
            # copied together, since a copy for each of many tasks would take longer than the graph
            weights = dict(zip(weights, torch.stack(list(weights.values()), dim=1).unbind(1), strict=True))
        packed = torch.cat(list(output.logits.values()), dim=1)
        logits = packed.split([logits.shape[1] for logits in output.logits.values()], dim=1)
        return Output(
            dict(zip(output.logits, logits, strict=True)),
            weights,
            None if output.embedding is None else output.embedding.clone(),
            None if output.towers is None else output.towers.clone(),
            packed=packed,
        )


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.images, batch.tokens, batch.text_lengths, batch.present


def _batch_of(tensors: Iterable[Tensor]) -> Batch:
    images, tokens, lengths, present = tensors
    return Batch(images, tokens, lengths, present)
