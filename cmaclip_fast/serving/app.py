"""The endpoints."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Annotated, Literal

from fastapi import APIRouter, FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse
from starlette.exceptions import HTTPException

from cmaclip_fast.serving import schemas, tables
from cmaclip_fast.serving.answers import explanation_of, predictions_of
from cmaclip_fast.serving.errors import Refused
from cmaclip_fast.serving.guard import Guard
from cmaclip_fast.serving.inputs import JSON, read_rows
from cmaclip_fast.serving.metrics import CONTENT_TYPE
from cmaclip_fast.serving.schemas import ERRORS, body_of_rows, body_of_table
from cmaclip_fast.serving.service import Service
from cmaclip_fast.serving.webpage import page, policy

router = APIRouter()

TYPES = {"csv": "text/csv; charset=utf-8", "parquet": "application/vnd.apache.parquet"}


def create_app(service: Service, examples: list[schemas.Example] | None = None) -> FastAPI:
    """The application, ready for a server: its service starts and ends with it.

    Args:
        examples: that the page offers.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.close()

    # FastAPI's own pages of documentation fetch scripts from elsewhere
    app = FastAPI(
        title="cmaclip_fast",
        version=version("cmaclip_fast"),
        description="Classifies pairs of a picture and a text; either side may be absent.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    app.state.service, app.state.examples = service, examples or []
    app.include_router(router)
    app.add_exception_handler(Refused, _refused)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(RequestValidationError, _invalid)
    _document(app, with_token=service.settings.token is not None)
    routes = frozenset({route.path for route in router.routes if hasattr(route, "path")} | {"/openapi.json"})
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics, routes=routes)
    return app


def _document(app: FastAPI, with_token: bool) -> None:
    """Adds to the OpenAPI document what the endpoints read by themselves: the rows in JSON, and the token."""
    document = app.openapi()
    rows = schemas.Rows.model_json_schema(ref_template="#/components/schemas/{model}")
    document["components"]["schemas"] |= {**rows.pop("$defs"), "Rows": rows}
    if with_token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    app.openapi_schema = document


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.post("/predict", responses=ERRORS, openapi_extra=body_of_rows(), tags=["model"])
async def predict(request: Request) -> schemas.Predictions:
    """Label rows: for each task the most probable class, the five best, and the weights of text and picture."""
    service = _service(request)
    rows = await read_rows(request, service.settings.limits, service.settings.limits.rows)
    found = await service.answer("predict", rows)
    return schemas.Predictions(predictions=[predictions_of(row) for row in found])


@router.post("/explain", responses=ERRORS, openapi_extra=body_of_rows(), tags=["model"])
async def explain(request: Request) -> schemas.Explanations:
    """Label rows and say what the model looked at: attention maps over picture and text."""
    service = _service(request)
    rows = await read_rows(request, service.settings.limits, service.settings.limits.explained_rows)
    found = await service.answer("explain", rows)
    return schemas.Explanations(explanations=[explanation_of(view) for view in found])


@router.post("/embed", responses=ERRORS, openapi_extra=body_of_rows(), tags=["model"])
async def embed(request: Request) -> schemas.Embeddings:
    """A vector for each row: the mean of its text's and its picture's, or the one that is there."""
    service = _service(request)
    rows = await read_rows(request, service.settings.limits, service.settings.limits.rows)
    found = await service.answer("embed", rows)
    return schemas.Embeddings(embeddings=[vector.tolist() for vector in found])


@router.post(
    "/predict-table",
    responses={**ERRORS, 200: {"content": {kind: {} for kind in TYPES.values()}}},
    response_model=schemas.TableRows,
    openapi_extra=body_of_table(),
    tags=["model"],
)
async def predict_table(
    request: Request, format: Annotated[Literal["json", "csv", "parquet"], Query()] = "json"
) -> Response:
    """Label the rows of a CSV, TSV, JSONL or Parquet file; a row that cannot be used gets an error of its own."""
    service = _service(request)
    async with service.one_table():
        model = service.model
        upload = await tables.read_upload(request, model, service.settings.limits)
        found = await tables.label(service, model, upload, request.is_disconnected)
    # in a thread, as a large table takes long and probes are to be answered meanwhile
    if format == "json":
        return Response(await asyncio.to_thread(tables.as_json, found), media_type=JSON)
    content = await asyncio.to_thread(tables.as_file, found, model, format)
    disposition = f'attachment; filename="predictions.{format}"'
    return Response(content, media_type=TYPES[format], headers={"Content-Disposition": disposition})


@router.get("/model", responses={401: ERRORS[401]}, tags=["model"])
async def model(request: Request) -> schemas.Model:
    """The tasks and classes of the model, and the limits of a request."""
    service = _service(request)
    loaded = service.model
    columns = loaded.classifier.columns
    limits = service.settings.limits
    return schemas.Model(
        name=loaded.name,
        system=loaded.classifier.system.title,
        version=loaded.version,
        tasks=loaded.classifier.tasks,
        image_column=columns.image if columns else None,
        text_column=columns.text if columns else None,
        limits={
            "rows": limits.rows,
            "explained_rows": limits.explained_rows,
            "table_rows": limits.table_rows,
            "body_bytes": limits.body_bytes,
            "pixels": limits.pixels,
            "text_characters": limits.text_characters,
            "seconds": limits.seconds,
        },
    )


@router.get("/examples", responses={401: ERRORS[401]}, tags=["model"])
async def examples(request: Request) -> schemas.Examples:
    """Rows of the training data's test split to try the model on."""
    return schemas.Examples(examples=request.app.state.examples)


@router.get("/health", tags=["operation"])
async def health() -> schemas.Health:
    """Whether the process answers at all."""
    return schemas.Health(status="ok")


@router.get("/ready", responses={503: {"model": schemas.Health}}, tags=["operation"])
async def ready(request: Request) -> Response:
    """Whether requests are taken: 503 while the service is being stopped."""
    is_ready = _service(request).is_ready
    return JSONResponse({"status": "ready" if is_ready else "stopping"}, 200 if is_ready else 503)


@router.get("/metrics", responses={200: {"content": {CONTENT_TYPE: {}}}, 401: ERRORS[401]}, tags=["operation"])
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    return Response(_service(request).metrics.text(), headers={"Content-Type": CONTENT_TYPE})


@router.get("/", include_in_schema=False)
async def root() -> HTMLResponse:
    return HTMLResponse(page(), headers={"Content-Security-Policy": policy()})


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Refused)
    _service(request).metrics.refused.labels(error.code).inc()
    return JSONResponse(error.content(), error.status, error.headers)


async def _http(request: Request, error: Exception) -> JSONResponse:
    """What the framework refuses by itself: paths and methods that are not there."""
    assert isinstance(error, HTTPException)
    found = {404: ("not_found", "no such path: see /openapi.json"), 405: ("method", "another method is asked for")}
    code, said = found.get(error.status_code, ("bad_request", str(error.detail)))
    refused = Refused(error.status_code, code, said)
    return JSONResponse(refused.content(), error.status_code, dict(error.headers or {}))


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    place = ".".join(map(str, problem["loc"]))
    return JSONResponse(Refused(422, "bad_parameter", f"{place}: {problem['msg']}").content(), 422)
