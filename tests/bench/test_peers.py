"""Every peer computes what our model computes, and the check before timing sees it where one does not."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cmaclip_fast.bench import comparison, flops
from cmaclip_fast.bench.comparison import Comparison, Group, Measurement, check_logits
from cmaclip_fast.bench.peers import BETWEEN, SYSTEMS
from cmaclip_fast.bench.peers.plain import PlainCMACLIP, PlainLongest, to_longest
from cmaclip_fast.bench.results import BenchmarkError
from cmaclip_fast.bench.steps import STEPS, operations
from cmaclip_fast.bench.workloads import SMALL, Texts, make_batch, make_model
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.types import Batch

from .conftest import MACHINE, setting, skip_unless_runs

SLOW = {"compiled": "compiles", "onnxruntime": "exports", "openvino": "exports"}
PEERS = [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SYSTEMS]
# compiling the backward pass of all layers takes minutes
TRAINED = [name for name, system in SYSTEMS.items() if system.trains and name not in SLOW]


@pytest.mark.parametrize("name", PEERS)
def test_inference_gives_our_logits(name: str, model: CMACLIP, batch: Batch, folder: Path) -> None:
    skip_unless_runs(name)
    with torch.inference_mode():
        expected = list(model.eval()(batch).logits.values())
        system = SYSTEMS[name](setting(model, folder))
        # another number of pairs and another length than those of the export and the compilation
        system.warm(make_batch(model, [5, 9, 4], seed=1))
        check_logits(system.title, "a small batch", system.logits(batch), expected)
        system.close()


@pytest.mark.parametrize("name", BETWEEN)
def test_each_step_gives_our_logits(name: str, model: CMACLIP, batch: Batch, folder: Path) -> None:
    with torch.inference_mode():
        expected = list(model.eval()(batch).logits.values())
        check_logits(name, "a small batch", BETWEEN[name](setting(model, folder)).logits(batch), expected)


@pytest.mark.parametrize("name", TRAINED)
def test_training_gives_our_loss_and_gradients(name: str, batch: Batch, folder: Path) -> None:
    skip_unless_runs(name, training=True)
    model = make_model(SMALL, depth=2)
    expected = torch.stack(
        [
            torch.nn.functional.cross_entropy(logits, batch.labels[task])
            for task, logits in model.train()(batch).logits.items()
        ]
    ).sum()
    (gradient,) = torch.autograd.grad(expected, model.norm.weight)
    system = SYSTEMS[name](setting(model, folder, training=True))
    loss = system.loss(batch)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    found = model.norm.weight.grad
    torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-3)


def test_plain_peers_share_our_parameters(model: CMACLIP) -> None:
    ours = {id(parameter) for parameter in model.parameters()}
    own = {name: parameter for name, parameter in PlainCMACLIP(model).named_parameters() if id(parameter) not in ours}
    heads = {name: parameter for name, parameter in own.items() if name.startswith("fusion.heads.")}
    assert own.keys() - heads.keys() == {f"fusion.pools.{task}.vector" for task in range(len(model.tasks))}
    # a head's weights are a part of ours, in the same memory
    assert len(heads) == 4 * len(model.tasks)
    memory = {parameter.untyped_storage().data_ptr() for parameter in model.heads.parameters()}
    assert {parameter.untyped_storage().data_ptr() for parameter in heads.values()} == memory


def test_check_sees_a_peer_that_attends_to_padding(model: CMACLIP, batch: Batch, folder: Path) -> None:
    system = PlainLongest(setting(model, folder))
    with torch.inference_mode():
        expected = list(model.eval()(batch).logits.values())
        plain = system.module
        assert isinstance(plain, PlainCMACLIP)
        handle = plain.fusion.encoder.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {"src_key_padding_mask": torch.zeros_like(kwargs["src_key_padding_mask"])},
            ),
            with_kwargs=True,
        )
        wrong = system.logits(batch)
        handle.remove()
    with pytest.raises(BenchmarkError, match=r"'plain, unmasked' differ from the baseline's by .* of the largest"):
        check_logits("plain, unmasked", "a small batch", wrong, expected)


def test_a_wrong_peer_fails_before_anything_is_timed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(PlainLongest):
        def logits(self, batch: Batch) -> list[torch.Tensor]:
            return [logits + 0.01 for logits in super().logits(batch)]

    monkeypatch.setitem(SYSTEMS, "longest", Wrong)
    monkeypatch.setattr(comparison, "alternate", lambda *given, **named: pytest.fail("was timed"))
    group = Group(SMALL, 2, False, (Measurement(Texts.product, ("ours", "plain", "longest"), 0.0, 1),))
    with pytest.raises(BenchmarkError, match="product titles: the logits of 'plain, padded to the longest' differ"):
        Comparison(group, make_model(SMALL, depth=2), MACHINE, folder).table(group.measurements[0])


def test_training_keeps_the_weights_that_all_systems_share(folder: Path) -> None:
    group = Group(SMALL, 2, True, (Measurement(Texts.product, ("ours", "plain"), 0.0, 2),))
    model = make_model(SMALL, depth=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = Comparison(group, model, MACHINE, folder).table(group.measurements[0])
    assert [row.system for row in table.rows] == ["ours", "plain"] and all(row.rounds == 2 for row in table.rows)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_missing_package_is_named_with_its_remedy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec("torch")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openvino" else found)
    group = Group(SMALL, 1, False, (Measurement(Texts.product, ("ours", "plain", "openvino"), 0.0, 1),))
    table = Comparison(group, make_model(SMALL, depth=2), MACHINE, folder).table(group.measurements[0])
    assert table.not_run == {"OpenVINO": "not run: openvino is missing: pip install 'cmaclip_fast[bench]'"}
    assert [row.system for row in table.rows] == ["ours", "plain"]


def counted(model: CMACLIP, batch: Batch, backward: bool) -> int:
    """PyTorch's own count of the plain model, with attention as products of matrices."""
    plain = PlainCMACLIP(model).train()
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        logits = plain(batch.images, to_longest(batch), batch.text_lengths)
        if backward:
            torch.stack([one.sum() for one in logits]).sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("length", [20, 77])
