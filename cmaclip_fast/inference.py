"""A trained model made ready for predictions: weights laid out once, CUDA graphs per bucket of text tokens."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from cmaclip_fast.layouts import lay_out
from cmaclip_fast.model import CMACLIP
from cmaclip_fast.types import Batch, Output

_BUCKETS_PER_DOUBLING = 4


class InferenceModel(nn.Module):
    """Predicts as `model` does, faster.

    On a CPU the weights are laid out once, when first needed, for products of few rows and for those of many; each
    takes their size in memory again. Weights that change later are used as they are. On a GPU they are copied in
    `dtype`, and each size of batch gets CUDA graphs for a few numbers of text tokens, recorded when first needed; this
    has not been run on a GPU yet.
    """

    def __init__(self, model: CMACLIP, dtype: torch.dtype | None = None, graphs: bool = True) -> None:
        """
        Args:
            model: on the device that it is to run on; it is put in evaluation mode.
            dtype: of weights and images; None is bfloat16 on a GPU that has it, else float32.
            graphs: record CUDA graphs on a GPU.
        """
        super().__init__()
        device = next(model.parameters()).device
        on_gpu = device.type == "cuda"
        if dtype is None:
            dtype = torch.bfloat16 if on_gpu and torch.cuda.is_bf16_supported() else torch.float32
        self.dtype = dtype
        has_dtype = all(parameter.dtype == dtype for parameter in model.parameters())
        self.model = (model if has_dtype else copy.deepcopy(model).to(dtype)).eval()
        self.tasks, self.preprocessing, self.tokenizer = model.tasks, model.preprocessing, model.tokenizer
        self._graphs: dict[tuple[int, ...], _Graph] | None = {} if on_gpu and graphs else None
        lay_out(self.model.parameters())

    @torch.inference_mode()
    def forward(self, batch: Batch, with_attention: bool = False) -> Output:
        """As `CMACLIP.forward`."""
        batch = replace(batch, images=batch.images.to(self.dtype))
        if self._graphs is None or with_attention:
            return self.model(batch, with_attention)
        capacity = bucket(int(batch.text_lengths.sum()), batch.tokens.numel())
        key = (*batch.images.shape, batch.tokens.shape[1], capacity)
        if key not in self._graphs:
            self._graphs[key] = _Graph(lambda batch: self.model(batch, capacity=capacity), batch)
        return self._graphs[key](batch)


def bucket(tokens: int, most: int) -> int:
    """The room for text tokens that a batch gets: the least of a few sizes that holds `tokens`, at most `most`.

    There are four sizes in each doubling, so at most a quarter is left empty.
    """
    step = max(1, (1 << max(0, tokens.bit_length() - 1)) // _BUCKETS_PER_DOUBLING)
    return min(most, -(-tokens // step) * step)


class _Graph:
    """A run of the model that was recorded for batches of one size."""

    def __init__(self, run: Callable[[Batch], Output], batch: Batch) -> None:
        images, tokens, lengths, present = (tensor.clone() for tensor in _tensors(batch))
        self.batch = Batch(images, tokens, lengths, present)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # autotuning and lazy initialisation must not be recorded
                run(self.batch)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = run(self.batch)

    def __call__(self, batch: Batch) -> Output:
        for ours, given in zip(_tensors(self.batch), _tensors(batch), strict=True):
            ours.copy_(given)
        self.graph.replay()
        weights = self.output.modality_weights
        return Output(
            {task: logits.clone() for task, logits in self.output.logits.items()},
            None if weights is None else {task: weight.clone() for task, weight in weights.items()},
            None if self.output.embedding is None else self.output.embedding.clone(),
            None if self.output.towers is None else self.output.towers.clone(),
        )


def _tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return batch.images, batch.tokens, batch.text_lengths, batch.present
