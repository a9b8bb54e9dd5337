"""The packed model against the plain padded one, for every kind of tower that open_clip registers."""

from __future__ import annotations

import open_clip
import pytest
import torch
import torch.nn.functional as F
from families import CONTEXT, END, image_kind, make_tokens, small, text_kind
from padded import padded_logits

from cmaclip_fast.classifier.engine import Engine, bucket
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.data.tokenizer import OpenClipTokenizer
from cmaclip_fast.nn import layers
from cmaclip_fast.nn.laid_out import _FEW_ROWS, lay_out, linear
from cmaclip_fast.ops import dispatch, use_backend
from cmaclip_fast.systems.cma_clip import CMACLIP, CMACLIPConfig
from cmaclip_fast.types import Batch

TASKS = {"colour": ["red", "green", "blue"], "style": ["long", "short"]}
KINDS = {(image_kind(name), text_kind(name)): name for name in open_clip.list_models() if text_kind(name) is not None}


def make(name: str = "ViT-B-32", **options) -> CMACLIP:
    clip = small(name)
    torch.manual_seed(1)
    config = CMACLIPConfig(name=name, **{"width": 32, "depth": 2, "heads": 2, "fusion_start": "random"} | options)
    model = CMACLIP(config, TASKS, clip, ImagePreprocessing(size=24), OpenClipTokenizer("ViT-B-32"))
    for name_, parameter in model.named_parameters():
        if name_.endswith(("bias", "type_embedding")):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_batch(model: CMACLIP, same: bool = True) -> Batch:
    lengths = [5, CONTEXT, 2, 5, 7, 3]
    tokens = make_tokens(lengths, getattr(model.text_tower.text, "eos_id", END) if eos(model) else END)
    images = torch.randn(6, 3, 24, 24, generator=torch.Generator().manual_seed(2))
    if same:
        tokens[3], images[4] = tokens[0], images[1]
    present = torch.tensor([[1, 1], [1, 1], [1, 0], [1, 1], [0, 1], [1, 1]], dtype=torch.bool)
    return Batch(images, tokens, torch.tensor(lengths, dtype=torch.int32), present)


def eos(model: CMACLIP) -> bool:
    return model.text_tower.text.pool_type == "eos"


@pytest.mark.parametrize("name", sorted(KINDS.values()))
def test_logits_are_those_of_the_padded_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(name)
    batch = make_batch(model)
    expected = padded_logits(model, batch)
    found = {"once": model(batch).logits, "laid out": Engine(model)(batch).logits}
    if model.text_tower.stops_at_end:
        found["capacity"] = model(batch, capacity=6 * CONTEXT).logits
    monkeypatch.setattr(layers, "_VALUES_AT_ONCE", 300)
    found["in parts"] = Engine(model)(batch).logits
    for logits in found.values():
        for task in TASKS:
            torch.testing.assert_close(logits[task], expected[task], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{}, {"sequence_attention": False}, {"modality_attention": False}, {"depth": 1}])
def test_gradients_are_those_of_the_padded_model(options: dict) -> None:
    model = make(**options).double()
    batch = make_batch(model)
    batch.images = batch.images.double()
    weights = {task: torch.randn(6, len(TASKS[task]), dtype=torch.float64) for task in TASKS}

    def gradients(logits: dict) -> dict[str, torch.Tensor | None]:
        model.zero_grad()
        sum((logits[task] * weights[task]).sum() for task in TASKS).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = gradients(padded_logits(model, batch))
    for training in (False, True):
        model.train(training)
        found = gradients(model(batch).logits)
        assert {name for name, grad in found.items() if grad is not None} == {
            name for name, grad in expected.items() if grad is not None
        }
        for name, grad in expected.items():
            if grad is not None:
                torch.testing.assert_close(found[name], grad, atol=1e-10, rtol=1e-7, msg=name)


def test_checkpointing_and_autocast_keep_the_gradients() -> None:
    model = make()
    batch = make_batch(model)

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        sum(logits.float().square().sum() for logits in model(batch).logits.values()).backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    plain = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        low = gradients()
    for transformer in (model.image_tower.visual.transformer, model.text_tower.text.transformer):
        transformer.grad_checkpointing = True
    model.sequence_attention.checkpointing = True
    for a, b, c in zip(plain, gradients(), low, strict=True):
        torch.testing.assert_close(b, a)
        assert (c - a).norm() <= 0.1 * a.norm() + 1e-4


