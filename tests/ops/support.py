"""Cases of the operators, and backends run on them, judged by the rule in `tests/rule.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from cmaclip_fast import ops
from tests import rule


@dataclass
class Case:
    """Arguments of an operator by name; floating-point tensors are cast, and differentiated unless in `fixed`.

    The outputs numbered in `without_gradient` get none.
    """

    operator: str
    arguments: dict[str, Any]
    fixed: Sequence[str] = ()
    without_gradient: Sequence[int] = ()

    def tensors(self, dtype: torch.dtype, device: str = "cpu") -> dict[str, Any]:
        return {name: _prepare(value, dtype, device) for name, value in self.arguments.items()}

    def run(
        self, backend: str, dtype: torch.dtype, device: str = "cpu", transform: Callable[[Tensor], Tensor] | None = None
    ) -> dict[str, Tensor]:
        """Outputs and gradients in float64 on the CPU; `transform` changes the layout of each tensor argument."""
        arguments = self.tensors(dtype, device)
        leaves = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor) and value.is_floating_point() and name not in self.fixed:
                leaves[name] = value.requires_grad_()
        if transform is not None:
            arguments = {name: transform(v) if name in leaves else v for name, v in arguments.items()}
        outputs = getattr(ops, self.operator)(**arguments, backend=backend)
        outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
        floats = [
            output
            for index, output in enumerate(outputs)
            if output.is_floating_point() and index not in self.without_gradient
        ]
        targets = [output.masked_fill(output == -torch.inf, 0) for output in floats]
        torch.autograd.backward(targets, cotangents(floats))
        results = {f"output {index}": output for index, output in enumerate(outputs)}
        results |= {f"gradient of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
        return {name: result.detach().double().cpu() for name, result in results.items()}


def cotangents(outputs: Sequence[Tensor]) -> list[Tensor]:
    """The same random gradients of outputs at every call, exact in each dtype."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randn(x.shape, generator=generator, dtype=torch.float32).bfloat16() for x in outputs]
    return [x.to(output.device, output.dtype) for x, output in zip(drawn, outputs, strict=True)]


def check(
    case: Case,
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    transform: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Run a case on a backend and judge outputs and gradients by the rule."""
    # Inputs are rounded to the dtype first, so that the truth is the truth of the same numbers.
    rounded = replace(case, arguments=case.tensors(dtype))
    truth = rounded.run("reference", torch.float64)
    plain = rounded.run("reference", dtype)
    got = rounded.run(backend, dtype, device, transform)
    assert got.keys() == truth.keys()
    outputs = [value for name, value in truth.items() if name.startswith("output")]
    conditioning = rule.by_name(case.operator, cotangents(outputs), rounded.tensors(torch.float64))
    for name in truth:
        label = f"{case.operator}, {backend}, {dtype}: {name}"
        rule.judge(label, got[name], plain[name], truth[name], dtype, conditioning.get(name))


def check_threads(case: Case, dtype: torch.dtype) -> None:
    """Run a case in C++ on one and on three threads: the results are the same, bit by bit."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = case.run("cpp", dtype)
        torch.set_num_threads(3)
        got = case.run("cpp", dtype)
    finally:
        torch.set_num_threads(threads)
    for name in expected:
        assert torch.equal(got[name], expected[name]), name


def _prepare(value: Any, dtype: torch.dtype, device: str) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device, dtype if value.is_floating_point() else value.dtype, copy=True)


def spread(tensor: Tensor) -> Tensor:
    """The same values as a view with gaps between the rows of its last dimension, which stays contiguous."""
    wide = torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=-1)
    return wide[..., : tensor.shape[-1]]


def ends(lengths: Sequence[int]) -> Tensor:
    """`cu_seqlens` of rows of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def modality_pool_case(rows: int, modalities: int, width: int, tasks: int, shared: bool = False) -> Case:
    embeddings = torch.randn(rows, modalities, width)
    weight = torch.randn(tasks, 1 if shared else modalities, width) * max(width, 1) ** -0.5
    present = torch.rand(rows, modalities) < 0.7
    return Case("modality_pool", {"embeddings": embeddings, "weight": weight, "present": present})


def pack_tokens_case(
    rows: int,
    length: int,
    patches: int,
    width: int,
    typed: bool = True,
    spare: int | None = None,
    shared: bool = False,
) -> Case:
    """Rows of up to `length` text tokens and, where present, `patches` image tokens; gaps lie between the texts.

    With `shared`, rows take any tokens there are, the same ones as others too.
    """
    present = torch.rand(rows, 2) < 0.7
    counts = torch.stack([torch.randint(0, length + 1, (rows,)), torch.full((rows,), patches)], dim=1) * present
    sizes = torch.tensor([rows * length, rows * patches])
    if shared:
        sizes = torch.tensor([2 * length, 2 * patches])
        starts = (torch.rand(rows, 2) * (sizes - counts + 1)).long()
    else:
        starts = torch.arange(rows)[:, None] * torch.tensor([length, patches])
    arguments = {
        "text": torch.randn(int(sizes[0]), width),
        "image": torch.randn(int(sizes[1]), width),
        "starts": starts.int(),
        "counts": counts.int(),
        "type_embedding": torch.randn(2, width) if typed else None,
    }
    if spare is not None:
        arguments["capacity"] = int(counts.sum()) + spare
    return Case("pack_tokens", arguments)


def packed_attention_case(
    q_lengths: Sequence[int],
    k_lengths: Sequence[int] | None = None,
    heads: int = 2,
    size: int = 32,
    causal: bool = False,
    spare: int = 0,
) -> Case:
    k_lengths = q_lengths if k_lengths is None else k_lengths
    q = torch.randn(sum(q_lengths) + spare, heads, size)
    k, v = (torch.randn(sum(k_lengths) + spare, heads, size) for _ in range(2))
    arguments = {
        **{"q": q, "k": k, "v": v, "cu_seqlens_q": ends(q_lengths), "cu_seqlens_k": ends(k_lengths)},
        **{"max_seqlen_q": max(q_lengths, default=0), "max_seqlen_k": max(k_lengths, default=0), "causal": causal},
    }
    return Case("packed_attention", arguments)


def multitask_cross_entropy_case(
    rows: int, classes: Sequence[int], weighted: bool = False, label_smoothing: float = 0.0, labelled: float = 0.7
) -> Case:
    labels = torch.stack([torch.randint(0, count, (rows,)) for count in classes], dim=1)
    labels = torch.where(torch.rand(labels.shape) < labelled, labels, -1)
    arguments = {
        "logits": torch.randn(rows, sum(classes)) * 3,
        "labels": labels,
        "offsets": ends(classes),
        "class_weight": torch.rand(sum(classes)) if weighted else None,
        "label_smoothing": label_smoothing,
    }
    return Case("multitask_cross_entropy", arguments, fixed=("class_weight",))


def multitask_binary_cross_entropy_case(
    rows: int,
    classes: Sequence[int],
    weighted: bool = False,
    gamma_positive: float = 0.0,
    gamma_negative: float = 0.0,
    margin: float = 0.0,
) -> Case:
    width = sum(classes)
    arguments = {
        "logits": torch.randn(rows, width) * 3,
        "targets": torch.randint(-1, 2, (rows, width), dtype=torch.int8),
        "offsets": ends(classes),
        "class_weight": torch.rand(width) if weighted else None,
        "gamma_positive": gamma_positive,
        "gamma_negative": gamma_negative,
        "margin": margin,
    }
    return Case("multitask_binary_cross_entropy", arguments, fixed=("class_weight",))
