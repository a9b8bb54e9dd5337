"""The model: absent modalities, ablations, attention maps, and what does not fit together."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from cmaclip_fast import CMACLIP, Batch, InputError, create_model
from cmaclip_fast.data import TrainedTokenizer

TASKS = {"colour": ["blue", "green", "red"], "style/cut": ["long", "short"]}
SMALL = {"image_size": 48, "width": 32, "heads": 4, "depth": 2, "fusion_start": "random"}


def make(**options: object) -> CMACLIP:
    torch.manual_seed(0)
    tokenizer = TrainedTokenizer.train(["red dress", "long blue coat", "short green skirt"] * 3, context_length=10)
    return create_model("tiny", TASKS, tokenizer=tokenizer, **(SMALL | options)).eval()


def make_batch(model: CMACLIP, texts: list[str | None], image_present: list[bool]) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(len(texts), 3, 48, 48, generator=generator)
    tokens, lengths, _ = model.tokenizer.encode(texts)
    present = torch.tensor([[text is not None, there] for text, there in zip(texts, image_present, strict=True)])
    return Batch(images, tokens, lengths, present)


@pytest.mark.parametrize("vectors", ["task", "task-and-modality"])
@torch.inference_mode()
def test_shapes_and_weights(vectors: str) -> None:
    model = make(vectors=vectors)
    output = model(make_batch(model, ["red dress", None, "long blue coat", None], [True, True, False, False]))
    assert {task: tuple(logits.shape) for task, logits in output.logits.items()} == {
        "colour": (4, 3),
        "style/cut": (4, 2),
    }
    assert output.embedding.shape == (4, 2, 32)
    for weights in output.modality_weights.values():
        torch.testing.assert_close(weights.sum(1), torch.tensor([1.0, 1.0, 1.0, 0.0]))
        assert weights[1].tolist() == [0.0, 1.0] and weights[2].tolist() == [1.0, 0.0]
        assert 0 < weights[0, 0] < 1
    assert output.embedding[1, 0].abs().sum() == 0 and output.embedding[2, 1].abs().sum() == 0


@pytest.mark.parametrize("options", [{}, {"sequence_attention": False}, {"modality_attention": False}])
@torch.inference_mode()
def test_what_is_absent_has_no_influence(options: dict) -> None:
    model = make(**options)
    batch = make_batch(model, ["red dress", None], [False, True])
    other = replace(batch, images=batch.images.clone(), tokens=batch.tokens.clone())
    other.images[0] = 7.0
    other.tokens[1] = other.tokens[0]
    other.text_lengths = torch.tensor([int(batch.text_lengths[0]), 9], dtype=torch.int32)
    for task, logits in model(batch).logits.items():
        torch.testing.assert_close(logits, model(other).logits[task], atol=1e-5, rtol=1e-5)


@pytest.mark.tried("operator", ends="NaN stays in its own row")
@pytest.mark.parametrize("options", [{}, {"sequence_attention": False}, {"modality_attention": False}])
@pytest.mark.parametrize("where", ["hidden picture", "next row", "only row before"])
@pytest.mark.parametrize("gradients", [False, True])
def test_nan_reaches_no_row_that_does_not_hold_it(options: dict, where: str, gradients: bool) -> None:
    """The place of an absent picture is some other token, which may be the next row's."""
    model = make(**options)
    batch = make_batch(model, ["red dress", "long blue coat", None, "red"], [False, True, True, False])
    clean = model(batch)
    broken = {"hidden picture": 0, "next row": 1, "only row before": 2}[where]
    batch.images[broken] = torch.nan
    rows = [row for row in range(4) if row != broken or where == "hidden picture"]
    with torch.set_grad_enabled(gradients):
        output = model(batch)
    torch.testing.assert_close(output.embedding[rows], clean.embedding[rows], atol=1e-5, rtol=1e-5)
    for task in TASKS:
        torch.testing.assert_close(output.logits[task][rows], clean.logits[task][rows], atol=1e-5, rtol=1e-5)
    if gradients and where == "hidden picture":
        (gradient,) = torch.autograd.grad(output.embedding[rows].square().sum(), [model.norm.weight])
        assert gradient.isfinite().all()