def test_what_is_absent_or_the_same_is_not_computed_again() -> None:
    model = make()
    batch = make_batch(model)
    seen: dict[str, int] = {}
    model.image_tower.register_forward_hook(lambda _, inputs, __: seen.update(images=len(inputs[0])))
    packed = model.text_tower.packed
    model.text_tower.packed = lambda tokens, *rest: seen.update(texts=len(tokens)) or packed(tokens, *rest)
    model(batch)
    assert seen == {"images": 4, "texts": 4}  # of six: one absent and one twice of each
    model.train()
    model(batch)
    assert seen == {"images": 6, "texts": 6}


@torch.no_grad()
@pytest.mark.parametrize(
    ("lengths", "spare", "parts"),
    [
        ([5, 5, 5, 5], 0, [(0, 2), (2, 4)]),
        ([0, 9, 1, 9, 1, 0, 0], 0, [(0, 3), (3, 7)]),
        ([1, 30, 1], 0, [(0, 2), (2, 3)]),
        ([30], 0, [(0, 1)]),
        ([5, 5], 0, [(0, 2)]),
        ([5, 5, 5, 5], 1, [(0, 4)]),
        ([], 30, [(0, 0)]),
    ],
)
def test_many_tokens_go_through_the_layers_in_parts(lengths, spare, parts, monkeypatch) -> None:
    monkeypatch.setattr(layers, "_VALUES_AT_ONCE", 40)
    tokens = torch.zeros(sum(lengths) + spare, 4)
    rows = layers.Rows.of(torch.tensor(lengths, dtype=torch.int32), max(lengths, default=0))
    assert layers._parts(tokens, rows) == parts
    with torch.enable_grad():
        assert layers._parts(tokens, rows) == [(0, len(lengths))]


@torch.inference_mode()
def test_the_last_layer_is_computed_for_two_tokens_a_row() -> None:
    model = make()
    batch = make_batch(model, same=False)
    sizes = []
    model.sequence_attention.layers[-1].norm_mlp.register_forward_hook(
        lambda _, inputs, __: sizes.append(len(inputs[0]))
    )
    model(batch)
    assert sizes == [2 * len(batch)]


def test_weights_that_change_after_they_were_laid_out_are_used() -> None:
    model = make()
    batch = make_batch(model)
    fast = Engine(model)
    before = fast(batch).logits["colour"]
    with torch.no_grad():
        for layer in model.sequence_attention.layers:
            layer.qkv.weight.mul_(3)
    after = fast(batch).logits["colour"]
    assert (after - before).abs().max() > 1e-4
    torch.testing.assert_close(after, padded_logits(model, batch)["colour"], atol=2e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="this PyTorch has no MKL")
@pytest.mark.skipif(dispatch.extension_missing() is not None, reason="the extension is not built")
@pytest.mark.parametrize("shape", [(77, 300), (2304, 768), (768, 3072), (512, 512)])
def test_a_layout_serves_products_of_any_number_of_rows(shape: tuple[int, int]) -> None:
    weight, bias = torch.nn.Parameter(torch.randn(shape)), torch.nn.Parameter(torch.randn(shape[0]))
    lay_out([weight])
    for rows in (1, 2, 7, 16, 50, _FEW_ROWS, _FEW_ROWS + 1, 600, 1600):
        x = torch.randn(rows, shape[1])
        with torch.no_grad(), torch.profiler.profile() as profile:
            found = linear(x, weight, bias)
        ran = {event.key for event in profile.key_averages()}
        few = rows <= _FEW_ROWS
        assert ("cmaclip::_panel_linear_cpp" in ran) == few and ("mkl::_mkl_linear" in ran) == (not few)
        exact = F.linear(x.double(), weight.double(), bias.double())
        error, plain = (found - exact).abs().max(), (F.linear(x, weight, bias) - exact).abs().max()
        assert error <= 2 * plain


def test_what_has_no_layout_is_multiplied_as_it_is() -> None:
    weight, vector = torch.nn.Parameter(torch.randn(8, 4)), torch.nn.Parameter(torch.randn(4))
    lay_out([weight, vector])
    x = torch.randn(3, 4)
    for backend in ("reference", "auto"):
        with torch.no_grad(), use_backend(backend):
            torch.testing.assert_close(linear(x, weight, None), x @ weight.T)
            torch.testing.assert_close(linear(x[None, :2], weight, None), (x @ weight.T)[None, :2])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight, None).dtype == torch.bfloat16
    assert linear(x, weight, None).requires_grad
    with torch.no_grad():
        weight.add_(1)
        torch.testing.assert_close(linear(x, weight, None), x @ weight.T)


def test_buckets_hold_the_tokens_and_are_few() -> None:
    sizes = {bucket(tokens, 2464) for tokens in range(1, 2465)}
    assert len(sizes) < 45
    for tokens in range(1, 2465):
        assert tokens <= bucket(tokens, 2464) <= max(tokens + 1, 1.25 * tokens)
