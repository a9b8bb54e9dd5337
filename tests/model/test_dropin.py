"""Accelerated stock models against themselves."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from families import CONTEXT, END, classic, image_kind, make_tokens, small, text_kind
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn import layers
from cmaclip_fast.nn.dropin import accelerate, is_accelerated, restore

KINDS = {(image_kind(name), text_kind(name)): name for name in open_clip.list_models() if text_kind(name) is not None}
LENGTHS = [5, CONTEXT, 2, 9]


def inputs(model: nn.Module, end: int = END) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)), make_tokens(LENGTHS, end)


def features(model: nn.Module, images: Tensor, tokens: Tensor) -> list[Tensor]:
    return [model.encode_image(images), model.encode_text(tokens)]


def gradients(model: nn.Module, outputs: list[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.Generator().manual_seed(3)
    sum((x * torch.randn(x.shape, generator=weights, dtype=x.dtype)).sum() for x in outputs).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def end_token(model: nn.Module) -> int:
    text = getattr(model, "text", None)
    return text.eos_id if getattr(text, "pool_type", "") == "eos" else END


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["classic", *sorted(KINDS.values())])
def test_open_clip_models_keep_outputs_and_gradients(name: str, training: bool) -> None:
    model = (classic("ViT-B-32") if name == "classic" else small(name)).double().train(training)
    batch = inputs(model, end_token(model))
    batch = (batch[0].double(), batch[1])
    keys = list(model.state_dict())
    expected = features(model, *batch)
    expected_gradients = gradients(model, expected)
    assert accelerate(model) is model and is_accelerated(model)
    assert list(model.state_dict()) == keys
    found = features(model, *batch)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)
    found_gradients = gradients(model, found)
    for parameter, grad in expected_gradients.items():
        torch.testing.assert_close(found_gradients[parameter], grad, atol=1e-10, rtol=1e-8, msg=parameter)
    restore(model)
    assert not is_accelerated(model)
    assert all(torch.equal(a, b) for a, b in zip(features(model, *batch), expected, strict=True))


def test_a_whole_clip_gives_the_same_pair_of_features() -> None:
    model = classic("ViT-B-32").eval()
    images, tokens = inputs(model)
    with torch.inference_mode():
        expected = model(images, tokens)
        found = accelerate(model)(images, tokens)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def tokens_of_mlps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many packed tokens go through the MLP of each layer that is run fast, as they come."""
    seen: list[int] = []
    process = layers.Layer._process
    monkeypatch.setattr(layers.Layer, "_process", lambda layer, x, norm: seen.append(len(x)) or process(layer, x, norm))
    return seen


def test_only_the_tokens_that_are_read_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(classic("ViT-B-32")).eval()
    images, tokens = inputs(model)
    seen = tokens_of_mlps(monkeypatch)
    model.encode_image(images)
    assert seen == [4 * 10, 4]
    seen.clear()
    model.encode_text(tokens)
    assert seen == [sum(LENGTHS), 4]


def encoder(norm_first: bool, norm: bool = True, **options) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        32, 2, 64, **{"dropout": 0.0, "batch_first": True, "norm_first": norm_first} | options
    )
    stack = nn.TransformerEncoder(layer, 2, nn.LayerNorm(32) if norm else None, enable_nested_tensor=False)
    for parameter in stack.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, std=0.3)
    return stack


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "gelu"}, {"bias": False}])
def test_transformer_encoders_keep_outputs_and_gradients(norm_first: bool, masked: bool, options: dict) -> None:
    model = encoder(norm_first, **options).double()
    x = torch.randn(4, 9, 32, dtype=torch.float64, requires_grad=True)
    padding = torch.arange(9) >= torch.tensor([9, 4, 1, 6])[:, None] if masked else None
    if masked:
        padding[0, 2] = True  # a hole, not only a tail
    kept = torch.ones(4, 9, dtype=torch.bool) if padding is None else ~padding
    expected = model(x, src_key_padding_mask=padding)[kept]
    leaves = [x, *model.parameters()]
    weight = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad((expected * weight).sum(), leaves)
    accelerate(model)
    out = model(x, src_key_padding_mask=padding)
    torch.testing.assert_close(out[kept], expected, atol=1e-11, rtol=1e-9)
    assert out[~kept].abs().sum() == 0
    found = torch.autograd.grad((out[kept] * weight).sum(), leaves)
    for a, b in zip(found, expected_gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-8)


