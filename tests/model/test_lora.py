"""Low-rank adapters: what is trained, what stays, and that a merged model gives the same as before."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import CONTEXT, small
from open_clip.model import CustomTextCLIP
from open_clip.timm_model import TimmModel
from test_dropin import gradients, tokens_of_mlps
from torch import Tensor, nn

from cmaclip_fast import CMACLIP, Batch, InputError
from cmaclip_fast.data.preprocess import ImagePreprocessing
from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.systems.cma_clip import CMACLIPConfig
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.lora import add_adapters, merge_adapters
from cmaclip_fast.training.schedule import parameter_groups

RANK, SIDE = 3, 32
TASKS = {"colour": ["blue", "green", "red"]}
KINDS = ["ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP", "timm and Hugging Face"]


def make(kind: str) -> CMACLIP:
    """A model in float64 on small towers."""
    clip = clip_of(kind)
    torch.manual_seed(0)
    config = CMACLIPConfig(name=kind, width=32, heads=2, depth=1)
    tokenizer: Any = SimpleNamespace(context_length=CONTEXT)
    return CMACLIP(config, TASKS, clip, ImagePreprocessing(size=SIDE), tokenizer).double()


def clip_of(kind: str) -> Any:
    if kind != "timm and Hugging Face":
        return small(kind, SIDE)
    transformers = pytest.importorskip("transformers", reason="Hugging Face text towers need cmaclip_fast[hf]")
    from open_clip.hf_model import HFTextEncoder

    clip = small("ViT-B-32")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=60, **sizes, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    clip.text = HFTextEncoder("", 40, config=config, pooler_type="mean_pooler", proj_type="linear")
    clip.text.transformer.pooler = None
    clip.visual = TimmModel("test_vit", 40, SIDE, pool="", proj="linear")
    clip.visual.set_input_size(SIDE)
    return clip


def batch() -> Batch:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([5, CONTEXT, 2], dtype=torch.int32)
    tokens = torch.randint(3, 59, (3, CONTEXT), generator=generator)
    tokens[torch.arange(CONTEXT) >= lengths[:, None]] = 0
    tokens[torch.arange(3), lengths.long() - 1] = 59
    images = torch.randn(3, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    present = torch.tensor([[True, True], [True, True], [True, False]])
    return Batch(images, tokens, lengths, present, {"colour": torch.tensor([0, 1, 2])})


def learn(model: nn.Module) -> None:
    """Gives each adapter's second matrix, which starts at 0, values of some size."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) / 3)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_alone_change_the_towers_and_merge_into_ordinary_ones(kind: str) -> None:
    model, inputs = make(kind), batch()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    classes = {name: type(module) for name, module in model.named_modules()}
    expected = model(inputs).logits["colour"]
    adapted = add_adapters(model, RANK)
    torch.testing.assert_close(model(inputs).logits["colour"], expected, atol=1e-12, rtol=1e-9)
    in_towers = dict(model.tower_parameters())
    assert all(parameter.requires_grad == ("lora_" in name) for name, parameter in in_towers.items())
    learn(model)
    for mode in (True, False):
        model.train(mode)
        trained = model(inputs).logits["colour"]
    assert (trained - expected).norm() > 0.01 * expected.norm()
    torch.testing.assert_close(evaluation_copy(model)(inputs).logits["colour"], trained)
    merge_adapters(adapted)
    torch.testing.assert_close(model(inputs).logits["colour"], trained, atol=1e-11, rtol=1e-9)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert {name: type(module) for name, module in model.named_modules()} == classes
    assert all(parameter.requires_grad for parameter in model.parameters())
    ranks = {
        name: int(torch.linalg.matrix_rank(after[name] - before[name]))
        for name in before
        if changed(name, before, after)
    }
    assert set(ranks.values()) == {RANK}
    blocks = {name.split("_tower.")[0] for name in ranks}
    assert blocks == {"image", "text"}
    linear = [name for name in before if is_adaptable(name, before[name])]
    assert sorted(ranks) == sorted(linear)


def changed(name: str, before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return not torch.equal(before[name], after[name])


def is_adaptable(name: str, tensor: Tensor) -> bool:
    """Whether a tensor is the weight of a linear layer in a transformer block."""
    inside = any(part in name for part in (".resblocks.", ".trunk.blocks.", ".encoder.layer."))
    return "_tower." in name and inside and tensor.ndim == 2


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_adapters_are_those_of_the_plain_way(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make(kind).train(), batch()
    add_adapters(model, RANK)
    learn(model)
    found = gradients(model, list(model(inputs).logits.values()))
    with monkeypatch.context() as patch:
        patch.setattr("cmaclip_fast.nn.towers.can_be_packed", lambda x: False)
        seen = tokens_of_mlps(patch)
        expected = gradients(model, list(model(inputs).logits.values()))
        assert len(seen) == 1, "more than the fusion ran packed"
    model.set_checkpointing()
    again = gradients(model, list(model(inputs).logits.values()))
    assert found.keys() == expected.keys() == again.keys()
    adapters = {name for name, parameter in model.named_parameters() if "lora_" in name}
    assert adapters <= found.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-10, rtol=1e-8, msg=name)
        torch.testing.assert_close(again[name], grad, atol=1e-10, rtol=1e-8, msg=name)
        assert name not in adapters or grad.norm() > 0


def test_towers_with_adapters_stay_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = make("ViT-B-32"), batch()
    plain = tokens_of_mlps(monkeypatch)
    model(inputs)
    expected, plain[:] = list(plain), []
    add_adapters(model, RANK)
    model(inputs)
    assert plain == expected and len(plain) == 5


def test_adapters_train_at_the_rate_of_new_layers() -> None:
    model = make("ViT-B-32")
    add_adapters(model, RANK)
    config = TrainingConfig(learning_rate=1e-3, tower_learning_rate=1e-5)
    groups = parameter_groups(model, config)
    assert {group["peak"] for group in groups} == {1e-3}
    trained = {id(parameter) for group in groups for parameter in group["params"]}
    assert {id(parameter) for parameter in model.parameters() if parameter.requires_grad} == trained


@pytest.mark.tried("call from Python", ends="one line that names the remedy")
def test_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"pip install 'cmaclip_fast\[lora\]'"):
        add_adapters(make("ViT-B-32"), RANK)


@pytest.mark.tried("call from Python", ends="one line that names the remedy")
def test_a_tower_without_linear_layers() -> None:
    clip = small("ViT-B-32")
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8}
    clip.visual = CustomTextCLIP(40, vision, {"width": 32, "heads": 2, "layers": 1}).visual
    config = CMACLIPConfig(name="RN50", width=32, heads=2, depth=1)
    model = CMACLIP(config, TASKS, clip, ImagePreprocessing(size=64), SimpleNamespace(context_length=CONTEXT))
    with pytest.raises(InputError, match="image tower of 'RN50' has no linear layers"):
        add_adapters(model, RANK)
    assert all(parameter.requires_grad for parameter in model.parameters())
