"""The classifier: same answers whatever the mode, dtype or thread, and a model that is left as it was."""

from __future__ import annotations

import copy
import io
import pickle
import re
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cmaclip_fast import Batch, Classifier, InputError, create_model
from cmaclip_fast.classifier.explanation import explain
from cmaclip_fast.data import Columns, Examples, read_table
from cmaclip_fast.evaluation.cost import forward_flops
from cmaclip_fast.evaluation.evaluate import classify
from cmaclip_fast.nn.modes import evaluation_copy
from cmaclip_fast.systems.cma_clip import CMACLIP

from ..cli.conftest import write_data
from ..systems.conftest import NAMES, make, make_batch
from .conftest import TASKS, TEXTS, make_model, make_pictures, make_resnet, make_tokenizer, same_state, state
from .test_inputs import close, encoded

tried = pytest.mark.tried
MODELS = {"tiny": make_model, "ResNet": make_resnet}
USES: dict[str, Callable[[Classifier], Any]] = {
    "predict": lambda c: c.predict(make_pictures(), TEXTS),
    "predict_proba": lambda c: c.predict_proba(make_pictures(), TEXTS),
    "embed": lambda c: c.embed(make_pictures(), TEXTS),
    "explain": lambda c: c.explain(make_pictures(), TEXTS),
}


