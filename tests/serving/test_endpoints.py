"""What each endpoint gives, against what `Classifier` gives for the same rows."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import jsonschema
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from fastapi.openapi.models import OpenAPI
from PIL import Image

from cmaclip_fast import Classifier
from tests.classifier.conftest import TASKS, TEXTS, make_pictures
from tests.serving.conftest import PICTURES, Running, Start

ROWS = [
    {"image": None if content is None else base64.b64encode(content).decode(), "text": text}
    for content, text in zip(PICTURES, TEXTS, strict=True)
]


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a row of the service's says what the classifier says."""
    assert found.keys() == wanted.keys()
    for task, said in wanted.items():
        got = found[task]
        assert got["label"] == said.label and got["probability"] == pytest.approx(said.probability, abs=1e-5)
        assert [one["label"] for one in got["top"]] == [label for label, _ in said.top]
        assert got["text_weight"] == pytest.approx(said.text_weight, abs=1e-5)
        assert got["image_weight"] == pytest.approx(said.image_weight, abs=1e-5)
    return True


def form(rows: list[dict[str, Any]]) -> list[tuple[str, Any]]:
    """The rows as parts of a form; what is absent is sent empty."""
    parts: list[tuple[str, Any]] = []
    for row in rows:
        image = b"" if row["image"] is None else base64.b64decode(row["image"])
        parts += [("image", ("a.png", image, "image/png")), ("text", (None, row["text"] or ""))]
    return parts


@pytest.mark.parametrize("rows", [1, len(ROWS)])
@pytest.mark.parametrize("kind", ["json", "form"])
def test_predict_says_what_the_classifier_says(served: Running, classifier: Classifier, kind: str, rows: int) -> None:
    body: dict[str, Any] = {"json": {"rows": ROWS[:rows]}} if kind == "json" else {"files": form(ROWS[:rows])}
    response = served.client.post("/predict", **body)
    assert response.status_code == 200
    wanted = classifier.predict(make_pictures()[:rows], TEXTS[:rows])
    found = response.json()["predictions"]
    assert len(found) == rows and all(same(*pair) for pair in zip(found, wanted, strict=True))


@pytest.mark.parametrize("side", ["image", "text"])
def test_a_side_may_be_missing(served: Running, classifier: Classifier, side: str) -> None:
    image, text = (make_pictures()[0], None) if side == "image" else (None, TEXTS[0])
    parts = [("image", PICTURES[0])] if side == "image" else [("text", (None, TEXTS[0]))]
    (by_form,) = served.client.post("/predict", files=parts).json()["predictions"]
    (by_json,) = served.client.post("/predict", json={"rows": [{side: ROWS[0][side]}]}).json()["predictions"]
    assert by_form == by_json and same(by_form, classifier.predict(image, text))
    other = "text" if side == "image" else "image"
    assert all(said[f"{other}_weight"] == 0 for said in by_form.values())


def test_a_data_url_is_a_picture(served: Running) -> None:
    plain = served.client.post("/predict", json={"rows": [ROWS[0]]}).json()
    url = {"image": f"data:image/png;base64,{ROWS[0]['image']}", "text": ROWS[0]["text"]}
    assert served.client.post("/predict", json={"rows": [url]}).json() == plain


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_known_formats_are_read(served: Running, classifier: Classifier, kind: str) -> None:
    buffer = io.BytesIO()
    make_pictures()[0].save(buffer, kind)  # type: ignore[union-attr]
    response = served.client.post("/predict", files={"image": buffer.getvalue()})
    assert same(response.json()["predictions"][0], classifier.predict(buffer.getvalue(), None))


def test_embed(served: Running, classifier: Classifier) -> None:
    found = served.client.post("/embed", json={"rows": ROWS}).json()["embeddings"]
    np.testing.assert_allclose(found, classifier.embed(make_pictures(), TEXTS), atol=1e-5)


def test_explain(served: Running, classifier: Classifier) -> None:
    (found,) = served.client.post("/explain", json={"rows": [ROWS[0]]}).json()["explanations"]
    wanted = classifier.explain(make_pictures()[0], TEXTS[0])
    assert found["tokens"] == wanted.tokens
    for name, values in (
        ("text_to_token", wanted.text_global_to_token),
        ("image_to_patch", wanted.image_global_to_patch),
        ("token_to_patch", wanted.token_to_patch),
    ):
        np.testing.assert_allclose(found[name], values, atol=1e-5)
    picture = Image.open(io.BytesIO(base64.b64decode(found["image"])))
    assert np.array_equal(np.asarray(picture), np.asarray(wanted.image))
    assert {task: said["label"] for task, said in found["predictions"].items()} == {
        task: None if said.status == "unsure" else said.predicted for task, said in wanted.predictions.items()
    }


def test_an_explanation_without_a_picture_has_no_map(served: Running) -> None:
    (found,) = served.client.post("/explain", files=[("text", (None, "red dress"))]).json()["explanations"]
    assert found["image"] is None and found["tokens"]


def test_model_names_tasks_and_limits(served: Running) -> None:
    found = served.client.get("/model").json()
    assert found["tasks"] == TASKS and found["name"] == "tiny"
    assert (found["image_column"], found["text_column"]) == ("file", "title")
    assert found["limits"]["rows"] == served.service.settings.limits.rows


def test_examples_are_rows_of_the_test_split(served: Running, start: Start) -> None:
    found = served.client.get("/examples").json()["examples"]
    assert [example["text"] for example in found] == TEXTS[: served.service.settings.examples]
    assert found[0]["image"] and found[5]["image"] is None
    assert start(examples=0).client.get("/examples").json() == {"examples": []}


def test_health_and_ready(served: Running) -> None:
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.client.get("/ready").json() == {"status": "ready"}


