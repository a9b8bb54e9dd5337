"""The classifier on a GPU: the same labels as on the CPU, with CUDA graphs, lower precision, and several threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from cmaclip_fast import Classifier, create_model
from cmaclip_fast.data import TrainedTokenizer

pytestmark = pytest.mark.gpu

TEXTS = ["a long red dress", None, "short blue coat", "green skirt"] * 8


def make_pair() -> tuple[Classifier, list[Image.Image | None]]:
    torch.manual_seed(0)
    tokenizer = TrainedTokenizer.train([text for text in TEXTS if text], context_length=10)
    model = create_model(
        "tiny", {"colour": ["blue", "green", "red"]}, tokenizer=tokenizer, image_size=32, fusion_start="random"
    )
    generator = np.random.default_rng(0)
    pictures = [Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in TEXTS]
    return Classifier(model, device="cpu"), [None if row % 4 == 2 else picture for row, picture in enumerate(pictures)]


@pytest.mark.parametrize("precision", ["auto", "float32", "bfloat16", "float16"])
def test_probabilities_are_those_of_the_cpu(precision: str) -> None:
    classifier, pictures = make_pair()
    expected = classifier.predict_proba(pictures, TEXTS)["colour"]
    on_gpu = Classifier(classifier.system, device="cuda", precision=precision)
    for _ in range(4):  # as it is, recorded, and replayed
        found = on_gpu.predict_proba(pictures, TEXTS, batch_size=4)["colour"]
        np.testing.assert_allclose(found, expected, atol=5e-2 if precision in ("auto", "bfloat16") else 1e-2)
    assert next(classifier.system.parameters()).device.type == "cpu"


def test_threads_share_the_graphs() -> None:
    classifier, pictures = make_pair()
    on_gpu = Classifier(classifier.system, device="cuda", precision="float32")
    expected = on_gpu.predict_proba(pictures, TEXTS, batch_size=4)["colour"]
    with ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(on_gpu.predict_proba, pictures, TEXTS, batch_size=4) for _ in range(32)]
    for future in futures:
        np.testing.assert_allclose(future.result()["colour"], expected, atol=1e-3)