@torch.inference_mode()
def test_a_row_does_not_depend_on_its_batch() -> None:
    model = make()
    texts = ["red dress", "long blue coat long blue coat", None, "short"]
    batch = make_batch(model, texts, [True, True, True, False])
    together = model(batch)
    for row in range(len(texts)):
        rows = slice(row, row + 1)
        alone = model(Batch(batch.images[rows], batch.tokens[rows], batch.text_lengths[rows], batch.present[rows]))
        for task in TASKS:
            torch.testing.assert_close(alone.logits[task][0], together.logits[task][row], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_sequence_attention_lets_the_image_read_the_text() -> None:
    texts = ["red dress", "short green skirt"]
    fused, late = make(), make(sequence_attention=False)
    for model, changes in ((fused, True), (late, False)):
        batch = make_batch(model, texts, [True, True])
        swapped = replace(batch, tokens=batch.tokens.flip(0), text_lengths=batch.text_lengths.flip(0))
        difference = (model(batch).embedding[:, 1] - model(swapped).embedding[:, 1]).abs().max()
        assert (difference > 1e-4) == changes


@torch.inference_mode()
def test_ablations_leave_out_what_they_name() -> None:
    late = make(sequence_attention=False)
    assert late(make_batch(late, ["red"], [True]), with_attention=True).attention is None
    plain = make(modality_attention=False)
    assert plain(make_batch(plain, ["red"], [True])).modality_weights is None
    assert not any("sequence_attention" in name for name, _ in late.named_parameters())
    assert not any("modality_attention" in name for name, _ in plain.named_parameters())


@torch.inference_mode()
def test_attention_maps_cover_text_then_image() -> None:
    model = make()
    batch = make_batch(model, ["red dress", None, "short"], [True, True, False])
    maps = model(batch, with_attention=True).attention
    patches = model.image_tower.grid[0] * model.image_tower.grid[1]
    counts = batch.text_lengths * batch.present[:, 0]
    assert maps.text_tokens.tolist() == counts.tolist()
    assert [len(w) for w in maps.weights] == [int(counts[0]) + 1 + patches, 1 + patches, int(counts[2])]
    for weights in maps.weights:
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))


@torch.inference_mode()
def test_a_batch_with_nothing_gives_finite_output() -> None:
    model = make()
    output = model(make_batch(model, [None, None], [False, False]), with_attention=True)
    assert all(logits.isfinite().all() for logits in output.logits.values())
    assert output.embedding.abs().sum() == 0


def test_every_parameter_that_classifies_gets_a_gradient() -> None:
    model = make(auxiliary_heads=False).train()
    output = model(make_batch(model, ["red dress", "short green"], [True, True]))
    sum(logits.square().sum() for logits in output.logits.values()).backward()
    without = {name for name, p in model.named_parameters() if p.grad is None}
    contrastive_only = {"logit_scale", "image_tower.visual.proj", "text_tower.text.text_projection"}
    assert without == contrastive_only


def test_gradients_of_many_tasks_take_no_memory_for_each_task_alone() -> None:
    """A slice for each task would make its gradient as large as that of all tasks together."""
    tasks = {f"task {k}": ["no", "yes"] for k in range(40)}
    torch.manual_seed(0)
    tokenizer = TrainedTokenizer.train(["red dress", "short green skirt"] * 3, context_length=10)
    model = create_model("tiny", tasks, tokenizer=tokenizer, image_size=32, width=32, heads=2, auxiliary_heads=False)
    pooled: list[torch.Tensor] = []
    model.modality_attention.register_forward_hook(lambda _, __, out: pooled.append(out[0]))
    output = model(make_batch(model, ["red dress"], [True]))
    nodes = set()
    waiting = [logits.grad_fn for logits in output.logits.values()]
    while waiting:
        node = waiting.pop()
        if node is pooled[0].grad_fn or node is None or node in nodes:
            continue
        nodes.add(node)
        waiting += [parent for parent, _ in node.next_functions]
    assert not {node.name() for node in nodes} & {"SelectBackward0", "SliceBackward0"}
    assert len(nodes) < len(tasks), "steps of the backward pass from the logits to the pooled embeddings"


