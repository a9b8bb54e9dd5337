"""What the endpoints take and give; the OpenAPI document is made from it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class Row(BaseModel):
    """A pair of a picture and a text; either side, but not both, may be absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | None = Field(None, description="The file of a picture, in base64 (a data: URL of one is taken too).")
    text: str | None = Field(None, description="The text.")


class Rows(BaseModel):
    """The rows of a request."""

    model_config = ConfigDict(extra="forbid", strict=True)

    rows: list[Row] = Field(min_length=1)


class Candidate(BaseModel):
    """A class and its probability."""

    label: str
    probability: float


class Prediction(BaseModel):
    """What is said of one row for one task."""

    label: str | list[str] | None = Field(
        description="The most probable class, or the accepted classes of a task with several labels; null where the "
        "model is not sure enough."
    )
    status: str | None = Field(
        description="`accepted`, `unsure` or `not_applicable`; null for a model without thresholds."
    )
    probability: float = Field(description="Of the most probable class.")
    top: list[Candidate] = Field(description="The five most probable classes, best first.")
    text_weight: float | None = Field(description="The text's share in the decision; null for a model without.")
    image_weight: float | None = Field(description="The picture's share in the decision; null for a model without.")


class Predictions(BaseModel):
    """For each row, in order, the prediction of each task."""

    predictions: list[dict[str, Prediction]]


class Embeddings(BaseModel):
    """For each row, in order, a vector; not normalised."""

    embeddings: list[list[float]]


class Explanation(BaseModel):
    """What the model looked at in one row. Maps are `[rows][columns]` of patches; null for a model without them."""

    predictions: dict[str, Prediction]
    image: str | None = Field(description="The picture as the model sees it, a PNG in base64.")
    tokens: list[str] = Field(description="The text's tokens, special ones included.")
    text_to_token: list[float] | None = Field(description="Attention of the text's global token to each token.")
    image_to_patch: list[list[float]] | None = Field(description="Attention of the picture's global token.")
    token_to_patch: list[list[list[float]]] | None = Field(description="Attention of each token to each patch.")


class Explanations(BaseModel):
    """For each row, in order, an explanation."""

    explanations: list[Explanation]


class TableRow(BaseModel):
    """A row of an uploaded table: its predictions, or why it has none."""

    row: int = Field(description="Counted from 1.")
    text: str | None
    picture: str | None = Field(description="What the picture's column says, where that is text.")
    predictions: dict[str, Prediction] | None
    error: str | None


class TableRows(BaseModel):
    """The rows of an uploaded table, in order."""

    rows: list[TableRow]


class Model(BaseModel):
    """The model that answers, and the limits of a request."""

    name: str
    system: str
    version: str = Field(description="Of the weights and settings: another model has another one.")
    tasks: dict[str, list[str]] = Field(description="For each task the names of its classes.")
    image_column: str | None
    text_column: str | None
    limits: dict[str, float]


class Example(BaseModel):
    """A row of the training data's test split."""

    image: str | None = Field(description="A PNG in base64.")
    text: str | None


class Examples(BaseModel):
    """Rows to try the model on; none where the training data are gone."""

    examples: list[Example]


class Health(BaseModel):
    """Whether the service runs, or is ready."""

    status: str


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    code: str = Field(description="A name for programs.")
    message: str = Field(description="One line for people: cause and remedy.")
    row: int | None = Field(description="The row that it is about, counted from 0.")


class Error(BaseModel):
    """What a request gets that is refused."""

    error: ErrorDetail


_FILES: dict[str, Any] = {"type": "array", "items": {"type": "string", "format": "binary"}}
_TEXTS: dict[str, Any] = {"type": "array", "items": {"type": "string"}}


def body_of_rows() -> dict[str, Any]:
    """What OpenAPI says of a body that is either JSON or a form."""
    form = {
        "type": "object",
        "properties": {"image": _FILES, "text": _TEXTS},
        "description": "One `image` and one `text` for each row, in order; an empty one is absent. Where all of one "
        "side are absent it may be left out.",
    }
    content = {
        "application/json": {"schema": {"$ref": "#/components/schemas/Rows"}},
        "multipart/form-data": {"schema": form},
    }
    return {"requestBody": {"required": True, "content": content}}


def body_of_table() -> dict[str, Any]:
    """What OpenAPI says of the form that carries a table."""
    properties = {
        "table": {"type": "string", "format": "binary", "description": "CSV, TSV, JSONL or Parquet, by its name."},
        "image_column": {"type": "string", "description": "Default: that of the training data."},
        "text_column": {"type": "string", "description": "Default: that of the training data."},
        "picture": _FILES | {"description": "The files that the picture column names; folders are left out."},
    }
    form = {"type": "object", "properties": properties, "required": ["table"]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}


ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": Error, "description": "The body is malformed."},
    401: {"model": Error, "description": "The token is missing or wrong."},
    408: {"model": Error, "description": "The body came too slowly."},
    413: {"model": Error, "description": "The body is too large."},
    415: {"model": Error, "description": "The content type is not taken."},
    422: {"model": Error, "description": "A row cannot be used."},
    429: {"model": Error, "description": "The queue is full; `Retry-After` says when to try again."},
    503: {"model": Error, "description": "The service is starting or being stopped."},
    504: {"model": Error, "description": "The answer took too long."},
}
