"""The data set `emoji`: from small packages of the same form, and (slow) the real one and what it is to show."""

from __future__ import annotations

import collections
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from emoji_packages import write_packages

from cmaclip_fast.data import describe, list_datasets, read_table, split_table
from cmaclip_fast.data.emoji import NOTO, TAGS, TWEMOJI, Package, build_emoji, from_folder, npm_pack
from cmaclip_fast.data.named import absolute, data_home
from cmaclip_fast.errors import InputError
from cmaclip_fast.training.run import TrainingRun, train


@pytest.fixture
def packages(tmp_path: Path) -> tuple[Package, Package, Package]:
    (tmp_path / "npm").mkdir()
    return write_packages(tmp_path / "npm")


@pytest.fixture
def built(tmp_path: Path, packages: tuple[Package, Package, Package], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CMACLIP_DATA", str(tmp_path / "home"))
    return build_emoji(fetch=from_folder(tmp_path / "npm"), packages=packages)


def test_labels_are_honest(built: Path) -> None:
    table = read_table("emoji")
    tasks = table.columns.tasks
    assert tasks == ("category", "subcategory", "tone", "vendor", "gender")
    labels = {task: table.labels(task) for task in tasks}
    rows = {
        str(table.keys(i)["id"]): {"text": table.text(i), **{task: labels[task][i] for task in tasks}}
        for i in range(len(table))
    }
    assert len(rows) == 2 * (1 + 4 * 6 + 10), "components and letters without a group are left out"
    assert rows["noto/1F600"] == {
        "text": "face grin",
        "category": "smileys-emotion",
        "subcategory": "smileys-emotion/face-smiling",
        "tone": None,
        "vendor": "noto",
        "gender": None,
    }
    assert rows["twemoji/1F44D"]["tone"] == "default" and rows["twemoji/1F44D"]["gender"] is None
    assert rows["noto/1F44D-1F3FB"]["tone"] == "light" and rows["noto/1F44D-1F3FE"]["tone"] == "medium-dark"
    assert rows["noto/1F44D-1F3FF"]["tone"] is None, "two tones in one picture"
    assert rows["noto/1F3C3-1F3FF"] == {
        "text": "fast race",
        "category": "people-body",
        "subcategory": "people-body/person-activity",
        "tone": "dark",
        "vendor": "noto",
        "gender": "neutral",
    }
    assert rows["noto/1F3C3-1F3FB-200D-2642"]["gender"] == "male"
    assert rows["noto/1F3C3-200D-2640-FE0F"]["gender"] == "female"


def test_pictures_are_the_packages_own(built: Path) -> None:
    table = read_table("emoji")
    for row in range(len(table)):
        picture = table.image(row)
        assert picture is not None and picture.size == (64, 64)
        expected = 90 if table.labels("vendor")[row] == "noto" else 200
        assert picture.getpixel((0, 0))[1] == expected  # type: ignore[index]


def test_a_picture_that_is_not_the_vendors_own_is_left_out(tmp_path: Path) -> None:
    packages = write_packages(tmp_path, missing="1F404")
    path = build_emoji(tmp_path / "out", fetch=from_folder(tmp_path), packages=packages)
    ids = read_table(path, any_columns=True)._source.texts("id")
    assert "noto/1F404" not in ids and "twemoji/1F404" in ids


def test_variants_stay_in_one_split(built: Path) -> None:
    table = read_table("emoji")
    splits = collections.defaultdict(set)
    for family, split in zip(table.labels("family"), table.splits(), strict=True):
        splits[family].add(split)
    assert all(len(found) == 1 for found in splits.values()) and len(splits) == 13
    assert table.labels("family").count("1F3C3") == 3 * 6 * 2, "persons, men and women running"
    sizes = {name: len(part) for name, part in split_table(table).items()}
    assert sizes["test"] == 4 and sizes["validation"] == 2, "of the ten animals two and one, of two vendors each"


def test_languages(built: Path, tmp_path: Path, packages: tuple[Package, Package, Package]) -> None:
    english, japanese, every = (read_table(f"emoji{part}") for part in ("", ":ja", ":all"))
    assert english.texts()[0] == "face grin" and japanese.texts()[0] == "笑顔"
    assert japanese.keys(0) == {"id": "noto/1F600", "language": "ja"}
    assert every.labels("language") == ["en"] * len(english) + ["ja"] * len(english)
    assert every.texts() == english.texts() + japanese.texts() and every.splits() == 2 * english.splits()
    assert every.image(len(english)).tobytes() == english.image(0).tobytes()  # type: ignore[union-attr]
    assert every.row_number(len(english)) == 1
    assert japanese.texts().count(None) == 2 * 6, "a language may have no tags of an emoji"
    with pytest.raises(InputError, match=r"no language 'jp'; languages: en, ja"):
        read_table("emoji:jp")
    build = {"fetch": from_folder(tmp_path / "npm"), "packages": packages}
    build_emoji(languages=["ja"], overwrite=True, **build)  # type: ignore[arg-type]
    assert read_table("emoji:ja").texts() == japanese.texts()
    with pytest.raises(InputError, match=r"emoji:en: no language 'en'.*--languages all --overwrite"):
        read_table("emoji:en")
    with pytest.raises(InputError, match=r"--languages: no language 'de'.*known: en, ja"):
        build_emoji(languages=["de"], overwrite=True, **build)  # type: ignore[arg-type]


def test_the_same_packages_give_the_same_file(
    built: Path, tmp_path: Path, packages: tuple[Package, Package, Package]
) -> None:
    again = build_emoji(tmp_path / "again", fetch=from_folder(tmp_path / "npm"), packages=packages)
    assert again.read_bytes() == built.read_bytes()
    assert {path.name for path in again.parent.iterdir()} == {"emoji.parquet", "README.md"}


def test_card(built: Path) -> None:
    told = describe("emoji:ja")
    assert told.licence == "Apache-2.0, CC-BY-4.0, MIT" and told.card is not None
    for fact in ("70 pictures", "2 columns of texts", "en, ja", "| `tone` | 6 | 46 |", "CC-BY-4.0", "emojibase-data"):
        assert fact in told.card
    assert (built.parent / "README.md").read_text(encoding="utf-8") == told.card


def test_before_it_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CMACLIP_DATA", str(tmp_path))
    assert "emoji" in {entry.name for entry in list_datasets()}
    with pytest.raises(InputError, match=r"run `cmaclip data build emoji`"):
        read_table("emoji")


def test_nothing_is_replaced_or_left_half(
    built: Path, tmp_path: Path, packages: tuple[Package, Package, Package]
) -> None:
    with pytest.raises(InputError, match=r"exists already: pass --overwrite"):
        build_emoji(fetch=from_folder(tmp_path / "npm"), packages=packages)
    with pytest.raises(InputError, match=f"{TWEMOJI.tarball}: no such file: fetch it with `npm pack"):
        (tmp_path / "npm" / TWEMOJI.tarball).unlink()
        build_emoji(tmp_path / "other", fetch=from_folder(tmp_path / "npm"), packages=packages)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("package", [NOTO, TWEMOJI, TAGS])
def test_checksum(tmp_path: Path, packages: tuple[Package, Package, Package], package: Package) -> None:
    tarball = tmp_path / "npm" / package.tarball
    content = bytearray(tarball.read_bytes())
    content[len(content) // 2] ^= 1
    tarball.write_bytes(content)
    with pytest.raises(InputError, match=f"{package.tarball}: checksum sha512-.* is not the expected"):
        build_emoji(tmp_path / "out", fetch=from_folder(tmp_path / "npm"), packages=packages)


def test_npm_is_missing_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match=r"npm: not found: install Node.js, or name a folder"):
        npm_pack(NOTO, tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error 404 Not Found' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(InputError, match=r"npm pack emoji-datasource-google@16.0.0: failed .npm error 404 Not Found"):
        npm_pack(NOTO, tmp_path)


@pytest.mark.skipif(sys.platform != "linux", reason="the folder of Linux")
@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "~/.cache/cmaclip_fast"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/cmaclip_fast"),
        ({"XDG_CACHE_HOME": "/x", "CMACLIP_DATA": "~/sets"}, "~/sets"),
    ],
)
def test_home(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("XDG_CACHE_HOME", "CMACLIP_DATA"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert data_home() == Path(expected).expanduser()


def test_names_stay_and_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("emoji:de") == "emoji:de" and absolute("openclipart") == "openclipart"
    assert absolute("a.csv") == str(tmp_path / "a.csv") and absolute("c:x.csv") == str(tmp_path / "c:x.csv")
    assert absolute("glami-1m:sets") == f"glami-1m:{tmp_path / 'sets'}"


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The real data set, in a home of its own."""
    home = tmp_path_factory.mktemp("home")
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    asked = subprocess.run([npm, "view", f"{TAGS.name}@{TAGS.version}", "version"], capture_output=True, check=False)
    if asked.returncode:
        pytest.skip("npm cannot reach its registry")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CMACLIP_DATA", str(home))
        build_emoji()
        yield home


@pytest.mark.slow
def test_the_real_one(real: Path) -> None:
    told = describe("emoji")
    assert told.rows == {"train": 5236, "validation": 700, "test": 1626}
    assert {task: len(classes) for task, classes in told.classes.items()} == {
        "category": 9,
        "subcategory": 98,
        "tone": 6,
        "vendor": 2,
        "gender": 3,
    }
    assert told.classes["tone"] == dict.fromkeys(told.classes["tone"], 646)
    assert told.classes["vendor"] == {"noto": 3781, "twemoji": 3781}
    assert told.classes["gender"] == {"female": 1192, "male": 1180, "neutral": 1170}
    assert told.absent == {"category": 0, "subcategory": 0, "tone": 3686, "vendor": 0, "gender": 4020} | {
        "text": 0,
        "image": 0,
    }
    table = read_table("emoji:all")
    assert len(set(table.labels("language"))) == 28 and len(table) == 28 * 7562
    english = read_table("emoji")
    splits = collections.defaultdict(set)
    for family, split in zip(english.labels("family"), english.splits(), strict=True):
        splits[family].add(split)
    assert len(splits) == 1686 and all(len(found) == 1 for found in splits.values())
    content = hashlib.sha256()
    for row in range(len(english)):
        content.update(str(english.keys(row)["id"]).encode())
        content.update(english._image_source(row))  # type: ignore[arg-type]
        content.update(str(english.text(row)).encode())
    assert content.hexdigest() == "66d53b02a4ead79cfdf829b0dd40a53ac19fb26c3723f23786d0e26c15d7ab21"


@pytest.mark.slow
def test_texts_say_nothing_of_tone_and_vendor(real: Path) -> None:
    table = read_table("emoji:all")
    for task, classes in (("tone", 6), ("vendor", 2)):
        by_text: dict[tuple[str | None, str | None], collections.Counter[str]] = collections.defaultdict(
            collections.Counter
        )
        for language, text, label in zip(table.labels("language"), table.texts(), table.labels(task), strict=True):
            if label is not None:
                by_text[language, text][label] += 1
        for counts in by_text.values():
            assert len(counts) == classes and len(set(counts.values())) == 1


@pytest.mark.slow
def test_modality_weights_show_what_the_text_tells(real: Path, tmp_path: Path) -> None:
    """The paper's claim for modality-wise attention, on a fifth of the data: up to a minute of one thread."""
    table = read_table("emoji")
    rows = [row for row in range(len(table)) if row // 2 % 5 == 0]  # both vendors of every fifth drawing
    run = TrainingRun(
        table=table.select(rows),
        output=tmp_path / "run",
        model_options={"image_size": 32, "depth": 1},
        training_options={"epochs": 5, "batch_size": 32},
    )
    metrics = train(run).metrics
    written = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["modality_weights"]
    text = {task: weights["text"] for task, weights in written.items()}
    # a name says what is drawn, not by whom or in which tone; of four seeds the means are 0.36 apart or more
    told, not_told = (
        [text[task] for task in tasks] for tasks in (("category", "subcategory", "gender"), ("tone", "vendor"))
    )
    assert statistics.fmean(told) > statistics.fmean(not_told) + 0.2 and min(told) > text["tone"] + 0.1, text
    assert metrics["text alone"]["category"]["accuracy"] > 0.7, "else the weights would tell nothing"
    assert metrics["image alone"]["tone"]["accuracy"] > 2 / 6
    assert metrics["text alone"]["tone"]["accuracy"] == pytest.approx(1 / 6, abs=0.05)
    assert metrics["text alone"]["vendor"]["accuracy"] == pytest.approx(1 / 2, abs=0.01)
