"""The heads of all tasks together against a loop over the tasks, and the one call of the loss."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import nn

from cmaclip_fast import Batch, create_model
from cmaclip_fast.bench.loops import heads_apart
from cmaclip_fast.data import TrainedTokenizer
from cmaclip_fast.nn.heads import TaskHeads, TaskLinear
from cmaclip_fast.nn.laid_out import lay_out
from cmaclip_fast.training import objective as module
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.objective import Objective

COUNTS = {
    "one task": [5],
    "equal": [4] * 6,
    "equal, not side by side": [3, 7, 3, 2, 7, 3],
    "all different": [2, 9, 4],
    "very different": [2, 3000, 2, 17, 3000, 2],
    "many": [2 + k % 23 for k in range(1024)],
}
ROWS, WIDTH, HIDDEN = 5, 12, 8


def make_heads(counts: list[int], dtype: torch.dtype = torch.float64, dropout: float = 0.0) -> TaskHeads:
    torch.manual_seed(0)
    return TaskHeads(WIDTH, HIDDEN, counts, dropout).to(dtype)


def apart(heads: TaskHeads, features: torch.Tensor) -> torch.Tensor:
    """The logits of a loop over plain modules, and the modules' gradients with them if anything asks for them."""
    parts = features.unbind(1) if features.ndim == 3 else [features] * len(heads.classes.sizes)
    modules = heads_apart(heads)
    return torch.cat([head(part) for head, part in zip(modules, parts, strict=True)], dim=1)


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
@pytest.mark.parametrize("own", [True, False], ids=["own features", "shared features"])
def test_values_and_gradients_are_those_of_a_loop(counts: list[int], own: bool) -> None:
    heads = make_heads(counts)
    features = torch.randn(*(ROWS, len(counts), WIDTH) if own else (ROWS, WIDTH), dtype=torch.float64)
    features.requires_grad_()
    logits = heads(features)
    modules = heads_apart(heads)
    parts = features.unbind(1) if own else [features] * len(counts)
    expected = torch.cat([head(part) for head, part in zip(modules, parts, strict=True)], dim=1)
    assert logits.shape == (ROWS, sum(counts)) and logits.is_contiguous()
    torch.testing.assert_close(logits, expected)

    grad = torch.randn_like(logits)
    ours = torch.autograd.grad(logits, [features, *heads.parameters()], grad)
    theirs = torch.autograd.grad(expected, [features, *modules.parameters()], grad)
    torch.testing.assert_close(ours[0], theirs[0])
    found = dict(zip([name for name, _ in heads.named_parameters()], ours[1:], strict=True))
    for task, of_task in enumerate(zip(*[iter(theirs[1:])] * 4, strict=True)):
        hidden, classes = heads.hidden.rows[task], heads.classes.rows[task]
        torch.testing.assert_close(found["hidden.weight"][hidden], of_task[0])
        torch.testing.assert_close(found["hidden.bias"][hidden], of_task[1])
        torch.testing.assert_close(found["classes.weight"][classes], of_task[2])
        torch.testing.assert_close(found["classes.bias"][classes], of_task[3])


@pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)
def test_every_row_of_the_weights_is_of_one_task(counts: list[int]) -> None:
    layer = TaskLinear(WIDTH, counts)
    assert [rows.stop - rows.start for rows in layer.rows] == counts
    rows = sorted(row for part in layer.rows for row in range(part.start, part.stop))
    assert rows == list(range(sum(counts))) and list(layer.state_dict()) == ["weight", "bias"]
    if len(set(counts)) == len(counts):
        assert [part.start for part in layer.rows] == [0, *accumulate(counts)][:-1], "no two tasks go together"


def test_products_do_not_grow_with_the_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    batched = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda *given: sizes.append(len(given[1])) or batched(*given))
    make_heads(COUNTS["many"])(torch.randn(2, 1024, WIDTH, dtype=torch.float64))
    assert len(sizes) == 1 + 23 and sum(sizes) == 2 * 1024