def test_padded_operations_are_what_pytorch_counts(model: CMACLIP, length: int) -> None:
    batch = make_batch(model, [4, length])
    shape = flops.Shape.of(model)
    # scores and sums of keyless attention are no products of matrices in the plain model
    keyless = 2 * len(model.tasks) * 2 * 4 * shape.width
    forward = flops.padded(shape, 2, length) - keyless
    assert counted(model, batch, backward=False) == forward
    assert counted(model, batch, backward=True) == flops.training(shape, 2, forward)


def test_useful_operations_are_the_padded_ones_less_what_nobody_reads(model: CMACLIP) -> None:
    shape = flops.Shape.of(model)
    length = 20
    tokens = length + shape.patches + 1
    saved_scores = shape.text_layers * 4 * shape.text_width * (length**2 - length * (length + 1) / 2)
    rest = tokens - 2
    saved_layer = rest * (4 * shape.width**2 + 4 * shape.width * shape.mlp) + 4 * shape.width * rest * tokens
    assert flops.useful(shape, [length]) == flops.padded(shape, 1, length) - saved_scores - saved_layer
    assert flops.useful(shape, [5, 9]) == flops.useful(shape, [5]) + flops.useful(shape, [9])
    assert flops.useful(replace(shape, classes=()), [5]) < flops.useful(shape, [5])


def test_operations_of_the_steps_fall_from_the_plain_to_ours(model: CMACLIP) -> None:
    shape, lengths = flops.Shape.of(model), [3, 11, 7, 20]
    found = operations(shape, lengths, 77)
    assert list(found) == list(STEPS)
    counts = list(found.values())
    assert counts[:5] == sorted(counts[:5], reverse=True) and len(set(counts[:5])) == 5
    assert found["plain"] == flops.padded(shape, 4, 77) and found["ours"] == flops.useful(shape, lengths)
    # where nothing is padded, the text tower saves the upper half of its scores and the packed fusion nothing
    even = operations(shape, [20, 20], 77)
    scores = shape.text_layers * 4 * shape.text_width * (20**2 - 20 * 21 / 2)
    assert even["longest"] - even["packed-text"] == 2 * scores
    assert even["packed-text"] == even["packed-fusion"]
