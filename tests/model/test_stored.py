"""Accelerated models that are copied, stored, exported, tuned with peft, or given nothing."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from families import classic, small
from test_dropin import encoder, features, gradients, inputs
from test_modified import Host, assert_same, difference, host, low_rank, results
from torch import Tensor, nn

from cmaclip_fast.errors import InputError
from cmaclip_fast.nn.dropin import accelerate, is_accelerated, restore
from cmaclip_fast.nn.modes import evaluation_copy

MODELS: dict[str, Callable[[], nn.Module]] = {
    "CLIP": lambda: classic("ViT-B-32"),
    "CustomTextCLIP": lambda: small("ViT-B-32"),
    "SigLIP": lambda: small("ViT-B-16-SigLIP"),
}


class Texts(nn.Module):
    """The text side of a model, as a module."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model.encode_text(tokens)


def stored(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.tried("modified model", ends="the same model, accelerated")
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "torch.save"])
@pytest.mark.parametrize("name", [*MODELS, "CLIP with LoRA", "TransformerEncoder"])
def test_copies(name: str, how: str) -> None:
    model = encoder(True) if name == "TransformerEncoder" else MODELS[name.removesuffix(" with LoRA")]()
    if "LoRA" in name:
        low_rank(Host(model, None, None, model.visual), "attn", "c_fc")
    accelerate(model).eval()
    copies = {"pickle": lambda: pickle.loads(pickle.dumps(model)), "torch.save": lambda: stored(model)}
    duplicate = copies.get(how, lambda: copy.deepcopy(model))()

    def run(of: nn.Module) -> list[Tensor]:
        if name == "TransformerEncoder":
            return [of(torch.ones(2, 5, 32) * torch.arange(5)[:, None])]
        return features(of, *inputs(of))

    expected = run(model)
    for parameter in model.parameters():
        parameter.data.zero_()
    assert is_accelerated(duplicate) and type(duplicate) is type(model)
    assert all(torch.equal(a, b) for a, b in zip(run(duplicate), expected, strict=True))
    assert not is_accelerated(restore(duplicate))
    for a, b in zip(run(duplicate), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.tried("modified model", ends="features of no rows, and gradients of 0")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_no_rows(name: str, training: bool) -> None:
    model = accelerate(MODELS[name]()).train(training)
    images, tokens = inputs(model)
    found = features(model, images[:0], tokens[:0])
    assert [tuple(x.shape) for x in found] == [(0, 40), (0, 40)]
    assert [tuple(x.shape) for x in model(images[:0], tokens[:0])[:2]] == [(0, 40), (0, 40)]
    assert all(not grad.any() for grad in gradients(model, found).values())


@pytest.mark.tried("modified model", ends="no rows, or 0 where all is padding")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize(("rows", "length"), [(0, 5), (2, 0), (2, 5)])
def test_an_encoder_given_nothing(rows: int, length: int, norm_first: bool, training: bool) -> None:
    model = accelerate(encoder(norm_first)).train(training)
    x = torch.randn(rows, length, 32)
    if rows * length == 0:
        assert model(x).shape == x.shape
    found = model(x, src_key_padding_mask=torch.ones(rows, length, dtype=torch.bool))
    assert found.shape == x.shape and not found.any()
    assert all(not grad.any() for grad in gradients(model, [found]).values())


def traced(model: nn.Module, *given: Tensor) -> Any:
    # PyTorch's own check of a trace finds a difference in the stock tower too
    return torch.jit.trace(model, given, check_trace=False)


def exported(model: nn.Module, *given: Tensor) -> Any:
    return torch.export.export(model, given).module()


def to_onnx(dynamo: bool) -> Callable[..., Any]:
    def run(model: nn.Module, *given: Tensor) -> Any:
        pytest.importorskip("onnxscript", reason="an export to ONNX needs onnx and onnxscript")
        runtime = pytest.importorskip("onnxruntime", reason="what was exported is run by onnxruntime")
        file = io.BytesIO()
        if dynamo:
            torch.onnx.export(model, given, dynamo=True, verbose=False).save(file)
        else:
            torch.onnx.export(model, given, file, dynamo=False)
        session = runtime.InferenceSession(file.getvalue())
        name = session.get_inputs()[0].name
        return lambda x: torch.from_numpy(session.run(None, {name: x.numpy()})[0])

    return run


WAYS = {
    "torch.jit.trace": traced,
    "torch.export": exported,
    "torch.onnx": to_onnx(True),
    "torch.onnx without dynamo": to_onnx(False),
}


@pytest.mark.tried("modified model", ends="the results of the stock model")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("side", ["images", "texts"])
@pytest.mark.parametrize("name", ["CLIP", "SigLIP"])
def test_exports(name: str, side: str, way: str) -> None:
    model = MODELS[name]().eval()
    stock, given = copy.deepcopy(model), inputs(model)[side == "texts"]
    accelerate(model)
    tower, expected = (m.visual if side == "images" else Texts(m) for m in (model, stock))
    torch.testing.assert_close(WAYS[way](tower, given)(given.flip(0)), expected(given.flip(0)), atol=1e-5, rtol=1e-4)
    assert is_accelerated(model)


@pytest.mark.tried("modified model", ends="one line that names restore")
@pytest.mark.parametrize("name", [*MODELS, "TransformerEncoder"])
def test_script_names_the_way_back(name: str) -> None:
    model = accelerate(encoder(True) if name == "TransformerEncoder" else MODELS[name]())
    with pytest.raises(InputError, match="restore"):
        torch.jit.script(model)


@pytest.mark.tried("modified model", ends="the results of the stock model")
@pytest.mark.parametrize("order", ["accelerated before", "accelerated after"])
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_step_of_training_with_peft(kind: str, order: str) -> None:
    peft = pytest.importorskip("peft", reason="adapters are peft's")
    stock, fast = host(kind), host(kind)
    tuned = []
    for at in (stock, fast):
        if at is fast and order == "accelerated before":
            accelerate(at.model)
        torch.manual_seed(1)
        config = peft.LoraConfig(r=3, target_modules=["attn", "c_fc", "c_proj"], init_lora_weights=False)
        tuned.append(peft.get_peft_model(at.tower, config))
        if at is fast and order == "accelerated after":
            accelerate(tuned[1])
    start = stock.run()
    for _ in range(2):
        expected, found = results(stock), results(fast)
        assert_same(found, expected)
        assert any("lora_" in name for name in expected[1])
        for at in (stock, fast):
            torch.optim.SGD([p for p in at.model.parameters() if p.requires_grad], lr=0.01).step()
    trained = stock.run()
    assert difference((trained, {}), (start, {})) > 1e-3
    for change in ("merge_adapter", "unmerge_adapter"):
        getattr(tuned[1], change)()
        assert_same((fast.run(), {}), (trained, {}))
    with tuned[0].disable_adapter(), tuned[1].disable_adapter():
        assert_same((fast.run(), {}), (stock.run(), {}))
    tuned[1].merge_and_unload()
    assert_same((fast.run(), {}), (trained, {}))
    assert is_accelerated(fast.model)


@pytest.mark.tried("threads", ends="the results of one thread, and the same weights")
def test_adapters_of_attention_in_threads() -> None:
    at = host("image")
    low_rank(at, "attn")
    accelerate(at.model)
    before = copy.deepcopy(at.model.state_dict())
    with torch.no_grad():
        expected = at.run()
        with ThreadPoolExecutor(4) as pool:
            for found in pool.map(lambda _: at.run(), range(64)):
                assert_same((found, {}), (expected, {}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in at.model.state_dict().items())


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_a_copy_for_evaluation_of_attention_with_adapters(dtype: torch.dtype | None) -> None:
    at = host("image")
    low_rank(at, "attn")
    images = inputs(at.model)[0].double()
    duplicate = evaluation_copy(accelerate(at.model), dtype=dtype)
    if dtype is None:
        weights = [dict(model.named_parameters()) for model in (at.model, duplicate)]
        assert all(p.data_ptr() == weights[1][name].data_ptr() for name, p in weights[0].items())
    with torch.no_grad():
        expected = at.model.encode_image(images)
        found = duplicate.encode_image(images.to(dtype or torch.float64)).double()
    torch.testing.assert_close(found, expected, atol=1e-4 if dtype else 1e-11, rtol=1e-4)