def test_contrastive_features_have_length_one_and_reach_both_towers() -> None:
    model = make().train()
    image, text = model.contrastive_features(make_batch(model, ["red dress", "short"], [True, True]))
    torch.testing.assert_close(image.norm(dim=1), torch.ones(2))
    torch.testing.assert_close(text.norm(dim=1), torch.ones(2))
    (image @ text.T).sum().backward()
    assert model.image_tower.visual.proj.grad is not None and model.text_tower.text.text_projection.grad is not None


@pytest.mark.slow
@torch.inference_mode()
def test_a_named_open_clip_model_with_a_local_checkpoint(tmp_path) -> None:
    import open_clip

    torch.manual_seed(0)
    clip = open_clip.create_model("ViT-S-32-alt")
    torch.save(clip.state_dict(), tmp_path / "clip.pt")
    model = create_model("ViT-S-32-alt", TASKS, pretrained=tmp_path / "clip.pt", depth=1, width=64).eval()
    images = torch.randn(1, 3, 224, 224)
    tokens, lengths, _ = model.tokenizer.encode(["a red dress"])
    image, text = model.contrastive_features(Batch(images, tokens, lengths, torch.ones(1, 2, dtype=torch.bool)))
    clip.eval()
    torch.testing.assert_close(image, clip.encode_image(images, normalize=True), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(text, clip.encode_text(tokens, normalize=True), atol=1e-5, rtol=1e-4)
    assert model.preprocessing.size == 224


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "ViT-B-23"}, "did you mean"),
        ({"name": "tiny", "pretrained": "x"}, "no pretrained weights"),
        ({"name": "tiny", "depht": 3}, "depht"),
        ({"name": "tiny", "depth": 0}, "depth"),
        ({"name": "tiny", "width": 30, "heads": 4}, "multiple of heads"),
        ({"name": "ViT-B-32", "pretrained": "no-such-tag"}, "no-such-tag"),
    ],
)
def test_what_cannot_be_built_is_said(arguments: dict, message: str) -> None:
    with pytest.raises((InputError, ValueError), match=message):
        create_model(tasks=TASKS, **arguments)


def test_a_task_needs_two_classes() -> None:
    with pytest.raises(InputError, match="'colour' has 1 class"):
        create_model("tiny", {"colour": ["red"]})
    with pytest.raises(InputError, match="at least one task"):
        create_model("tiny", {})


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"modality_attention": False}, {"fusion_gate": True}])
def test_fusion_starts_as_the_system_without_it(options: dict, training: bool) -> None:
    """Bit for bit in float32: `fusion_start="zero"` adds nothing until the first step."""
    still = {"dropout": 0.0, "head_dropout": 0.0}
    fused = make(fusion_start="zero", **still, **options)
    unfused = make(sequence_attention=False, **still, **{k: v for k, v in options.items() if k != "fusion_gate"})
    unfused.load_state_dict({name: fused.state_dict()[name] for name in unfused.state_dict()})
    batch = make_batch(fused, ["red dress", None, "long blue coat", None], [True, True, False, False])
    outputs = []
    for model in (fused, unfused):
        torch.manual_seed(1)  # the towers have dropout
        outputs.append(model.train(training)(batch))
    one, other = outputs
    assert torch.equal(one.embedding, other.embedding)
    for task in TASKS:
        if not options.get("fusion_gate"):  # which adds up in another order
            assert torch.equal(one.logits[task], other.logits[task])
        torch.testing.assert_close(one.logits[task], other.logits[task])


def test_every_branch_of_the_fusion_learns_from_zero() -> None:
    model = make(fusion_start="zero").train()
    batch = make_batch(model, ["red dress", "long blue coat"], [True, True])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # what lies before a product that is zero has no gradient in the first step
        loss = sum(logits.logsumexp(1).sum() - logits[:, 0].sum() for logits in model(batch).logits.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    for name, parameter in model.sequence_attention.named_parameters():
        assert parameter.grad.abs().sum() > 0, name
    assert model.type_embedding.grad.abs().sum() > 0


def test_a_gate_needs_both_attentions() -> None:
    with pytest.raises(InputError, match="fusion_gate needs"):
        make(fusion_gate=True, sequence_attention=False)
