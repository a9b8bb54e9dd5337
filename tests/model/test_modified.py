"""Models that a user has changed: the same results as stock, whatever was changed, before or after `accelerate`."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from families import classic
from open_clip.transformer import ResidualAttentionBlock, Transformer, VisionTransformer
from test_dropin import LENGTHS, encoder, gradients, inputs, tokens_of_mlps
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from cmaclip_fast.nn.dropin import accelerate

PARTS = {
    "expand": ("mlp.c_fc", "linear1"),
    "contract": ("mlp.c_proj", "linear2"),
    "norm": ("ln_2", "norm2"),
    "attention": ("attn", "self_attn"),
    "branch": ("ls_1", "dropout1"),
    "block": ("", ""),
}


@dataclass
class Host:
    """A model in float64, its blocks, and how it is run: outputs that gradients can be taken of."""

    model: nn.Module
    blocks: nn.ModuleList
    run: Callable[[], list[Tensor]]
    tower: nn.Module
    calls: list[Any] = field(default_factory=list)

    def part(self, name: str) -> tuple[nn.Module, str]:
        """The parent and the name of a part of the first block; as blocks count the last one."""
        path = PARTS[name][isinstance(self.model, nn.TransformerEncoder)]
        if not path:
            return self.blocks, str(len(self.blocks) - 1)
        parent, _, child = path.rpartition(".")
        return self.blocks[0].get_submodule(parent), child

    def get(self, name: str) -> Any:
        parent, child = self.part(name)
        return getattr(parent, child)

    def put(self, name: str, module: nn.Module) -> None:
        parent, child = self.part(name)
        setattr(parent, child, module)


def host(kind: str) -> Host:
    if kind == "encoder":
        model = encoder(True).double()
        x = torch.randn(4, 9, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        padding = torch.arange(9) >= torch.tensor([9, 4, 1, 6])[:, None]
        return Host(model, model.layers, lambda: [model(x, src_key_padding_mask=padding)[~padding]], model)
    model = classic("ViT-B-32").double()
    images, tokens = inputs(model)
    if kind == "image":
        tower = model.visual
        return Host(model, tower.transformer.resblocks, lambda: [model.encode_image(images.double())], tower)
    return Host(model, model.transformer.resblocks, lambda: [model.encode_text(tokens)], model)


def mixed(output: Any) -> Any:
    return (
        tuple(map(mixed, output)) if isinstance(output, tuple) else None if output is None else output + output.flip(-1)
    )


def shapes(values: Any) -> list[Any]:
    values = values if isinstance(values, tuple) else (values,)
    return [tuple(x.shape) if isinstance(x, Tensor) else None for x in values]


def forward_hook(at: Host, part: str, **options: bool) -> Any:
    def hook(module: nn.Module, args: Any, *rest: Any) -> Any:
        at.calls.append([part, shapes(args), shapes(rest[-1])])
        return mixed(rest[-1])

    return at.get(part).register_forward_hook(hook, **options)


def forward_pre_hook(at: Host, part: str, **options: bool) -> Any:
    def hook(module: nn.Module, args: Any, *kwargs: Any) -> Any:
        at.calls.append([part, shapes(args)])
        changed = (args[0] + args[0].flip(-1), *args[1:])
        return (changed, *kwargs) if kwargs else changed

    return at.get(part).register_forward_pre_hook(hook, **options)


def backward_hook(at: Host, part: str) -> Any:
    def hook(module: nn.Module, into: Any, out: Any) -> Any:
        at.calls.append([part, shapes(out)])
        return mixed(into)

    return at.get(part).register_full_backward_hook(hook)


def backward_pre_hook(at: Host, part: str) -> Any:
    return at.get(part).register_full_backward_pre_hook(lambda _, out: at.calls.append(shapes(out)) or mixed(out))


class Mixed(nn.Module):
    """A wrapper that has what is read of what it wraps."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        for name in ("weight", "bias", "in_features", "out_features"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return mixed(self.inner(*args, **kwargs))


