"""Parts of the training loop: groups, schedule, what is hidden and mixed, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cmaclip_fast import Batch, InputError, create_model
from cmaclip_fast.data import TrainedTokenizer
from cmaclip_fast.systems.cma_clip import CMACLIP
from cmaclip_fast.training.checkpoint import Progression, load_checkpoint, save_checkpoint
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.loop import _side
from cmaclip_fast.training.memory import Meter
from cmaclip_fast.training.objective import Objective
from cmaclip_fast.training.schedule import parameter_groups, schedule, tower_factors
from cmaclip_fast.types import Output

ROWS = 400


@pytest.fixture
def model() -> CMACLIP:
    tokenizer = TrainedTokenizer.train(["red dress", "blue coat"] * 3, context_length=8)
    tasks = {"colour": ["blue", "red"], "cut": ["long", "short"]}
    return create_model("tiny", tasks, tokenizer=tokenizer, image_size=32, width=32, heads=2, fusion_start="random")


def batch_of(rows: int) -> Batch:
    tokens = torch.arange(rows)[:, None].repeat(1, 8)
    present = torch.ones(rows, 2, dtype=torch.bool)
    present[::10, 0] = False
    present[1::10, 1] = False
    labels = {"colour": torch.arange(rows) % 2, "cut": torch.arange(rows) % 2}
    return Batch(torch.zeros(rows, 3, 32, 32), tokens, torch.arange(rows, dtype=torch.int32) % 7 + 2, present, labels)


def test_every_parameter_is_in_one_group_with_its_own_rate_and_decay(model: CMACLIP) -> None:
    groups = parameter_groups(model, TrainingConfig(learning_rate=1e-3, tower_learning_rate=1e-5, weight_decay=0.1))
    found = {id(p): group for group in groups for p in group["params"]}
    assert len(found) == sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        assert group["peak"] == (1e-5 if name.startswith(("image_tower", "text_tower")) else 1e-3), name
        plain = parameter.ndim <= 1 or "positional" in name or "class_embedding" in name or "type_emb" in name
        assert group["weight_decay"] == (0.0 if plain else 0.1), name


def test_rate_rises_then_falls_and_starts_anew_after_the_warm_start() -> None:
    rate = schedule(TrainingConfig(epochs=10, contrastive_epochs=2, warmup=0.1), steps=10)
    first, second = [rate(step) for step in range(20)], [rate(step) for step in range(20, 120)]
    for part, warm in ((first, 2), (second, 10)):
        assert part[:warm] == sorted(part[:warm]) and max(part) == pytest.approx(1)
        assert part[warm:] == sorted(part[warm:], reverse=True) and part[-1] < 0.05


def test_small_pictures_come_first(model: CMACLIP) -> None:
    config = TrainingConfig(epochs=4, small_epochs=0.5)
    assert [_side(model, config, epoch) for epoch in range(4)] == [16, 16, None, None]
    assert _side(model, TrainingConfig(epochs=1, small_epochs=0.9), 0) is None


def test_modality_dropout_hides_one_side_of_complete_pairs_only(model: CMACLIP) -> None:
    objective = Objective(model, TrainingConfig(text_dropout=0.3, image_dropout=0.2))
    batch = batch_of(ROWS)
    hidden = objective._hide(batch)
    assert hidden.present.any(1).all()
    both = batch.present.all(1)
    assert torch.equal(hidden.present[~both], batch.present[~both])
    shares = 1 - hidden.present[both].float().mean(0)
    assert abs(shares[0] - 0.3) < 0.08 and abs(shares[1] - 0.2) < 0.08


def test_mismatch_moves_whole_texts_between_rows_that_have_one(model: CMACLIP) -> None:
    objective = Objective(model, TrainingConfig(mismatch=0.4))
    batch = batch_of(ROWS)
    mixed, rows = objective._mismatch(batch)
    assert torch.equal(mixed.tokens[:, 0], rows) and torch.equal(mixed.text_lengths, batch.text_lengths[rows])
    moved = rows != torch.arange(ROWS)
    assert 0.2 < moved.float().mean() < 0.45
    assert batch.present[moved, 0].all() and batch.present[rows[moved], 0].all()
    assert torch.equal(objective._mismatch(batch)[0].present, batch.present)
    ablation = create_model("tiny", model.tasks, tokenizer=model.tokenizer, image_size=32, modality_attention=False)
    assert Objective(ablation, TrainingConfig(mismatch=0.4))._mismatch(batch)[0] is batch, "it has no modality weights"


def test_a_moved_text_teaches_only_what_is_judged_by_the_picture(model: CMACLIP) -> None:
    objective = Objective(model, TrainingConfig(mismatch=0.4))
    batch = batch_of(ROWS)
    given = torch.arange(ROWS)[:, None].expand(-1, 2)
    mixed, rows = objective._mismatch(batch)
    hidden = objective._hide(mixed)
    by_image, by_text = hidden.present * torch.tensor([0.2, 0.8]), hidden.present * torch.tensor([0.8, 0.2])
    colour, cut = objective._labels(given, rows, hidden, Output({}, {"colour": by_image, "cut": by_text})).unbind(1)
    own = torch.arange(ROWS)
    seen = torch.where(hidden.present[:, 1], own, rows)
    assert torch.equal(colour, seen) and not torch.equal(seen, own)
    torn = hidden.present.all(1) & (rows != own)
    assert torn.any() and torch.equal(cut, seen.masked_fill(torn, -1))
    assert torch.equal(objective._labels(given, rows, hidden, Output({}))[:, 1], seen)


def test_checkpoint_restores_everything_and_refuses_damage(model: CMACLIP, tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    optimizer = torch.optim.AdamW(parameter_groups(model, TrainingConfig()))
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    best = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said = Progression(epoch=3, step=30, best_score=0.5, best_epoch=2, seconds=1.5, history=[{"epoch": 1.0}])
    save_checkpoint(path, model, None, optimizer, best, said)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {p: optimizer.state[p]["exp_avg"].clone() for p in model.parameters()}
    sum(p.square().sum() for p in model.parameters()).backward()
    optimizer.step()
    assert load_checkpoint(path, model, None, optimizer, best) == said
    assert all(torch.equal(model.state_dict()[name], expected[name]) for name in expected)
    assert all(torch.equal(optimizer.state[p]["exp_avg"], moment) for p, moment in moments.items())
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"c\.safetensors.*--resume"):
        load_checkpoint(path, model, None, optimizer, best)


def test_without_pictures_the_image_tower_is_not_run(model: CMACLIP, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same loss and gradients of all that a text goes through."""
    batch = batch_of(12)
    batch.present[:, 1] = False
    runs = []
    for has_images in (True, False):
        torch.manual_seed(0)
        model.train().zero_grad()
        if not has_images:
            monkeypatch.setattr(model.image_tower, "forward", None)
        loss, report = Objective(model, TrainingConfig(), has_images)(batch)
        loss.backward()
        runs.append(
            (loss.detach(), report, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        )
    (loss, report, before), (same_loss, same_report, after) = runs
    assert torch.equal(report, same_report) and torch.equal(loss, same_loss)
    assert after and all(torch.equal(gradient, before[name]) for name, gradient in after.items())
    assert not any(before[name].any() for name in before.keys() - after.keys())


@pytest.mark.parametrize("how", ["checkpointing", "compile"])
def test_checkpointing_and_compilation_keep_loss_and_gradients(model: CMACLIP, how: str) -> None:
    objective = Objective(model, TrainingConfig(text_dropout=0.2, image_dropout=0.2, auxiliary_weight=0.5))
    batch = batch_of(12)

    def gradients(step: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        model.zero_grad()
        loss, _ = step(batch)
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # compiled code draws otherwise
    model.text_tower.text.token_embedding.dropout = 0.0
    loss, expected = gradients(objective)
    if how == "compile":
        torch._dynamo.reset()
        again, found = gradients(torch.compile(objective, backend="aot_eager"))
    else:
        model.set_checkpointing()
        again, found = gradients(objective)
    torch.testing.assert_close(again, loss)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(found[name], grad, atol=1e-5, rtol=1e-3, msg=name)


def test_memory_of_a_step_is_seen() -> None:
    meter = Meter("cpu")
    held = meter.reset()
    if held is None:
        pytest.skip("this system does not tell the memory of a process")
    block = torch.ones(64 * 2**20, dtype=torch.uint8)
    del block
    assert 60 * 2**20 < meter.peak() - held < 128 * 2**20


def test_fusion_and_lower_tower_layers_have_their_own_rates(model: CMACLIP) -> None:
    config = TrainingConfig(learning_rate=1e-3, fusion_learning_rate=5e-3, tower_learning_rate=1e-4, tower_decay=0.5)
    found = {id(p): group for group in parameter_groups(model, config) for p in group["params"]}
    factors = tower_factors(model, 0.5)
    layers = [name for name in factors if name.startswith("text_tower") and ".resblocks." in name]
    last = max(int(name.split(".resblocks.")[1].split(".")[0]) for name in layers)
    for name, parameter in model.named_parameters():
        group = found[id(parameter)]
        if name.startswith("sequence_attention"):
            assert (group["kind"], group["peak"]) == ("fusion", 5e-3)
        elif name.startswith(("heads", "auxiliary_heads", "modality_attention")):
            assert (group["kind"], group["peak"]) == ("heads", 1e-3)
        elif name in factors:
            assert (group["kind"], group["peak"]) == ("tower", pytest.approx(1e-4 * factors[name]))
    for name in layers:
        assert factors[name] == 0.5 ** (last - int(name.split(".resblocks.")[1].split(".")[0])), name
    assert factors["text_tower.text.token_embedding.weight"] == 0.5 ** (last + 1)
    assert set(tower_factors(model, 1.0).values()) == {1.0}


def test_heads_train_alone_first_and_the_rest_warms_up_after_them() -> None:
    config = TrainingConfig(epochs=10, contrastive_epochs=1, heads_first=3, warmup=0.1, fusion_warmup=0.5)
    share = schedule(config, steps=10)
    assert all(share(step, kind) > 0 for step in range(10) for kind in ("heads", "new", "tower", "fusion"))
    assert all(share(step, kind) == 0 for step in range(10, 40) for kind in ("new", "tower", "read", "fusion"))
    assert all(share(step, "heads") > 0 for step in range(10, 110))
    plain = schedule(TrainingConfig(epochs=10, contrastive_epochs=1, warmup=0.1), steps=10)
    assert [share(step, "heads") for step in range(110)] == [plain(step) for step in range(110)]
    assert share(40, "tower") == pytest.approx(plain(40) / 7) and share(46, "tower") == plain(46)
    assert share(40, "fusion") == pytest.approx(plain(40) / 35) and share(74, "fusion") == plain(74)
    with pytest.raises(ValueError, match="leaves no epoch"):
        TrainingConfig(epochs=3, heads_first=3)