def unlike(one: Any, other: Any) -> float:
    """The largest difference of two answers."""
    if isinstance(one, dict):
        return max(unlike(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return max(unlike(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray):
        return float(np.abs(one - other).max())
    if hasattr(one, "text_global_to_token"):
        maps = ("text_global_to_token", "image_global_to_patch")
        return max(unlike(getattr(one, m), getattr(other, m)) for m in maps if getattr(one, m) is not None)
    return abs(one.probability - other.probability)


@tried("call from Python", ends="answers of evaluation; mode and batch norms as before")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("frozen", [False, True])
def test_a_model_in_training_mode(name: str, use: str, frozen: bool) -> None:
    model = MODELS[name]()
    if frozen:  # a part that its user keeps in evaluation mode
        model.image_tower.eval()
    expected = USES[use](Classifier(copy.deepcopy(model).eval()))
    before, grad = state(model), torch.is_grad_enabled()
    classifier = Classifier(model)
    assert unlike(USES[use](classifier), expected) == 0
    assert same_state(state(model), before) and torch.is_grad_enabled() == grad
    model.eval()
    model.train()  # a change of mode afterwards
    assert unlike(USES[use](classifier), expected) == 0


@tried("call from Python", ends="mode and batch norms as before")
@pytest.mark.parametrize("use", ["classify", "explain", "forward_flops"])
@pytest.mark.parametrize("fails", [False, True])
def test_measuring_leaves_the_mode(use: str, fails: bool, tmp_path: Path) -> None:
    model = make_model()
    model.text_tower.eval()
    model.tasks = {"colour": ["blue", "green", "red"], "shape": ["circle", "square"]}
    table = read_table(write_data(tmp_path, rows=12), Columns(image="picture", text="title", tasks=tuple(model.tasks)))
    examples = Examples(table, model.tasks, model.preprocessing, model.tokenizer)
    before = state(model)
    if fails:
        model.norm.register_forward_hook(_fail)
    run = {
        "classify": lambda: classify(model, examples),
        "explain": lambda: explain(model, table),
        "forward_flops": lambda: forward_flops(model, examples.batch(range(4))),
    }[use]
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            run()
    else:
        run()
    assert same_state(state(model), before)


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


@tried("threads", ends="same answers as alone; mode and batch norms as before")
@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", MODELS)
def test_several_threads(name: str, use: str) -> None:
    model = MODELS[name]()
    expected = USES[use](Classifier(copy.deepcopy(model)))
    before, classifier = state(model), Classifier(model)
    start = threading.Barrier(8)

    def ask(_: int) -> float:
        start.wait()
        return max(unlike(USES[use](classifier), expected) for _ in range(3))

    with ThreadPoolExecutor(8) as pool:
        assert max(pool.map(ask, range(8))) < 1e-6
    assert same_state(state(model), before)


@tried("threads", ends="same answers as alone")
@pytest.mark.parametrize("name", NAMES)
def test_threads_ask_any_system(name: str) -> None:
    model = make(name).train()
    pictures, texts = make_pictures() * 3, TEXTS * 3
    expected = Classifier(copy.deepcopy(model)).predict(pictures, texts)
    classifier = Classifier(model)

    def ask(number: int) -> None:
        given = (iter(pictures), texts) if number % 2 else (pictures, texts)
        close(list(classifier.predict(*given, batch_size=4 + number)), expected)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert all(module.training for module in model.modules())


@tried("threads", ends="training goes on in training mode, answers are those of evaluation")
def test_asked_while_it_trains() -> None:
    model = make_model()
    classifier, modes, stop = Classifier(model), set(), threading.Event()
    expected = classifier.predict(make_pictures(), TEXTS)
    batch = Batch(
        torch.randn(4, 3, 32, 32), *model.tokenizer.encode(["red"] * 4)[:2], torch.ones(4, 2, dtype=torch.bool)
    )

    def train() -> None:
        while not stop.is_set():
            model.norm(torch.zeros(1, 32))
            modes.update(module.training for module in model.modules())

    trainer = threading.Thread(target=train)
    trainer.start()
    try:
        assert all(classifier.predict(make_pictures(), TEXTS) == expected for _ in range(20))
    finally:
        stop.set()
        trainer.join()
    assert modes == {True}
    model(batch)  # its batch norms are the classifier's
    assert classifier.predict(make_pictures(), TEXTS) != expected


@tried("threads", ends="same answers as alone")
def test_threads_share_a_picture_that_is_not_read_yet() -> None:
    classifier = Classifier(make_model())
    large = make_pictures()[0].resize((800, 600))
    expected = classifier.predict(large, "red")
    for _ in range(2):
        picture = Image.open(io.BytesIO(encoded(large)))
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _, p=picture: classifier.predict(p, "red"), range(8)))
        assert found == [expected] * 8


@tried("call from Python", ends="answers of float32 up to rounding")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("name", [*MODELS, *NAMES])
def test_a_model_of_another_dtype(name: str, dtype: torch.dtype, own: bool) -> None:
    """Run in float32, or in its own dtype."""
    model = MODELS[name]() if name in MODELS else make(name)
    expected = Classifier(copy.deepcopy(model)).predict_proba(make_pictures(), TEXTS)
    model.to(dtype)
    if own and dtype == torch.float64:
        with pytest.raises(InputError, match="precision 'float64' is not available"):
            Classifier(model, precision="float64")
        return
    classifier = Classifier(model, precision=str(dtype).removeprefix("torch.") if own else "auto")
    assert classifier.engine.dtype == (dtype if own else torch.float32)
    found = classifier.predict_proba(make_pictures(), TEXTS)
    # random weights: logits of some units, each with the rounding of a few layers
    assert unlike(found, expected) < (5e-2 if dtype == torch.bfloat16 else 1e-2)
    assert all(p.dtype == dtype for p in model.parameters() if p.is_floating_point())
    assert all(probabilities.dtype == np.float32 for probabilities in found.values())
    assert classifier.explain(make_pictures()[0], "red dress").predictions.keys() == TASKS.keys()


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_a_lower_precision_leaves_the_model(precision: str) -> None:
    model = make_model()
    before = state(model)
    low = Classifier(model, precision=precision)
    assert {p.dtype for p in low.engine.module.parameters()} == {getattr(torch, precision)}
    assert unlike(USES["predict_proba"](low), USES["predict_proba"](Classifier(model))) < 5e-2
    assert same_state(state(model), before)


@tried("call from Python", ends="same answers as before")
@pytest.mark.parametrize("change", ["half", "bfloat16", "double"])
def test_a_model_that_is_converted_afterwards(change: str) -> None:
    model = make_resnet()
    classifier = Classifier(model)
    expected = classifier.predict_proba(make_pictures(), TEXTS)
    getattr(model, change)()
    assert unlike(classifier.predict_proba(make_pictures(), TEXTS), expected) < 2e-2


def test_weights_that_change_are_used() -> None:
    model = make_model()
    classifier = Classifier(model)
    before = classifier.predict_proba(make_pictures(), TEXTS)
    torch.optim.SGD(model.parameters(), lr=1.0).zero_grad()
    model.load_state_dict({name: 1.5 * t if t.is_floating_point() else t for name, t in model.state_dict().items()})
    after = classifier.predict_proba(make_pictures(), TEXTS)
    assert unlike(after, before) > 1e-3
    assert unlike(after, Classifier(copy.deepcopy(model)).predict_proba(make_pictures(), TEXTS)) < 1e-6


@tried("call from Python", ends="same answers as without")
@pytest.mark.parametrize("around", ["autocast", "no_grad", "inference_mode", "enable_grad", "float64"])
def test_what_is_set_around_a_call(classifier: Classifier, around: str) -> None:
    expected = classifier.predict_proba(make_pictures(), TEXTS)
    contexts = {
        "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "enable_grad": torch.enable_grad,
    }
    if around in contexts:
        with contexts[around]():
            found = classifier.predict_proba(make_pictures(), TEXTS)
    else:
        torch.set_default_dtype(torch.float64)
        try:
            found = classifier.predict_proba(make_pictures(), TEXTS)
        finally:
            torch.set_default_dtype(torch.float32)
    assert unlike(found, expected) < 1e-6


@tried("call from Python", ends="same answers as before")
@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_a_classifier_is_copied(classifier: Classifier, how: str) -> None:
    copied = pickle.loads(pickle.dumps(classifier)) if how == "pickle" else copy.deepcopy(classifier)
    assert copied.predict(make_pictures(), TEXTS) == classifier.predict(make_pictures(), TEXTS)


def test_answers_agree(classifier: Classifier) -> None:
    pictures = make_pictures()
    said, probabilities = classifier.predict(pictures, TEXTS), classifier.predict_proba(pictures, TEXTS)
    vectors, views = classifier.embed(pictures, TEXTS), classifier.explain(pictures, TEXTS)
    assert vectors.shape == (7, 32) and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    for row, (one, view) in enumerate(zip(said, views, strict=True)):
        alone = classifier.predict_proba(pictures[row], TEXTS[row])
        np.testing.assert_allclose(classifier.embed(pictures[row], TEXTS[row]), vectors[row], atol=1e-5)
        assert view.row == row + 1 and view.text == TEXTS[row]
        assert (view.image is None) == (pictures[row] is None) and (view.tokens == []) == (TEXTS[row] is None)
        for task, classes in TASKS.items():
            assert probabilities[task].shape == (7, len(classes))
            assert classes[probabilities[task][row].argmax()] == one[task].label == view.predictions[task].predicted
            np.testing.assert_allclose(alone[task], probabilities[task][row], atol=1e-6)
    close(list(classifier.predict(zip(pictures, TEXTS, strict=True), batch_size=3)), said)


def test_an_embedding_is_the_mean_of_what_is_there(classifier: Classifier) -> None:
    picture = make_pictures()[0]
    with torch.inference_mode():
        _, batch = classifier._read([(0, (picture, "red dress"))], None)
        both = classifier.engine(batch).embedding[0]
    np.testing.assert_allclose(classifier.embed(picture, "red dress"), both.mean(0).numpy(), atol=1e-6)


@tried("operator", ends="NaN stays in its own row")
@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_nan_in_a_picture_reaches_no_other_row(name: str) -> None:
    system, batch = make(name), make_batch()
    clean = system(batch)
    batch.images[1], batch.images[5] = torch.nan, torch.nan  # one that is there, one that is hidden
    rows = [row for row in range(len(batch)) if row != 1]
    found = system(batch)
    for task in TASKS:
        torch.testing.assert_close(found.logits[task][rows], clean.logits[task][rows], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_every_system_embeds(name: str) -> None:
    vectors = Classifier(make(name)).embed(make_pictures()[:2], TEXTS[:2])
    assert vectors.shape[0] == 2 and np.isfinite(vectors).all() and (vectors != 0).any(1).all()


def test_an_artefact_is_loaded(folder: Path) -> None:
    classifier = Classifier.load(folder)
    assert isinstance(classifier.system, CMACLIP) and classifier.tasks == TASKS
    assert classifier.columns.image == "file" and classifier.decisions is not None
    own = Classifier.load(folder, calibrated=False).predict(make_pictures(), TEXTS)
    for loaded, made in zip(own, Classifier(make_model()).predict(make_pictures(), TEXTS), strict=True):
        assert {task: said.top for task, said in loaded.items()} == {task: said.top for task, said in made.items()}


@tried("artefact", ends="one line that names the file")
@pytest.mark.parametrize("content", ["", "{", "[]", "NaN", "\udcff", '{"colour": 1}', '{"no such task": {}}'])
@pytest.mark.parametrize("name", ["thresholds.json", "calibration.json", "scores.safetensors"])
def test_damaged_decisions(name: str, content: str, folder: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / name).write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InputError, match=rf"{re.escape(name)}: "):
        Classifier.load(copied)
    (copied / name).unlink()
    with pytest.raises(InputError, match=rf"{re.escape(name)}: missing"):
        Classifier.load(copied)


@tried("call from Python", ends="one line")
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"device": "abacus"}, "device 'abacus' is unknown"),
        ({"device": 1.5}, "device 1.5 is unknown"),
        ({"device": "cuda:77"}, "PyTorch sees"),
        ({"precision": "int8"}, "'int8' is not available: use auto, float32, bfloat16, float16"),
        ({"precision": "double"}, "not available"),
        ({"precision": None}, "not available"),
    ],
    ids=str,
)
def test_options_that_cannot_be(options: dict[str, Any], said: str, folder: Path) -> None:
    for make_one in (lambda: Classifier(make_model(), **options), lambda: Classifier.load(folder, **options)):
        with pytest.raises(InputError, match=said):
            make_one()