class MixesTokens(nn.Module):
    """An adapter that looks at the other tokens of its row, which packed tokens do not show."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    @property
    def weight(self) -> Tensor:
        return self.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + x.cumsum(-2))


def wrap(at: Host, part: str, wrapper: Callable[[nn.Module], nn.Module] = Mixed) -> None:
    at.put(part, wrapper(at.get(part)))


def subclass(at: Host, part: str) -> None:
    """The class of the part, on this object, becomes one with another `forward`."""
    module = at.get(part)
    cls = type(module)
    module.__class__ = type(cls.__name__, (cls,), {"forward": lambda self, *a, **k: mixed(cls.forward(self, *a, **k))})


def own_forward(at: Host, part: str) -> None:
    module = at.get(part)
    forward = module.forward
    module.forward = lambda *args, **kwargs: mixed(forward(*args, **kwargs))


def own_method(at: Host) -> None:
    block = at.blocks[0]
    name = "_sa_block" if isinstance(at.model, nn.TransformerEncoder) else "attention"
    method = getattr(block, name)
    setattr(block, name, lambda *args, **kwargs: mixed(method(*args, **kwargs)))


def inserted(at: Host) -> None:
    mlp = at.blocks[0].mlp
    between = nn.LayerNorm(mlp.c_fc.out_features).double()
    at.blocks[0].mlp = nn.Sequential(OrderedDict(c_fc=mlp.c_fc, gelu=mlp.gelu, ln=between, c_proj=mlp.c_proj))


def new_activation(at: Host) -> None:
    activation = nn.PReLU(at.get("expand").out_features if isinstance(at.model, nn.TransformerEncoder) else 1).double()
    if isinstance(at.model, nn.TransformerEncoder):
        at.blocks[0].activation = nn.Softmax(-2)
    else:
        at.blocks[0].mlp.gelu = activation


def parametrized(at: Host, part: str) -> None:
    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    name = "in_proj_weight" if part == "attention" else "weight"
    parametrize.register_parametrization(at.get(part), name, Doubled())


def low_rank(at: Host, *targets: str) -> None:
    """peft's adapters, with values of some size in them."""
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False), at.tower)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in at.tower.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)


ON = ("expand", "contract", "norm", "attention", "branch", "block")
CHANGES: dict[str, Callable[[Host], Any]] = {}
for _part in ON:
    CHANGES |= {
        f"forward hook on {_part}": lambda at, part=_part: forward_hook(at, part),
        f"backward hook on {_part}": lambda at, part=_part: backward_hook(at, part),
        f"own forward of {_part}": lambda at, part=_part: own_forward(at, part),
        f"subclass of {_part}": lambda at, part=_part: subclass(at, part),
    }
for _part in ("expand", "norm", "block"):
    CHANGES |= {
        f"pre-hook on {_part}": lambda at, part=_part: forward_pre_hook(at, part),
        f"pre-hook with keywords on {_part}": lambda at, part=_part: forward_pre_hook(at, part, with_kwargs=True),
        f"hook with keywords on {_part}": lambda at, part=_part: forward_hook(at, part, with_kwargs=True),
        f"hook always called on {_part}": lambda at, part=_part: forward_hook(at, part, always_call=True),
        f"backward pre-hook on {_part}": lambda at, part=_part: backward_pre_hook(at, part),
    }
