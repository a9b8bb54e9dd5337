"""Every way to give pictures and texts, and what is said of those that cannot be used."""

from __future__ import annotations

import datetime
import io
import warnings
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from PIL import Image

from cmaclip_fast import Classifier, InputError
from cmaclip_fast.classifier.pairs import MAX_IMAGE_PIXELS, read_picture

from .conftest import TASKS, TEXTS, make_pictures

tried = pytest.mark.tried
SAME = {"ends": "same result as the PIL image"}
LINE = {"ends": "one line that names the pair"}


class Upper(str):
    pass


class HasArray:
    """As arrays of JAX and TensorFlow are."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        return self._values


class Indexed(torch.utils.data.Dataset):
    """Pairs, without an error behind the last."""

    def __len__(self) -> int:
        return len(TEXTS)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return make_pictures()[index % len(TEXTS)], TEXTS[index % len(TEXTS)]


def encoded(picture: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind)
    return buffer.getvalue()


def saved(picture: Image.Image, folder: Path) -> Path:
    picture.save(folder / "a picture.png")
    return folder / "a picture.png"


def chw(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def opened(picture: Image.Image) -> Image.Image:
    return Image.open(io.BytesIO(encoded(picture)))


PICTURES: dict[str, Callable[[Image.Image, Path], Any]] = {
    "opened but not read": lambda p, _: opened(p),
    "RGBA": lambda p, _: p.convert("RGBA"),
    "Path": saved,
    "str": lambda p, f: str(saved(p, f)),
    "numpy str": lambda p, f: np.str_(saved(p, f)),
    "bytes": lambda p, _: encoded(p),
    "bytearray": lambda p, _: bytearray(encoded(p)),
    "memoryview": lambda p, _: memoryview(encoded(p)),
    "binary file": lambda p, f: saved(p, f).open("rb"),
    "BytesIO": lambda p, _: io.BytesIO(encoded(p)),
    "Hugging Face bytes": lambda p, _: {"bytes": encoded(p), "path": None},
    "Hugging Face path": lambda p, f: {"bytes": None, "path": str(saved(p, f))},
    "[H, W, 3]": lambda p, _: np.array(p),
    "[H, W, 4]": lambda p, _: np.array(p.convert("RGBA")),
    "[3, H, W]": lambda p, _: np.array(p).transpose(2, 0, 1),
    "not contiguous": lambda p, _: np.array(p)[::-1, ::-1].copy()[::-1, ::-1],
    "read-only": lambda p, _: np.asarray(p),
    "float64": lambda p, _: np.array(p) / 255,
    "float16": lambda p, _: (np.array(p) / 255).astype(np.float16),
    "int64": lambda p, _: np.array(p).astype(np.int64),
    "uint16": lambda p, _: np.array(p).astype(np.uint16) * 257,
    "big-endian": lambda p, _: (np.array(p) / 255).astype(">f4"),
    "tensor [3, H, W]": lambda p, _: chw(p),
    "tensor [H, W, 3]": lambda p, _: torch.from_numpy(np.array(p)),
    "tensor float": lambda p, _: chw(p) / 255,
    "tensor half": lambda p, _: (chw(p) / 255).half(),
    "tensor double": lambda p, _: chw(p).double() / 255,
    "tensor with gradient": lambda p, _: (chw(p) / 255).requires_grad_(),
    "array interface": lambda p, _: HasArray(np.array(p)),
}


@tried("call from Python", **SAME)
@pytest.mark.parametrize("kind", PICTURES)
def test_a_picture_of_any_kind(classifier: Classifier, kind: str, tmp_path: Path) -> None:
    picture = make_pictures()[0]
    given = PICTURES[kind](picture, tmp_path)
    assert classifier.predict(given, "a red dress") == classifier.predict(picture, "a red dress")


@tried("call from Python", **SAME)
@pytest.mark.parametrize("kind", ["[H, W]", "[H, W, 1]", "[1, H, W]", "tensor [1, H, W]", "tensor [H, W]", "bool"])
def test_a_grey_picture(classifier: Classifier, kind: str) -> None:
    grey = make_pictures()[0].convert("1").convert("L")
    values = np.array(grey)
    given = {
        "[H, W]": values,
        "[H, W, 1]": values[..., None],
        "[1, H, W]": values[None],
        "tensor [1, H, W]": torch.from_numpy(values)[None],
        "tensor [H, W]": torch.from_numpy(values),
        "bool": values > 0,
    }[kind]
    assert classifier.predict(given) == classifier.predict(grey)


def test_usual_order_goes_first_where_both_would_do() -> None:
    values = np.zeros((3, 5, 3), dtype=np.uint8)
    assert read_picture(0, values, "white").size == (5, 3)
    assert read_picture(0, torch.from_numpy(values), "white").size == (3, 5)


def test_bfloat16_pixels_are_read(classifier: Classifier) -> None:
    picture = make_pictures()[0]
    found = np.array(read_picture(0, (chw(picture) / 255).bfloat16(), "white"), dtype=int)
    assert np.abs(found - np.array(picture)).max() <= 1


def too_large() -> Image.Image:
    return Image.new("1", (MAX_IMAGE_PIXELS // 1000 + 1, 1000))


BAD_PICTURES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "int": (lambda f: 3, "type int"),
    "float": (lambda f: 0.5, "type float"),
    "object": (lambda f: object(), "type object"),
    "date": (lambda f: datetime.date(2020, 1, 1), "type datetime.date"),
    "missing file": (lambda f: f / "none.png", "does not exist"),
    "folder": (lambda f: str(f), "is not a regular file"),
    "NUL in the path": (lambda f: "a\0b.png", "cannot be read"),
    "no picture": (lambda f: b"no picture", "not a picture"),
    "text file": (lambda f: io.StringIO("text"), "binary mode"),
    "closed file": (lambda f: _closed(), "open it again"),
    "truncated": (lambda f: encoded(make_pictures()[6])[:200], "cannot be read"),
    "truncated, opened": (lambda f: Image.open(io.BytesIO(encoded(make_pictures()[6])[:200])), "cannot be read"),
    "large": (lambda f: too_large(), "over the bound"),
    "no pixels": (lambda f: Image.new("RGB", (0, 5)), "0 x 5 pixels"),
    "dict without bytes": (lambda f: {"url": "x"}, "type dict"),
    "[N]": (lambda f: np.zeros(5, np.uint8), "shape"),
    "[H, W, 2]": (lambda f: np.zeros((5, 5, 2), np.uint8), "shape"),
    "[N, H, W, 3]": (lambda f: np.zeros((2, 5, 5, 3), np.uint8), "shape"),
    "[0, W, 3]": (lambda f: np.zeros((0, 5, 3), np.uint8), "shape"),
    "float to 255": (lambda f: np.full((5, 5, 3), 255.0), "floats from 0 to 1"),
    "normalised": (lambda f: torch.randn(3, 5, 5), "floats from 0 to 1"),
    "NaN": (lambda f: np.full((5, 5, 3), np.nan), "floats from 0 to 1"),
    "negative": (lambda f: np.full((5, 5, 3), -1), "uint8"),
    "complex": (lambda f: np.ones((5, 5, 3), complex), "complex"),
    "objects": (lambda f: np.full((5, 5, 3), None), "object"),
    "sparse": (lambda f: torch.ones(3, 5, 5).to_sparse(), "dense"),
    "meta": (lambda f: torch.ones(3, 5, 5, device="meta"), "dense"),
}


def _closed() -> io.BytesIO:
    file = io.BytesIO(b"")
    file.close()
    return file


@tried("call from Python", **LINE)
@pytest.mark.parametrize("kind", BAD_PICTURES)
def test_a_picture_that_cannot_be_used(classifier: Classifier, kind: str, tmp_path: Path) -> None:
    make, said = BAD_PICTURES[kind]
    with pytest.raises(InputError, match=said) as error:
        classifier.predict([None, make(tmp_path)], ["red", "blue"])
    assert str(error.value).startswith("pair 1: ") and "\n" not in str(error.value)


ABSENT = [None, float("nan"), np.nan, np.float32("nan"), pd.NA, pd.NaT, Decimal("NaN"), "", "  "]


@tried("call from Python", ends="same result as None")
@pytest.mark.parametrize("nothing", ABSENT, ids=repr)
@pytest.mark.parametrize("side", ["image", "text"])
def test_what_is_absent(classifier: Classifier, nothing: Any, side: str) -> None:
    picture, text = make_pictures()[0], TEXTS[0]
    given = (nothing, text) if side == "image" else (picture, nothing)
    expected = (None, text) if side == "image" else (picture, None)
    assert classifier.predict(*given) == classifier.predict(*expected)
    assert classifier.predict([given[0]], [given[1]]) == [classifier.predict(*expected)]


@tried("call from Python", ends="same result as the str")
@pytest.mark.parametrize("text", [np.str_("red dress"), Upper("red dress")], ids=["numpy str", "subclass"])
def test_a_text_of_another_kind(classifier: Classifier, text: Any) -> None:
    assert classifier.predict(None, text) == classifier.predict(None, "red dress")


@tried("call from Python", **LINE)
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"red", "bytes: decode it"),
        (bytearray(b"red"), "bytearray: decode it"),
        (5, "type int"),
        (np.int64(5), "numpy.int64"),
        (0.5, "type float"),
        (True, "type bool"),
        (["red"], "type list"),
        (Path("red"), "Path"),
        (datetime.date(2020, 1, 1), "datetime.date"),
        ("a \ud800 red", "no valid Unicode"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_text_that_cannot_be_used(classifier: Classifier, text: Any, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        classifier.predict([None, None], ["red", text])
    assert str(error.value).startswith("pair 1: ") and "\n" not in str(error.value)


def pairs() -> tuple[list[Any], list[Any]]:
    return make_pictures(), TEXTS


SEQUENCES: dict[str, Callable[[], tuple[Any, ...]]] = {
    "tuples": lambda: (tuple(make_pictures()), tuple(TEXTS)),
    "arrays of objects": lambda: (_objects(make_pictures()), np.array(TEXTS, dtype=object)),
    "Series": lambda: (pd.Series(make_pictures(), index=range(7, 0, -1)), pd.Series(TEXTS)),
    "pairs": lambda: (list(zip(*pairs(), strict=True)),),
    "a data set of PyTorch": lambda: (Indexed(),),
    "lists of two": lambda: ([list(pair) for pair in zip(*pairs(), strict=True)],),
}


def _objects(values: list[Any]) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


@tried("call from Python", ends="same result as lists")
@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences(classifier: Classifier, kind: str) -> None:
    assert classifier.predict(*SEQUENCES[kind]()) == classifier.predict(*pairs())


@tried("call from Python", ends="same result as lists")
@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_one_array_of_many_pictures(classifier: Classifier, library: str) -> None:
    pictures = np.stack([np.array(picture.resize((20, 30))) for picture in make_pictures() if picture])
    given = pictures if library == "numpy" else torch.from_numpy(pictures).permute(0, 3, 1, 2)
    assert classifier.predict(given) == classifier.predict([Image.fromarray(picture) for picture in pictures])


STREAMS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "generator of pairs": lambda: (pair for pair in zip(*pairs(), strict=True)),
    "zip": lambda: zip(*pairs(), strict=True),
    "images": lambda: (iter(make_pictures()), TEXTS),
    "texts": lambda: (make_pictures(), iter(TEXTS)),
    "both": lambda: (iter(make_pictures()), map(str, TEXTS)),
    "dicts": lambda: ({"file": image, "title": text} for image, text in zip(*pairs(), strict=True)),
}


@tried("call from Python", ends="an iterator of the same results")
@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("batch_size", [1, 3, 7, 64])
def test_streams(classifier: Classifier, kind: str, batch_size: int) -> None:
    given = STREAMS[kind]()
    found = classifier.predict(
        *(given if isinstance(given, tuple) else (given,)), image="file", text="title", batch_size=batch_size
    )
    assert iter(found) is found
    texts = [str(text) for text in TEXTS] if kind == "both" else TEXTS
    close(list(found), classifier.predict(make_pictures(), texts))


def close(found: list[Any], expected: list[Any]) -> None:
    """The same labels, and probabilities up to the rounding of another batch size."""
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for task in TASKS:
            assert one[task].label == other[task].label
            assert one[task].probability == pytest.approx(other[task].probability, abs=1e-6)


def test_a_stream_is_read_little_ahead(classifier: Classifier) -> None:
    read = []

    def endless() -> Any:
        while True:
            read.append(len(read))
            yield None, f"text {len(read)}"

    found = classifier.predict(endless(), batch_size=4)
    for number in range(20):
        next(found)
        assert len(read) <= number + 8
    found.close()


@tried("call from Python", ends="the answers before it, then the error")
def test_a_stream_that_fails(classifier: Classifier) -> None:
    def fails() -> Any:
        for text in TEXTS[:3]:
            yield None, text
        raise OSError("the network is gone")

    found = classifier.predict(fails(), batch_size=2)
    close([next(found) for _ in range(3)], classifier.predict(None, TEXTS[:3]))
    with pytest.raises(OSError, match="the network is gone"):
        next(found)


@tried("call from Python", ends="the answers before it, then one line that names the pair")
def test_a_stream_with_a_bad_picture(classifier: Classifier) -> None:
    found = classifier.predict(iter([(None, "red"), (None, "blue"), (b"no", "green")]), batch_size=2)
    assert len([next(found), next(found)]) == 2
    with pytest.raises(InputError, match="pair 2: picture cannot be read"):
        next(found)


@pytest.mark.parametrize(
    ("given", "form"),
    [
        (("{file}", "red dress"), dict),
        (("{file}",), dict),
        ((None, "red dress"), dict),
        ((None, ["red dress"]), list),
        ((["{file}"],), list),
        ((["{file}"], ["red dress"]), list),
    ],
    ids=str,
)
def test_one_pair_or_many(classifier: Classifier, given: tuple[Any, ...], form: type, tmp_path: Path) -> None:
    path = str(saved(make_pictures()[0], tmp_path))
    named = [path if value == "{file}" else [path] if value == ["{file}"] else value for value in given]
    found = classifier.predict(*named)
    assert type(found) is form
    one = found if form is dict else found[0]
    assert one.keys() == TASKS.keys() and one["colour"].label in TASKS["colour"]


@tried("call from Python", ends="no answers")
@pytest.mark.parametrize("given", [([], []), ([],), (None, []), ((), ()), (np.array([]), [])], ids=str)
def test_nothing_gives_nothing(classifier: Classifier, given: tuple[Any, ...]) -> None:
    assert classifier.predict(*given) == []
    assert classifier.predict_proba(*given)["colour"].shape == (0, 3)
    assert classifier.embed(*given).shape == (0, 32)
    assert classifier.explain(*given) == []


@tried("call from Python", ends="no answers")
def test_an_empty_stream_and_an_empty_table(classifier: Classifier) -> None:
    assert list(classifier.predict(iter([]))) == []
    frame = classifier.predict(pd.DataFrame({"file": [], "title": []}), image="file", text="title")
    assert len(frame) == 0 and "colour_probability" in frame
    assert classifier.predict_proba(pd.DataFrame({"title": []}), text="title").shape == (0, 5)


@tried("call from Python", ends="one line")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        (([None], ["a", "b"]), "1 images but 2 texts"),
        (([None, None], "a"), "one of each for every pair"),
        ((iter([None]), iter(["a", "b"])), "pair 1: the images end before the texts"),
        ((iter([None, None]), ["a"]), "pair 1: the texts end before the images"),
        ((None, None), "neither images nor texts"),
        (([None], [None]), "pair 0: neither image nor text"),
        ((iter(["a.png"]),), "pair 0: a str is no pair"),
        ((iter([("a", "b", "c")]),), "pair 0: a tuple is no pair"),
        (({"file": ["a"]},), "images: a dict holds no pairs"),
        (({"a.png"}, ["a"]), "images: a set holds no pairs"),
        ((None, {"a"}), "texts: a set holds no pairs"),
        ((object(), "a"), "images: a object holds no pairs"),
        ((np.array(3), "a"), "images: a numpy.ndarray holds no pairs"),
        ((pa.table({"file": ["a"]}),), "images: a pyarrow.Table holds no pairs"),
        ((pd.DataFrame({"file": ["a"]}), ["a"]), "name the column of texts by text="),
        ((pd.DataFrame({"file": ["a"]}),), "name the columns by image= and text="),
        ((datasets.DatasetDict({"train": datasets.Dataset.from_dict({"a": [1]})}),), "several splits .train."),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_holds_no_pairs(classifier: Classifier, given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        list(classifier.predict(*given))
    assert "\n" not in str(error.value)


@tried("call from Python", ends="one line")
@pytest.mark.parametrize("size", [0, -1, 2.5, None, "8"])
def test_a_batch_size_that_is_none(classifier: Classifier, size: Any) -> None:
    with pytest.raises(InputError, match="batch_size"):
        classifier.predict(None, ["red"], batch_size=size)


def table(folder: Path) -> pd.DataFrame:
    """Pictures as a path, bytes, a Hugging Face cell and a missing value; an index that is not in order."""
    first, second, third = (picture for picture in make_pictures()[:3] if picture)
    return pd.DataFrame(
        {
            "title": ["red dress", None, "blue coat", np.nan],
            "price": [1, 2, 3, 4],
            "file": [saved(first, folder).name, encoded(second), np.nan, {"bytes": encoded(third), "path": None}],
        },
        index=[7, 3, 3, 1],
    )


def test_a_table_gives_a_table(folder: Path, tmp_path: Path) -> None:
    classifier, frame = Classifier.load(folder, device="cpu"), table(tmp_path)
    found = classifier.predict(frame, image_dir=tmp_path)
    expected = classifier.predict(
        [*make_pictures()[:2], None, make_pictures()[2]], ["red dress", None, "blue coat", None]
    )
    assert found.index.equals(frame.index)
    labels = [None if pd.isna(label) else label for label in found["colour"]]
    assert labels == [row["colour"].label for row in expected] and set(labels) > {None}
    assert found["colour_status"].tolist() == [row["colour"].status for row in expected]
    assert found["style/cut_probability"].tolist() == [pytest.approx(row["style/cut"].probability) for row in expected]
    assert found["colour_top"].iloc[0][0]["label"] == expected[0]["colour"].top[0][0]
    probabilities = classifier.predict_proba(frame, image_dir=tmp_path)
    assert probabilities.index.equals(frame.index)
    assert probabilities.columns.tolist() == [
        "colour=blue", "colour=green", "colour=red", "style/cut=long", "style/cut=short",
    ]  # fmt: skip
    assert probabilities.iloc[0][f"colour={expected[0]['colour'].top[0][0]}"] == pytest.approx(
        expected[0]["colour"].probability
    )
    assert classifier.embed(frame, image_dir=tmp_path).shape == (4, 32)
    assert [view.row for view in classifier.explain(frame, image_dir=tmp_path)] == [1, 2, 3, 4]


@tried("call from Python", ends="same result as object columns")
@pytest.mark.parametrize("dtype", ["string", "string[pyarrow]", "category"])
def test_columns_of_other_types(folder: Path, dtype: str) -> None:
    classifier = Classifier.load(folder, device="cpu")
    frame = pd.DataFrame({"title": ["red dress", "blue coat", None], "file": [None, None, encoded(make_pictures()[0])]})
    typed = frame.assign(title=frame["title"].astype(dtype))
    pd.testing.assert_frame_equal(classifier.predict(typed), classifier.predict(frame))


def test_columns_are_found_or_named(folder: Path) -> None:
    classifier = Classifier.load(folder, device="cpu")
    frame = pd.DataFrame({"name": ["red dress"]})
    with pytest.warns(UserWarning, match="no column 'file'"):
        found = classifier.predict(frame.rename(columns={"name": "title"}))
    with pytest.warns(UserWarning, match="no column 'file'"):
        pd.testing.assert_frame_equal(classifier.predict(frame, text="name"), found)
    with pytest.raises(InputError, match="no column 'nam' for text"), warnings.catch_warnings(action="ignore"):
        classifier.predict(frame, text="nam")
    with pytest.raises(InputError, match="name the columns"), warnings.catch_warnings(action="ignore"):
        classifier.predict(frame)
    with pytest.raises(InputError, match="'title' is there twice"):
        classifier.predict(pd.DataFrame([["a", "b", None]], columns=["title", "title", "file"]))


def hugging_face(kind: str) -> tuple[Any, list[Any]]:
    pictures = [encoded(picture) for picture in make_pictures()[:3] if picture]
    columns = {"file": [*pictures, None], "title": ["red dress", None, "blue coat", "skirt"]}
    dataset = datasets.Dataset.from_dict(columns)
    if "Image" in kind:
        dataset = dataset.cast_column("file", datasets.Image())
    if "stream" in kind:
        dataset = dataset.to_iterable_dataset()
    if "torch" in kind:
        dataset = dataset.with_format("torch")
    return dataset, [*make_pictures()[:3], None]


@tried("call from Python", ends="same result as lists")
@pytest.mark.parametrize("kind", ["bytes", "Image", "Image, torch", "stream", "stream, Image"])
def test_a_hugging_face_data_set(folder: Path, kind: str) -> None:
    classifier = Classifier.load(folder, device="cpu")
    dataset, pictures = hugging_face(kind)
    found = classifier.predict(dataset)
    assert isinstance(found, list) != ("stream" in kind)
    assert list(found) == classifier.predict(pictures, ["red dress", None, "blue coat", "skirt"])


@tried("call from Python", ends="same result as lists")
def test_columns_of_a_hugging_face_data_set(classifier: Classifier) -> None:
    dataset, pictures = hugging_face("Image")
    found = classifier.predict(dataset["file"], dataset["title"])
    assert found == classifier.predict(pictures, ["red dress", None, "blue coat", "skirt"])