@tried("call from Python", ends="one line; right answers once in evaluation mode")
def test_a_forward_that_would_run_in_training_mode() -> None:
    model = make_model()
    expected = Classifier(model).predict(make_pictures(), TEXTS)
    own = model.forward
    model.forward = lambda *inputs, **options: own(*inputs, **options)  # as accelerate does for mixed precision
    with pytest.raises(InputError, match="forward of 'CMACLIP' was replaced"):
        Classifier(model)
    assert Classifier(model.eval()).predict(make_pictures(), TEXTS) == expected


@tried("call from Python", ends="one line")
def test_tasks_whose_columns_have_one_name() -> None:
    tasks = {"cut": ["a", "b"], "cut_top": ["c", "d"]}
    model = create_model(
        "tiny", tasks, tokenizer=make_tokenizer(), image_size=32, width=32, heads=2, fusion_start="random"
    )
    with pytest.raises(InputError, match="task 'cut_top' has the name"):
        Classifier(model).predict(pd.DataFrame({"title": ["red"]}), text="title")


def test_a_classifier_is_made_from_a_system() -> None:
    with pytest.raises(InputError, match="from a System, not from Linear"):
        Classifier(torch.nn.Linear(2, 2))


def test_a_copy_shares_weights_and_hooks() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    seen: list[Any] = []

    class Collect:
        def __init__(self) -> None:
            self.shapes: list[Any] = []

        def __call__(self, module: Any, inputs: Any, output: Any) -> None:
            self.shapes.append(output.shape)

        def method(self, module: Any, inputs: Any) -> None:
            seen.append(self)

    collect = Collect()
    model[0].register_forward_hook(collect)
    model[0].register_forward_pre_hook(collect.method)
    torch.nn.utils.parametrizations.orthogonal(model[0])
    copied = evaluation_copy(model)
    assert {id(p) for p in copied.parameters()} == {id(p) for p in model.parameters()}
    assert copied[1].running_mean is model[1].running_mean
    copied(torch.zeros(3, 2))
    assert collect.shapes == [(3, 2)] and seen == [collect]
    assert model[1].num_batches_tracked == 0 and model.training and not any(m.training for m in copied.modules())
    low = evaluation_copy(model, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16} and model[1].weight.dtype == torch.float32
