"""What every system must do: learn, ignore what is absent, take one pair, come back from its artefact."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cmaclip_fast import Batch, InputError
from cmaclip_fast.classifier.artifact import DataColumns, load_model, save_model
from cmaclip_fast.systems.build import create_system
from cmaclip_fast.systems.registry import VARIANTS, find_system, systems
from cmaclip_fast.training.config import TrainingConfig
from cmaclip_fast.training.objective import Objective
from cmaclip_fast.training.schedule import parameter_groups
from cmaclip_fast.types import IMAGE, TEXT

from .conftest import NAMES, TASKS, make, make_batch

DESIGN = {
    "cma-clip",
    "clip",
    "clip-zero-shot",
    "vit",
    "bert",
    "mmbt",
    "embracenet",
    "coca",
    "perceiver-io",
    "one-stream",
    "kaleidobert",
}


def test_all_systems_of_the_paper_are_there() -> None:
    assert set(systems()) >= DESIGN
    assert all(find_system(name)[0] for name in VARIANTS)


def test_an_unknown_system_is_said() -> None:
    with pytest.raises(InputError, match=r"mmbd.*did you mean.*mmbt"):
        create_system("mmbd", "tiny", TASKS)
    with pytest.raises(InputError, match="dephts"):
        create_system("mmbt", "tiny", TASKS, dephts=3)


def test_logits_of_every_task(name: str) -> None:
    batch = make_batch()
    with torch.inference_mode():
        output = make(name)(batch)
    assert {task: tuple(logits.shape) for task, logits in output.logits.items()} == {
        "colour": (len(batch), 3),
        "style/cut": (len(batch), 2),
    }
    assert all(logits.isfinite().all() for logits in output.logits.values())


def test_the_loss_falls_in_training(name: str) -> None:
    torch.manual_seed(0)
    system = make(name)
    config = TrainingConfig(learning_rate=4e-3, tower_learning_rate=4e-3, text_dropout=0.1, image_dropout=0.1)
    objective = Objective(system, config)
    optimizer = torch.optim.AdamW(parameter_groups(system, config))
    for group in optimizer.param_groups:
        group["lr"] = group["peak"]
    batch = make_batch()
    objective.train()
    losses = []
    for _ in range(9):
        loss, report = objective(batch, contrastive=not system.uses_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(report))
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3]), losses


def test_every_parameter_that_trains_gets_a_gradient(name: str) -> None:
    """Summed over steps, since masks are drawn; CLIP's own projections are for the warm start."""
    system = make(name).train()
    objective = Objective(system, TrainingConfig(text_dropout=0.0, image_dropout=0.0))
    for _ in range(4):
        objective(make_batch(), contrastive=not system.uses_labels)[0].backward()
    without = {name for name, p in system.named_parameters() if p.grad is None}
    assert without <= {"logit_scale", "image_tower.visual.proj", "text_tower.text.text_projection"}


def test_what_is_absent_has_no_influence(name: str) -> None:
    system = make(name)
    batch = make_batch(["red dress", None, "a short coat"], [False, True, True])
    other = replace(batch, images=batch.images.clone(), tokens=batch.tokens.clone())
    other.images[0] = 7.0
    other.tokens[1] = other.tokens[2]
    other.text_lengths = torch.tensor([int(batch.text_lengths[0]), 5, int(batch.text_lengths[2])], dtype=torch.int32)
    with torch.inference_mode():
        for task, logits in system(batch).logits.items():
            torch.testing.assert_close(logits, system(other).logits[task], atol=1e-5, rtol=1e-5)


def test_a_system_reads_what_it_says_it_reads(name: str) -> None:
    system = make(name)
    batch = make_batch(["red dress", "a short coat"], [True, True])
    reads = list(system.modalities)
    if system.system == "clip-zero-shot" and system.config.use != "both":
        reads = [system.config.use == "text", system.config.use == "image"]
    changed = (
        replace(batch, tokens=batch.tokens.flip(0), text_lengths=batch.text_lengths.flip(0)),
        replace(batch, images=batch.images.flip(0)),
    )
    with torch.inference_mode():
        for other, matters in zip(changed, reads, strict=True):
            gap = (system(batch).logits["colour"] - system(other).logits["colour"]).abs().max()
            assert (gap > 1e-6) == matters


def test_a_row_does_not_depend_on_its_batch(name: str) -> None:
    system, batch = make(name), make_batch()
    with torch.inference_mode():
        together = system(batch).logits
        for row in (0, 4, 5):
            rows = slice(row, row + 1)
            alone = Batch(batch.images[rows], batch.tokens[rows], batch.text_lengths[rows], batch.present[rows])
            for task, logits in system(alone).logits.items():
                torch.testing.assert_close(logits[0], together[task][row], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("text", "image"), [("red dress", True), ("red dress", False), (None, True), (None, False)])
def test_one_pair_trains_whatever_it_lacks(name: str, text: str | None, image: bool) -> None:
    system = make(name).train()
    batch = make_batch([text], [image])
    batch.labels["style/cut"][:] = -1
    loss, _ = Objective(system, TrainingConfig())(batch, contrastive=not system.uses_labels)
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in system.parameters())


def test_an_artefact_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    system, batch = make(name), make_batch()
    save_model(tmp_path, system, DataColumns(image="i", text="t", tasks=list(TASKS)), "here", {"seed": 0})
    loaded = load_model(tmp_path)
    assert type(loaded) is type(system) and loaded.config == system.config
    with torch.inference_mode():
        for task, logits in system(batch).logits.items():
            assert torch.equal(loaded(batch).logits[task], logits)


def test_an_artefact_from_before_there_were_systems_loads(tmp_path: Path) -> None:
    system, batch = make("cma-clip"), make_batch()
    save_model(tmp_path, system, DataColumns(image="i", text="t", tasks=list(TASKS)), "here", {"seed": 0})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["system"], config["model"]["text_tower"], config["model"]["image_tower"]
    path.write_text(json.dumps(config))
    with torch.inference_mode():
        assert torch.equal(load_model(tmp_path)(batch).logits["colour"], system(batch).logits["colour"])


def test_auxiliary_heads_are_for_systems_of_two_towers() -> None:
    for name in NAMES:
        system = make(name)
        two = all(system.modalities) and system.uses_labels
        assert system.has_auxiliary_heads == two, name
        if two:
            output = system(make_batch())
            for modality in (TEXT, IMAGE):
                assert list(system.by_task(system.auxiliary_logits(output, modality))) == list(TASKS)
