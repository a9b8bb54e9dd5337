"""Columns of paths become a task for each level, and what is predicted lies on one path."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from cmaclip_fast.data import Columns, Taxonomy, class_names, read_table
from cmaclip_fast.errors import InputError
from cmaclip_fast.systems.taxonomy import parent_numbers, task_probabilities

KIND = Taxonomy("kind")
PATHS = [
    "Apparel > Dresses > Maxi",
    "Apparel > Dresses > Mini",
    "Apparel > Shoes",
    "Apparel",
    "Home > Chairs > Folding",
    "Home > Chairs",
    "Toys",
]
TASKS = {KIND.task(level): sorted({KIND.upto(path, level) for path in PATHS}) for level in (1, 2, 3)}


def test_levels_of_a_path() -> None:
    assert [KIND.upto("Apparel >Dresses>  Maxi", level) for level in (1, 2, 3, 4)] == [
        "Apparel",
        "Apparel > Dresses",
        "Apparel > Dresses > Maxi",
        "Apparel > Dresses > Maxi",
    ]
    assert Taxonomy("k", "/").upto("/food/fruit/", 2) == "food/fruit"
    assert KIND.levels_in(["kind_3", "kind_1", "colour", "kind_2", "kind_5"]) == ["kind_1", "kind_2", "kind_3"]


def test_a_column_becomes_a_task_for_each_level(write_csv: Callable[..., Path]) -> None:
    path = write_csv([["title", "kind", "colour"], *([f"t{i}", p, "red"] for i, p in enumerate(PATHS)), ["t", "", ""]])
    table = read_table(path, Columns(None, "title", ("colour",), taxonomies=(KIND,)))
    assert table.columns.tasks == ("colour", "kind_1", "kind_2", "kind_3")
    assert table.labels("kind_1")[:4] == ["Apparel"] * 4 and table.labels("kind_1")[-1] is None
    assert table.labels("kind_2") == [
        "Apparel > Dresses",
        "Apparel > Dresses",
        "Apparel > Shoes",
        "Apparel",
        "Home > Chairs",
        "Home > Chairs",
        "Toys",
        None,
    ]
    assert table.labels("kind_3") == table.labels("kind"), "the last level is the column itself"
    assert class_names(table, ("kind_1", "kind_2", "kind_3")) == TASKS
    (found,) = table.columns.taxonomies
    assert found == Taxonomy("kind", " > ", 3), "so that other tables are read with as many levels"
    shallow = write_csv([["title", "kind"], ["a", "Apparel > Dresses"], ["b", "Toys > A > B > C"]], "other.csv")
    again = read_table(shallow, Columns(None, "title", taxonomies=(found,)))
    assert again.columns.tasks == ("kind_1", "kind_2", "kind_3")
    assert again.labels("kind_3") == ["Apparel > Dresses", "Toys > A > B"]


def test_openclipart_has_paths() -> None:
    table = read_table("openclipart", Columns(taxonomies=(Taxonomy("subcategory", "/"),)))
    assert table.columns.tasks == ("subcategory_1", "subcategory_2", "subcategory_3", "subcategory_4")
    assert table.labels("subcategory_4") == table.labels("subcategory")
    pairs = zip(table.labels("subcategory_1"), table.labels("category"), strict=True)
    assert all(top in (None, category) for top, category in pairs)


def test_bad_columns(write_csv: Callable[..., Path]) -> None:
    path = write_csv([["title", "kind", "kind_1"], ["a", "A > B", "x"]])
    with pytest.raises(InputError, match=r"no column 'kinds' for a taxonomy .did you mean 'kind'"):
        read_table(path, Columns(None, "title", taxonomies=(Taxonomy("kinds"),)))
    with pytest.raises(InputError, match="column 'kind_1' has the name of a level of 'kind'; rename it"):
        read_table(path, Columns(None, "title", taxonomies=(KIND,)))


def test_parents() -> None:
    names = [TASKS["kind_2"][parent] for parent in parent_numbers(KIND, 2, TASKS["kind_2"], TASKS["kind_3"])]
    assert dict(zip(TASKS["kind_3"], names, strict=True))["Home > Chairs > Folding"] == "Home > Chairs"
    with pytest.raises(ValueError, match="class 'A > B' of 'kind' has no parent"):
        parent_numbers(KIND, 1, ["C"], ["A > B"])


def _logits(seed: int, rows: int = 64, scale: float = 3.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tasks = {**TASKS, "colour": ["red", "blue"]}
    return {task: scale * torch.randn(rows, len(names), generator=generator) for task, names in tasks.items()}


@given(seed=st.integers(0, 10_000), scale=st.sampled_from([0.1, 3.0, 40.0]))
def test_predictions_lie_on_one_path(seed: int, scale: float) -> None:
    logits = _logits(seed, scale=scale)
    found = task_probabilities(logits, TASKS, [KIND])
    for level, (above, below) in enumerate(pairwise(TASKS), 1):
        for up, down in zip(found[above], found[below], strict=True):
            parent, child = TASKS[above][int(up.argmax())], TASKS[below][int(down.argmax())]
            assert KIND.upto(child, level) == parent
            assert down.max() <= up.max() + 1e-6, "no class is surer than the one it lies in"
    assert torch.equal(found["colour"], logits["colour"].softmax(1)) and found["kind_1"].equal(
        logits["kind_1"].softmax(1)
    )


def test_probabilities_are_those_of_the_chain_rule() -> None:
    logits = _logits(1)
    found = task_probabilities(logits, TASKS, [KIND])
    names = TASKS["kind_3"]
    capped = 0
    for row in range(64):
        expected = []
        for name in names:
            probability = float(logits["kind_1"][row].softmax(0)[TASKS["kind_1"].index(KIND.upto(name, 1))])
            for level in (2, 3):
                task, mine, parent = f"kind_{level}", KIND.upto(name, level), KIND.upto(name, level - 1)
                siblings = [i for i, other in enumerate(TASKS[task]) if KIND.upto(other, level - 1) == parent]
                shares = logits[task][row, siblings].softmax(0)
                probability *= float(shares[siblings.index(TASKS[task].index(mine))])
            expected.append(probability)
        assert sum(expected) == pytest.approx(1, abs=1e-5)
        best = int(found["kind_3"][row].argmax())
        for name, given_, wanted in zip(names, found["kind_3"][row].tolist(), expected, strict=True):
            if given_ != pytest.approx(wanted, rel=1e-4):
                capped += 1
                assert wanted > given_, f"{name} lies elsewhere and is put below the prediction"
                assert wanted > 0.99 * expected[best]
    assert 0 < capped < 64


def test_extreme_logits_stay_finite() -> None:
    logits = {task: torch.full((2, len(names)), -300.0) for task, names in TASKS.items()}
    logits["kind_3"][0, 0] = 300.0
    logits["kind_1"][1, 0] = 300.0
    for probabilities in task_probabilities(logits, TASKS, [KIND]).values():
        assert torch.isfinite(probabilities).all() and (probabilities >= 0).all()


def test_no_taxonomy_is_softmax() -> None:
    logits = _logits(2)
    for task, probabilities in task_probabilities(logits, TASKS).items():
        assert torch.equal(probabilities, logits[task].softmax(1))
