"""The page at `/`: what it may fetch, that it stands alone, and what its script does with a service that listens."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from cmaclip_fast import Classifier
from cmaclip_fast.serving import webpage
from tests.classifier.conftest import TASKS
from tests.serving.conftest import PICTURES, Running, Start

FOLDER = Path(webpage.__file__).parent / "page"
NODE = shutil.which("node")
TOKEN = "0123456789abcdef0123"

needs_node = pytest.mark.skipif(NODE is None, reason="running the page's script needs Node.js")


class Page(HTMLParser):
    """The elements of the page, in order."""

    VOID = frozenset({"meta", "input", "img", "br"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.inline: dict[str, str] = {}
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("style", "script"):
            self.inline[self.open[-1]] = self.inline.get(self.open[-1], "") + data


@pytest.fixture(scope="module")
def page(served: Running) -> Page:
    found = Page(served.client.get("/").text)
    assert not found.open
    return found


def test_the_policy_allows_the_two_inline_parts_and_the_service_alone(served: Running, page: Page) -> None:
    response = served.client.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    rules = dict(rule.split(" ", 1) for rule in response.headers["content-security-policy"].split("; "))
    for tag in ("style", "script"):
        digest = base64.b64encode(hashlib.sha256(page.inline[tag].encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'" and rules["img-src"] == "blob: data:"


def test_the_page_fetches_nothing_from_elsewhere(page: Page) -> None:
    whole = webpage.page()
    assert not re.findall(r"https?://|//[a-z]+\.|@import|url\(", whole)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base") and "src" not in attributes
        assert not [name for name in attributes if name.startswith("on") or name == "style"], attributes


def test_the_script_makes_no_markup_of_text() -> None:
    script = (FOLDER / "script.js").read_text()
    ways = (
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|setTimeout\(['\"]|localStorage"
    )
    assert not re.findall(ways, script)


def test_everything_has_a_name_and_a_place_in_the_order(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labelled = {attributes.get("for") for tag, attributes in page.elements if tag == "label"}
    for tag, attributes in page.elements:
        if tag in ("input", "textarea", "select"):
            assert attributes["id"] in labelled, attributes
        if tag == "img":
            assert "alt" in attributes
        if tag == "section":
            assert attributes["aria-labelledby"] in ids
        assert int(attributes.get("tabindex") or 0) <= 0
    assert ("html", {"lang": "en"}) in page.elements
    levels = [int(tag[1]) for tag, _ in page.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and all(after - before <= 1 for before, after in pairwise(levels))


def luminance(colour: str) -> float:
    values = [int(part, 16) / 255 for part in re.findall("..", colour[1:] if len(colour) == 7 else colour[1:] * 2)]
    red, green, blue = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("mode", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(mode: str) -> None:
    """WCAG 2.2, success criterion 1.4.3: a contrast of 4.5."""
    blocks = re.findall(r":root \{(.*?)\}", (FOLDER / "style.css").read_text(), re.DOTALL)
    assert len(blocks) == 2
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]+);", blocks[mode == "dark"]))
    pairs = [("ink", "paper"), ("ink", "panel"), ("quiet", "paper"), ("quiet", "panel"), ("bad", "panel")]
    pairs += [("on-accent", "accent"), ("text", "panel"), ("image", "panel")]
    for front, back in pairs:
        light, dark = sorted((luminance(colours[front]), luminance(colours[back])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (front, back)


def play(running: Running, scenario: str, tmp_path: Path, token: str = "") -> dict[str, Any]:
    """What the script of the page did in a scenario of `page.cjs`."""
    (tmp_path / "a.png").write_bytes(PICTURES[0] or b"")
    player = Path(__file__).with_name("page.cjs")
    files = [FOLDER / "index.html", FOLDER / "script.js"]
    command = [NODE, player, *files, str(running.client.base_url), scenario, token, tmp_path / "a.png"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


@needs_node
def test_a_pair_is_classified_on_the_page(served: Running, classifier: Classifier, tmp_path: Path) -> None:
    seen = play(served, "pair", tmp_path)
    assert seen["about"] == "CMA-CLIP. colour (3 classes), style/cut (2 classes)."
    assert seen["nothing"] == "Choose a picture, type a text, or both."
    for given, (image, text) in (("text", (None, "a <b>red</b> dress")), ("both", (PICTURES[0], "a <b>red</b> dress"))):
        wanted = classifier.predict(image, text)
        assert len(seen[given]) == len(TASKS)
        for card, (task, said) in zip(seen[given], wanted.items(), strict=True):
            assert card.startswith(f"{task} {said.top[0][0]} {said.status} {said.top[0][0]}")
            assert f"{round(100 * said.probability)}%" in card
            assert f"text {round(100 * said.text_weight)}%, picture {round(100 * said.image_weight)}%" in card
    assert seen["withoutPicture"] and seen["focused"] and seen["said"].startswith("colour: ")
    explained = classifier.explain(PICTURES[0], "a <b>red</b> dress")
    assert seen["tokens"][:2] == ["nothing", "the picture as a whole"]
    assert len(seen["tokens"]) == 2 + len(explained.tokens)
    assert seen["canvas"] == "The picture, lit where the picture as a whole attends to it"
    assert seen["chosen"] == f"The picture, lit where {seen['tokens'][2]} attends to it"
    assert "not a picture of" in seen["wrong"]
    assert seen["examples"] == 6 and seen["example"] == ["short blue coat", True]
    assert seen["down"].startswith("The service does not answer.") and seen["enabled"]


@needs_node
def test_a_table_is_labelled_and_reviewed_on_the_page(served: Running, tmp_path: Path) -> None:
    seen = play(served, "table", tmp_path)
    assert seen["nothing"] == "Choose a table first."
    assert seen["summary"] == "3 rows, 1 of them with an error."
    assert [row[:3] for row in seen["rows"]] == [
        ["1", "red dress", "a.png"],
        ["2", 'a, "quoted" coat', "b/a.png"],
        ["3", "", ""],
    ]
    assert seen["rows"][2][-1] == "neither image nor text: give at least one"
    assert seen["head"].split() == ["row", "text", "picture", "colour", "style/cut", "error"]
    # with a limit of 1 each answer is asked about: two rows, two tasks
    assert seen["questions"] == "1 of 4, row 1; 0 answered" and seen["pictured"] and seen["task"] == "colour"
    assert seen["back"] == "2 of 4, row 1; 1 answered" == seen["typed"]
    assert seen["unknown"] == "no class is no class of style/cut." and seen["done"]
    (name, corrections), (other, labels), (last, magic) = seen["downloads"]
    assert (name, other, last, magic) == ("corrections.csv", "predictions.csv", "predictions.parquet", "PAR1")
    rows = list(csv.reader(io.StringIO(corrections)))
    second = re.fullmatch(r"2 · (.*) \(\d+%\)", seen["second"])
    assert second and rows[0] == ["file", "title", "colour", "style/cut"]
    assert rows[1] == ["a.png", "red dress", second[1], "long"]
    assert rows[2][:2] == ["b/a.png", 'a, "quoted" coat'] and rows[2][2] in TASKS["colour"] and rows[2][3] == ""
    found = list(csv.DictReader(io.StringIO(labels)))
    assert [row["error"] for row in found] == ["", "", "neither image nor text: give at least one"]
    assert (
        found[0]["colour_status"] == "unsure"
        and found[0]["colour"] == ""
        and 0 < float(found[0]["colour_probability"]) <= 1
    )
    assert "give a file named .csv" in seen["wrong"]


@needs_node
def test_the_page_asks_for_a_token(start: Start, tmp_path: Path) -> None:
    seen = play(start(token=TOKEN), "token", tmp_path, TOKEN)
    assert seen["asked"] == "This service asks for an access token."
    assert seen["login"] and seen["labels"] == len(TASKS)


def test_the_page_in_chromium(served: Running, tmp_path: Path) -> None:
    """Not counted as run where Playwright or its Chromium is missing."""
    api = pytest.importorskip("playwright.sync_api", reason="the page in a browser needs Playwright")
    (tmp_path / "a.png").write_bytes(PICTURES[0] or b"")
    with api.sync_playwright() as player:
        try:
            browser = player.chromium.launch()
        except api.Error as error:
            pytest.skip(f"Chromium does not start: {error}")
        for scheme, width in (("light", 1200), ("dark", 360)):
            context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 800})
            found = context.new_page()
            problems: list[str] = []
            found.on("console", lambda said, problems=problems: problems.append(said.text))
            found.on("pageerror", lambda error, problems=problems: problems.append(str(error)))
            asked: list[str] = []
            found.on("request", lambda request, asked=asked: asked.append(request.url))
            found.goto(str(served.client.base_url))
            found.get_by_role("heading", name="tiny").wait_for()
            found.locator("#picture").set_input_files(str(tmp_path / "a.png"))
            found.locator("#text").focus()
            found.keyboard.type("a red dress")
            found.keyboard.press("Tab")
            found.keyboard.press("Enter")
            found.locator("#result").wait_for()
            assert found.locator(".card").count() == len(TASKS)
            assert found.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
            assert all(url.startswith((str(served.client.base_url), "blob:", "data:")) for url in asked)
            assert not problems
            context.close()
        browser.close()