def test_metrics_count_requests_and_rows(start: Start) -> None:
    running = start()
    running.client.post("/predict", json={"rows": ROWS[:3]})
    running.client.post("/predict", json={"rows": []})
    running.client.get("/no/such/path")
    assert running.client.get("/metrics").headers["content-type"].startswith("text/plain; version=0.0.4")
    assert running.metric('cmaclip_requests_total{route="/predict",status="200"}') == 1
    assert running.metric('cmaclip_requests_total{route="/predict",status="400"}') == 1
    assert running.metric('cmaclip_requests_total{route="other",status="404"}') == 1
    assert running.metric('cmaclip_rows_total{kind="predict"}') == 3
    assert running.metric('cmaclip_refused_total{code="bad_json"}') == 1
    assert running.metric("cmaclip_batch_rows_count") == 1
    assert running.metric("cmaclip_batch_rows_sum") == 3
    assert running.metric("cmaclip_ready") == 1
    assert running.metric("cmaclip_queue_rows") == 0


def test_an_answer_has_an_identifier_and_is_not_kept(served: Running) -> None:
    one, other = (served.client.post("/predict", json={"rows": ROWS[:1]}) for _ in range(2))
    assert one.headers["x-request-id"] != other.headers["x-request-id"]
    assert one.headers["cache-control"] == "no-store" and one.headers["x-content-type-options"] == "nosniff"


CSV = "file,title\n0.png,a long red dress\n,green skirt\nfolder\\1.png,\n,\nmissing.png,x\n"


def upload(table: bytes, name: str, **fields: str) -> list[tuple[str, Any]]:
    pictures = [("picture", (f"{number}.png", PICTURES[number])) for number in (0, 1)]
    return [("table", (name, table)), *pictures, *((key, (None, value)) for key, value in fields.items())]


def test_a_table_is_labelled_row_by_row(served: Running, classifier: Classifier) -> None:
    rows = served.client.post("/predict-table", files=upload(CSV.encode(), "rows.csv")).json()["rows"]
    pairs = [(PICTURES[0], "a long red dress"), (None, "green skirt"), (PICTURES[1], None)]
    assert all(same(row["predictions"], classifier.predict(*pair)) for row, pair in zip(rows, pairs, strict=False))
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[3]["error"] == "neither image nor text: give at least one" and rows[3]["predictions"] is None
    assert rows[4]["error"] == "picture 'missing.png' was not uploaded: send it as a file `picture`"


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_comes_back_as_a_file(served: Running, kind: str) -> None:
    response = served.client.post(f"/predict-table?format={kind}", files=upload(CSV.encode(), "rows.csv"))
    assert f'filename="predictions.{kind}"' in response.headers["content-disposition"]
    read = pyarrow.csv.read_csv if kind == "csv" else pq.read_table
    table = read(pa.BufferReader(response.content))
    rows = served.client.post("/predict-table", files=upload(CSV.encode(), "rows.csv")).json()["rows"]
    assert table["row"].to_pylist() == [1, 2, 3, 4, 5]
    labels = [row["predictions"] and row["predictions"]["colour"]["label"] for row in rows]
    assert [value or None for value in table["colour"].to_pylist()] == labels


@pytest.mark.parametrize("cells", ["bytes", "struct"])
def test_parquet_may_hold_the_pictures(served: Running, classifier: Classifier, cells: str) -> None:
    pictures: list[Any] = [PICTURES[0], None]
    if cells == "struct":
        pictures = [{"bytes": PICTURES[0], "path": "/etc/passwd"}, None]
    buffer = io.BytesIO()
    pq.write_table(pa.table({"photo": pictures, "words": ["red", "blue coat"]}), buffer)
    files = upload(buffer.getvalue(), "rows.parquet", image_column="photo", text_column="words")
    rows = served.client.post("/predict-table", files=files).json()["rows"]
    assert same(rows[0]["predictions"], classifier.predict(PICTURES[0], "red"))
    assert same(rows[1]["predictions"], classifier.predict(None, "blue coat"))


@pytest.fixture(scope="module")
def document(served: Running) -> dict[str, Any]:
    found: dict[str, Any] = served.client.get("/openapi.json").json()
    return found


def test_the_openapi_document_is_valid(document: dict[str, Any]) -> None:
    OpenAPI.model_validate(document)
    schemas = document["components"]["schemas"]
    for schema in schemas.values():
        jsonschema.Draft202012Validator.check_schema(schema)
    paths = {"/predict", "/explain", "/embed", "/predict-table", "/model", "/examples", "/health", "/ready", "/metrics"}
    assert document["paths"].keys() == paths
    text = str(document)
    names = {part.partition("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert names <= schemas.keys() and "Rows" in names


def conforms(document: dict[str, Any], name: str, response: httpx.Response) -> None:
    schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
    jsonschema.Draft202012Validator(schema).validate(response.json())


def test_answers_are_what_the_openapi_document_says(served: Running, document: dict[str, Any]) -> None:
    rows = {"rows": ROWS[:2]}
    jsonschema.Draft202012Validator(
        {"$ref": "#/components/schemas/Rows", "components": document["components"]}
    ).validate(rows)
    for path, name in (("/predict", "Predictions"), ("/explain", "Explanations"), ("/embed", "Embeddings")):
        conforms(document, name, served.client.post(path, json=rows))
    conforms(document, "TableRows", served.client.post("/predict-table", files=upload(CSV.encode(), "rows.csv")))
    conforms(document, "Model", served.client.get("/model"))
    conforms(document, "Examples", served.client.get("/examples"))
    conforms(document, "Health", served.client.get("/health"))
    conforms(document, "Error", served.client.post("/predict", json={"rows": []}))
