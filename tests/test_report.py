"""The HTML pages: complete, self-contained, safe with any text, whole with pieces missing."""

from __future__ import annotations

import base64
import hashlib
import io
import os
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cmaclip_fast.errors import InputError
from cmaclip_fast.pages.explanation import relevant_token, render_explanation
from cmaclip_fast.pages.page import is_special
from cmaclip_fast.pages.report import render_report
from cmaclip_fast.pages.views import ExampleView, Prediction, ReportView, TaskView

HOSTILE = "\"><script>alert('&')</script><img src=x onerror=alert(1)>{{ 7*7 }}"
VOID = {"meta", "link", "img", "br", "input", "wbr", "hr"}


class Page(HTMLParser):
    """A page as its elements, its words, and the tags that were closed out of order."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.feed(html)
        self.close()
        self.unbalanced += self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.words += data

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {name.rstrip("_"): value for name, value in attributes.items()}
        return sum(
            t == tag and all(value in (a.get(name) or "").split() for name, value in wanted.items())
            for t, a in self.elements
        )


def picture(width: int = 96, height: int = 96, seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def task(classes: int = 8, name: str = "color") -> TaskView:
    rng = np.random.default_rng(classes)
    names = [f"class_{i}" for i in range(classes)]
    confusion = rng.integers(0, 4, (classes, classes)) + 30 * np.eye(classes, dtype=int)
    text = rng.uniform(0.9, 1, 100)
    precision = np.linspace(1, 0.5, 1000)
    line = {"rows": 10, "precision": 0.5, "recall": 0.25, "f1": 1 / 3, "recall_at_precision": float("nan")}
    return TaskView(
        name,
        names,
        {"accuracy": 0.7501, "macro_f1": 0.7, "recall_at_precision": 0.4, "rows": 1234},
        [{"class": c, **line} for c in names],
        confusion,
        np.stack([text, 1 - text], 1),
        precision,
        np.linspace(0, 1, 1000),
    )


def example(row: int = 7, title: str = "Red lobster", image: Image.Image | None = None) -> ExampleView:
    maps = np.full((4, 6, 6), 0.001)
    maps[0] = 0.02  # the start token attends most, and must not be chosen
    maps[2, 1, 4] = 0.3
    return ExampleView(
        row,
        f"animals/lobster_{row}",
        image or picture(seed=row),
        title,
        ["<start_of_text>", "red</w>", "lobster</w>", "<end_of_text>"],
        maps,
        np.full((6, 6), 1 / 36),
        np.array([0.1, 0.2, 0.6, 0.1]),
        {
            "color": Prediction("red", "red", 0.91, [("red", 0.91), ("blue", 0.05)], (0.21, 0.79)),
            "category": Prediction("animals", "food", 0.52, [("food", 0.52), ("animals", 0.4)], (0.98, 0.02)),
            "style": Prediction(None, "plain", 0.6),
        },
    )


def view() -> ReportView:
    metrics = {"accuracy": 0.8, "macro_f1": 0.7, "recall_at_precision": 0.6, "rows": 626}
    history = [
        {
            "epoch": e,
            "train_loss": 3 / e,
            "validation_loss": 3 / e + 0.1 * e,
            "learning_rate": 1e-3,
            "accuracy/color": e / 9,
        }
        for e in range(1, 7)
    ]
    return ReportView(
        "A run",
        {"model": "tiny", "seed": "0"},
        history,
        {split: {"color": metrics} for split in ("test", "test, text alone", "test, image alone")},
        [task()],
        [example(1)],
        [example(2)],
        0.9,
    )


def report(value: ReportView, folder: Path) -> str:
    render_report(value, folder / "report.html")
    return (folder / "report.html").read_text(encoding="utf-8")


def explanation(examples: list[ExampleView], folder: Path, title: str = "Explained") -> str:
    render_explanation(examples, folder / "explain.html", title, {"model": "tiny"})
    return (folder / "explain.html").read_text(encoding="utf-8")


def assert_sound(html: str) -> Page:
    """Well-formed, and nothing in it reaches outside the file."""
    page = Page(html)
    assert page.unbalanced == []
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/webp;base64,", "#")), (tag, name, value[:60])
        assert not any(name.startswith("on") for name in attributes), attributes
    assert all(url.startswith(("data:image/webp;base64,", "var(")) for url in re.findall(r"url\(([^)]{0,40})", html))
    assert "@import" not in html and "http://" not in html and "https://" not in html
    ids = Counter(attributes["id"] for _, attributes in page.elements if "id" in attributes)
    assert all(times == 1 for times in ids.values())
    for _, attributes in page.elements:
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids
    assert all(attributes.get("alt") for tag, attributes in page.elements if tag == "img")
    return page


def test_report_shows_every_part(tmp_path: Path) -> None:
    html = report(view(), tmp_path)
    page = assert_sound(html)
    for words in (
        "A run",
        "tiny",
        "test, text alone",
        "0.800",
        "626",
        "1,234",
        "0.750",
        "Which modality each task trusts",
    ):
        assert words in page.words
    assert "Recall at90 % precision" in page.words
    assert "lowest on validation: 1.150 at epoch 5" not in page.words
    assert "lowest on validation: 1.100 at epoch 5" in page.words
    assert "highest on validation: 0.667 at epoch 6" in page.words
    assert page.count("svg", class_="chart") == 4  # loss, accuracy, learning rate, precision over recall
    assert "dashed: precision 0.9, kept up to recall 0.199" in page.words
    assert page.count("td", class_="hit") == 8
    assert page.count("article", class_="card") == 2
    assert page.count("div", class_="over") == 2
    assert page.words.count("labelled animals") == 2
    assert page.words.count("unlabelled") == 2
    assert "text 0.21, image 0.79" in html


def test_explanation_shows_every_part(tmp_path: Path) -> None:
    html = explanation([example(), example(8, "Blue boots", picture(200, 120))], tmp_path)
    page = assert_sound(html)
    # Four tokens, the image's global token and the bare picture, for each row.
    assert page.count("input", type_="radio") == 12
    assert page.count("span", class_="layer") == 10
    assert sum("checked" in attributes for _, attributes in page.elements) == 2
    assert page.words.count("most relevant word") == 2
    for words in ("text 0.98, image 0.02", "read 0.600", "to picture 0.335", "image's global token", "0.910"):
        assert words in page.words
    assert "lobster</w>" not in page.words


def test_layer_is_bright_where_attention_is(tmp_path: Path) -> None:
    html = explanation([example(image=picture(120, 60))], tmp_path)
    data = re.search(r"--m3:url\(data:image/webp;base64,([^)]+)\)", html)  # after the image token and two tokens
    assert data
    layer = Image.open(io.BytesIO(base64.b64decode(data[1]))).convert("RGBA")
    assert layer.size == (128, 64)
    at = (128 * 4.5 / 6, 64 * 1.5 / 6)
    brightest = np.unravel_index(np.asarray(layer.convert("L")).argmax(), (64, 128))
    assert abs(brightest[1] - at[0]) < 8 and abs(brightest[0] - at[1]) < 5
    assert layer.getpixel((int(at[0]), int(at[1])))[3] < layer.getpixel((5, 60))[3]


def test_relevant_token_passes_over_special_ones() -> None:
    assert relevant_token(example()) == 2
    assert relevant_token(replace(example(), token_to_patch=None)) is None
    only_marks = replace(example(), tokens=["<s>", "</s>"], token_to_patch=np.ones((2, 3, 3)))
    assert relevant_token(only_marks) is None
    for token in ("<start_of_text>", "<|endoftext|>", "[CLS]", "</s>", "<pad>"):
        assert is_special(token)
    for token in ("lobster</w>", "<", "a", "</w>", "[", "cls", "<3</w>"):
        assert not is_special(token)


@pytest.mark.parametrize("page", ["report", "explanation"])
def test_hostile_words_are_only_words(tmp_path: Path, page: str) -> None:
    prediction = Prediction(HOSTILE, HOSTILE, 0.5, [(HOSTILE, 0.5)], (0.5, 0.5))
    wrong = replace(prediction, label=HOSTILE + "!")
    hostile = replace(example(title=HOSTILE), key=HOSTILE, predictions={HOSTILE: prediction, "b": wrong})
    hostile.tokens[2] = HOSTILE
    if page == "report":
        named = replace(task(2, HOSTILE), classes=[HOSTILE, "b"], per_class=[{"class": HOSTILE}])
        many = replace(task(30), classes=[HOSTILE + str(i) for i in range(30)])
        history = [{"epoch": 1, f"accuracy/{HOSTILE}": 0.5}]
        splits = {HOSTILE: {HOSTILE: {"accuracy": 0.5}}}
        value = ReportView(HOSTILE, {HOSTILE: HOSTILE}, history, splits, [named, many], [hostile], [hostile])
        html = report(value, tmp_path)
    else:
        render_explanation([hostile], tmp_path / "explain.html", HOSTILE, {HOSTILE: HOSTILE})
        html = (tmp_path / "explain.html").read_text(encoding="utf-8")
    parsed = assert_sound(html)
    assert parsed.count("script") == (page == "report")
    assert HOSTILE in parsed.words
    assert "49" not in re.findall(r"onerror=alert\(1\)>(\d+)", parsed.words)


def test_script_is_the_one_the_policy_allows(tmp_path: Path) -> None:
    html = report(view(), tmp_path)
    script = re.search(r"<script>(.*?)</script>", html, re.DOTALL)
    assert script
    digest = base64.b64encode(hashlib.sha256(script[1].encode()).digest()).decode()
    assert f"'sha256-{digest}'" in html and "default-src 'none'" in html


def test_report_with_nothing_in_it(tmp_path: Path) -> None:
    page = assert_sound(report(ReportView("Empty"), tmp_path))
    assert "Empty" in page.words
    assert page.count("svg") == page.count("table") == page.count("section") == 0


def test_report_with_pieces_missing(tmp_path: Path) -> None:
    bare = TaskView("bare", ["a", "b"], {"accuracy": float("nan")})
    poor = replace(
        example(), image=None, text=None, tokens=[], token_to_patch=None, image_global_to_patch=None,
        text_global_to_token=None,
    )  # fmt: skip
    value = replace(view(), history=[], tasks=[bare], right=[poor], wrong=[])
    page = assert_sound(report(value, tmp_path))
    assert "no picture" in page.words and "no text" in page.words
    assert page.count("svg", class_="chart") == page.count("div", class_="over") == 0
    assert "Training" not in page.words and "Which modality" not in page.words and "Predicted wrong" not in page.words
    assert "\N{EN DASH}" in page.words and "nan" not in page.words


def test_explanation_with_pieces_missing(tmp_path: Path) -> None:
    no_image = replace(example(1), image=None)
    no_text = replace(example(2), text=None, tokens=[], token_to_patch=None, text_global_to_token=None)
    no_maps = replace(example(3), token_to_patch=None, image_global_to_patch=None, text_global_to_token=None)
    page = assert_sound(explanation([no_image, no_text, no_maps], tmp_path))
    assert "no picture" in page.words and "no text" in page.words
    assert page.count("span", class_="layer") == 1  # the image's global token of the row without text
    assert page.count("img") == 2
    assert "There are no rows to explain" in assert_sound(explanation([], tmp_path)).words


def test_history_with_gaps(tmp_path: Path) -> None:
    history = [
        {"epoch": 0, "train_loss": 2.0},
        {"epoch": 1, "train_loss": float("nan"), "accuracy/color": 0.0},
        {"epoch": 2, "train_loss": 1.0, "accuracy/color": float("inf")},
        {"epoch": 3, "train_loss": 1.0},
    ]
    html = report(replace(view(), history=history, tasks=[]), tmp_path)
    page = assert_sound(html)
    assert page.count("svg", class_="chart") == 2
    loss = next(a["d"] for t, a in page.elements if t == "path" and a.get("class") == "line faint")
    assert loss and loss.count("M") == 2 and loss.count("L") == 1
    assert "nan" not in html.split("</style>")[1] and "highest on validation: 0.000 at epoch 1" in page.words


def test_one_class_one_epoch_one_row(tmp_path: Path) -> None:
    single = replace(
        task(1),
        confusion=np.array([[5]]),
        weights=np.array([[1.0, 0.0]]),
        precision_curve=np.array([1.0]),
        recall_curve=np.array([1.0]),
    )
    page = assert_sound(report(replace(view(), tasks=[single], history=view().history[:1]), tmp_path))
    assert page.count("td", class_="hit") == 1
    assert "text 1.00" in page.words and "kept up to recall 1.000" in page.words


def test_many_classes_are_drawn_without_labels(tmp_path: Path) -> None:
    many = task(63, "subcategory")
    assert many.confusion is not None
    many.confusion[3, 5] = 40
    page = assert_sound(report(replace(view(), tasks=[many], right=[], wrong=[]), tmp_path))
    assert page.count("svg", class_="matrix") == 1 and page.count("table", class_="confusion") == 0
    pairs = page.words.split("Most confused pairs")[1].split()
    assert pairs[1] == f"class_3class_540{40 / many.confusion[3].sum():.3f}"
    assert "Per class (63)" in page.words
    labelled = assert_sound(report(replace(view(), tasks=[task(20)]), tmp_path))
    assert labelled.count("table", class_="confusion") == 1


def test_unreached_precision_and_absent_modalities(tmp_path: Path) -> None:
    low = replace(task(), precision_curve=np.array([0.5, 0.4]), recall_curve=np.array([0.1, 0.4]))
    low.weights = np.array([[0.0, 0.0], [0.25, 0.75]])
    page = assert_sound(report(replace(view(), tasks=[low]), tmp_path))
    assert "precision 0.9, not reached" in page.words
    assert "text 0.25" in page.words
    low.weights = np.zeros((3, 2))
    assert "Which modality" not in assert_sound(report(replace(view(), tasks=[low]), tmp_path)).words


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"])
def test_every_kind_of_picture(tmp_path: Path, mode: str) -> None:
    image = Image.new(mode, (31, 7))
    page = assert_sound(explanation([example(image=image)], tmp_path))
    assert page.count("img") == 1


def test_transparent_pixels_become_white(tmp_path: Path) -> None:
    html = explanation([example(image=Image.new("RGBA", (32, 32), (0, 0, 0, 0)))], tmp_path)
    data = re.search(r'<img src="data:image/webp;base64,([^"]+)"', html)
    assert data
    assert Image.open(io.BytesIO(base64.b64decode(data[1]))).getpixel((16, 16)) == (255, 255, 255)


def test_size_is_bounded(tmp_path: Path) -> None:
    # Noise is the worst case for the codec; large pictures are scaled down.
    examples = [example(i, image=picture(300, 300, i)) for i in range(24)]
    value = replace(view(), tasks=[task(63, n) for n in "abc"], right=examples[:12], wrong=examples[12:])
    assert len(report(value, tmp_path)) < 6_000_000
    small = [example(i) for i in range(24)]
    assert len(report(replace(value, right=small[:12], wrong=small[12:]), tmp_path)) < 1_500_000


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (replace(task(), confusion=np.zeros((3, 3))), "confusion"),
        (replace(task(), weights=np.zeros((4, 3))), "weights"),
        (replace(task(), recall_curve=np.zeros(3)), "one length"),
    ],
)
def test_shapes_that_do_not_fit(tmp_path: Path, broken: TaskView, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        render_report(replace(view(), tasks=[broken]), tmp_path / "report.html")
    assert not list(tmp_path.iterdir())


def test_maps_that_do_not_fit(tmp_path: Path) -> None:
    for broken in (
        replace(example(), token_to_patch=np.zeros((3, 6, 6))),
        replace(example(), text_global_to_token=np.zeros(2)),
        replace(example(), image_global_to_patch=np.zeros(36)),
    ):
        with pytest.raises(ValueError, match=r"expected \["):
            render_explanation([broken], tmp_path / "explain.html", "t", {})


def test_maps_that_are_not_finite(tmp_path: Path) -> None:
    broken = example()
    assert broken.token_to_patch is not None
    broken.token_to_patch[1] = np.nan
    broken.text_global_to_token = np.full(4, np.nan)
    assert "nan" not in assert_sound(explanation([broken], tmp_path)).words


def test_lone_surrogate_does_not_cost_the_page(tmp_path: Path) -> None:
    assert r"a\ud800b" in report(replace(view(), title="a\ud800b"), tmp_path)


def test_write_is_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.html"
    path.write_text("the last good page")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(InputError, match=r"report\.html: cannot be written \(No space left on device\)"):
        render_report(view(), path)
    assert path.read_text() == "the last good page"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    monkeypatch.undo()
    render_report(view(), path)
    assert "A run" in path.read_text(encoding="utf-8")
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be written"):
        render_report(view(), tmp_path / "missing" / "report.html")