@pytest.mark.parametrize("counts", [COUNTS["one task"], COUNTS["equal, not side by side"]], ids=["one", "six"])
@pytest.mark.parametrize("own", [True, False], ids=["own features", "shared features"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast(counts: list[int], own: bool, dtype: torch.dtype) -> None:
    heads = make_heads(counts, torch.float32)
    features = torch.randn(*(ROWS, len(counts), WIDTH) if own else (ROWS, WIDTH))
    with torch.autocast("cpu", dtype):
        logits, expected = heads(features), apart(heads, features)
    assert logits.dtype == expected.dtype == dtype
    exact = heads(features)
    theirs = (expected - exact).abs().max()
    assert (logits - exact).abs().max() <= 2 * theirs
    logits.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in heads.parameters())


@pytest.mark.parametrize("rows", [1, 100])
def test_laid_out_weights_give_the_same(rows: int) -> None:
    for counts, shape in ((COUNTS["one task"], (rows, 1, WIDTH)), (COUNTS["all different"], (rows, WIDTH))):
        heads = make_heads(counts, torch.float32).eval()
        features = torch.randn(shape)
        with torch.inference_mode():
            expected = heads(features)
            lay_out(heads.parameters())
            torch.testing.assert_close(heads(features), expected, atol=1e-5, rtol=1e-5)


def test_dropout_drops_hidden_values_in_training_alone() -> None:
    heads = make_heads([3, 2], dropout=0.5)
    features = torch.randn(ROWS, 2, WIDTH, dtype=torch.float64)
    assert not torch.equal(heads(features), heads(features))
    heads.eval()
    torch.testing.assert_close(heads(features), apart(heads, features))


def test_a_batch_may_be_empty() -> None:
    heads = make_heads([3, 2, 3])
    assert heads(torch.zeros(0, 3, WIDTH, dtype=torch.float64)).shape == (0, 8)


def test_initial_weights_have_the_range_of_single_layers() -> None:
    torch.manual_seed(0)
    layer, single = TaskLinear(64, [100, 50, 100]), nn.Linear(64, 50)
    for name in ("weight", "bias"):
        ours, theirs = getattr(layer, name), getattr(single, name)
        assert ours.abs().max() <= 1 / 8 and theirs.abs().max() <= 1 / 8
        assert abs(float(ours.detach().std()) - 1 / 8 / 3**0.5) < 0.01


NAMES = ["weight", "forward", "a.b", "style/cut", "", " ", "été 颜色", "train"]


def make_objective(counts: dict[str, int], **options: object) -> tuple[Objective, Batch]:
    torch.manual_seed(0)
    tokenizer = TrainedTokenizer.train(["red dress", "short green skirt"] * 3, context_length=10)
    tasks = {task: [f"class {k}" for k in range(count)] for task, count in counts.items()}
    model = create_model("tiny", tasks, tokenizer=tokenizer, image_size=32, width=32, heads=2, depth=1)
    tokens, lengths, _ = tokenizer.encode(["red dress", "short skirt", "green", "dress", "skirt red", "short"])
    present = torch.tensor([[True, True], [True, False], [False, True], [True, True], [True, True], [True, True]])
    labels = {task: torch.randint(-1, count, (6,)) for task, count in counts.items()}
    batch = Batch(torch.randn(6, 3, 32, 32), tokens, lengths, present, labels)
    quiet = {"text_dropout": 0.0, "image_dropout": 0.0, "mismatch": 0.0, "auxiliary_weight": 0.5}
    return Objective(model.train(), TrainingConfig(**(quiet | options))), batch


def test_a_task_may_bear_any_name() -> None:
    step, batch = make_objective({name: 2 + k % 3 for k, name in enumerate(NAMES)})
    loss, _ = step(batch)
    loss.backward()
    output = step.model(batch)
    assert list(output.logits) == list(output.modality_weights) == NAMES
    assert not any(name and f"{name}." in key for name in NAMES[2:] for key in step.model.heads.state_dict())
    for k, name in enumerate(NAMES):
        assert output.logits[name].shape == (6, 2 + k % 3) and output.logits[name]._base is output.packed


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_call_gives_the_loss_of_heads_and_auxiliary_heads(
    smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, batch = make_objective({"colour": 4, "cut": 2, "size": 4, "none": 3}, label_smoothing=smoothing)
    batch.labels["none"].fill_(-1)
    step.double().eval()  # without dropout
    batch.images = batch.images.double()
    calls = []
    operator = module.multitask_cross_entropy
    monkeypatch.setattr(
        module, "multitask_cross_entropy", lambda *given, **named: calls.append(given) or operator(*given, **named)
    )
    loss, report = step(batch)
    assert len(calls) == 1 and calls[0][0].shape == (6, 3 * 13)

    def plain(logits: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        losses = []
        for task, of_task in step.model.by_task(logits).items():
            label = batch.labels[task].where(seen, -1)
            one = nn.functional.cross_entropy(of_task, label, ignore_index=-1, label_smoothing=smoothing)
            losses.append(one if (label >= 0).any() else one.new_zeros(()))
        return torch.stack(losses).mean()

    output = step.model(batch)
    auxiliary = [plain(step.model.auxiliary_logits(output, side), batch.present[:, side]) for side in (0, 1)]
    expected = plain(output.packed, torch.ones(6, dtype=torch.bool))
    torch.testing.assert_close(report, expected.detach())
    expected = expected + 0.5 * sum(auxiliary)
    torch.testing.assert_close(loss, expected)
    parameters = [p for _, p in step.model.named_parameters() if p.requires_grad]
    ours = torch.autograd.grad(loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(expected, parameters, allow_unused=True)
    for one, other in zip(ours, theirs, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_many_tasks_train_and_work_does_not_grow_with_them() -> None:
    """A step of 200 tasks takes as many operators of autograd as one of 20."""
    counts = []
    for tasks in (20, 200):
        step, batch = make_objective({f"task {k}": 2 + k % 5 for k in range(tasks)})
        loss, _ = step(batch)
        assert loss.isfinite()
        seen, waiting = set(), [loss.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [parent for parent, _ in node.next_functions]
        counts.append(len(seen))
        loss.backward()
    assert counts[0] == counts[1]