def test_a_mask_of_positions_takes_the_stock_way() -> None:
    model = encoder(True).eval()
    x, mask = torch.randn(2, 5, 32), nn.Transformer.generate_square_subsequent_mask(5)
    expected = model(x, mask=mask)
    assert torch.equal(accelerate(model)(x, mask=mask), expected)


def test_dropout_is_drawn_in_training_and_not_in_evaluation() -> None:
    model = accelerate(encoder(True, dropout=0.5))
    x = torch.randn(2, 5, 32)
    assert not torch.equal(model.train()(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_inside_another_model_and_in_a_copy() -> None:
    outer = nn.Sequential(encoder(True), nn.Linear(32, 3))
    x = torch.randn(2, 5, 32)
    expected = outer(x)
    duplicate = copy.deepcopy(accelerate(outer))
    with torch.no_grad():
        outer[0].layers[0].linear1.weight.zero_()
    assert is_accelerated(duplicate)
    torch.testing.assert_close(duplicate(x), expected)


def test_compile() -> None:
    torch._dynamo.reset()
    model = accelerate(classic("ViT-B-32")).eval()
    compiled = torch.compile(model, backend="aot_eager")
    for seed in (0, 1):
        images, tokens = inputs(model)
        tokens = tokens.roll(seed, 0)
        with torch.no_grad():
            expected, found = model(images, tokens), compiled(images, tokens)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    stack = accelerate(encoder(True))
    x, padding = torch.randn(2, 5, 32), torch.tensor([[False] * 5, [False, False, False, True, True]])
    expected = stack(x, src_key_padding_mask=padding)
    torch.testing.assert_close(torch.compile(stack, backend="aot_eager")(x, src_key_padding_mask=padding), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_inference_in_other_precisions(dtype: torch.dtype) -> None:
    model = classic("ViT-B-32").eval()
    images, tokens = inputs(model)
    with torch.inference_mode():
        expected = features(model, images, tokens)
        accelerate(model.to(dtype))
        for a, b in zip(features(model, images.to(dtype), tokens), expected, strict=True):
            assert a.dtype == dtype
            assert (a - b).norm() <= {torch.float64: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype] * b.norm()


def test_autocast_and_activation_checkpointing() -> None:
    model = classic("ViT-B-32")
    batch = inputs(model)
    with torch.autocast("cpu", torch.bfloat16):
        expected = features(model, *batch)
    expected_gradients = gradients(model, [x.float() for x in expected])
    accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = features(model, *batch)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert (a - b).norm() <= 0.05 * b.norm()
    low = gradients(model, [x.float() for x in found])
    assert all((low[name] - grad).norm() <= 0.1 * grad.norm() + 1e-3 for name, grad in expected_gradients.items())
    plain = gradients(model, features(model, *batch))
    model.set_grad_checkpointing(True)
    for name, grad in gradients(model, features(model, *batch)).items():
        torch.testing.assert_close(grad, plain[name])


def test_distributed_data_parallel(tmp_path) -> None:
    model = classic("ViT-B-32")
    batch = inputs(model)
    expected = gradients(model, list(model(*batch)[:2]))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(accelerate(model), find_unused_parameters=True)
        found = gradients(wrapped, list(wrapped(*batch)[:2]))
    finally:
        torch.distributed.destroy_process_group()
    for name, grad in expected.items():
        torch.testing.assert_close(found[f"module.{name}"], grad, atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "nothing in Linear"),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2), 1, enable_nested_tensor=False), "batch_first"),
    ],
)
def test_what_cannot_be_accelerated_is_said(model: nn.Module, message: str) -> None:
    with pytest.raises(InputError, match=message):
        accelerate(model)