CHANGES |= {
    "wrapper of expand": lambda at: wrap(at, "expand"),
    "wrapper of contract": lambda at: wrap(at, "contract"),
    "wrapper of branch": lambda at: wrap(at, "branch"),
    "wrapper of norm": lambda at: wrap(at, "norm"),
    "adapter over tokens": lambda at: wrap(at, "expand", MixesTokens),
    "own method of block": own_method,
    "another activation": new_activation,
    "block removed": lambda at: at.blocks.__delitem__(0),
    "block added": lambda at: at.blocks.append(copy.deepcopy(at.blocks[0])),
    "pruned expand": lambda at: prune.l1_unstructured(at.get("expand"), "weight", 0.5),
    "pruned attention": lambda at: prune.l1_unstructured(at.get("attention"), "in_proj_weight", 0.5),
    "old spectral norm of expand": lambda at: spectral_norm(at.get("expand")),
    "spectral norm of expand": lambda at: parametrizations.spectral_norm(at.get("expand")),
    "parametrized expand": lambda at: parametrized(at, "expand"),
    "parametrized contract": lambda at: parametrized(at, "contract"),
    "parametrized attention": lambda at: parametrized(at, "attention"),
    "parametrized norm": lambda at: parametrized(at, "norm"),
}
OF_OPEN_CLIP: dict[str, Callable[[Host], Any]] = {
    "MLP with a module appended": lambda at: at.blocks[0].mlp.append(nn.Tanh()),
    "MLP with a module inserted": inserted,
    "hook on the MLP": lambda at: at.blocks[0].mlp.register_forward_hook(lambda m, x, y: y * 1.5),
    "hook on the activation": lambda at: at.blocks[0].mlp.gelu.register_forward_hook(lambda m, x, y: y * 1.5),
    "in-place activation": lambda at: setattr(at.blocks[0].mlp, "gelu", nn.ReLU(inplace=True)),
    "norm over the batch": lambda at: setattr(
        at.blocks[0], "ls_1", nn.BatchNorm1d(10 if isinstance(at.tower, VisionTransformer) else 12).double()
    ),
    "hook on the transformer": lambda at: at.tower.transformer.register_forward_hook(lambda m, x, y: y + y.flip(-1)),
    "own forward of the transformer": lambda at: setattr(
        at.tower.transformer,
        "forward",
        lambda x, attn_mask=None: Transformer.forward(at.tower.transformer, x.flip(-1), attn_mask),
    ),
    "LoRA on the MLP": lambda at: low_rank(at, "c_fc", "c_proj"),
    "LoRA on one product": lambda at: low_rank(at, "c_proj"),
    "LoRA on attention": lambda at: low_rank(at, "attn"),
    "LoRA everywhere": lambda at: low_rank(at, "attn", "c_fc", "c_proj"),
}
OF_IMAGE = {
    f"hook on {name}": lambda at, name=name: getattr(at.model.visual, name).register_forward_hook(
        lambda m, x, y: at.calls.append(shapes((*x, y))) or y * 1.5
    )
    for name in ("conv1", "ln_pre", "ln_post")
} | {
    "hook on visual": lambda at: at.model.visual.register_forward_hook(lambda m, x, y: y * 1.5),
    "own forward of visual": lambda at: setattr(
        at.model.visual, "forward", lambda x: torch.ones(4, 40).double() * x.mean() * at.model.visual.proj.sum()
    ),
    "own pooling": lambda at: setattr(at.model.visual, "_global_pool", lambda x: (x.mean(1), x)),
    "another norm": lambda at: setattr(at.model.visual, "ln_post", nn.BatchNorm1d(10).double()),
    "pooling by mean": lambda at: setattr(at.model.visual, "pool_type", "avg"),
}
OF_TEXT = {
    f"hook on {name}": lambda at, name=name: getattr(at.tower, name).register_forward_hook(
        lambda m, x, y: at.calls.append(shapes((*x, y))) or y + y.flip(-1)
    )
    for name in ("token_embedding", "ln_final")
} | {
    "own encode_text": lambda at: setattr(
        at.model, "encode_text", lambda text: at.model.positional_embedding[:4, :40] * 2
    ),
    "pooling the first": lambda at: setattr(at.model, "text_pool_type", "first"),
    "another embedding": lambda at: setattr(at.tower, "token_embedding", Flipped(at.tower.token_embedding)),
}


