"""Towers that a user has changed, inside CMA-CLIP: the same as when each module is called on padded texts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CONTEXT, make_tokens, small
from padded import image_tokens, text_tokens
from test_dropin import LENGTHS, tokens_of_mlps
from test_modified import (
    CHANGES,
    OF_IMAGE,
    OF_OPEN_CLIP,
    OF_TEXT,
    Host,
    assert_same,
    difference,
    low_rank,
    results,
)
from torch import Tensor
from torch.nn.modules import module as global_hooks

from cmaclip_fast.nn.towers import image_tower, text_tower

# a tower gives tokens, so what belongs to the embedding that open_clip makes of them has no part in it
NOT_OF_TOWERS = {"hook on visual", "own forward of visual", "own encode_text", "pooling the first"}
ITEMS = [
    (kind, name, change)
    for kind, changes in {"image": CHANGES | OF_OPEN_CLIP | OF_IMAGE, "text": CHANGES | OF_OPEN_CLIP | OF_TEXT}.items()
    for name, change in changes.items()
    if name not in NOT_OF_TOWERS
]


def host(kind: str, called: bool = False) -> Host:
    """A tower in float64 that gives all tokens and then the global ones; `called`: by calls of open_clip's modules."""
    clip = small("ViT-B-32").double()
    if kind == "image":
        images = torch.randn(4, 3, 24, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        of_images: Any = image_tower(clip.visual)

        def run() -> list[Tensor]:
            if called:
                return [image_tokens(of_images, images), image_tokens(of_images, images)[:, 0]]
            return [of_images(images), of_images.global_tokens(images)]

        return Host(of_images, clip.visual.transformer.resblocks, run, clip.visual)
    tokens, lengths = make_tokens(LENGTHS), torch.tensor(LENGTHS, dtype=torch.int32)
    of_texts: Any = text_tower(clip.text)

    def run_texts() -> list[Tensor]:
        if not called:
            return [of_texts.packed(tokens, lengths)[0], of_texts.global_tokens(tokens, lengths)]
        dense, again = (text_tokens(of_texts, tokens, lengths)[0] for _ in range(2))
        return [dense[torch.arange(CONTEXT) < lengths[:, None]], again[torch.arange(4), lengths.long() - 1]]

    return Host(of_texts, clip.text.transformer.resblocks, run_texts, clip.text)


@pytest.mark.tried("modified model", ends="the results of the stock modules")
@pytest.mark.parametrize(("kind", "change"), [(k, c) for k, _, c in ITEMS], ids=[f"{k}-{n}" for k, n, _ in ITEMS])
def test_a_changed_tower_gives_what_its_modules_give(kind: str, change: Callable[[Host], Any]) -> None:
    called, changed = host(kind, called=True), host(kind)
    for at in (called, changed):
        torch.manual_seed(1)
        change(at)
    expected = results(called)
    assert difference(expected, results(host(kind))) > 0.01
    assert_same(results(changed), expected)
    assert changed.calls == called.calls


@pytest.mark.tried("modified model", ends="the results of the stock modules")
@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("register", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_on_all_modules_are_called(kind: str, register: str) -> None:
    called, tower = host(kind, called=True), host(kind)
    seen: list[str] = []
    hook = getattr(global_hooks, f"register_module_{register}_hook")
    handle = hook(lambda module, *rest: seen.append(type(module).__name__))
    try:
        expected = results(called)
        names, seen[:] = list(seen), []
        assert_same(results(tower), expected)
    finally:
        handle.remove()
    own = type(tower.model).__name__
    assert [name for name in seen if name != own] == names and len(names) > 20


@pytest.mark.parametrize("kind", ["image", "text"])
def test_adapters_stay_fast_and_leave_the_weights_as_they_are(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    at = host(kind)
    low_rank(at, "attn", "c_fc", "c_proj")
    before = copy.deepcopy(at.model.state_dict())
    seen = tokens_of_mlps(monkeypatch)
    at.run()
    tokens = 40 if kind == "image" else sum(LENGTHS)
    assert seen == [tokens, tokens, tokens, 4]
    assert all(torch.equal(tensor, before[name]) for name, tensor in at.model.state_dict().items())


@pytest.mark.tried("modified model", ends="no tokens, and gradients of 0")
@pytest.mark.parametrize("name", ["ViT-B-32", "coca_ViT-B-32", "ViT-B-16-SigLIP"])
@pytest.mark.parametrize("adapted", [False, True])
def test_no_rows(name: str, adapted: bool) -> None:
    clip = small(name)
    images, texts = image_tower(clip.visual), text_tower(clip.text)
    if adapted:
        for tower in (images, texts):
            low_rank(Host(tower, None, None, tower), "c_fc", "attn" if name == "ViT-B-32" else "c_proj")
    none, lengths = torch.zeros(0, CONTEXT, dtype=torch.int64), torch.zeros(0, dtype=torch.int32)
    packed, rows = texts.packed(none, lengths)
    found = [images(torch.zeros(0, 3, 24, 24)), images.global_tokens(torch.zeros(0, 3, 24, 24)), packed]
    found += [texts(none, lengths)[0], texts.global_tokens(none, lengths)]
    assert [len(x) for x in found] == [0] * 5 and rows.cu_seqlens.tolist() == [0]
    assert {x.shape[-1] for x in found} == {images.width, texts.width}
    sum(x.sum() for x in found).backward()
    parameters = [*images.parameters(), *texts.parameters()]
    assert all(p.grad.abs().sum() == 0 for p in parameters if p.grad is not None)
