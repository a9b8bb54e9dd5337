"""The measurements of a run, and their duration."""

from __future__ import annotations

from dataclasses import dataclass

from cmaclip_fast.bench.comparison import Group, Measurement
from cmaclip_fast.bench.workloads import Texts

INFERENCE = ("ours", "plain", "longest", "compiled", "accelerated", "transformers", "onnxruntime", "openvino")
TRAINING = ("ours", "plain", "longest", "compiled", "accelerated", "transformers")
NOT_COMPILED = ("ours", "plain", "longest", "accelerated", "transformers", "onnxruntime", "openvino")
EAGER = ("ours", "plain", "longest", "accelerated", "transformers")
PADDED = ("ours", "plain", "longest")
B32, B16 = "ViT-B-32", "ViT-B-16"


@dataclass(frozen=True)
class Plan:
    """The measurements of a run.

    Attributes:
        groups: tables; what takes minutes a round gets few rounds and the peers that matter, as the report says.
        steps_seconds: of the steps from the plain implementation to ours; 0 for none.
        memory: systems whose memory is measured, in training at the first such table.
        batches, lengths, tasks, classes: the points of the curves.
        point_seconds: of each point.
        part_seconds: of each operator.
        loader_seconds: of the input pipeline.
    """

    groups: tuple[Group, ...]
    steps_seconds: float
    memory: tuple[str, ...]
    batches: tuple[int, ...]
    lengths: tuple[int, ...]
    tasks: tuple[int, ...]
    classes: tuple[int, ...]
    point_seconds: float
    part_seconds: float
    loader_seconds: float


FULL = Plan(
    groups=(
        Group(B32, 1, False, tuple(Measurement(texts, INFERENCE, 20, least=16) for texts in Texts)),
        Group(
            B32,
            32,
            False,
            (
                Measurement(Texts.product, INFERENCE, 90),
                Measurement(Texts.clipart, NOT_COMPILED, 0, least=2),
                Measurement(Texts.full, NOT_COMPILED, 60, least=2),
            ),
        ),
        Group(B32, 256, False, (Measurement(Texts.product, (*PADDED, "openvino"), 0, least=1),)),
        Group(
            B32,
            32,
            True,
            (Measurement(Texts.product, TRAINING, 150, least=3), Measurement(Texts.full, PADDED, 0, least=2)),
        ),
        Group(B16, 1, False, (Measurement(Texts.product, EAGER, 20, least=8),)),
        Group(B16, 32, False, (Measurement(Texts.product, PADDED, 0, least=2),)),
        Group(B16, 256, False, (Measurement(Texts.product, ("ours", "longest"), 0, least=1),)),
        Group(B16, 32, True, (Measurement(Texts.product, ("ours", "plain"), 0, least=1),)),
    ),
    steps_seconds=60,
    memory=PADDED,
    batches=(1, 2, 4, 8, 16, 32),
    lengths=(8, 16, 32, 48, 64, 77),
    tasks=(1, 4, 16, 64, 256, 1024),
    classes=(10, 100, 1_000, 10_000, 100_000),
    point_seconds=2,
    part_seconds=3,
    loader_seconds=5,
)

QUICK = Plan(
    groups=(
        Group(B32, 1, False, (Measurement(Texts.product, EAGER, 5, least=8),)),
        Group(B32, 32, False, (Measurement(Texts.product, PADDED, 0, least=2),)),
        Group(B32, 32, True, (Measurement(Texts.product, ("ours", "plain"), 0, least=1),)),
    ),
    steps_seconds=0,
    memory=(),
    batches=(1, 4, 8),
    lengths=(8, 32, 77),
    tasks=(1, 32, 1024),
    classes=(10, 1_000, 100_000),
    point_seconds=0,
    part_seconds=1,
    loader_seconds=2,
)
"""About three minutes: no compilation, no export, no memory."""