class Flipped(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embedding(tokens) + self.embedding(tokens.flip(1))


ITEMS = [
    (kind, name, change)
    for kind, changes in {
        "image": CHANGES | OF_OPEN_CLIP | OF_IMAGE,
        "text": CHANGES | OF_OPEN_CLIP | OF_TEXT,
        "encoder": CHANGES,
    }.items()
    for name, change in changes.items()
]


def results(at: Host) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(0)
    at.calls.clear()
    outputs = at.run()
    return [x.detach() for x in outputs], gradients(at.model, outputs)


def assert_same(found: Any, expected: Any) -> None:
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-9)
    assert found[1].keys() == expected[1].keys()
    for name, grad in expected[1].items():
        torch.testing.assert_close(found[1][name], grad, atol=1e-10, rtol=1e-8, msg=name)


def difference(a: Any, b: Any) -> float:
    """The largest relative change of an output or of a gradient that both have."""
    pairs = list(zip(a[0], b[0], strict=True)) + [(grad, b[1].get(name, grad)) for name, grad in a[1].items()]
    return max(float((x - y).norm() / (y.norm() + 1e-9)) for x, y in pairs if x.shape == y.shape)


@pytest.mark.tried("modified model", ends="the results of the stock model")
@pytest.mark.parametrize(("kind", "change"), [(k, c) for k, _, c in ITEMS], ids=[f"{k}-{n}" for k, n, _ in ITEMS])
def test_a_changed_model_gives_what_the_stock_model_gives(kind: str, change: Callable[[Host], Any]) -> None:
    stock, before, after, unchanged = (host(kind) for _ in range(4))
    torch.manual_seed(1)
    change(stock)
    torch.manual_seed(1)
    change(before)
    accelerate(before.model)
    accelerate(after.model)
    torch.manual_seed(1)
    change(after)
    expected = results(stock)
    calls = list(stock.calls)
    assert difference(expected, results(unchanged)) > 0.01
    for changed in (before, after):
        assert_same(results(changed), expected)
        assert changed.calls == calls


@pytest.mark.tried("modified model", ends="the results of the stock model")
@pytest.mark.parametrize("kind", ["image", "text", "encoder"])
@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_are_called(kind: str, register: str) -> None:
    stock, fast = host(kind), host(kind)
    accelerate(fast.model)
    seen: list[str] = []
    hook = getattr(global_hooks, f"register_module_{register}_hook")
    handle = hook(lambda module, *rest: seen.append(type(module).__name__.removeprefix("Accelerated")))
    try:
        expected = results(stock)
        names, seen[:] = list(seen), []
        assert_same(results(fast), expected)
    finally:
        handle.remove()
    assert seen == names and len(names) > 10


@pytest.mark.tried("modified model", ends="the results of the stock model")
@pytest.mark.parametrize("kind", ["image", "text"])
def test_a_method_replaced_on_the_class_is_called(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stock, fast = host(kind), host(kind)
    accelerate(fast.model)
    plain = results(fast)
    attention = ResidualAttentionBlock.attention
    monkeypatch.setattr(ResidualAttentionBlock, "attention", lambda self, **given: 2 * attention(self, **given))
    assert difference(results(stock), plain) > 0.01
    assert_same(results(fast), results(stock))


@pytest.mark.parametrize("kind", ["image", "text", "encoder"])
def test_fast_again_once_a_hook_is_gone(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = host(kind)
    accelerate(at.model)
    seen = tokens_of_mlps(monkeypatch)
    handle = forward_hook(at, "expand")
    at.run()
    assert not seen
    handle.remove()
    at.run()
    assert len(seen) == 2


@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("name", ["LoRA on the MLP", "LoRA on attention", "LoRA everywhere", "parametrized expand"])
def test_adapters_stay_fast(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = host(kind)
    (CHANGES | OF_OPEN_CLIP)[name](at)
    accelerate(at.model)
    seen = tokens_of_mlps(monkeypatch)
    at.run()
    assert seen == ([40, 4] if kind == "image" else [sum(LENGTHS), 4])
